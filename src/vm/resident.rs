//! A vCPU that a CPU holds: its registers are the CPU's, and its run loop runs here.
//!
//! `loop { prepare; enter; do what the exit asks }`. A vCPU leaves its CPU only when its VM stops; one that is off or
//! waits for a command stays, and its CPU sleeps by WFI at EL2.

use core::ptr::with_exposed_provenance_mut;
use core::sync::atomic::Ordering;

use spin::MutexGuard;

use crate::addr::{Ipa, Va};
use crate::arch;
use crate::arch::context::{El1, Exit, Frame};
use crate::dev::gic::Irq;
use crate::sync::percpu;
use crate::sync::quiescence::CpuId;
use crate::trace::Event;
use crate::trace::ring::Mark;
use crate::vm::host::Host;
use crate::vm::inject::{self, Exception};
use crate::vm::trap::{self, Abort, INSTRUCTION_BYTES};
use crate::vm::vcpu::{Parked, Vcpu};
use crate::vm::vgic::interface::{Access, Interface};
use crate::vm::vgic::private::Wiring;
use crate::vm::vm::{StopReason, Vm, this_cpu};
use crate::vm::vtimer;

/// A vCPU on a CPU. The frame comes first: the vectors hand its address to the abort short path, which takes it for the
/// whole.
#[repr(C)]
pub(crate) struct Resident<'a> {
    pub(crate) frame: Frame,
    pub(crate) host: &'static Host,
    pub(crate) vm: &'a Vm,
    pub(crate) vcpu: &'a Vcpu,
    pub(crate) cpu: CpuId,
    /// What the abort short path found out about the fault that made it give up.
    pub(crate) fault_ipa: Ipa,
    interface: Interface,
    /// The guest waits inside a call for its next command.
    pub(crate) awaiting: bool,
    parked: MutexGuard<'a, Parked>,
}

