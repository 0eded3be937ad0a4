//! Taking write permission away from many leaves, and giving it back.
//!
//! Under the shared side of the lock, by compare-and-swap, concurrently with faults. A leaf found read-only is believed
//! only if no other debt is open (rule 11). A busy slot is some CPU between break and make: its new leaves may be writable,
//! so the walk waits outside the lock and looks again (rule 9); so it does for a frozen leaf, whose table is being replaced, and
//! for a deferred entry, below which leaves may be writable whose bits the caller has taken.

use core::ops::Range;

use crate::addr::Ipa;
use crate::arch;
use crate::mmu::bitmap::Bitmap;
use crate::mmu::epoch::Tracking;
use crate::mmu::geometry::Level;
use crate::mmu::rights::Rights;
use crate::mmu::slot::{MemorySlot, SlotId, SlotView};
use crate::mmu::stage2::Stage2;
use crate::mmu::table::Slot;
use crate::mmu::tlb::Debt;
use crate::mmu::walk::table_of;
use crate::sync::quiescence::{Active, CpuId};

/// The slot was busy: nothing was done, look again later.
#[derive(Debug)]
#[must_use]
pub(crate) struct Busy;

/// What was done about a slot is true of what the slot held at one moment: a second look could find a block again where
/// a table was, split and collapsed meanwhile (`bad_second_look_at_a_block_loses_a_write` in `tests/loom`).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[must_use]
pub(crate) enum Looked {
    /// It held a leaf or nothing, and is as it should be.
    Done,
    /// It held a leaf that permitted stores, and is as it should be now.
    Written,
    /// It held a table: look below.
    Deeper,
    /// Nothing was done, and nothing is to be done with the rest.
    Stop,
}

/// Makes the leaf in `slot`, which translates `ipa`, read-only. Empty slots and tables are left alone.
#[inline]
pub(crate) fn protect_slot(
    slot: &Slot,
    ipa: Ipa,
    level: Level,
    rights: Rights,
    debt: &mut Debt<'_>,
) -> Result<Looked, Busy> {
    let mut found = slot.load();
    loop {
        if found.is_held() {
            return Err(Busy);
        }
        if found.is_table(level) {
            return Ok(Looked::Deeper);
        }
        if !found.is_leaf(level) || rights.is_revoked(found, level) {
            debt.join(ipa, level);
            return Ok(Looked::Done);
        }
        match slot.compare_and_swap(found, rights.revoke(found, level)) {
            Ok(()) => {
                debt.add(ipa, level);
                return Ok(if rights.permits(found) {
                    Looked::Written
                } else {
                    Looked::Done
                });
            }
            Err(now) => found = now,
        }
    }
}

/// Makes the leaf in `slot` writable. Nothing is owed: a stale read-only entry costs one spurious fault.
fn relax_slot(slot: &Slot, level: Level, rights: Rights) -> Result<Looked, Busy> {
    let mut found = slot.load();
    loop {
        if found.is_held() {
            return Err(Busy);
        }
        if found.is_table(level) {
            return Ok(Looked::Deeper);
        }
        if !found.is_leaf(level) || rights.permits(found) {
            return Ok(Looked::Done);
        }
        match slot.compare_and_swap(found, rights.grant(found)) {
            Ok(()) => return Ok(Looked::Done),
            Err(now) => found = now,
        }
    }
}

