//! Taking translations away: pages, slots, the whole tree.

use alloc::vec::Vec;

use crate::addr::{Ipa, PAGE_BYTES};
use crate::arch;
use crate::mmu::descriptor::{Descriptor, Leaf, View};
use crate::mmu::error::Error;
use crate::mmu::geometry::Level;
use crate::mmu::map::record;
use crate::mmu::pool::Unlinked;
use crate::mmu::protect::Busy;
use crate::mmu::slot::SlotId;
use crate::mmu::stage2::{Stage2, note_root};
use crate::mmu::table::{Slot, root_at};
use crate::mmu::tlb::{self, Debt};
use crate::mmu::walk::{Tree, table_of};
use crate::sync::quiescence::{Active, CpuId};

impl Stage2 {
    /// Takes the leaves of `bytes` from `ipa` away; the next access faults. Memory with [`Contents::Zero`] loses its
    /// contents, as memory given back does. Tables stay.
    ///
    /// Rounding: none; a block that is only partly inside is refused. Races: faults may map pages again at once. TLB: nothing
    /// owed on return: no CPU reaches the memory. Cost: the leaves, one invalidation.
    ///
    /// # Errors
    ///
    /// [`Error::BadRange`]: unaligned, outside the guest, or cutting a block; leaves below the block are gone then.
    ///
    /// [`Contents::Zero`]: crate::mmu::slot::Contents::Zero
    pub fn unmap(&self, cpu: CpuId, ipa: Ipa, bytes: u64) -> Result<(), Error> {
        let bad = Error::BadRange(ipa, bytes);
        let aligned = ipa.is_aligned(PAGE_BYTES) && bytes.is_multiple_of(PAGE_BYTES);
        if bytes == 0 || !aligned || !self.shape().contains(ipa, bytes) {
            return Err(bad);
        }
        let _operation = self.begin_operation();
        self.outdate_spare(cpu);
        self.unmap_span(cpu, ipa, bytes)
    }

    fn unmap_span(&self, cpu: CpuId, ipa: Ipa, bytes: u64) -> Result<(), Error> {
        let bad = Error::BadRange(ipa, bytes);
        let end = Ipa::new(ipa.raw() + bytes);
        let mut debt = Debt::open(self, cpu);
        let mut at = ipa;
        let mut outcome = Ok(());
        while at < end {
            match self.unmap_step(cpu, at, ipa, end, &mut debt) {
                Ok(Some(next)) => at = next,
                Ok(None) => {
                    outcome = Err(bad);
                    break;
                }
                Err(Busy) => arch::yield_now(),
            }
        }
        debt.pay();
        // Who walked to a leaf before it went may still be acting on it; its memory may be given away after this.
        self.services.quiescence.wait();
        outcome
    }

    /// Unmaps what one walk finds at `at` and returns where to go on; `None` when it is cut by the range.
    fn unmap_step(
        &self,
        cpu: CpuId,
        at: Ipa,
        from: Ipa,
        end: Ipa,
        debt: &mut Debt<'_>,
    ) -> Result<Option<Ipa>, Busy> {
        let active = self.services.quiescence.enter(cpu);
        let context = self.context.load(&active);
        let _guard = self.lock.share();
        let Some(place) = self.walk(context, at, &active) else {
            return Ok(Some(end));
        };
        let base = at.align_down(place.level.span_bytes());
        let next = Ipa::new(base.raw() + place.level.span_bytes());
        let mut found = place.found;
        loop {
            if found.is_held() {
                return Err(Busy);
            }
            if found.is_table(place.level) {
                return Ok(Some(at));
            }
            if found == Descriptor::EMPTY {
                debt.join(at, place.level);
                return Ok(Some(next));
            }
            if base < from || next > end {
                return Ok(None);
            }
            match place.slot.compare_and_swap(found, Descriptor::EMPTY) {
                Ok(()) => {
                    debt.add(at, place.level);
                    if let Some(view) = context.tagged(found.tag())
                        && view.rights.permits(found)
                    {
                        // Hardware may have marked it, which nobody has recorded.
                        record(view, at, place.level, cpu);
                    }
                    return Ok(Some(next));
                }
                Err(now) => found = now,
            }
        }
    }

