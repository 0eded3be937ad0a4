//! Interrupts on their way: from a device's line or a register to the vCPU that they are for, and from the models to the
//! list registers of the CPU that holds it.
//!
//! Whoever changes a model tells the vCPUs that it concerns: `attention`, for a shared interrupt also `spis`, and a kick
//! unless one is on its way. The vCPU brings its list registers up to date before it enters its guest again.

use core::sync::atomic::{AtomicU32, Ordering};

use spin::Mutex;

use crate::arch;
use crate::vm::resident::Resident;
use crate::vm::vcpu::Vcpu;
use crate::vm::vgic::access::Accessor;
use crate::vm::vgic::flight::{Holder, SpiSet, VcpuSet, concern};
use crate::vm::vgic::homes::Homes;
use crate::vm::vgic::private::{Private, Wiring};
use crate::vm::vgic::shared::{Routing, Shared};
use crate::vm::vgic::state::{VcpuState, VmState};
use crate::vm::vm::Vm;
use crate::vm::vtimer;

impl Vm {
    /// The device behind SPI `intid` asserts its line, or does not any more. From any CPU, at any time; an interrupt that
    /// does not exist is ignored.
    pub fn set_line(&self, intid: u16, asserted: bool) {
        self.change_spi(intid, |shared| shared.set_line(intid, asserted));
    }

    /// The device behind SPI `intid`, which its guest has made edge-triggered, sends an edge.
    pub fn pulse_line(&self, intid: u16) {
        self.change_spi(intid, |shared| shared.pulse(intid));
    }

    fn change_spi(&self, intid: u16, change: impl FnOnce(&mut Shared) -> bool) {
        let mut shared = self.shared.lock();
        let concerned = if change(&mut shared) {
            self.concern(&shared, intid..intid + 1)
        } else {
            VcpuSet::default()
        };
        drop(shared);
        for vcpu in concerned.filter_map(|index| self.vcpus().get(index)) {
            self.alert(vcpu);
        }
    }

    /// The device behind PPI `intid` of `vcpu`, which is not linked to hardware, asserts its line, or does not any more. From
    /// any CPU.
    pub fn set_private_line(&self, vcpu: &Vcpu, intid: u8, asserted: bool) {
        let changed = vcpu.private.lock().set_line(intid, asserted);
        if changed {
            self.alert(vcpu);
        }
    }

    fn concern(&self, shared: &Shared, intids: impl Iterator<Item = u16>) -> VcpuSet {
        let homes = self.homes();
        concern(
            shared,
            intids,
            |target| homes.of(target),
            |vcpu| self.mark(vcpu),
        )
    }

    /// The state of its interrupt controller; `None` unless the VM is stopped. A vCPU that no CPU has loaded is not enough: one
    /// that is on a queue may be loaded at any time.
    pub fn save_interrupts(&self) -> Option<VmState> {
        if self.vcpus().iter().any(|vcpu| vcpu.cpu().is_some()) {
            return None;
        }
        let of_vcpu = |vcpu: &Vcpu| {
            let interface = vcpu.parked.try_lock()?.interface;
            let private = vcpu.private.lock().save()?;
            Some(VcpuState { private, interface })
        };
        Some(VmState {
            gicv3: self.gic_version() == 3,
            control: self.gic_control.load(Ordering::Relaxed),
            shared: self.shared.lock().save()?,
            vcpus: self.vcpus().iter().map(of_vcpu).collect::<Option<_>>()?,
        })
    }

    /// Replaces the state of its interrupt controller. False, and nothing has happened: the VM is not stopped, or `state` is one
    /// of another kind of VM. Who calls this is who starts VMs.
    pub fn restore_interrupts(&self, state: &VmState) -> bool {
        let (gicv3, vcpus) = (self.gic_version() == 3, self.vcpus().len());
        if state.gicv3 != gicv3 || state.vcpus.len() != vcpus || self.save_interrupts().is_none() {
            return false;
        }
        self.gic_control
            .store(state.control & 0b11, Ordering::Relaxed);
        let routing = Routing::new(gicv3, vcpus);
        *self.shared.lock() = Shared::restored(&state.shared, routing, vcpus);
        for (vcpu, state) in self.vcpus().iter().zip(&state.vcpus) {
            *vcpu.private.lock() = Private::restored(&state.private, gicv3, vtimer::INTID);
            vcpu.parked.lock().interface = state.interface.restored(gicv3);
            // Whoever holds it next finds out what is in flight.
            vcpu.spis.store(true, Ordering::Relaxed);
            vcpu.look_again();
        }
        true
    }

    /// A vCPU was turned on or off: whoever shared interrupts are for now looks at them.
    pub(crate) fn rehome_interrupts(&self) {
        let concerned = self.concern(&self.shared.lock(), SpiSet::all());
        concerned
            .filter_map(|vcpu| self.vcpus().get(vcpu))
            .for_each(|vcpu| self.alert(vcpu));
    }

    /// A shared interrupt may be for `vcpu`; the lock of the shared interrupts is held.
    pub(crate) fn mark(&self, vcpu: usize) {
        if let Some(vcpu) = self.vcpus().get(vcpu) {
            vcpu.spis.store(true, Ordering::Relaxed);
        }
    }

