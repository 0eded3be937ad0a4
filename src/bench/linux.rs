//! Suite `linux`: an unmodified kernel and its initial RAM disk as the guest.
//!
//! The hypervisor is given both as one bundle (its own initial RAM disk). The guest ends the run by switching itself off. A
//! reset restarts it: a new VM with fresh memory and images copied anew. A kernel that panics is told apart from one that is
//! rebooted by the kind of reset, which the command line asks for: a warm one.
//!
//! [`beneath`]: what the controller does to the guest's memory meanwhile.

mod beneath;

use alloc::format;
use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::addr::PAGE_BYTES;
use crate::log;
use crate::mem;
use crate::mem::frames;
use crate::mmu::{Engine, Level, Locking, SlotId, Stage2};
use crate::vm::loader::{Plan, Target};
use crate::vm::run;
use crate::vm::vm::RAM;
use crate::vm::vuart::Output;
use crate::vm::{Host, Placement, StopReason, Vm, VmConfig};

use super::Refusal;
use super::clock::{Counts, Moment};
use super::params::Console;
use super::report::{Row, progress};
use super::scene::{Cast, Stage, cpu, near, refused, reserve};
use beneath::Beneath;

/// What every kernel is told: a panic ends in a warm reset at once.
const COMMAND_LINE: &str = "panic=-1 reboot=panic_warm";

/// A VM with a kernel in it.
struct Machine {
    vm: Arc<Vm>,
    host: &'static Host,
    memory: Vec<mem::Extent>,
    ram: SlotId,
    pages: u64,
    engine: Engine,
}

impl AsRef<Stage2> for Machine {
    fn as_ref(&self) -> &Stage2 {
        self.vm.stage2()
    }
}

/// What somebody types, on its way to the guest.
struct Keyboard {
    attached: bool,
    listening: bool,
    /// Typed, and the guest had no room for it.
    waiting: Option<u8>,
}

/// Boots the guest until it switches itself off; false when something was lost or it was off too early.
pub(super) fn run(stage: &Stage<'_>) -> Result<bool, Refusal> {
    let Some(bundle) = stage.bundle else {
        return Err(
            "suite linux needs a bundle of kernel and initramfs as initial RAM disk".into(),
        );
    };
    let wanted = &stage.params.linux;
    let mut keyboard = Keyboard::new(stage);
    let mut good = true;
    for boot in 1_u64.. {
        let (ended, kept) = once(stage, bundle, boot, &mut keyboard)?;
        good &= kept;
        match ended {
            StopReason::SystemOff if wanted.boots == 0 || boot == wanted.boots => break,
            StopReason::SystemOff => {
                return Err(format!("the guest switched itself off in boot {boot}"));
            }
            StopReason::SystemReset if wanted.boots == 0 || boot < wanted.boots => {}
            StopReason::WarmReset => return Err("the guest's kernel panicked".into()),
            reason => return Err(format!("boot {boot}: the guest's VM {reason}")),
        }
    }
    Ok(good)
}

/// One boot, from images to the end of the VM: why it ended, and whether nothing was lost.
fn once(
    stage: &Stage<'_>,
    bundle: &[u8],
    boot: u64,
    keyboard: &mut Keyboard,
) -> Result<(StopReason, bool), Refusal> {
    let params = stage.params;
    let cast = cast(stage, boot);
    let target = Target {
        vcpus: cast.vcpus,
        ram_bytes: params.linux.guest_mib << 20,
        gic_version: stage.host.gic_version(),
        command_line: format!(
            "{COMMAND_LINE} vellum.boot={boot} vellum.boots={} vellum.cpus={} {}",
            params.linux.boots, cast.vcpus, stage.guest_arguments
        ),
    };
    let plan = Plan::new(bundle, &target).map_err(|error| format!("{error}"))?;
    progress(
        usize::try_from(boot - 1).unwrap_or(0),
        usize::try_from(params.linux.boots).unwrap_or(0),
        format_args!(
            "linux: boot {boot}, {} vCPUs, {}",
            cast.vcpus,
            cast.engine.name()
        ),
    );
    let machine = Machine::new(stage, cast, &target, &plan)?;
    if params.linux.console == Console::Raw {
        machine.vm.set_output(Output::Bytes);
    }
    let mut beneath = match params.linux.beneath {
        true => Some(Beneath::new(&machine, params.period_us)?),
        false => None,
    };
    let (counts, start) = (Counts::now(), Moment::now());
    machine.vm.start(stage.host);
    let ended = machine.watch(keyboard, &mut beneath)?;
    let run_ns = start.elapsed_ns();
    let counts: Vec<_> = counts.since().collect();
    machine.vm.stop(stage.host);
    let (row, lost) = match &mut beneath {
        Some(beneath) => {
            let lost = beneath.end(&machine)?;
            (beneath.told(row(stage, cast, boot)), lost)
        }
        None => (row(stage, cast, boot), 0),
    };
    machine.close();
    row.value("run_ns", run_ns)
        .value("reset", u64::from(ended == StopReason::SystemReset))
        .value("free_pages", frames::free_pages())
        .value("vmids_in_use", stage.host.services.vmids.in_use())
        .values(counts)
        .print();
    Ok((ended, lost == 0))
}