const _: () = assert!(core::mem::offset_of!(Resident<'static>, frame) == 0);

/// Holds `vcpu` until its VM stops.
pub(crate) fn hold(host: &'static Host, vm: &Vm, vcpu: &Vcpu) {
    let mut resident = Resident::load(host, vm, vcpu);
    resident.run();
    resident.put();
}

impl<'a> Resident<'a> {
    fn load(host: &'static Host, vm: &'a Vm, vcpu: &'a Vcpu) -> Self {
        let cpu = this_cpu();
        let parked = vcpu.parked.lock();
        let vttbr = vm.stage2.load(cpu);
        percpu::this()
            .ring
            .record(Mark::Switch, [vcpu.index as u64, 1]);
        // SAFETY: the CPU holds no vCPU. The VM's stage 2 lives until its last vCPU has been put.
        unsafe { arch::load(&parked.el1, vm.vtcr, vttbr) };
        vtimer::load(host, cpu, &vcpu.private.lock());
        vcpu.attention.store(true, Ordering::Relaxed);
        Self {
            frame: parked.frame.clone(),
            host,
            vm,
            vcpu,
            cpu,
            fault_ipa: Ipa::new(0),
            interface: Interface::load(Access::of(host.gic), &parked.interface),
            awaiting: parked.awaiting,
            parked,
        }
    }

    fn put(&mut self) {
        self.take_back();
        vtimer::put(self.host, self.cpu, &mut self.vcpu.private.lock());
        self.parked.interface = self.interface.put();
        self.parked.frame = self.frame.clone();
        self.parked.awaiting = self.awaiting;
        // SAFETY: the CPU holds this vCPU; the idle root translates nothing.
        unsafe { arch::put(&mut self.parked.el1, self.host.services.idle_vttbr) };
        self.vm.stage2.unload(self.cpu);
        percpu::this()
            .ring
            .record(Mark::Switch, [self.vcpu.index as u64, 0]);
    }

    fn run(&mut self) {
        let this = (&raw mut *self).expose_provenance();
        while self.prepare() {
            // SAFETY: this CPU holds the vCPU, and the frame is the first field of this structure, which nothing else
            // uses before the guest has been left.
            let exit = unsafe { arch::enter(with_exposed_provenance_mut::<Frame>(this)) };
            percpu::count(Event::Exits);
            let times = &percpu::this().exit_times;
            let begun = times.begin();
            self.act(exit);
            times.end(begun);
        }
    }

    /// Waits until the vCPU may run. False: its VM stops.
    fn prepare(&mut self) -> bool {
        loop {
            if self.vm.is_stopping() {
                return false;
            }
            self.vm.stage2.refresh(self.cpu);
            if self.vcpu.attention.load(Ordering::Relaxed) {
                self.relist();
            }
            if self.is_ready() {
                return true;
            }
            self.vm.stage2.rest(self.cpu);
            arch::wfi();
            self.take_interrupt();
        }
    }

    fn is_ready(&mut self) -> bool {
        if self.awaiting {
            return self.receive_command();
        }
        if self.vcpu.is_on() {
            return true;
        }
        match self.vcpu.begin() {
            Some(frame) => {
                self.reset(frame);
                true
            }
            None => false,
        }
    }

    /// Gives the vCPU, which CPU_ON started, the registers of a CPU out of reset.
    fn reset(&mut self, frame: Frame) {
        self.frame = frame;
        let old = &self.parked.el1;
        *self.parked.el1 = El1::reset(old.vmpidr, old.cntvoff);
        // SAFETY: this CPU holds the vCPU, whose old state ends here.
        unsafe { arch::reload(&self.parked.el1) };
    }

    fn act(&mut self, exit: Exit) {
        match exit {
            Exit::Sync => self.handle(trap::decode(self.frame.esr)),
            Exit::Interrupt => self.take_interrupt(),
            Exit::NoSlot => self.access_device(),
            Exit::Denied => self.deny(),
            Exit::TopUp => self.top_up(),
            Exit::OtherAbort => self.other_abort(),
            Exit::SError => self.halt(StopReason::SError(self.frame.esr)),
            Exit::Aarch32 => self.halt(StopReason::Aarch32),
        }
        if let Some(syndrome) = arch::take_deferred_serror() {
            self.halt(StopReason::SError(syndrome));
        }
    }

    pub(crate) fn halt(&self, reason: StopReason) {
        self.vm.halt(self.vcpu.index, reason);
    }

    /// Goes on behind the trapped instruction.
    pub(crate) fn skip_instruction(&mut self) {
        self.frame.pc = self.frame.pc.wrapping_add(INSTRUCTION_BYTES);
    }

    pub(crate) fn inject(&mut self, exception: Exception) {
        let entry = inject::entry(
            exception,
            self.frame.pstate,
            arch::vbar_el1(),
            arch::sctlr_el1(),
        );
        arch::set_exception_el1(self.frame.pc, self.frame.pstate, entry.esr, entry.far);
        self.frame.pc = entry.pc;
        self.frame.pstate = entry.pstate;
    }

    pub(crate) fn external_abort(&mut self, fetch: bool, abort: Abort) {
        self.inject(Exception::ExternalAbort {
            fetch,
            abort,
            far: self.frame.far,
        });
    }

    /// Drops what this CPU's TLB holds for the address that faulted.
    pub(crate) fn forget_translation(far: u64) {
        arch::tlbi_vaae1(Va::new(far));
        arch::dsb_nsh();
    }

    /// Takes one physical interrupt, if any is pending.
    fn take_interrupt(&mut self) {
        if let Some(irq) = self.host.gic.acknowledge() {
            self.on_interrupt(irq);
        }
    }

    fn on_interrupt(&mut self, irq: Irq) {
        let (gic, interrupts) = (self.host.gic, self.host.machine.interrupts);
        percpu::this()
            .ring
            .record(Mark::Interrupt, [u64::from(irq.intid()), 0]);
        gic.priority_drop(irq);
        let intid = irq.intid();
        if intid == interrupts.virtual_timer {
            // It stays active until the guest deactivates its virtual twin. The twin of the last time may still be listed,
            // deactivated: that has to be known first, or it would look like the end of this one.
            self.take_back();
            vtimer::fired(&mut self.vcpu.private.lock());
            return;
        }
        if intid == interrupts.maintenance {
            self.relist();
        }
        gic.deactivate(irq);
    }

    /// Takes everything back from the list registers, so that the model is the truth.
    pub(crate) fn take_back(&mut self) {
        let mut private = self.vcpu.private.lock();
        let ended = self
            .interface
            .take_back(|entry, state| private.take_back(entry, state));
        private.end_unlisted(ended);
        drop(private);
        self.vcpu.attention.store(true, Ordering::Relaxed);
    }

    /// Brings the list registers up to date with the model.
    fn relist(&mut self) {
        self.vcpu.attention.swap(false, Ordering::AcqRel);
        let control = self.vm.gic_control.load(Ordering::Relaxed);
        let wiring = Wiring {
            group0_enabled: control & 1 != 0,
            group1_enabled: control & 2 != 0,
            linked: vtimer::link(self.host),
            asserted: arch::virtual_timer_asserted(),
            lists: self.interface.lists(),
        };
        let mut private = self.vcpu.private.lock();
        let ended = self
            .interface
            .take_back(|entry, state| private.take_back(entry, state));
        private.end_unlisted(ended);
        let listing = private.list(&wiring);
        drop(private);
        self.interface.list(&listing);
        if listing.release {
            vtimer::deactivate(self.host, self.cpu);
        }
    }
}