/// What is done with each place that decides about a range of a memory slot, given its address, its level, the memory
/// slot as published, and the section it is done in.
pub(crate) trait Visit:
    FnMut(&Slot, Ipa, Level, &SlotView, &Active<'_>) -> Result<Looked, Busy>
{
}

impl<T> Visit for T where T: FnMut(&Slot, Ipa, Level, &SlotView, &Active<'_>) -> Result<Looked, Busy>
{}

/// Records the pages of `slot` that the leaf of `level` at `ipa` translates.
pub(crate) fn record_pages(
    written: &Bitmap,
    slot: &MemorySlot,
    ipa: Ipa,
    level: Level,
    cpu: CpuId,
) {
    let first = slot.page_of(ipa.align_down(level.span_bytes()));
    for page in first..first + level.span_pages() {
        written.set(page, cpu.0);
    }
}

impl Stage2 {
    /// Makes everything mapped in the slot `id` read-only; `debt` then owes everything. Where hardware tracks writes, what
    /// it has marked is recorded in `written`.
    pub(crate) fn protect_into(
        &self,
        cpu: CpuId,
        id: SlotId,
        slot: &MemorySlot,
        written: &Bitmap,
        debt: &mut Debt<'_>,
    ) {
        debt.add_everything();
        let span = slot.config.ipa..slot.end();
        let marks = self.tracking() == Tracking::Dbm;
        self.visit_slots(cpu, id, span, |found, ipa, level, view, _| {
            let looked = protect_slot(found, ipa, level, view.rights, debt)?;
            if marks && looked == Looked::Written {
                record_pages(written, slot, ipa, level, cpu);
            }
            Ok(looked)
        });
    }

    /// Records in `written` what hardware has marked in `span` of `view`'s slot, and takes nothing.
    pub(crate) fn read_marks(&self, cpu: CpuId, id: SlotId, slot: &MemorySlot, written: &Bitmap) {
        if self.tracking() == Tracking::Fault {
            return;
        }
        let span = slot.config.ipa..slot.end();
        self.visit_slots(cpu, id, span, |found, ipa, level, view, _| {
            let leaf = found.load();
            if leaf.is_table(level) {
                return Ok(Looked::Deeper);
            }
            if view.rights.permits(leaf) {
                record_pages(written, slot, ipa, level, cpu);
            }
            Ok(Looked::Done)
        });
    }

    /// Makes everything mapped in the slot `id` writable again, unless somebody logs it meanwhile: who enables logging
    /// publishes that, waits for a grace period, and protects afterwards.
    pub(crate) fn relax_all(&self, cpu: CpuId, id: SlotId, slot: &MemorySlot) {
        let span = slot.config.ipa..slot.end();
        self.visit_slots(cpu, id, span, |found, _, level, view, _| {
            if view.log.is_none() && view.slot.config.writable {
                relax_slot(found, level, view.rights)
            } else {
                Ok(Looked::Stop)
            }
        });
    }

    /// Calls `visit` with every place that decides about memory of `span`, which lies in the slot `id`, until that says to
    /// stop: inside sections, under the shared lock, waiting outside both for what is busy. A block that becomes a table
    /// meanwhile is visited leaf by leaf. Of a slot that is being removed nothing is visited.
    pub(crate) fn visit_slots(
        &self,
        cpu: CpuId,
        id: SlotId,
        span: Range<Ipa>,
        mut visit: impl Visit,
    ) {
        let mut ipa = span.start;
        while ipa < span.end {
            match self.visit_step(cpu, id, ipa, span.end, &mut visit) {
                Ok(next) => ipa = next,
                Err((stalled, Busy)) => {
                    ipa = stalled;
                    arch::yield_now();
                }
            }
        }
    }

    /// Visits up to one level-3 table, or one block or hole, and returns where to go on.
    #[inline]
    fn visit_step(
        &self,
        cpu: CpuId,
        id: SlotId,
        ipa: Ipa,
        end: Ipa,
        visit: &mut impl Visit,
    ) -> Result<Ipa, (Ipa, Busy)> {
        let active = self.services.quiescence.enter(cpu);
        let context = self.context.load(&active);
        let Some(view) = context.tagged(id.0) else {
            return Ok(end);
        };
        let _guard = self.lock.share();
        let Some(at) = self.walk_to(context, ipa, Level::L2, &active) else {
            return Ok(end);
        };
        let (places, level) = if at.found.is_table(at.level) {
            let table = table_of(at.found, &active);
            let from = Level::L3.index_of(ipa);
            (table.get(from..).unwrap_or_default(), Level::L3)
        } else {
            (core::slice::from_ref(at.slot), at.level)
        };
        let span = level.span_bytes();
        let mut page = ipa;
        for place in places {
            if page >= end {
                break;
            }
            match visit(place, page, level, view, &active) {
                Ok(Looked::Done | Looked::Written) => {}
                Ok(Looked::Deeper) => return Ok(page),
                Ok(Looked::Stop) => return Ok(end),
                Err(busy) => return Err((page, busy)),
            }
            page = Ipa::new(page.align_down(span).raw() + span);
        }
        Ok(page)
    }
}
