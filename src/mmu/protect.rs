//! Taking write permission away from many leaves, and giving it back.
//!
//! Under the shared side of the lock, by compare-and-swap, concurrently with faults. A leaf found read-only is believed
//! only if no other debt is open (rule 11). A busy slot is some CPU between break and make: its new leaves may be writable,
//! so the walk waits outside the lock and looks again (rule 9); so it does for a frozen leaf, whose table is being replaced.

use crate::addr::Ipa;
use crate::arch;
use crate::mmu::geometry::Level;
use crate::mmu::slot::{MemorySlot, SlotId};
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
    /// It held a table: look below.
    Deeper,
}

/// Makes the leaf in `slot`, which translates `ipa`, read-only. Empty slots and tables are left alone.
#[inline]
pub(crate) fn protect_slot(
    slot: &Slot,
    ipa: Ipa,
    level: Level,
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
        if !found.is_writable() {
            debt.join(ipa, level);
            return Ok(Looked::Done);
        }
        match slot.compare_and_swap(found, found.read_only()) {
            Ok(()) => {
                debt.add(ipa, level);
                return Ok(Looked::Done);
            }
            Err(now) => found = now,
        }
    }
}

/// Makes the leaf in `slot` writable. Nothing is owed: a stale read-only entry costs one spurious fault.
fn relax_slot(slot: &Slot, level: Level) -> Result<Looked, Busy> {
    let mut found = slot.load();
    loop {
        if found.is_held() {
            return Err(Busy);
        }
        if found.is_table(level) {
            return Ok(Looked::Deeper);
        }
        if !found.is_leaf(level) || found.is_writable() {
            return Ok(Looked::Done);
        }
        match slot.compare_and_swap(found, found.writable()) {
            Ok(()) => return Ok(Looked::Done),
            Err(now) => found = now,
        }
    }
}

impl Stage2 {
    /// Makes everything mapped in `slot` read-only; `debt` then owes everything.
    pub(crate) fn protect_all(&self, cpu: CpuId, slot: &MemorySlot, debt: &mut Debt<'_>) {
        debt.add_everything();
        self.visit_slots(cpu, slot, |found, ipa, level, _| {
            protect_slot(found, ipa, level, debt).map(Some)
        });
    }

    /// Makes everything mapped in the slot `id` writable again, unless somebody logs it meanwhile: who enables logging
    /// publishes that, waits for a grace period, and protects afterwards.
    pub(crate) fn relax_all(&self, cpu: CpuId, id: SlotId, slot: &MemorySlot) {
        self.visit_slots(cpu, slot, |found, _, level, active| {
            let context = self.context.load(active);
            if context
                .tagged(id.0)
                .is_none_or(|view| view.log.is_some() || !view.slot.config.writable)
            {
                return Ok(None);
            }
            relax_slot(found, level).map(Some)
        });
    }

    /// Calls `visit` with every slot that decides about memory of `slot`, until it says `None`: inside sections, under the
    /// shared lock, waiting outside both for what is busy. A block that becomes a table meanwhile is visited leaf by leaf.
    fn visit_slots(
        &self,
        cpu: CpuId,
        slot: &MemorySlot,
        mut visit: impl FnMut(&Slot, Ipa, Level, &Active<'_>) -> Result<Option<Looked>, Busy>,
    ) {
        let mut ipa = slot.config.ipa;
        while ipa < slot.end() {
            match self.visit_step(cpu, ipa, slot.end(), &mut visit) {
                Ok(next) => ipa = next,
                Err((stalled, Busy)) => {
                    ipa = stalled;
                    arch::yield_now();
                }
            }
        }
    }

    /// Visits up to one level-3 table, or one block or hole, and returns where to go on.
    fn visit_step(
        &self,
        cpu: CpuId,
        ipa: Ipa,
        end: Ipa,
        visit: &mut impl FnMut(&Slot, Ipa, Level, &Active<'_>) -> Result<Option<Looked>, Busy>,
    ) -> Result<Ipa, (Ipa, Busy)> {
        let active = self.services.quiescence.enter(cpu);
        let _guard = self.lock.share();
        let Some(at) = self.root().walk_to(ipa, Level::L2, &active) else {
            return Ok(end);
        };
        let next = Ipa::new(ipa.align_down(at.level.span_bytes()).raw() + at.level.span_bytes());
        if !at.found.is_table(at.level) {
            let looked = visit(at.slot, ipa, at.level, &active).map_err(|busy| (ipa, busy))?;
            return Ok(match looked {
                Some(Looked::Done) => next,
                Some(Looked::Deeper) => ipa,
                None => end,
            });
        }
        let mut page = ipa;
        for slot in table_of(at.found, &active)
            .iter()
            .skip(Level::L3.index_of(ipa))
        {
            if page >= end {
                break;
            }
            let looked = visit(slot, page, Level::L3, &active).map_err(|busy| (page, busy))?;
            if looked.is_none() {
                return Ok(end);
            }
            page = Ipa::new(page.raw() + Level::L3.span_bytes());
        }
        Ok(next)
    }
}
