//! Collapsing a table of 512 leaves that translate one block's memory into that block.
//!
//! ```text
//!            hardware                      other software
//!   freeze   translates by the leaves      waits: a frozen leaf is as good as busy
//!   replace  level 0: nothing (busy)       waits
//!            level 2: by either            waits: the block is made frozen
//!   VMALLS12E1IS, complete
//!   fold     access flags that hardware set in the detached table meanwhile go to the block
//!   make / thaw
//!   grace period, then the table is freed (rule 20)
//! ```
//!
//! # Why the leaves are frozen, and the block too
//!
//! Whoever changes a leaf does it by compare-and-swap and refuses a frozen one, so between freezing and freeing no software
//! changes the detached table, and no permission or bit is lost with it. At level 2 the block stays frozen until the
//! invalidation is complete: a `clear` that protected it earlier would name the block's address only, and an entry of one of
//! the old, writable pages would outlive its invalidation (`tests/loom`, rule 27).
//!
//! # What may collapse
//!
//! All 512 leaves lead to consecutive memory, as the slot says for a block there. While the slot is logged they must also
//! agree in their permission: read-only leaves make a read-only block, writable ones, all of which are recorded, a
//! writable one. Otherwise the block gets the slot's permission. Hardware never sets write permission here (VTCR_EL2.HD = 0).

use alloc::vec::Vec;

use crate::addr::Ipa;
use crate::arch;
use crate::mmu::bbm::{Broken, MOST_BATCH, Together};
use crate::mmu::descriptor::{Descriptor, Leaf, Memory};
use crate::mmu::epoch::Tracking;
use crate::mmu::error::Error;
use crate::mmu::geometry::Level;
use crate::mmu::map::record;
use crate::mmu::pool::Unlinked;
use crate::mmu::rights::Rights;
use crate::mmu::slot::{Context, MemorySlot, SlotId, SlotView};
use crate::mmu::splitting::Bbm;
use crate::mmu::stage2::Stage2;
use crate::mmu::table::{Slot, Table};
use crate::mmu::tlb;
use crate::mmu::walk::table_of;
use crate::sync::percpu;
use crate::sync::quiescence::{Active, CpuId};
use crate::trace::Event;

/// What a collapse did.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Collapse {
    /// Tables replaced by blocks.
    pub tables: u64,
    /// Tables of memory that a block could translate, left because their leaves do not agree or some are missing.
    pub left: u64,
}

/// A table whose leaves are all frozen, by the calling CPU.
struct Frozen<'t> {
    /// The slot that leads to the table.
    slot: &'t Slot,
    found: Descriptor,
    table: &'t Table,
    ipa: Ipa,
    /// What is to replace it.
    block: Leaf,
}

/// One pass over a range: tables found at `level` become blocks there.
struct Pass<'a> {
    id: SlotId,
    slot: &'a MemorySlot,
    level: Level,
    done: Collapse,
}

impl Stage2 {
    /// Replaces tables by blocks wherever pages `[from, to)` of the slot allow it, also 2 MiB blocks by those of 1 GiB,
    /// whether or not the slot is logged. Permissions, memory and what is recorded stay as they are.
    ///
    /// Rounding: in to whole blocks; `from` and `to` are multiples of 64 pages, or `to` is the slot's end. Races: faults,
    /// clears, splits and collapses; a table that somebody else is replacing is left to them. TLB: nothing owed on return.
    /// Cost: per table 512 compare-and-swaps; per batch one invalidation of the VMID and one grace period.
    ///
    /// # Errors
    ///
    /// [`Error::NoSlot`], [`Error::BadRange`]; nothing is collapsed then.
    pub fn collapse(&self, cpu: CpuId, id: SlotId, from: u64, to: u64) -> Result<Collapse, Error> {
        let _operation = self.begin_operation();
        let slot = self.admin.lock().slot(id)?.slot.clone();
        slot.check_range(from, to)?;
        Ok(self.collapse_span(cpu, id, &slot, slot.ipa_of(from), slot.ipa_of(to)))
    }

