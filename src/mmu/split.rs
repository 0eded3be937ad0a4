//! Splitting a block into a table of 512 leaves that translate the same memory.
//!
//! Policy `fault`: the first write to a block while logging splits it, through break-before-make at level 0. The table is
//! filled off-line with read-only leaves, the written page apart, so that the other 511 never fault for being read. Where
//! no table is to be had even after a top-up, nothing is lost: the block becomes writable as a whole and every page of it
//! is recorded ([`Stage2::write_whole_block`]).

use crate::addr::Ipa;
use crate::mmu::descriptor::{Descriptor, Leaf, View};
use crate::mmu::fault::{Attempt, Resolution};
use crate::mmu::geometry::{ENTRIES, Level};
use crate::mmu::map::record;
use crate::mmu::slot::SlotView;
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
        let (View::Leaf(block), Some(level)) = (at.found.view(at.level), at.level.deeper()) else {
            return Attempt::Again;
        };
        let Some(table) = self.pool.take(cpu) else {
            return Attempt::Give(Resolution::TopUp);
        };
        let written = (level == Level::L3).then(|| level.index_of(ipa));
        table.fill(active, |index| self.part(&block, level, index, written));
        let Ok(broken) = at.slot.break_leaf(at.found, ipa) else {
            self.pool.put_back(cpu, table.abandon());
            return Attempt::Again;
        };
        broken.invalidate().make(table.descriptor());
        percpu::count(Event::Splits);
        if written.is_none() {
            return Attempt::Again;
        }
        record(view, ipa, Level::L3, cpu);
        Attempt::Stale
    }

    /// Leaf `index` of the table that replaces `block`.
    fn part(&self, block: &Leaf, level: Level, index: usize, written: Option<usize>) -> Descriptor {
        debug_assert!(index < ENTRIES);
        let to = crate::addr::Pa::new(block.to.raw() + index as u64 * level.span_bytes());
        let written = written == Some(index);
        let leaf = Leaf {
            to,
            write: block.write || written,
            young: block.young || written,
            ..*block
        };
        Descriptor::leaf(&leaf, level, self.format())
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
        let Some(at) = context.root.walk(ipa, &active) else {
            return false;
        };
        if at.found == Descriptor::BUSY {
            // Some CPU is between break and make: the guest's next try finds what it made.
            return true;
        }
        let view = context.tagged(at.found.tag());
        let Some(view) =
            view.filter(|view| at.found.is_leaf(at.level) && view.slot.config.writable)
        else {
            return false;
        };
        let writable = at.found.writable().young();
        if at.slot.compare_and_swap(at.found, writable).is_ok() {
            record(view, ipa, at.level, cpu);
        }
        true
    }
}