    /// Removes a slot and everything mapped in it. Afterwards nobody reaches its memory.
    ///
    /// Rounding: none. Races: faults, which find no slot from some moment during the call on. TLB: nothing owed on return.
    /// Cost: a grace period, the leaves, one invalidation.
    ///
    /// # Errors
    ///
    /// [`Error::NoSlot`].
    pub fn remove_slot(&self, cpu: CpuId, id: SlotId) -> Result<(), Error> {
        let _operation = self.begin_operation();
        self.outdate_spare(cpu);
        let slot = {
            let mut admin = self.admin.lock();
            let entry = admin
                .slots
                .get_mut(id.index())
                .and_then(Option::take)
                .ok_or(Error::NoSlot)?;
            self.publish(&admin);
            entry.slot
        };
        self.unmap_span(cpu, slot.config.ipa, slot.bytes())
    }

    /// Calls `visit(ipa, level, leaf)` for every leaf, ascending.
    ///
    /// Rounding: none. Races: leaves that change meanwhile are seen before or after. TLB: nothing owed. Cost: every table.
    pub fn for_each_leaf(&self, cpu: CpuId, mut visit: impl FnMut(Ipa, Level, Leaf)) {
        let active = self.services.quiescence.enter(cpu);
        let root = self.context.load(&active).tree.root;
        // SAFETY: The root lives as long as `self`.
        let slots = unsafe { root_at(root.pa, root.shape.root_entries(), &active) };
        let mut visit = |ipa, level, found: Descriptor| {
            if let View::Leaf(leaf) = found.view(level, self.format()) {
                visit(ipa, level, leaf);
            }
        };
        visit_leaves(slots, root.shape.start(), Ipa::new(0), &active, &mut visit);
    }

    /// Frees every table and the VMID. No vCPU of this VM is loaded anywhere, and none will be.
    ///
    /// Rounding: none. Races: none left. TLB: all entries of the VMID are invalidated before a table is freed. Cost: every
    /// table, one grace period.
    pub fn destroy(self, cpu: CpuId) {
        let (live, spare) = self.trees();
        for tree in [Some(live), spare].into_iter().flatten() {
            self.take_apart(cpu, tree);
        }
        self.pool.drain(&*self.services.frames);
    }

    fn take_apart(&self, cpu: CpuId, Tree { root, vmid }: Tree) {
        let tree = Tree { root, vmid };
        arch::dsb_ishst();
        self.under_vmid(cpu, tree, tlb::everything);
        self.services.vmids.release(self.vmid(tree));
        let frames = &*self.services.frames;
        let mut tables = Vec::new();
        {
            let active = self.services.quiescence.enter(cpu);
            // SAFETY: The root lives until it is released below.
            let slots = unsafe { root_at(root.pa, root.shape.root_entries(), &active) };
            collect_tables(slots, root.shape.start(), &active, &mut tables);
        }
        Unlinked::free(tables, &self.services.quiescence, frames);
        note_root(root.pa, root.shape, false);
        frames.release(root.pa, root.shape.root_pages());
    }
}

fn visit_leaves(
    slots: &[Slot],
    level: Level,
    base: Ipa,
    active: &Active<'_>,
    visit: &mut impl FnMut(Ipa, Level, Descriptor),
) {
    for (index, slot) in slots.iter().enumerate() {
        let ipa = Ipa::new(base.raw() + index as u64 * level.span_bytes());
        let found = slot.load();
        match level.deeper().filter(|_| leads_on(found, level)) {
            Some(deeper) => visit_leaves(table_of(found, active), deeper, ipa, active, visit),
            None => visit(ipa, level, found),
        }
    }
}

/// Whether `found` leads to a table, deferred or not.
fn leads_on(found: Descriptor, level: Level) -> bool {
    found.is_table(level) || found.is_deferred()
}

fn collect_tables(slots: &[Slot], level: Level, active: &Active<'_>, tables: &mut Vec<Unlinked>) {
    let Some(deeper) = level.deeper() else { return };
    for found in slots
        .iter()
        .map(Slot::load)
        .filter(|found| leads_on(*found, level))
    {
        collect_tables(table_of(found, active), deeper, active, tables);
        tables.push(Unlinked::new(found.address()));
    }
}