fn row(stage: &Stage<'_>, cast: Cast, boot: u64) -> Row {
    let linux = &stage.params.linux;
    Row::new("linux", "boot", stage.params.timing.name())
        .param("vcpus", cast.vcpus)
        .param("guest_mib", linux.guest_mib)
        .word("engine", cast.engine.name())
        .word("tracking", cast.tracking.name())
        .word("access_flag", cast.access_flag.name())
        .param("beneath", linux.beneath)
        .param("boot", boot)
}

/// The VM of boot number `boot`: boots take turns with the engines.
fn cast(stage: &Stage<'_>, boot: u64) -> Cast {
    let params = stage.params;
    let locking = params.locking.first().copied();
    let vcpus = params.vcpus.first().copied();
    let cast = stage.cast(locking.unwrap_or(Locking::Lockless), vcpus.unwrap_or(1));
    let mut trackers = stage.trackers.iter().cycle();
    let turns = usize::try_from(boot - 1).unwrap_or(0);
    match trackers.nth(turns % stage.trackers.len().max(1)) {
        Some(&(engine, tracking)) => Cast {
            engine,
            tracking,
            ..cast
        },
        None => cast,
    }
}

impl Machine {
    fn new(
        stage: &Stage<'_>,
        cast: Cast,
        target: &Target,
        plan: &Plan<'_>,
    ) -> Result<Self, Refusal> {
        let mut memory = Vec::new();
        let node = near(stage.host, Placement::Spread);
        let ram = reserve(&mut memory, target.ram_bytes, RAM.raw(), Level::L2, node)?;
        let config = VmConfig {
            vcpus: cast.vcpus,
            placement: Placement::Spread,
            weight: cast.weight,
            locking: cast.locking,
            splitting: cast.splitting,
            engine: cast.engine,
            tracking: cast.tracking,
            access_flag: cast.access_flag,
            trust_hpfar: stage.params.trust_hpfar,
            entry: plan.entry,
        };
        let vm = Vm::create(stage.host, &config).map_err(refused)?;
        let ram = vm.stage2().add_slot(ram).map_err(refused)?;
        for (ipa, bytes) in plan.pieces() {
            let copied = vm.stage2().copy_to_guest(cpu(), ipa, bytes);
            copied.map_err(|error| format!("cannot load the guest: {error}"))?;
        }
        Ok(Self {
            vm,
            host: stage.host,
            memory,
            ram,
            pages: target.ram_bytes / PAGE_BYTES,
            engine: cast.engine,
        })
    }

    /// Works beneath the guest, or sleeps, until its VM has stopped by itself.
    fn watch(
        &self,
        keyboard: &mut Keyboard,
        beneath: &mut Option<Beneath>,
    ) -> Result<StopReason, Refusal> {
        loop {
            keyboard.feed(&self.vm);
            if let Some(reason) = self.vm.ended() {
                return Ok(reason);
            }
            match beneath {
                Some(beneath) => match beneath.next_round() {
                    Some(tick) => run::rest_until(self.host.gic, tick),
                    None => beneath.round(self)?,
                },
                None => self.vm.rest(),
            }
        }
    }

    fn close(self) {
        Vm::destroy(self.vm, self.host);
        self.memory.into_iter().for_each(frames::release);
    }
}

impl Keyboard {
    /// Connects the console's input, where there is one and the guest has the console.
    fn new(stage: &Stage<'_>) -> Self {
        let raw = stage.params.linux.console == Console::Raw;
        let interrupt = stage.host.machine.console.and_then(|uart| uart.intid);
        if raw {
            log::share();
            match interrupt {
                Some(intid) => stage.host.gic.route(intid, cpu().0),
                None => ::log::warn!("the console's UART has no interrupt: nothing can be typed"),
            }
        }
        Self {
            attached: raw && interrupt.is_some(),
            listening: false,
            waiting: None,
        }
    }

    /// Gives the guest what was typed, as far as it takes it, and has the rest interrupt as soon as it does.
    fn feed(&mut self, vm: &Vm) {
        if !self.attached {
            return;
        }
        while let Some(byte) = self.waiting.take().or_else(log::typed) {
            if !vm.receive(byte) {
                self.waiting = Some(byte);
                break;
            }
        }
        let listening = self.waiting.is_none();
        if listening != self.listening {
            log::listen(listening);
            self.listening = listening;
        }
    }
}
