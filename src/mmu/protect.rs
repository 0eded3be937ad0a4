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

/// Makes the leaf in `slot`, which translates `ipa`, read-only. Empty slots and tables are left alone.
#[inline]
pub(crate) fn protect_slot(
    slot: &Slot,
    ipa: Ipa,
    level: Level,
    debt: &mut Debt<'_>,
) -> Result<(), Busy> {
    let mut found = slot.load();
    loop {
        if found.is_held() {
            return Err(Busy);
        }
        if !found.is_leaf(level) || !found.is_writable() {
            debt.join(ipa, level);
            return Ok(());
        }
        match slot.compare_and_swap(found, found.read_only()) {
            Ok(()) => {
                debt.add(ipa, level);
                return Ok(());
            }
            Err(now) => found = now,
        }
    }
}

/// Makes the leaf in `slot` writable. Nothing is owed: a stale read-only entry costs one spurious fault.
fn relax_slot(slot: &Slot, level: Level) -> Result<(), Busy> {
    let mut found = slot.load();
    loop {
        if found.is_held() {
            return Err(Busy);
        }
        if !found.is_leaf(level) || found.is_writable() {
            return Ok(());
        }
        match slot.compare_and_swap(found, found.writable()) {
            Ok(()) => return Ok(()),
            Err(now) => found = now,
        }
    }
}

impl Stage2 {
    /// Makes everything mapped in `slot` read-only; `debt` then owes everything.
    pub(crate) fn protect_all(&self, cpu: CpuId, slot: &MemorySlot, debt: &mut Debt<'_>) {
        debt.add_everything();
        self.visit_slots(cpu, slot, |found, ipa, level, _| {
            protect_slot(found, ipa, level, debt).map(|()| true)
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
                return Ok(false);
            }
            relax_slot(found, level).map(|()| true)
        });
    }

    /// Calls `visit` with every slot that decides about memory of `slot`, until it says false: inside sections, under the
    /// shared lock, waiting outside both for what is busy. A block that becomes a table meanwhile is visited leaf by leaf.
    fn visit_slots(
        &self,
        cpu: CpuId,
        slot: &MemorySlot,
        mut visit: impl FnMut(&Slot, Ipa, Level, &Active<'_>) -> Result<bool, Busy>,
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
        visit: &mut impl FnMut(&Slot, Ipa, Level, &Active<'_>) -> Result<bool, Busy>,
    ) -> Result<Ipa, (Ipa, Busy)> {
        let active = self.services.quiescence.enter(cpu);
        let _guard = self.lock.share();
        let Some(at) = self.root().walk_to(ipa, Level::L2, &active) else {
            return Ok(end);
        };
        let next = Ipa::new(ipa.align_down(at.level.span_bytes()).raw() + at.level.span_bytes());
        if !at.found.is_table(at.level) {
            if !visit(at.slot, ipa, at.level, &active).map_err(|busy| (ipa, busy))? {
                return Ok(end);
            }
            // A block may have become a table meanwhile; then its leaves are looked at one by one.
            return Ok(if at.slot.load().is_table(at.level) {
                ipa
            } else {
                next
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
            if !visit(slot, page, Level::L3, &active).map_err(|busy| (page, busy))? {
                return Ok(end);
            }
            page = Ipa::new(page.raw() + Level::L3.span_bytes());
        }
        Ok(next)
    }
}
