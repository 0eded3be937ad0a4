//! Taking write permission away.
//!
//! Under the shared side of the lock, by compare-and-swap, concurrently with faults. A leaf found read-only is believed
//! only if no other debt is open (rule 11). A busy slot is some CPU between break and make: its new leaves may be writable,
//! so the walk waits outside the lock and looks again (rule 9).

use crate::addr::Ipa;
use crate::arch;
use crate::mmu::descriptor::Descriptor;
use crate::mmu::geometry::Level;
use crate::mmu::slot::MemorySlot;
use crate::mmu::stage2::Stage2;
use crate::mmu::table::Slot;
use crate::mmu::tlb::Debt;
use crate::mmu::walk::table_of;
use crate::sync::quiescence::CpuId;

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
        if found == Descriptor::BUSY {
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

impl Stage2 {
    /// Makes everything mapped in `slot` read-only; `debt` then owes everything.
    pub(crate) fn protect_all(&self, cpu: CpuId, slot: &MemorySlot, debt: &mut Debt<'_>) {
        debt.add_everything();
        let mut ipa = slot.config.ipa;
        while ipa < slot.end() {
            match self.protect_step(cpu, ipa, slot.end(), debt) {
                Ok(next) => ipa = next,
                Err((stalled, Busy)) => {
                    ipa = stalled;
                    arch::yield_now();
                }
            }
        }
    }

    /// Protects up to one level-3 table, or one block or hole, and returns where to go on.
    fn protect_step(
        &self,
        cpu: CpuId,
        ipa: Ipa,
        end: Ipa,
        debt: &mut Debt<'_>,
    ) -> Result<Ipa, (Ipa, Busy)> {
        let active = self.services.quiescence.enter(cpu);
        let _guard = self.lock.share();
        let Some(at) = self.root().walk_to(ipa, Level::L2, &active) else {
            return Ok(end);
        };
        let next = Ipa::new(ipa.align_down(at.level.span_bytes()).raw() + at.level.span_bytes());
        if !at.found.is_table(at.level) {
            protect_slot(at.slot, ipa, at.level, debt).map_err(|busy| (ipa, busy))?;
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
            protect_slot(slot, page, Level::L3, debt).map_err(|busy| (page, busy))?;
            page = Ipa::new(page.raw() + Level::L3.span_bytes());
        }
        Ok(next)
    }
}