    /// Whom targets mean, while the lock of the shared interrupts is held.
    fn homes(&self) -> Homes<impl Fn(usize) -> bool> {
        Homes::new(self.vcpus().len(), |vcpu| self.is_on(vcpu))
    }

    fn is_on(&self, vcpu: usize) -> bool {
        self.vcpus().get(vcpu).is_some_and(Vcpu::is_on)
    }
}

impl<'a> Resident<'a> {
    /// Takes everything back from the list registers, so that the models are the truth; it is listed again before the guest
    /// goes on. Nothing is done where nothing is listed.
    pub(crate) fn take_back(&mut self) {
        if !self.interface.is_in_use() {
            return;
        }
        self.take_back_listed();
        self.vcpu.look_again();
    }

    /// As [`Self::take_back`], of a vCPU that leaves its CPU.
    pub(crate) fn take_back_listed(&mut self) {
        let (vm, homes, holder) = (self.vm, self.vm.homes(), self.holder());
        let home = |target| homes.of(target);
        let others = holder.take_back(&mut self.interface, home, |vcpu| vm.mark(vcpu));
        others.for_each(|vcpu| self.alert(vcpu));
    }

    /// Brings the list registers up to date with the models.
    pub(crate) fn relist(&mut self) {
        self.vcpu.attention.swap(false, Ordering::AcqRel);
        if self.list_only_sgi() {
            return;
        }
        let (vm, host, holder) = (self.vm, self.host, self.holder());
        let homes = vm.homes();
        let lists = self.interface.lists();
        let wiring = || {
            let control = vm.gic_control.load(Ordering::Relaxed);
            Wiring {
                group0_enabled: control & 1 != 0,
                group1_enabled: control & 2 != 0,
                linked: vtimer::link(host),
                asserted: arch::virtual_timer_asserted(),
                lists,
            }
        };
        let (listing, others) = holder.relist(
            &mut self.interface,
            wiring,
            |target| homes.of(target),
            |vcpu| vm.mark(vcpu),
        );
        self.deliverable = listing.has_pending();
        if listing.release {
            vtimer::deactivate(self.host, self.cpu);
        }
        others.for_each(|vcpu| self.alert(vcpu));
    }

    /// The usual case in short: one SGI is pending and nothing else is in flight, or only one that the guest has ended. False:
    /// it is not that, and nothing has changed.
    #[inline]
    fn list_only_sgi(&mut self) -> bool {
        if self.vcpu.spis.load(Ordering::Relaxed) {
            return false;
        }
        let mut private = self.vcpu.private.lock();
        // Under the lock, as whoever disables a group expects.
        let control = self.vm.gic_control.load(Ordering::Relaxed);
        let Some(sgi) = private.only_sgi(control) else {
            return false;
        };
        let Some(ended) = self.interface.only_ended() else {
            return false;
        };
        if let Some(ended) = ended {
            private.sgi_ended(&ended);
        }
        private.remove(&sgi);
        drop(private);
        self.interface.list_only(&sgi);
        self.deliverable = true;
        true
    }

    fn holder(&self) -> Holder<'a> {
        Holder {
            index: self.vcpu.index,
            private: &self.vcpu.private,
            shared: &self.vm.shared,
            spis: &self.vcpu.spis,
        }
    }
}

impl Accessor for Resident<'_> {
    fn is_v3(&self) -> bool {
        self.vm.gic_version() == 3
    }

    fn vcpus(&self) -> usize {
        self.vm.vcpus().len()
    }

    fn own(&self) -> usize {
        self.vcpu.index
    }

    fn control(&self) -> &AtomicU32 {
        &self.vm.gic_control
    }

    fn private(&self, vcpu: usize) -> Option<&Mutex<Private>> {
        self.vm.vcpus().get(vcpu).map(|vcpu| &vcpu.private)
    }

    fn shared(&self) -> &Mutex<Shared> {
        &self.vm.shared
    }

    fn is_on(&self, vcpu: usize) -> bool {
        self.vm.is_on(vcpu)
    }

    fn mark(&self, vcpu: usize) {
        self.vm.mark(vcpu);
    }

    /// This CPU's own vCPU looks before it goes on, so it needs no kick.
    fn alert(&self, vcpu: usize) {
        let Some(vcpu) = self.vm.vcpus().get(vcpu) else {
            return;
        };
        if vcpu.demand_attention() && vcpu.index != self.vcpu.index {
            self.vm.kick(vcpu);
        }
    }

    fn insist(&self, vcpu: usize) {
        if let Some(vcpu) = self.vm.vcpus().get(vcpu) {
            vcpu.demand_attention();
            self.vm.kick(vcpu);
        }
    }

    fn take_back(&mut self) {
        Self::take_back(self);
    }

    fn release(&mut self) {
        let mut private = self.vcpu.private.lock();
        let released = private.holds_untaken()
            && private.release(vtimer::INTID, arch::virtual_timer_asserted());
        drop(private);
        if released {
            vtimer::deactivate(self.host, self.cpu);
        }
    }

    /// The other may itself wait until every CPU has seen a new root of the VM.
    fn wait(&mut self) {
        self.vm.stage2.refresh(self.cpu);
        core::hint::spin_loop();
    }

    fn deactivates(&self) -> bool {
        self.interface.has_eoi_mode()
    }
}
