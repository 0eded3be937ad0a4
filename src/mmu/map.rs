//! Mapping: filling an empty slot with the leaf that its memory slot says.
//!
//! An empty slot is first *claimed* (busy), so that exactly one CPU zeroes the memory behind it; a second CPU that
//! zeroed it too could do so after the first one's guest had written. Zeroing happens outside the MMU lock. While logging,
//! pages are mapped one by one, and a read maps read-only (rule 8).

use crate::addr::{Ipa, PAGE_BYTES};
use crate::arch;
use crate::mmu::bitmap::Bitmap;
use crate::mmu::descriptor::Descriptor;
use crate::mmu::fault::{Access, Attempt, Resolution, retry};
use crate::mmu::geometry::Level;
use crate::mmu::protect::record_pages;
use crate::mmu::slot::{Contents, Context, SlotView};
use crate::mmu::stage2::Stage2;
use crate::mmu::tlb;
use crate::mmu::walk::Position;
use crate::sync::quiescence::{Active, CpuId};

impl Stage2 {
    /// Maps the page at `ipa` for `access`, building what tables are missing. Called inside a section, without the lock.
    pub(crate) fn map_at(
        &self,
        cpu: CpuId,
        context: &Context,
        ipa: Ipa,
        access: Access,
        active: &Active<'_>,
    ) -> Attempt {
        let Some((tag, view)) = context.slot_of(ipa) else {
            return Attempt::Give(Resolution::NoSlot);
        };
        if !context.mapping {
            return retry();
        }
        self.catch_up(cpu, context);
        if access == Access::Write && !view.slot.config.writable {
            return Attempt::Give(Resolution::Denied);
        }
        let limit = if view.log.is_some() {
            Level::L3
        } else {
            Level::L1
        };
        let wanted = view.slot.level_at(ipa, limit);
        let at = match self.descend(cpu, context, ipa, wanted, active) {
            Ok(at) => at,
            Err(attempt) => return attempt,
        };
        let write = view.slot.config.writable && (view.log.is_none() || access == Access::Write);
        let Some(leaf) = view.slot.leaf(ipa, at.level, tag, write) else {
            return Attempt::Give(Resolution::NoSlot);
        };
        let claimed = {
            let _guard = self.lock.share();
            at.slot.claim()
        };
        let Ok(clean) = claimed else {
            return Attempt::Again;
        };
        self.settle_claimed(cpu, context, ipa);
        if view.slot.config.contents == Contents::Zero {
            zero(leaf.to.raw(), at.level.span_pages());
        }
        let made = Descriptor::leaf(&leaf, at.level, self.format());
        clean.make(view.rights.set(made, at.level, write));
        if let Some(mapped) = &view.mapped {
            record_regions(mapped, view, ipa, at.level, cpu);
        }
        if write {
            record(view, ipa, at.level, cpu);
        }
        Attempt::Done
    }

    /// Walks to an empty slot at `wanted` or below, linking tables on the way.
    fn descend<'a>(
        &self,
        cpu: CpuId,
        context: &Context,
        ipa: Ipa,
        wanted: Level,
        active: &'a Active<'_>,
    ) -> Result<Position<'a>, Attempt> {
        loop {
            let at = context
                .tree
                .root
                .walk_to(ipa, Level::L3, active)
                .ok_or(Attempt::Give(Resolution::NoSlot))?;
            if at.found != Descriptor::EMPTY {
                return Err(Attempt::Again);
            }
            if at.level >= wanted {
                return Ok(at);
            }
            let table = self
                .pool
                .take(cpu)
                .ok_or(Attempt::Give(Resolution::TopUp))?;
            table.fill(active, |_| Descriptor::EMPTY);
            let claimed = {
                let _guard = self.lock.share();
                at.slot.claim()
            };
            let Ok(clean) = claimed else {
                self.pool.put_back(cpu, table.abandon());
                return Err(Attempt::Again);
            };
            self.settle_claimed(cpu, context, ipa);
            clean.make(table.descriptor());
        }
    }

    /// Before a claimed slot around `ipa` is filled: it may be empty because an unmap took a leaf away whose invalidation
    /// is still owed. What is made may differ from that leaf in size or address, so it is invalidated here as well.
    fn settle_claimed(&self, cpu: CpuId, context: &Context, ipa: Ipa) {
        if self.debts().any() {
            self.under_vmid(cpu, context.tree, || tlb::broadcast_one(ipa));
        }
    }
}

/// Records every page of a leaf that was just made writable while its slot is being logged.
pub(crate) fn record(view: &SlotView, ipa: Ipa, level: Level, cpu: CpuId) {
    if let Some(log) = &view.log {
        record_pages(log, &view.slot, ipa, level, cpu);
    }
}

/// Records that something was mapped in the regions of a leaf: the spare root has to follow (`swap`).
fn record_regions(mapped: &Bitmap, view: &SlotView, ipa: Ipa, level: Level, cpu: CpuId) {
    let first = ipa.align_down(level.span_bytes());
    let last = Ipa::new(first.raw() + level.span_bytes() - 1);
    for region in view.slot.region_of(first)..=view.slot.region_of(last) {
        mapped.set(region, cpu.0);
    }
}

fn zero(first: u64, pages: u64) {
    for page in 0..pages {
        // SAFETY: A slot with `Contents::Zero` owns its backing, and the claimed slot makes this CPU the only one that
        // reaches these pages until the leaf is made.
        unsafe { arch::zero_page(crate::addr::Pa::new(first + page * PAGE_BYTES)) };
    }
}
