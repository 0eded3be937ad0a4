//! What each exit does: one method an arm of the run loop's matches.

use crate::arch;
use crate::sync::percpu;
use crate::trace::Event;
use crate::trace::ring::Mark;
use crate::vm::debug;
use crate::vm::inject::Exception;
use crate::vm::psci::{self, Call, Power, Refusal};
use crate::vm::ptimer;
use crate::vm::resident::Resident;
use crate::vm::smccc::{self, Hypercall};
use crate::vm::sysreg::{self, Answer, Given};
use crate::vm::trap::{self, FaultStatus, SystemRegisterAccess, Trap, Wait};
use crate::vm::vcpu::Vcpu;
use crate::vm::vgic::distributor::index_of;
use crate::vm::vm::StopReason;

impl Resident<'_> {
    pub(crate) fn handle(&mut self, trap: Trap) {
        match trap {
            Trap::Hvc { immediate } => self.hypercall(immediate),
            Trap::SystemRegister(access) => self.system_register(access),
            // EL3 and nested virtualization do not exist for guests; nor do the hidden features' instructions.
            Trap::Smc | Trap::HiddenFeature => self.inject(Exception::Undefined),
            Trap::Wait(wait) => self.wait(wait),
            Trap::InstructionAbort(_) | Trap::DataAbort(_) => self.other_abort(),
            Trap::Aarch32 => self.halt(StopReason::Aarch32),
            Trap::IllegalState | Trap::Unexpected { .. } => self.unexpected(),
        }
    }

    fn unexpected(&self) {
        self.halt(StopReason::Unexpected(self.frame.esr, self.frame.pc));
    }

    fn hypercall(&mut self, immediate: u16) {
        let arguments = [self.frame.read(1), self.frame.read(2), self.frame.read(3)];
        match smccc::decode(immediate, self.frame.read(0), arguments) {
            Hypercall::Version => self.frame.write(0, smccc::VERSION),
            Hypercall::ArchFeatures(function) => {
                let answer = smccc::arch_features(function, &self.host.mitigations);
                self.frame.write(0, answer);
            }
            Hypercall::Workaround(function) => {
                let answer = smccc::workaround(function, &self.host.mitigations);
                self.frame.write(0, answer);
            }
            Hypercall::Psci(call) => self.psci(call),
            Hypercall::VendorUid => self.answer(&smccc::UID),
            Hypercall::VendorRevision => self.answer(&smccc::REVISION),
            Hypercall::Null => self.frame.write(0, smccc::SUCCESS),
            Hypercall::Next => self.end_command(),
            Hypercall::Unknown => self.frame.write(0, smccc::NOT_SUPPORTED),
        }
    }

    fn answer(&mut self, values: &[u64]) {
        for (register, value) in (0..).zip(values) {
            self.frame.write(register, *value);
        }
    }

    fn psci(&mut self, call: Call) {
        let answer = match call {
            Call::Version => psci::VERSION,
            Call::Features(function) => psci::features(function),
            Call::CpuOn {
                target,
                entry,
                context,
            } => self.cpu_on(target, entry, context),
            Call::CpuOff => return self.cpu_off(),
            Call::AffinityInfo { target, level } => self.affinity_info(target, level),
            Call::CpuSuspend => self.suspend(),
            Call::MigrateInfoType => psci::NO_TRUSTED_OS,
            Call::SystemOff => return self.halt(StopReason::SystemOff),
            Call::SystemReset => return self.halt(StopReason::SystemReset),
            Call::SystemReset2 {
                kind: psci::WARM_RESET,
            } => return self.halt(StopReason::WarmReset),
            Call::SystemReset2 { .. } => Refusal::InvalidParameters.value(),
        };
        self.frame.write(0, answer);
    }

    fn cpu_on(&self, target: u64, entry: u64, context: u64) -> u64 {
        let Some(target) = self.target(target) else {
            return Refusal::InvalidParameters.value();
        };
        let outcome = target.power.lock().turn_on(entry, context);
        match outcome {
            Ok(()) => {
                self.vm.alert(target);
                smccc::SUCCESS
            }
            Err(refusal) => refusal.value(),
        }
    }

    /// The vCPU that a PSCI call means.
    fn target(&self, target: u64) -> Option<&Vcpu> {
        let index = psci::affinity_of(target).and_then(index_of)?;
        self.vm.vcpus().get(index)
    }

    /// What it has not taken of interrupts that others may take goes to those.
    fn cpu_off(&mut self) {
        *self.vcpu.power.lock() = Power::Off;
        self.take_back();
        self.vm.rehome_interrupts();
    }

    fn affinity_info(&self, target: u64, level: u64) -> u64 {
        match self.target(target) {
            Some(target) if level == 0 => target.power.lock().affinity_info(),
            _ => Refusal::InvalidParameters.value(),
        }
    }

    /// Standby: sleeps until an interrupt of any kind, which the guest may then find or not.
    fn suspend(&mut self) -> u64 {
        self.wait_for_interrupt(None);
        smccc::SUCCESS
    }

    /// A wait trapped, because this CPU has others to run. One for an event gives the rest of its slice away: whoever it waits
    /// for may be one of them.
    fn wait(&mut self, wait: Wait) {
        self.frame.skip_instruction();
        if wait.for_event {
            return self.end_slice();
        }
        let until = wait.until.map(|register| self.frame.read(register));
        self.wait_for_interrupt(until.map(|tick| self.physical_tick(tick)));
    }

    /// The built-in guest reports on its last command, if it had one, and waits for the next.
    fn end_command(&mut self) {
        self.vcpu.mailbox.lock().report =
            Some([1, 2, 3, 4].map(|register| self.frame.read(register)));
        self.awaiting = true;
        self.vm.reported(self.vcpu.index);
    }

    /// Takes the next command. False: there is none yet.
    pub(crate) fn receive_command(&mut self) -> bool {
        let Some(command) = self.vcpu.mailbox.lock().command.take() else {
            return false;
        };
        self.awaiting = false;
        percpu::this()
            .ring
            .record(Mark::Command, [command.op, command.args[0]]);
        self.frame.write(0, command.op);
        for (register, argument) in (1..).zip(command.args) {
            self.frame.write(register, argument);
        }
        true
    }

    fn system_register(&mut self, access: SystemRegisterAccess) {
        let given = Given {
            gic_registers: self.vm.gic_version() == 3,
            pauth: self.host.features.pauth,
            pa_range: self.vm.pa_range,
            revidr: arch::revidr_el1(),
        };
        let common = |crm, op2| self.host.identification.numbered(crm, op2);
        match sysreg::answer(access, given, common) {
            Answer::Undefined => return self.inject(Exception::Undefined),
            Answer::SendGroup1 => self.send_sgi_v3(self.frame.read(access.general), true),
            Answer::SendGroup0 => self.send_sgi_v3(self.frame.read(access.general), false),
            Answer::PhysicalTimer(register) => self.physical_timer(register, access),
            Answer::Debug(debug::Register::Channel)
                if self.debug().keeps_out(self.frame.pstate) =>
            {
                let iss = self.frame.esr & trap::ISS_BITS;
                return self.inject(Exception::SystemRegister { iss });
            }
            Answer::Debug(register) => self.debug_register(register, access),
            Answer::Deactivate => self.deactivate(self.frame.read(access.general)),
            Answer::Value(value) if !access.write => self.frame.write(access.general, value),
            Answer::Value(_) => {}
        }
        self.frame.skip_instruction();
    }

    fn debug_register(&mut self, register: debug::Register, access: SystemRegisterAccess) {
        if access.write {
            self.write_debug(register, self.frame.read(access.general));
        } else {
            let value = self.debug().read(register);
            self.frame.write(access.general, value);
        }
    }

    fn physical_timer(&mut self, register: ptimer::Register, access: SystemRegisterAccess) {
        let now = arch::counter();
        if access.write {
            let value = self.frame.read(access.general);
            self.timer.write(register, value, now);
            self.settle_physical_timer();
        } else {
            self.frame
                .write(access.general, self.timer.read(register, now));
        }
    }

    /// The slot forbids the access: on a machine, a read-only or missing device would answer with an error.
    pub(crate) fn deny(&mut self) {
        let (fetch, abort) = trap::abort_of(self.frame.esr);
        self.external_abort(fetch, abort);
    }

    pub(crate) fn top_up(&self) {
        let stage2 = &self.vm.stage2;
        if stage2.top_up(self.cpu).is_err() && !stage2.write_whole_block(self.cpu, self.fault_ipa) {
            self.halt(StopReason::NoMemory);
        }
    }

    /// Aborts that are not a matter of what stage 2 maps.
    pub(crate) fn other_abort(&mut self) {
        let (fetch, abort) = trap::abort_of(self.frame.esr);
        match abort.status {
            FaultStatus::External
            | FaultStatus::AddressSize
            | FaultStatus::UnsupportedAtomic
            | FaultStatus::Alignment => self.external_abort(fetch, abort),
            FaultStatus::TlbConflict => percpu::count(Event::TlbConflicts),
            FaultStatus::Stage2(_) | FaultStatus::Other { .. } => self.unexpected(),
        }
    }
}
