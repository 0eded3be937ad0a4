//! Engine `lazy`: each table is made read-only when it is first reached.
//!
//! Table descriptors of stage 2 carry no permission, so the upper levels cannot be made read-only: they are made invalid.
//!
//! ```text
//!   call        flip ── publish ── grace period ── every table the root leads to becomes *deferred* ── VMALLS12E1IS
//!   push down   claim the deferred entry (busy) ── what may be writable below becomes read-only, or deferred in turn ──
//!               the entry is a table again (release)
//!   harvest     push down to every table with pages of the closed epoch ── then the bits are taken
//! ```
//!
//! A deferred entry is met by a fault or by any other walk, which pushes down one level and goes on; not before the call's
//! invalidation is complete. Hardware cannot reach what is below, then, nor has it anything of it cached, so nothing is owed
//! for what changes there.
//!
//! # What may be writable below
//!
//! In a logged slot a leaf is writable only if its page was recorded since its table was last looked through. Tables that
//! are deferred were looked through in the closed epoch or not at all since the one before, and what that one recorded has
//! been harvested, which pushed it down. So *the closed epoch's bitmap is the bitmap of possibly writable entries*: a
//! level-3 table's line of it says which of its 512 leaves, and its summary which tables have any. Pushing down costs
//! those, not 512, and the write fault pays nothing for it.
//!
//! The mark in the entry that leads to a table is the table's generation: it is behind, or it is not. A table that replaces
//! a block is linked by somebody who walked there, so where the block was nothing is deferred above (rule 30).

use core::ops::Range;

use crate::addr::Ipa;
use crate::arch;
use crate::arch::atomic::Ordering;
use crate::mmu::bitmap::{Bitmap, GROUP_PAGES, WORD_PAGES};
use crate::mmu::descriptor::Descriptor;
use crate::mmu::epoch::{Closed, Engine};
use crate::mmu::geometry::Level;
use crate::mmu::protect::Busy;
use crate::mmu::rights::Rights;
use crate::mmu::slot::{Context, MemorySlot, SlotId, SlotView};
use crate::mmu::stage2::{Admin, Stage2};
use crate::mmu::table::{Slot, Table, root_at, table_at};
use crate::mmu::tlb::Debt;
use crate::mmu::walk::Position;
use crate::sync::percpu;
use crate::sync::quiescence::{Active, CpuId};
use crate::trace::Event;

/// Root entries that are deferred in one go.
const ENTRIES_AT_ONCE: usize = 16;

impl Stage2 {
    /// The call.
    pub(crate) fn next_by_lazy(&self, cpu: CpuId, admin: &mut Admin) -> Closed {
        let epoch = self.flip(admin);
        self.publish(admin);
        self.deferring.store(1, Ordering::Release);
        let mut debt = Debt::open(self, cpu);
        debt.add_everything();
        for (id, slot, _) in admin.logged() {
            let entries = self.root_entries(slot);
            while let Err(Busy) = self.defer_root_entries(cpu, id, entries.clone()) {
                arch::yield_now();
            }
        }
        debt.pay();
        self.deferring.store(0, Ordering::Release);
        Closed {
            epoch,
            engine: Engine::Lazy,
            late: false,
            kicked: 0,
            wait_ticks: 0,
        }
    }

    /// The root's entries that `slot` lies below.
    fn root_entries(&self, slot: &MemorySlot) -> Range<usize> {
        let level = self.shape().start();
        let index = |ipa: Ipa| usize::try_from(ipa.raw() >> level.shift()).unwrap_or(usize::MAX);
        index(slot.config.ipa)..index(Ipa::new(slot.end().raw() - 1)).saturating_add(1)
    }

    /// Takes what the root's `entries` lead to out of hardware's reach; a leaf there becomes read-only. `Err`: somebody holds
    /// one; those that are done stay so when this is tried again.
    fn defer_root_entries(
        &self,
        cpu: CpuId,
        id: SlotId,
        entries: Range<usize>,
    ) -> Result<(), Busy> {
        let active = self.services.quiescence.enter(cpu);
        let context = self.context.load(&active);
        let _guard = self.lock.share();
        let root = context.tree.root;
        let level = root.shape.start();
        // SAFETY: A root lives until its VM is destroyed, after a grace period.
        let slots = unsafe { root_at(root.pa, root.shape.root_entries(), &active) };
        let (Some(slots), Some(view)) = (slots.get(entries), context.tagged(id.0)) else {
            return Ok(());
        };
        // Nearly always they are tables, and nobody else changes them: then runs of them take the fewest instructions.
        let (runs, rest) = slots.as_chunks::<ENTRIES_AT_ONCE>();
        let mut deferred = 0;
        let slow = |slot| take_away(slot, level, view.rights);
        let mut outcome = Ok(());
        for run in runs {
            if run.iter().all(Slot::defer) {
                deferred += ENTRIES_AT_ONCE;
            } else {
                outcome = outcome.and_then(|()| run.iter().try_for_each(slow));
            }
        }
        for slot in rest {
            if slot.defer() {
                deferred += 1;
            } else {
                outcome = outcome.and_then(|()| slow(slot));
            }
        }
        percpu::count_many(Event::DescriptorWrites, deferred as u64);
        outcome
    }