    /// Collapses the tables of `[from, to)`, chunk by chunk, small ones first.
    pub(crate) fn collapse_span(
        &self,
        cpu: CpuId,
        id: SlotId,
        slot: &MemorySlot,
        from: Ipa,
        to: Ipa,
    ) -> Collapse {
        let mut done = Collapse::default();
        if slot.config.memory != Memory::Normal {
            return done;
        }
        for level in [Level::L2, Level::L1] {
            if level < slot.config.max_leaf {
                continue;
            }
            let mut pass = Pass {
                id,
                slot,
                level,
                done,
            };
            let bytes = self.splitting.chunk_bytes.max(level.span_bytes());
            self.by_chunk(bytes, from.raw(), to.raw(), |from, to| {
                let (mut at, to) = (Ipa::new(from), Ipa::new(to));
                while at < to {
                    // Room for what is unlinked is made here: nothing is allocated under the lock.
                    let mut unlinked = Vec::with_capacity(self.splitting.batch);
                    at = self.collapse_batch(cpu, &mut pass, at, to, &mut unlinked);
                    Unlinked::free(unlinked, &self.services.quiescence, &*self.services.frames);
                }
            });
            done = pass.done;
        }
        done
    }

    /// Looks at a batch of places in `[at, end)`, replaces the tables there, and returns where to go on. What is not to be
    /// replaced counts too, so that neither the lock nor a frozen leaf is held for longer than a batch takes.
    fn collapse_batch(
        &self,
        cpu: CpuId,
        pass: &mut Pass<'_>,
        at: Ipa,
        end: Ipa,
        unlinked: &mut Vec<Unlinked>,
    ) -> Ipa {
        let active = self.services.quiescence.enter(cpu);
        let context = self.context.load(&active);
        let Some(view) = context.tagged(pass.id.0) else {
            // The slot is being removed.
            return end;
        };
        let span = pass.level.span_bytes();
        let mut frozen: Together<Frozen<'_>> = [const { None }; MOST_BATCH];
        let guard = self.lock.share();
        let mut next = at;
        for place in frozen.iter_mut().take(self.splitting.batch) {
            let base = next.align_down(span);
            if base >= at && base.raw().saturating_add(span) <= end.raw() {
                match self.freeze_table(pass, base, context, view, &active) {
                    Some(Ok(table)) => *place = Some(table),
                    Some(Err(())) => pass.done.left += 1,
                    None => {}
                }
            }
            next = Ipa::new(base.raw().saturating_add(span));
        }
        let before = unlinked.len();
        match self.splitting.bbm {
            Bbm::Zero => self.make_blocks_at_level_0(cpu, view, pass.level, frozen, unlinked),
            Bbm::Two => self.make_blocks_at_level_2(cpu, view, pass.level, frozen, unlinked),
        }
        drop(guard);
        pass.done.tables += (unlinked.len() - before) as u64;
        next
    }

    /// Freezes all leaves of the table that translates the block at `base`. `None`: there is no table, or no block could
    /// take its place; `Err`: its leaves are not those of one block.
    fn freeze_table<'a>(
        &self,
        pass: &Pass<'_>,
        base: Ipa,
        context: &Context,
        view: &SlotView,
        active: &'a Active<'_>,
    ) -> Option<Result<Frozen<'a>, ()>> {
        if pass.slot.level_at(base, pass.level) != pass.level {
            return None;
        }
        let at = self.walk_to(context, base, pass.level, active)?;
        if at.level != pass.level || !at.found.is_table(at.level) {
            return None;
        }
        let table = table_of(at.found, active);
        let child = pass.level.deeper()?;
        let write = pass.slot.config.writable;
        let mut block = pass.slot.leaf(base, pass.level, pass.id.0, write)?;
        // What hardware has marked is folded into the bitmap, so leaves need not agree and the block is not marked.
        let marks = view.log.is_some() && self.tracking() == Tracking::Dbm;
        if view.log.is_some() {
            block.write = !marks && view.rights.permits(table.first()?.load());
        }
        let first = Leaf {
            write: false,
            young: false,
            ..block
        };
        let first = Descriptor::leaf(&first, child, self.format());
        let uniform = Uniform {
            first: view.rights.revoke(first, child),
            level: child,
            rights: view.rights,
            write: (view.log.is_some() && !marks).then_some(block.write),
        };
        Some(match freeze(table, &uniform) {
            Some(young) => Ok(Frozen {
                slot: at.slot,
                found: at.found,
                table,
                ipa: base,
                block: Leaf { young, ..block },
            }),
            None => Err(()),
        })
    }

    fn make_blocks_at_level_0(
        &self,
        cpu: CpuId,
        view: &SlotView,
        level: Level,
        frozen: Together<Frozen<'_>>,
        unlinked: &mut Vec<Unlinked>,
    ) {
        let mut broken: Together<Broken<'_>> = [const { None }; MOST_BATCH];
        let mut detached: Together<Frozen<'_>> = [const { None }; MOST_BATCH];
        for (table, (broken, kept)) in frozen
            .into_iter()
            .flatten()
            .zip(broken.iter_mut().zip(&mut detached))
        {
            match table.slot.break_table(table.found, table.ipa) {
                Ok(taken) => {
                    *broken = Some(taken);
                    *kept = Some(table);
                }
                Err(_) => thaw(table.table),
            }
        }
        let clean = self.invalidate_together(cpu, broken);
        for (clean, table) in clean.into_iter().zip(&detached) {
            let (Some(clean), Some(table)) = (clean, table) else {
                continue;
            };
            let block = self.block(&table.block, level, view);
            self.fold_marks(cpu, view, level, table);
            clean.make(if was_used(table.table) {
                block.young()
            } else {
                block
            });
            percpu::count(Event::Collapses);
            unlinked.push(Unlinked::new(table.found.address()));
        }
    }

    fn make_blocks_at_level_2(
        &self,
        cpu: CpuId,
        view: &SlotView,
        level: Level,
        mut frozen: Together<Frozen<'_>>,
        unlinked: &mut Vec<Unlinked>,
    ) {
        let mut any = false;
        for place in &mut frozen {
            let Some(table) = place else { continue };
            let block = self.block(&table.block, level, view).frozen();
            if table.slot.compare_and_swap(table.found, block).is_ok() {
                any = true;
            } else {
                thaw(table.table);
                *place = None;
            }
        }
        if !any {
            return;
        }
        arch::dsb_ishst();
        self.under_vmid(cpu, self.tree(), tlb::everything);
        for table in frozen.iter().flatten() {
            let young = was_used(table.table);
            self.fold_marks(cpu, view, level, table);
            change(table.slot, |block| {
                if young {
                    block.thawed().young()
                } else {
                    block.thawed()
                }
            });
            percpu::count(Event::Collapses);
            unlinked.push(Unlinked::new(table.found.address()));
        }
    }
}

