//! A vCPU that a CPU holds: its registers are the CPU's, and its run loop runs here.
//!
//! `loop { prepare; enter; do what the exit asks }`. A vCPU leaves its CPU when its VM stops, when it is moved, and when another
//! vCPU of the same CPU is to run. One that waits (WFI, off, for a command) stays while nobody else is ready, and its CPU sleeps
//! by WFI at EL2.

use core::ptr::with_exposed_provenance_mut;
use core::sync::atomic::Ordering;

use spin::MutexGuard;

use crate::addr::{Ipa, Va};
use crate::arch;
use crate::arch::context::{El1, Exit, Frame};
use crate::dev::gic::Irq;
use crate::mem::frames;
use crate::panic;
use crate::sync::percpu;
use crate::sync::quiescence::CpuId;
use crate::trace::Event;
use crate::trace::ring::Mark;
use crate::vm::debug::{self, Debug};
use crate::vm::host::Host;
use crate::vm::inject::{self, Exception};
use crate::vm::ptimer::{self, PhysicalTimer};
use crate::vm::run::{self, Held};
use crate::vm::sched::End;
use crate::vm::serror::{self, Loss};
use crate::vm::trap::{self, Abort};
use crate::vm::vcpu::{Parked, Vcpu};
use crate::vm::vgic::interface::{Access, Interface, Saved};
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
    pub(crate) interface: Interface,
    /// The guest waits inside a call for its next command.
    pub(crate) awaiting: bool,
    /// The guest waits for an interrupt, in a WFI that trapped or in CPU_SUSPEND.
    pub(crate) asleep: Option<Sleep>,
    /// The guest's physical timer; its line is as it was when the timer was last settled.
    pub(crate) timer: PhysicalTimer,
    /// Something pending was listed when the lists were last brought up to date.
    pub(crate) deliverable: bool,
    /// Whether the vCPU is to make way has to be looked at: the CPU was interrupted, or the guest waits.
    pub(crate) reconsider: bool,
    /// When it makes way for others that are ready.
    slice_end: u64,
    /// It makes way of its own accord.
    yields: bool,
    /// Ticks that the CPU slept since it holds the vCPU.
    idle_ticks: u64,
    parked: MutexGuard<'a, Parked>,
}

