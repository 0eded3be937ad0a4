//! Interrupts on their way: from a device's line or a register to the vCPU that they are for, and from the models to the
//! list registers of the CPU that holds it.
//!
//! Whoever changes a model tells the vCPUs that it concerns: `attention`, for a shared interrupt also `spis`, and a kick
//! unless one is on its way. The vCPU brings its list registers up to date before it enters its guest again.

use core::sync::atomic::Ordering;

use crate::arch;
use crate::vm::resident::Resident;
use crate::vm::vcpu::Vcpu;
use crate::vm::vgic::distributor::index_of;
use crate::vm::vgic::flight::{Models, SpiSet};
use crate::vm::vgic::private::Wiring;
use crate::vm::vgic::shared::{Shared, Target};
use crate::vm::vm::Vm;
use crate::vm::vtimer;

/// A set of a VM's vCPUs; a GICv3 VM has at most 123.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct VcpuSet(u128);

impl VcpuSet {
    fn add(&mut self, vcpu: &Vcpu) {
        self.0 |= 1_u128.unbounded_shl(u32::try_from(vcpu.index).unwrap_or(u32::MAX));
    }

    fn contains(self, vcpu: &Vcpu) -> bool {
        u32::try_from(vcpu.index).is_ok_and(|index| self.0.unbounded_shr(index) & 1 != 0)
    }
}

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
        for vcpu in self.members(concerned) {
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

    /// Marks the vCPUs that the given SPIs are for; the caller notifies them when it has let go of the lock.
    pub(crate) fn concern(&self, shared: &Shared, intids: impl Iterator<Item = u16>) -> VcpuSet {
        let mut set = VcpuSet::default();
        for target in intids.filter_map(|intid| shared.concerned(intid)) {
            if let Some(vcpu) = self.home_of(target) {
                vcpu.spis.store(true, Ordering::Relaxed);
                set.add(vcpu);
            }
        }
        set
    }

    pub(crate) fn members(&self, set: VcpuSet) -> impl Iterator<Item = &Vcpu> {
        self.vcpus().iter().filter(move |vcpu| set.contains(vcpu))
    }

    fn is_home(&self, target: Target, vcpu: &Vcpu) -> bool {
        let home = self.home_of(target);
        home.is_some_and(|home| home.index == vcpu.index)
    }

    /// The one vCPU that `target` means now: of several the first that is on, or the first if none is.
    fn home_of(&self, target: Target) -> Option<&Vcpu> {
        let among = |bits: u128| {
            let mut candidates = self.members(VcpuSet(bits));
            let first = candidates.next();
            if first.is_some_and(Vcpu::is_on) {
                return first;
            }
            candidates.find(|vcpu| vcpu.is_on()).or(first)
        };
        match target {
            Target::Home(index) => self.vcpus().get(index),
            Target::Affinity(affinity) => self.vcpus().get(index_of(affinity)?),
            Target::OneOf(bits) => among(u128::from(bits)),
            Target::Any => among(u128::MAX),
        }
    }
}

impl Resident<'_> {
    /// Takes everything back from the list registers, so that the models are the truth; it is listed again before the guest
    /// goes on. Nothing is done where nothing is listed.
    pub(crate) fn take_back(&mut self) {
        if !self.interface.is_in_use() {
            return;
        }
        self.take_back_listed();
        self.vcpu.attention.store(true, Ordering::Relaxed);
    }

    /// As [`Self::take_back`], of a vCPU that leaves its CPU.
    pub(crate) fn take_back_listed(&mut self) {
        self.with_models(|_| ());
    }

    /// Brings the list registers up to date with the models.
    pub(crate) fn relist(&mut self) {
        self.vcpu.attention.swap(false, Ordering::AcqRel);
        if self.list_only_sgi() {
            return;
        }
        let control = self.vm.gic_control.load(Ordering::Relaxed);
        let wiring = Wiring {
            group0_enabled: control & 1 != 0,
            group1_enabled: control & 2 != 0,
            linked: vtimer::link(self.host),
            asserted: arch::virtual_timer_asserted(),
            lists: self.interface.lists(),
        };
        let (vm, vcpu) = (self.vm, self.vcpu);
        let listing = self.with_models(|models| {
            let (listing, any) = models.list(&wiring, |target| vm.is_home(target, vcpu));
            if models.shared.is_some() {
                vcpu.spis.store(any, Ordering::Relaxed);
            }
            listing
        });
        self.deliverable = listing.has_pending();
        self.interface.list(&listing);
        if listing.release {
            vtimer::deactivate(self.host, self.cpu);
        }
    }

    /// The usual case in short: one SGI is pending and nothing else is in flight, or only one that the guest has ended. False:
    /// it is not that, and nothing has changed.
    #[inline]
    fn list_only_sgi(&mut self) -> bool {
        if self.vcpu.spis.load(Ordering::Relaxed) {
            return false;
        }
        let control = self.vm.gic_control.load(Ordering::Relaxed);
        let mut private = self.vcpu.private.lock();
        let Some(sgi) = private.only_sgi(control) else {
            return false;
        };
        let Some(ended) = self.interface.only_ended() else {
            return false;
        };
        if let Some(intid) = ended {
            private.pass_turn(intid);
        }
        private.remove(&sgi);
        drop(private);
        self.interface.list_only(&sgi);
        self.deliverable = true;
        true
    }

    /// Empties the list registers into the models, does `work` with these, and tells other vCPUs of shared interrupts that
    /// are theirs now.
    fn with_models<R>(&mut self, work: impl FnOnce(&mut Models<'_>) -> R) -> R {
        let (vm, vcpu) = (self.vm, self.vcpu);
        let mut private = vcpu.private.lock();
        // While a shared interrupt is listed the flag stays set.
        let mut shared = vcpu.spis.load(Ordering::Relaxed).then(|| vm.shared.lock());
        let mut models = Models {
            home: vcpu.index,
            private: &mut private,
            shared: shared.as_deref_mut(),
        };
        let mut returned = SpiSet::default();
        self.interface
            .take_back(|what| models.take_back(what, &mut returned));
        let others = models
            .shared
            .as_deref()
            .map(|shared| vm.concern(shared, returned));
        let result = work(&mut models);
        drop((shared, private));
        for other in vm.members(others.unwrap_or_default()) {
            self.notify(other);
        }
        result
    }

    /// Tells `vcpu` that its interrupts changed; this CPU's own looks before it goes on.
    pub(crate) fn notify(&self, vcpu: &Vcpu) {
        if vcpu.demand_attention() && vcpu.index != self.vcpu.index {
            self.vm.kick(vcpu);
        }
    }
}
