//! Splitting a block into a table of 512 leaves that translate the same memory, when a fault wants one of them writable.
//!
//! ```text
//!   level 0   fill the table off-line ── break ── invalidate ── make
//!   level 2   fill the table off-line ── one compare-and-swap               (old entries: see below)
//! ```
//!
//! One block, one level down; read-only leaves but for the written page, so that the other 511 never fault for being read.
//! Where a fault has no table even after a top-up, the block becomes writable as a whole and every page of it is recorded
//! ([`Stage2::write_whole_block`]). Splitting before the fault comes is `eager`'s.
//!
//! # What stale entries can do at level 2
//!
//! Between the swap and an invalidation a TLB may hold the block and the new leaves (I_HYQMB): it uses one of them or
//! raises a conflict abort, which EL2 resolves. The old entry leads to the same memory; all it can differ in is its
//! permission. If the block was read-only, a stale entry costs a spurious fault. If it was writable, so were the leaves, and
//! whoever protects one of them later names its address without a level hint, which reaches the entry of the block too
//! (rule 18). So a fault owes nothing but its local invalidation. An eager split invalidates once a chunk, to be rid of
//! conflicts; that is no debt, nobody needs to wait for it or join it.

use crate::addr::Ipa;
use crate::mmu::descriptor::Descriptor;
use crate::mmu::fault::{Attempt, Resolution};
use crate::mmu::geometry::Level;
use crate::mmu::map::record;
use crate::mmu::slot::SlotView;
use crate::mmu::splitting::{Bbm, Policy};
use crate::mmu::stage2::Stage2;
use crate::mmu::walk::Position;
use crate::sync::percpu;
use crate::sync::quiescence::{Active, CpuId};
use crate::trace::Event;

impl Stage2 {
    /// Splits the read-only block at `at` one level down; a level-2 block's page at `ipa` becomes writable and recorded.
    /// Called inside a section, under the shared lock, on a CPU that runs under the VM's VMID.
    pub(crate) fn split_for_write(
        &self,
        cpu: CpuId,
        view: &SlotView,
        ipa: Ipa,
        at: &Position<'_>,
        active: &Active<'_>,
    ) -> Attempt {
        let Some(level) = at.level.deeper() else {
            return Attempt::Again;
        };
        let Some(table) = self.pool.take(cpu) else {
            return Attempt::Give(Resolution::TopUp);
        };
        let written = (level == Level::L3).then(|| level.index_of(ipa));
        let empty = self.splitting.policy == Policy::FaultEmpty;
        let first = view
            .rights
            .inherit(at.found, at.level, level)
            .of_level(level);
        table.fill(active, |index| {
            let leaf = first.further(index as u64 * level.span_bytes());
            match (written == Some(index), empty) {
                (true, _) => view.rights.grant(leaf).young(),
                (false, false) => leaf,
                (false, true) => Descriptor::EMPTY,
            }
        });
        let replaced = if self.splitting.bbm == Bbm::Two && !empty {
            at.slot.compare_and_swap(at.found, table.descriptor())
        } else {
            at.slot
                .break_leaf(at.found, ipa)
                .map(|broken| broken.invalidate().make(table.descriptor()))
        };
        if replaced.is_err() {
            self.pool.put_back(cpu, table.abandon());
            return Attempt::Again;
        }
        percpu::count(Event::Splits);
        if written.is_none() {
            return Attempt::Again;
        }
        record(view, ipa, Level::L3, cpu);
        Attempt::Stale
    }

    /// Makes the block around `ipa` writable as a whole and records all its pages: what is left when no table can be
    /// had to split it into. False: the slot holds no leaf of writable memory, so nothing was done.
    ///
    /// Rounding: out to the block. Races: everything. TLB: nothing owed; stale read-only entries cost a fault each. Cost: the
    /// block's pages.
    #[must_use = "false: the guest cannot go on"]
    pub fn write_whole_block(&self, cpu: CpuId, ipa: Ipa) -> bool {
        let active = self.services.quiescence.enter(cpu);
        let context = self.context.load(&active);
        let _guard = self.lock.share();
        let Some(at) = self.walk(context, ipa, &active) else {
            return false;
        };
        if at.found.is_held() {
            // Some CPU is replacing it: the guest's next try finds what it made.
            return true;
        }
        let view = context.tagged(at.found.tag());
        let Some(view) =
            view.filter(|view| at.found.is_leaf(at.level) && view.slot.config.writable)
        else {
            return false;
        };
        let writable = view.rights.grant(at.found).young();
        if at.slot.compare_and_swap(at.found, writable).is_ok() {
            record(view, ipa, at.level, cpu);
        }
        true
    }
}