const _: () = assert!(core::mem::offset_of!(Resident<'static>, frame) == 0);

/// A guest's wait for an interrupt.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sleep {
    /// Tick of the physical counter at which it ends anyway.
    pub(crate) until: Option<u64>,
}

/// Holds `vcpu` until it is to leave this CPU.
pub(crate) fn hold(host: &'static Host, vm: &Vm, vcpu: &Vcpu) -> Held {
    let mut resident = Resident::load(host, vm, vcpu);
    resident.settle_physical_timer();
    resident.run();
    resident.put()
}

/// Has this CPU debug as `debug` asks for. None that holds no vCPU, or one that does not debug, has anything to debug.
fn debug_for(debug: &Debug) {
    arch::set_debug_registers(&debug.registers(arch::last_breakpoint()));
    percpu::this().exit_times.set_stepped(debug.is_stepping());
}

impl<'a> Resident<'a> {
    fn load(host: &'static Host, vm: &'a Vm, vcpu: &'a Vcpu) -> Self {
        let cpu = this_cpu();
        let parked = vcpu.parked.lock();
        let vttbr = vm.stage2.load(cpu);
        percpu::this()
            .ring
            .record(Mark::Switch, [vcpu.index as u64, 1]);
        // Before its timer is enabled: an interrupt that is not active yet would be signalled, and taken once more.
        vtimer::load(host, cpu, &vcpu.private.lock());
        // SAFETY: the CPU holds no vCPU. The VM's stage 2 lives until its last vCPU has been put.
        unsafe { arch::load(&parked.el1, vm.vtcr, vttbr) };
        if vm.was_another_here(cpu, vcpu.index) {
            // Two vCPUs may use one ASID for different tables.
            percpu::count(Event::TlbiLocal);
            arch::tlbi_vmalle1();
            arch::dsb_nsh();
        }
        if parked.debug.is_in_use() {
            debug_for(&parked.debug);
        }
        vcpu.look_again();
        arch::trap_waits(run::is_shared(cpu.0));
        vcpu.set_held_by(Some(cpu.0));
        Self {
            frame: parked.frame.clone(),
            host,
            vm,
            vcpu,
            cpu,
            fault_ipa: Ipa::new(0),
            interface: Interface::load(Access::of(host.gic), &parked.interface),
            awaiting: parked.awaiting,
            asleep: parked.asleep,
            timer: parked.timer,
            deliverable: false,
            reconsider: true,
            slice_end: arch::counter().saturating_add(run::slice_ticks()),
            yields: false,
            idle_ticks: 0,
            parked,
        }
    }

    fn put(&mut self) -> Held {
        self.take_back_listed();
        let end = self.how_it_goes_on();
        vtimer::put(self.host, self.cpu, &mut self.vcpu.private.lock());
        self.parked.interface = self.interface.put();
        self.parked.frame = self.frame.clone();
        self.parked.awaiting = self.awaiting;
        self.parked.asleep = self.asleep;
        self.parked.timer = self.timer;
        if self.parked.debug.is_in_use() {
            debug_for(&Debug::default());
        }
        // SAFETY: the CPU holds this vCPU; the idle root translates nothing.
        unsafe { arch::put(&mut self.parked.el1, self.host.services.idle_vttbr) };
        self.vm.stage2.unload(self.cpu);
        self.vcpu.set_held_by(None);
        percpu::this()
            .ring
            .record(Mark::Switch, [self.vcpu.index as u64, 0]);
        Held {
            idle_ticks: self.idle_ticks,
            end,
        }
    }

    /// Whether the vCPU would run if it were picked again, and if not, when its timers want it to.
    fn how_it_goes_on(&mut self) -> End {
        if self.is_ready() {
            return if self.yields { End::Yields } else { End::Ready };
        }
        if self.asleep.is_none() {
            // Off, or waiting for a command: its timers do not matter, and whoever ends that demands attention.
            return End::Asleep(None);
        }
        let private = self.vcpu.private.lock();
        let times = [
            self.asleep.and_then(|sleep| sleep.until),
            vtimer::wakes_at(&private),
            self.timer
                .changes_at()
                .filter(|_| private.is_enabled(ptimer::INTID)),
        ];
        End::Asleep(times.into_iter().flatten().min())
    }

    fn run(&mut self) {
        let this = (&raw mut *self).expose_provenance();
        while self.prepare() || self.owes_an_error() {
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

    /// Whether an SError is pending when the vCPU is to go, or to sleep: it is still its guest's. Entered, that has it taken before
    /// it completes an instruction (Arm ARM, Prioritization and recognition of interrupts); whether it is to go is for the next
    /// look to say.
    fn owes_an_error(&mut self) -> bool {
        let owes = arch::serror_is_pending();
        self.reconsider |= owes;
        owes
    }

    /// Waits until the vCPU may run, or must for an SError's sake. False: it is to leave this CPU.
    fn prepare(&mut self) -> bool {
        loop {
            if self.vm.is_stopping() {
                return false;
            }
            self.vm.stage2.refresh(self.cpu);
            if self.vcpu.attention.load(Ordering::Relaxed) {
                self.relist();
            }
            let ready = self.is_ready();
            if (self.reconsider || !ready) && self.makes_way(ready) {
                return false;
            }
            if self.vcpu.attention.load(Ordering::SeqCst) {
                // CPU_ON began a new life, or the vCPU was moved away and back meanwhile: no kick of that is on its way here.
                // Somebody who sets it again and again keeps the CPU from nobody else: its slice ends here, too.
                self.reconsider = true;
                continue;
            }
            // A sleep would end at once, again and again.
            if ready || self.owes_an_error() {
                return true;
            }
            self.sleep();
        }
    }

    /// Whether this CPU has something better to do. If not, its timer is set for when it may have.
    fn makes_way(&mut self, ready: bool) -> bool {
        self.reconsider = false;
        if self.vcpu.cpu() != Some(self.cpu.0) {
            return true;
        }
        let shared = run::is_shared(self.cpu.0);
        arch::trap_waits(shared);
        let now = arch::counter();
        let timer = self.timer.changes_at();
        if !shared && self.asleep.is_none() && timer.is_none() {
            return false;
        }
        let is_over = !ready || now >= self.slice_end;
        if shared && run::has_rival(self.cpu.0, self.idle_ticks, is_over) {
            return true;
        }
        self.yields = false;
        if is_over {
            self.slice_end = now.saturating_add(run::slice_ticks());
        }
        let until = self.asleep.and_then(|sleep| sleep.until);
        let own = until.into_iter().chain(timer).min();
        run::set_alarm(self.cpu.0, own, self.slice_end);
        false
    }

    /// Makes the line of the guest's physical timer what the timer says, and has this CPU interrupted when that changes.
    pub(crate) fn settle_physical_timer(&mut self) {
        let asserted = self.timer.settle(arch::counter());
        if self.vcpu.private.lock().set_line(ptimer::INTID, asserted) {
            self.vcpu.look_again();
        }
        if let Some(tick) = self.timer.changes_at() {
            run::set_alarm(self.cpu.0, Some(tick), self.slice_end);
        }
    }

    /// Sleeps at EL2 until an interrupt comes, and takes it.
    fn sleep(&mut self) {
        self.vm.stage2.rest(self.cpu);
        frames::refill();
        let begun = arch::counter();
        arch::wfi();
        let slept = arch::counter().wrapping_sub(begun);
        self.idle_ticks = self.idle_ticks.wrapping_add(slept);
        self.take_interrupt();
    }

    fn is_ready(&mut self) -> bool {
        if self.awaiting {
            return self.receive_command();
        }
        if self.vcpu.is_on() {
            return self.is_awake();
        }
        match self.vcpu.begin() {
            Some(frame) => {
                self.reset(frame);
                true
            }
            None => false,
        }
    }

    /// Whether there is nothing that the guest waits for, or no longer.
    fn is_awake(&mut self) -> bool {
        let Some(sleep) = self.asleep else {
            return true;
        };
        let over = sleep.until.is_some_and(|until| arch::counter() >= until);
        // The timer's interrupt may still be on its way.
        let timer = arch::virtual_timer_asserted() && vtimer::is_wanted(&self.vcpu.private.lock());
        if over || timer || self.deliverable {
            self.asleep = None;
        }
        self.asleep.is_none()
    }

    /// Others that are ready run first now.
    pub(crate) fn end_slice(&mut self) {
        self.slice_end = 0;
        self.yields = true;
        self.reconsider = true;
    }

    /// The tick of the physical counter at which the guest's virtual one reads `tick`.
    pub(crate) fn physical_tick(&self, tick: u64) -> u64 {
        tick.saturating_add(self.parked.el1.cntvoff)
    }

    /// The guest waits for an interrupt, until `until` ticks of the physical counter at the latest. One that is pending already
    /// ends the wait at once.
    pub(crate) fn wait_for_interrupt(&mut self, until: Option<u64>) {
        self.asleep = Some(Sleep { until });
        self.reconsider = true;
        self.relist();
    }

    /// Gives the vCPU, which CPU_ON started, the registers of a CPU out of reset. What of its interrupts is listed is from its
    /// life before: it has to look again before it enters its guest.
    fn reset(&mut self, frame: Frame) {
        self.take_back_listed();
        self.interface = Interface::load(Access::of(self.host.gic), &Saved::default());
        self.vcpu.look_again();
        self.frame = frame;
        self.asleep = None;
        self.timer = PhysicalTimer::default();
        self.settle_physical_timer();
        self.set_debug(Debug::default());
        let old = &self.parked.el1;
        *self.parked.el1 = El1::reset(old.vmpidr, old.cntvoff);
        // SAFETY: this CPU holds the vCPU, whose old state ends here.
        unsafe { arch::reload(&self.parked.el1) };
        self.vm.rehome_interrupts();
    }

    /// What the guest's debug registers hold.
    pub(crate) fn debug(&self) -> &Debug {
        &self.parked.debug
    }

    /// The guest writes `register` of its debug registers.
    pub(crate) fn write_debug(&mut self, register: debug::Register, value: u64) {
        let mut debug = self.parked.debug;
        debug.write(register, value);
        self.set_debug(debug);
    }

    fn set_debug(&mut self, debug: Debug) {
        if self.parked.debug.is_in_use() || debug.is_in_use() {
            debug_for(&debug);
        }
        self.parked.debug = debug;
    }

    fn act(&mut self, exit: Exit) {
        match exit {
            Exit::Sync => self.handle(trap::decode(self.frame.esr)),
            // It was taken before the guest was left.
            Exit::Interrupt => {}
            Exit::NoSlot => self.access_device(),
            Exit::Denied => self.deny(),
            Exit::TopUp => self.top_up(),
            Exit::OtherAbort => self.other_abort(),
            Exit::SError => self.on_serror(self.frame.esr),
            Exit::Aarch32 => self.halt(StopReason::Aarch32),
        }
        // Deferred when the guest was left. One that is pending since is taken at the next entry.
        if let Some(syndrome) = arch::take_deferred_serror() {
            self.on_serror(syndrome);
        }
    }

    /// Rule 4 of the world switch: one VM where the error is known to be confined to it, the machine otherwise. Machines mix CPUs:
    /// what a syndrome means is this one's matter.
    fn on_serror(&self, syndrome: u64) {
        match serror::judge(syndrome, &arch::id_registers()) {
            Loss::Nothing => percpu::count(Event::ErrorsSurvived),
            Loss::Vm => self.halt(StopReason::SError(syndrome)),
            Loss::Machine => panic::give_up(format_args!(
                "SError (syndrome {syndrome:#x}) that need not be vCPU {}'s alone",
                self.vcpu.index
            )),
        }
    }

    pub(crate) fn halt(&self, reason: StopReason) {
        self.vm.halt(self.vcpu.index, reason);
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
    pub(crate) fn take_interrupt(&mut self) {
        if let Some(irq) = self.host.gic.acknowledge() {
            self.on_interrupt(irq);
        }
    }

    fn on_interrupt(&mut self, irq: Irq) {
        self.reconsider = true;
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
            self.vcpu.look_again();
            return;
        }
        if intid == interrupts.maintenance {
            self.relist();
        }
        if intid == interrupts.hypervisor_timer {
            // Its line would make it pending again; whoever looks for what it was set sets it anew.
            arch::set_hypervisor_timer(None);
            self.settle_physical_timer();
        }
        gic.deactivate(irq);
    }
}
