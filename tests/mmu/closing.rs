//! Epochs of a rig's VMs: closing them, harvesting them, and what the model makes of both.

use std::collections::BTreeSet;

use vellum::mmu::{Closed, Error, PageSet, Prepared};
use vellum::sync::quiescence::CpuId;

use crate::flat::{ModelSlot, Vm};
use crate::rig::Rig;

/// A slot's closed epoch, until it is harvested: the pages that may be reported.
pub(crate) struct Closing {
    pub(crate) epoch: vellum::mmu::Epoch,
    pub(crate) tried: BTreeSet<u64>,
}

impl Rig {
    /// Closes the epoch of `vm`.
    pub(crate) fn close(&self, cpu: usize, vm: &Vm) -> Result<Closed, Error> {
        let slots = vm.slots.borrow();
        let take = |slot: &ModelSlot| core::mem::take(&mut *slot.reportable.borrow_mut());
        let tried: Vec<_> = slots.iter().map(take).collect();
        let closed = self.machine.on(cpu, || vm.stage2.next_epoch(CpuId(cpu)));
        for (slot, mut tried) in slots.iter().zip(tried) {
            let mut reportable = slot.reportable.borrow_mut();
            let Ok(Closed { epoch, .. }) = closed else {
                reportable.extend(tried);
                continue;
            };
            if slot.copied.borrow().is_some() {
                // Tries that end while the call runs may be recorded in either epoch.
                tried.extend(reportable.iter());
                *slot.closing.borrow_mut() = Some(Closing { epoch, tried });
            }
        }
        closed
    }

    /// Harvests the closed epoch of slot `index` and copies what is reported; nothing when none is closed.
    pub(crate) fn harvest(&self, cpu: usize, vm: &Vm, index: usize) -> BTreeSet<u64> {
        let slots = vm.slots.borrow();
        let slot = &slots[index];
        let Some(closing) = slot.closing.borrow_mut().take() else {
            return BTreeSet::new();
        };
        let mut set = PageSet::default();
        let harvested = self.machine.on(cpu, || {
            let stage2 = &vm.stage2;
            stage2.harvest(CpuId(cpu), slot.id, closing.epoch, &mut set)
        });
        harvested.expect("a closed epoch");
        for page in set.pages() {
            let known = closing.tried.contains(&page);
            assert!(known, "page {page} was harvested but not written");
        }
        self.copy(vm, slot, &set);
        set.pages().collect()
    }

    /// Closes the epoch of `vm` and harvests all its slots; what slot `index` reported.
    pub(crate) fn next_epoch(&self, cpu: usize, vm: &Vm, index: usize) -> BTreeSet<u64> {
        self.close(cpu, vm).expect("a logged slot");
        let count = vm.slots.borrow().len();
        let mut reported = vec![BTreeSet::new(); count];
        for (slot, reported) in reported.iter_mut().enumerate() {
            *reported = self.harvest(cpu, vm, slot);
        }
        reported.swap_remove(index)
    }

    /// Makes the spare root ready.
    pub(crate) fn prepare(&self, cpu: usize, vm: &Vm) -> Result<Prepared, Error> {
        self.machine.on(cpu, || vm.stage2.prepare(CpuId(cpu)))
    }
}