impl Stage2 {
    fn block(&self, leaf: &Leaf, level: Level, view: &SlotView) -> Descriptor {
        let block = Descriptor::leaf(leaf, level, self.format());
        view.rights.set(block, level, leaf.write)
    }

    /// Records what hardware marked in the detached `table` below `level`.
    fn fold_marks(&self, cpu: CpuId, view: &SlotView, level: Level, table: &Frozen<'_>) {
        let Some(child) = level.deeper() else { return };
        if self.tracking() != Tracking::Dbm {
            return;
        }
        for (index, slot) in table.table.iter().enumerate() {
            if view.rights.permits(slot.load()) {
                let ipa = Ipa::new(table.ipa.raw() + index as u64 * child.span_bytes());
                record(view, ipa, child, cpu);
            }
        }
    }
}

/// What 512 leaves must be to make one block.
struct Uniform {
    /// The first of them, read-only and old.
    first: Descriptor,
    /// Their level.
    level: Level,
    rights: Rights,
    /// Whether all permit stores, or none; `None`: each as it likes.
    write: Option<bool>,
}

impl Uniform {
    /// Whether leaf `index` of the table may be `found`.
    fn allows(&self, index: usize, found: Descriptor) -> bool {
        let expected = self.first.further(index as u64 * self.level.span_bytes());
        self.rights.revoke(found, self.level).old() == expected
            && self
                .write
                .is_none_or(|write| write == self.rights.permits(found))
    }
}

/// Freezes every leaf of `table`, or none when one of them is not what it must be. Returns whether any was young.
fn freeze(table: &Table, uniform: &Uniform) -> Option<bool> {
    let fits = |(index, slot): (usize, &Slot)| uniform.allows(index, slot.load());
    if !table.iter().enumerate().all(fits) {
        return None;
    }
    let mut young = false;
    for (index, slot) in table.iter().enumerate() {
        let mut found = slot.load();
        loop {
            if !uniform.allows(index, found) {
                table.iter().take(index).for_each(thaw_slot);
                return None;
            }
            match slot.compare_and_swap(found, found.frozen()) {
                Ok(()) => break,
                Err(now) => found = now,
            }
        }
        young |= found.is_young();
    }
    Some(young)
}

fn thaw(table: &Table) {
    table.iter().for_each(thaw_slot);
}

fn thaw_slot(slot: &Slot) {
    change(slot, Descriptor::thawed);
}

/// Changes a slot that only hardware changes besides the caller.
fn change(slot: &Slot, to: impl Fn(Descriptor) -> Descriptor) {
    let mut found = slot.load();
    while let Err(now) = slot.compare_and_swap(found, to(found)) {
        found = now;
    }
}

/// Whether hardware or software set an access flag in `table` before it was unreachable.
fn was_used(table: &Table) -> bool {
    table.iter().any(|slot| slot.load().is_young())
}
