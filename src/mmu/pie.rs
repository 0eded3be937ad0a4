//! Engine `pie`: each leaf's permission index names the epoch in which it became writable, and S2PIR_EL2 grants writing to
//! the current epoch's alone.
//!
//! ```text
//!   call      publish the next epoch ── each CPU: S2PIR_EL2, ISB, acknowledges ── grace period ── VMALLS12E1IS
//!   fault     index := current epoch's, then the bit
//!   harvest   leaves that still carry the closed epoch's index get the read-only one ── then the bits are taken
//! ```
//!
//! No table is touched by the call, ever. The index is a ring of three: before epoch `e + 3` grants `e`'s index again, every
//! leaf of `e` was relabelled (its epoch was harvested before `e + 2` was opened, for want of a third bitmap) and the
//! invalidation that opened `e + 2` followed that relabelling. A CPU may have held the old index without the permission that
//! it led to: that invalidation is what makes it forget (rule 32).
//!
//! A slot whose logging was enabled with everything set has leaves that are writable at all times: the first call visits
//! them.

use core::ops::Range;

use crate::addr::Ipa;
use crate::arch;
use crate::mmu::bitmap::Bitmap;
use crate::mmu::epoch::{Closed, Engine, Epoch};
use crate::mmu::geometry::Level;
use crate::mmu::protect::{Busy, Looked};
use crate::mmu::rights::{Rights, is_of};
use crate::mmu::slot::{MemorySlot, SlotId};
use crate::mmu::stage2::{Admin, Stage2};
use crate::mmu::table::Slot;
use crate::mmu::tlb::{self, Debt};
use crate::sync::quiescence::CpuId;

impl Stage2 {
    /// The call.
    pub(crate) fn next_by_pie(&self, cpu: CpuId, admin: &mut Admin) -> Closed {
        let epoch = self.flip(admin);
        let (kicked, wait_ticks) = self.publish_registers(cpu, admin);
        let unprotected = admin.logged().any(|(_, _, log)| log.unprotected);
        if unprotected {
            // Paid with what follows.
            let mut debt = Debt::open(self, cpu);
            for (id, slot, log) in admin.logged().filter(|(_, _, log)| log.unprotected) {
                self.protect_into(cpu, id, slot, log.closed(), &mut debt);
            }
            debt.pay();
            for log in admin
                .slots
                .iter_mut()
                .flatten()
                .filter_map(|slot| slot.log.as_mut())
            {
                log.unprotected = false;
            }
        } else {
            arch::dsb_ishst();
            self.under_vmid(cpu, self.tree(), tlb::everything);
        }
        Closed {
            epoch,
            engine: if unprotected {
                Engine::Walk
            } else {
                Engine::Pie
            },
            late: false,
            kicked,
            wait_ticks,
        }
    }

    /// Publishes what `admin` says as a new generation of registers, and waits until every CPU has loaded it and nobody uses
    /// what was published before. Returns the CPUs kicked, and ticks from the first kick to the last acknowledgement.
    pub(crate) fn publish_registers(&self, cpu: CpuId, admin: &mut Admin) -> (u64, u64) {
        admin.generation += 1;
        let before = self.context.replace(admin.snapshot());
        self.acks.announce(admin.generation);
        self.obey_here(cpu);
        let begun = arch::counter();
        let kick = |cpu| (self.services.kick)(CpuId(cpu));
        let kicked = self.acks.await_all(admin.generation, kick);
        let wait_ticks = arch::counter().wrapping_sub(begun);
        before.free(&self.services.quiescence);
        (kicked, wait_ticks)
    }

    /// `cpu`, the calling CPU, hears no kick while it waits: if it runs this VM, it loads what is published now.
    fn obey_here(&self, cpu: CpuId) {
        let active = self.services.quiescence.enter(cpu);
        self.catch_up(cpu, self.context.load(&active));
    }

    /// Gives the leaves of `pages`, which are one group, that still carry the index of `epoch` the read-only one. Nothing is
    /// owed now: hardware has not let anybody write by that index since the call's invalidation. A leaf that permits stores is
    /// the current epoch's, whatever its index: of a slot whose log was ended and begun anew since nobody waits for this
    /// harvest, and the ring may have come round.
    pub(crate) fn relabel_group(
        &self,
        cpu: CpuId,
        id: SlotId,
        slot: &MemorySlot,
        closed: &Bitmap,
        epoch: Epoch,
        pages: Range<u64>,
    ) {
        closed.read(pages.start, pages.end, |first, bits| {
            let mut left = bits;
            while left != 0 {
                // A run of pages at a time: neighbours share a walk.
                let low = left.trailing_zeros();
                let run = (left >> low).trailing_ones();
                let (from, to) = (first + u64::from(low), first + u64::from(low + run));
                self.relabel(cpu, id, slot.ipa_of(from)..slot.ipa_of(to), epoch);
                left = if low + run == u64::BITS {
                    0
                } else {
                    left >> (low + run) << (low + run)
                };
            }
        });
    }

    fn relabel(&self, cpu: CpuId, id: SlotId, span: Range<Ipa>, epoch: Epoch) {
        self.visit_slots(cpu, id, span, |found, _, level, view, _| {
            relabel_slot(found, level, view.rights, epoch)
        });
    }
}

fn relabel_slot(slot: &Slot, level: Level, rights: Rights, epoch: Epoch) -> Result<Looked, Busy> {
    let mut found = slot.load();
    loop {
        if found.is_held() {
            return Err(Busy);
        }
        if found.is_table(level) {
            return Ok(Looked::Deeper);
        }
        if !is_of(found, epoch) || rights.permits(found) {
            return Ok(Looked::Done);
        }
        match slot.compare_and_swap(found, rights.revoke(found, level)) {
            Ok(()) => return Ok(Looked::Done),
            Err(now) => found = now,
        }
    }
}