    /// The rest of a walk that met a deferred entry. What is held by somebody below looks busy, and so does everything
    /// until the call's invalidation is complete.
    #[cold]
    pub(crate) fn walk_deferred<'a>(
        &self,
        context: &Context,
        ipa: Ipa,
        limit: Level,
        active: &'a Active<'_>,
    ) -> Option<Position<'a>> {
        loop {
            let at = context.tree.root.walk_to(ipa, limit, active)?;
            if !at.found.is_deferred() {
                return Some(at);
            }
            let unpaid = self.deferring.load(Ordering::Acquire) != 0;
            if unpaid || push_down(context, &at, ipa, active).is_err() {
                return Some(Position {
                    found: Descriptor::BUSY,
                    ..at
                });
            }
        }
    }

    /// Pushes down to the tables of `pages`, which are one group of `slot`.
    pub(crate) fn push_down_group(&self, cpu: CpuId, slot: &MemorySlot, pages: Range<u64>) {
        let mut at = slot.ipa_of(pages.start);
        let end = slot.ipa_of(pages.end);
        while at < end {
            let active = self.services.quiescence.enter(cpu);
            let context = self.context.load(&active);
            let guard = self.lock.share();
            let place = self.walk(context, at, &active);
            drop(guard);
            if place.is_some_and(|place| place.found == Descriptor::BUSY) {
                drop(active);
                arch::yield_now();
                continue;
            }
            let span = Level::L2.span_bytes();
            at = Ipa::new(at.align_down(span).raw() + span);
        }
    }
}

/// Looks through the table that the deferred entry at `at`, for `ipa`, leads to, and links it again. Once somebody else has
/// claimed the entry there is nothing to do. `Err`: somebody holds an entry of the table; it stays deferred.
fn push_down(
    context: &Context,
    at: &Position<'_>,
    ipa: Ipa,
    active: &Active<'_>,
) -> Result<(), Busy> {
    let Some(level) = at.level.deeper() else {
        return Ok(());
    };
    if at
        .slot
        .compare_and_swap(at.found, Descriptor::BUSY)
        .is_err()
    {
        return Ok(());
    }
    // SAFETY: The entry leads to a table that is live, and the claim keeps others from unlinking it.
    let table = unsafe { table_at(at.found.address(), active) };
    let base = ipa.align_down(at.level.span_bytes());
    let looked = context
        .slots
        .iter()
        .flatten()
        .try_for_each(|view| look_through(view, table, level, base));
    at.slot.replace_busy(match looked {
        Ok(()) => Descriptor::table(at.found.address()),
        Err(Busy) => at.found,
    });
    if looked.is_ok() {
        percpu::count(Event::PushDowns);
        arch::dsb_ishst();
    }
    looked
}

/// Takes away what may be writable for `view`'s slot in a table of `level` that translates from `base`.
fn look_through(view: &SlotView, table: &Table, level: Level, base: Ipa) -> Result<(), Busy> {
    let Some(closed) = &view.closed else {
        return Ok(());
    };
    let slot = &view.slot;
    let bytes = level.span_bytes() * table.len() as u64;
    let from = base.max(slot.config.ipa);
    let to = Ipa::new(base.raw().saturating_add(bytes)).min(slot.end());
    if from >= to {
        return Ok(());
    }
    let (mut page, end) = (slot.page_of(from), slot.page_of(Ipa::new(to.raw() - 1)) + 1);
    while page < end {
        let Some(group) = closed.next_group(page, end) else {
            return Ok(());
        };
        let group = group.max(page);
        let at = slot.ipa_of(group);
        let Some(entry) = table.get(level.index_of(at)) else {
            return Ok(());
        };
        if level == Level::L3 {
            let last = (group / GROUP_PAGES + 1) * GROUP_PAGES;
            revoke_pages(view, closed, table, group..last.min(end))?;
            page = last;
        } else {
            take_away(entry, level, view.rights)?;
            let next = Ipa::new(at.align_down(level.span_bytes()).raw() + level.span_bytes());
            page = slot.page_of(next);
        }
    }
    Ok(())
}

/// Makes the leaves of the recorded ones of `pages` read-only; they lie in one group and in `table`, of level 3.
fn revoke_pages(
    view: &SlotView,
    closed: &Bitmap,
    table: &Table,
    pages: Range<u64>,
) -> Result<(), Busy> {
    let mut outcome = Ok(());
    let from = pages.start / WORD_PAGES * WORD_PAGES;
    let to = pages.end.next_multiple_of(WORD_PAGES).min(view.slot.pages);
    closed.read(from, to, |first, bits| {
        let mut left = bits;
        while left != 0 && outcome.is_ok() {
            let page = first + u64::from(left.trailing_zeros());
            left &= left - 1;
            let leaf = table.get(Level::L3.index_of(view.slot.ipa_of(page)));
            if let Some(leaf) = leaf.filter(|_| pages.contains(&page)) {
                outcome = take_away(leaf, Level::L3, view.rights);
            }
        }
    });
    outcome
}

/// Makes a table in `slot` deferred and a leaf there read-only.
#[inline]
fn take_away(slot: &Slot, level: Level, rights: Rights) -> Result<(), Busy> {
    let mut found = slot.load();
    loop {
        let new = if found.is_deferred() {
            return Ok(());
        } else if found.is_held() {
            return Err(Busy);
        } else if found.is_table(level) {
            found.deferred()
        } else if rights.permits(found) {
            rights.revoke(found, level)
        } else {
            return Ok(());
        };
        match slot.compare_and_swap(found, new) {
            Ok(()) => return Ok(()),
            Err(now) => found = now,
        }
    }
}
