//! A virtual machine, as a controller handles it: create, fill, start, post commands, stop, destroy.
//!
//! A controller runs on a CPU of its own and waits by WFI; whoever finishes something it may wait for kicks it.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering, fence};

use spin::Mutex;

use crate::addr::{Ipa, Pa};
use crate::arch;
use crate::arch::context::Stage2Geometry;
use crate::dev::gic::Gic;
use crate::dev::machine;
use crate::mmu::{
    self, AccessFlag, Config, Contents, Engine, Extent, Level, Locking, Memory, Shape, SlotConfig,
    SlotId, Splitting, Stage2, Tracking,
};
use crate::sync::padded::Padded;
use crate::sync::percpu;
use crate::sync::quiescence::CpuId;
use crate::vm::console::{self, Console};
use crate::vm::host::{self, Host};
use crate::vm::run;
use crate::vm::sched;
use crate::vm::vcpu::{Command, Vcpu};
use crate::vm::vgic::access::Frame;
use crate::vm::vgic::distributor::{
    REDISTRIBUTOR_BYTES, V2_DISTRIBUTOR_BYTES, V3_DISTRIBUTOR_BYTES,
};
use crate::vm::vgic::shared::{Routing, Shared};
use crate::vm::vuart;

/// Bits of a guest's physical address space, where the machine's is not smaller.
const GUEST_ADDRESS_BITS: u32 = 40;
/// GICD.
pub const GICD: Ipa = Ipa::new(0x0800_0000);
/// GICC of GICv2.
pub const GICC: Ipa = Ipa::new(0x0801_0000);
/// Redistributors of GICv3, one after the other.
pub const GICR: Ipa = Ipa::new(0x080a_0000);
/// PL011.
pub const UART: Ipa = Ipa::new(0x0900_0000);
/// RAM begins here.
pub const RAM: Ipa = Ipa::new(0x4000_0000);
/// Bytes of what a guest sees at [`GICC`]: two pages.
pub(crate) const GICC_BYTES: u64 = 0x2000;
/// The first page is GICV's, so a guest accesses it by itself. The second is emulated: writes of GICC_DIR, which is all there
/// is, may name interrupts that this CPU's list registers do not have.
const GICV_BYTES: u64 = 0x1000;
/// Redistributors that fit below the UART.
const MOST_VCPUS_V3: usize = 123;
const MOST_VCPUS_V2: usize = 8;

/// What is chosen when a VM is created.
#[derive(Clone, Copy, Debug)]
pub struct VmConfig {
    /// Number of vCPUs.
    pub vcpus: usize,
    /// Which CPUs they begin on.
    pub placement: Placement,
    /// What each gets of a CPU that it shares, against the weights of the others there: 1 to 1000.
    pub weight: u32,
    /// What its MMU lock costs.
    pub locking: Locking,
    /// How blocks become tables while it is logged.
    pub splitting: Splitting,
    /// Who protects everything when an epoch ends.
    pub engine: Engine,
    /// How a write becomes known.
    pub tracking: Tracking,
    /// Who sets access flags.
    pub access_flag: AccessFlag,
    /// Takes HPFAR_EL2 for true on permission faults, which the architecture does not promise; to measure its absence.
    pub trust_hpfar: bool,
    /// Where vCPU 0 begins, with its MMU off and [`RAM`] in x0.
    pub entry: Ipa,
}

/// Which CPUs a VM's vCPUs begin on. CPU 0 is the controller's.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Placement {
    /// vCPU `i` on CPU `i + 1`, and from CPU 1 on again where there are fewer.
    Spread,
    /// All on this one.
    On(usize),
}

impl Placement {
    /// The CPU, of `cpus`, that vCPU `index` begins on; `None`: there is none.
    pub fn cpu_of(self, index: usize, cpus: usize) -> Option<usize> {
        match self {
            Self::Spread => Some(1 + index.checked_rem(cpus.checked_sub(1)?)?),
            Self::On(cpu) => Some(cpu).filter(|cpu| (1..cpus).contains(cpu)),
        }
    }
}

/// Why a VM could not be created.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Error {
    /// The MMU refused.
    Mmu(mmu::Error),
    /// This many vCPUs at most, on this machine.
    TooManyVcpus(usize),
    /// The entry point is none that A64 code can have.
    BadEntry(Ipa),
    /// No guest runs on this CPU, or there is none of that number.
    NoSuchCpu(usize),
    /// A weight is 1 to 1000.
    BadWeight(u32),
    /// The machine's CPUs address too little memory.
    NoShape,
}

impl From<mmu::Error> for Error {
    fn from(error: mmu::Error) -> Self {
        Self::Mmu(error)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mmu(error) => write!(f, "{error}"),
            Self::TooManyVcpus(most) => write!(f, "a VM of this machine has at most {most} vCPUs"),
            Self::BadEntry(entry) => write!(f, "no code can begin at {entry}"),
            Self::NoSuchCpu(cpu) => write!(f, "CPU {cpu} runs no guests"),
            Self::BadWeight(weight) => write!(f, "a weight is 1 to 1000, not {weight}"),
            Self::NoShape => write!(
                f,
                "the machine's CPUs address too little memory for a guest"
            ),
        }
    }
}

/// Why a VM does not run any more.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum StopReason {
    /// The CPU that was to run the vCPU does not exist.
    NoCpu,
    /// The guest called SYSTEM_OFF.
    SystemOff,
    /// The guest called SYSTEM_RESET.
    SystemReset,
    /// The guest called SYSTEM_RESET2 for a warm reset.
    WarmReset,
    /// The guest ran in AArch32, which it was told does not exist.
    Aarch32,
    /// The machine reported an error that belongs to the guest, with this syndrome.
    SError(u64),
    /// A trap that nothing asked for, with this ESR_EL2 and at this address.
    Unexpected(u64, u64),
    /// No memory is left for the VM's translation tables.
    NoMemory,
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoCpu => write!(f, "has no CPU to run on"),
            Self::SystemOff => write!(f, "switched off by its guest"),
            Self::SystemReset => write!(f, "reset by its guest"),
            Self::WarmReset => write!(f, "warm reset by its guest"),
            Self::Aarch32 => write!(f, "ran 32-bit code, which it cannot"),
            Self::SError(esr) => write!(f, "hit an SError (syndrome {esr:#x})"),
            Self::Unexpected(esr, pc) => {
                write!(f, "trapped unexpectedly (syndrome {esr:#x}) at {pc:#x}")
            }
            Self::NoMemory => write!(f, "needs more memory for its tables than there is"),
        }
    }
}

/// A virtual machine. What changes while it runs is apart from what every exit reads, and behind it: what is near needs no
/// instruction for its address.
#[repr(C)]
pub struct Vm {
    pub(crate) stage2: Stage2,
    pub(crate) trust_hpfar: bool,
    pub(crate) vtcr: u64,
    /// ID_AA64MMFR0_EL1.PARange for the guest.
    pub(crate) pa_range: u64,
    /// GICD_CTLR: the groups that are forwarded.
    pub(crate) gic_control: AtomicU32,
    gic: &'static Gic,
    placement: Placement,
    weight: u32,
    entry: Ipa,
    vcpus: Box<[Vcpu]>,
    /// By CPU: the vCPU that it loaded last. Each word is its CPU's own.
    last_on: Box<[AtomicUsize]>,
    /// The vCPUs are to leave their CPUs.
    stopping: AtomicBool,
    controller: usize,
    /// Its shared interrupts.
    pub(crate) shared: Padded<Mutex<Shared>>,
    pub(crate) uart: Padded<Mutex<Console>>,
    reasons: Padded<Mutex<Vec<Option<StopReason>>>>,
    /// vCPUs that are on a CPU's queue.
    held: Padded<AtomicUsize>,
    /// The vCPU whose report the controller sleeps for.
    awaited: Padded<AtomicUsize>,
}

/// The controller sleeps for no vCPU's report.
const NOBODY: usize = usize::MAX;

/// The calling CPU, as the MMU names it.
pub(crate) fn this_cpu() -> CpuId {
    CpuId(percpu::index())
}

impl Vm {
    /// A VM without memory. The calling CPU becomes its controller; vCPU 0 begins when the VM is started.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub fn create(host: &Host, config: &VmConfig) -> Result<Arc<Self>, Error> {
        let shape =
            Shape::new(GUEST_ADDRESS_BITS.min(host.features.pa_bits)).ok_or(Error::NoShape)?;
        let gicv3 = host.gic_version() == 3;
        let most = if gicv3 { MOST_VCPUS_V3 } else { MOST_VCPUS_V2 };
        if config.vcpus > most {
            return Err(Error::TooManyVcpus(most));
        }
        if !sched::WEIGHTS.contains(&config.weight) {
            return Err(Error::BadWeight(config.weight));
        }
        if let Placement::On(cpu) = config.placement
            && !(1..host.cpus()).contains(&cpu)
        {
            return Err(Error::NoSuchCpu(cpu));
        }
        let geometry = Stage2Geometry {
            ipa_bits: shape.ipa_bits(),
            start_level: shape.start() as u32,
            pa_range: pa_range(host.features.pa_bits),
            wide_vmid: host.features.vmid_bits == 16,
            indirection: config.engine == Engine::Pie,
            access_flag: config.access_flag == AccessFlag::Hardware,
            dirty_state: config.tracking == Tracking::Dbm,
        };
        let counter = arch::counter();
        let vm = Self {
            stage2: Stage2::new(
                Config {
                    locking: config.locking,
                    shape,
                    splitting: config.splitting,
                    engine: config.engine,
                    tracking: config.tracking,
                    access_flag: config.access_flag,
                },
                host.services.clone(),
            )?,
            trust_hpfar: config.trust_hpfar,
            vtcr: arch::vtcr(geometry),
            pa_range: pa_range(shape.ipa_bits()),
            gic_control: AtomicU32::new(0),
            shared: Padded::new(Mutex::new(Shared::new(Routing::new(gicv3, config.vcpus)))),
            gic: host.gic,
            placement: config.placement,
            weight: config.weight,
            entry: config.entry,
            last_on: (0..host.cpus()).map(|_| AtomicUsize::new(NOBODY)).collect(),
            vcpus: (0..config.vcpus)
                .map(|index| Vcpu::new(index, gicv3, counter))
                .collect(),
            uart: Padded::default(),
            stopping: AtomicBool::new(false),
            reasons: Padded::new(Mutex::new(vec![None; config.vcpus])),
            held: Padded::new(AtomicUsize::new(0)),
            awaited: Padded::new(AtomicUsize::new(NOBODY)),
            controller: percpu::index(),
        };
        if let machine::Gic::V2 {
            virtual_interface, ..
        } = host.machine.gic
        {
            vm.add_device(GICC, virtual_interface, GICV_BYTES)?;
        }
        vm.turn_first_on()?;
        let vm = Arc::new(vm);
        console::add(&vm);
        Ok(vm)
    }

    fn turn_first_on(&self) -> Result<(), Error> {
        match self.vcpus.first() {
            Some(first) => {
                let turned_on = first.power.lock().turn_on(self.entry.raw(), RAM.raw());
                turned_on.map_err(|_| Error::BadEntry(self.entry))
            }
            None => Ok(()),
        }
    }

    fn add_device(&self, ipa: Ipa, pa: Pa, bytes: u64) -> Result<SlotId, Error> {
        Ok(self.stage2.add_slot(SlotConfig {
            ipa,
            backing: vec![Extent { pa, bytes }],
            max_leaf: Level::L3,
            memory: Memory::Device,
            writable: true,
            contents: Contents::Keep,
        })?)
    }

    /// Its stage 2.
    pub fn stage2(&self) -> &Stage2 {
        &self.stage2
    }

    /// Its vCPUs.
    pub fn vcpus(&self) -> &[Vcpu] {
        &self.vcpus
    }

    /// The version of its interrupt controller.
    pub fn gic_version(&self) -> u32 {
        self.gic.version()
    }

    /// Puts every vCPU on the queue of its CPU; those that are off sleep there. After [`Vm::stop`] everything goes on where it
    /// was, on the CPUs of the VM's placement; a VM that stopped by itself does not.
    pub fn start(self: &Arc<Self>, host: &Host) {
        if self.reasons.lock().iter().any(Option::is_some) {
            return;
        }
        self.stopping.store(false, Ordering::SeqCst);
        for vcpu in &self.vcpus {
            let cpu = self.placement.cpu_of(vcpu.index, host.cpus());
            vcpu.set_cpu(cpu);
            self.held.fetch_add(1, Ordering::AcqRel);
            if !cpu.is_some_and(|cpu| run::add(cpu, self, vcpu.index, self.weight)) {
                vcpu.set_cpu(None);
                self.held.fetch_sub(1, Ordering::AcqRel);
                self.halt(vcpu.index, StopReason::NoCpu);
            }
        }
        for cpu in self.vcpus.iter().filter_map(Vcpu::cpu) {
            host::kick(self.gic, cpu);
        }
    }

    /// Moves `vcpu` to the queue of `cpu`, at once if it runs; it goes on there. A VM that is not started stays where it is.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchCpu`].
    pub fn move_vcpu(&self, host: &Host, vcpu: usize, cpu: usize) -> Result<(), Error> {
        if !(1..host.cpus()).contains(&cpu) {
            return Err(Error::NoSuchCpu(cpu));
        }
        let left = self.vcpus.get(vcpu).and_then(|vcpu| vcpu.move_to(cpu));
        if let Some(left) = left.filter(|left| *left != cpu) {
            self.kick_cpu(left);
        }
        Ok(())
    }

    /// Gives every vCPU the state out of reset, vCPU 0 about to begin, as if the VM had just been created; memory stays as it
    /// is. The VM has been stopped, by whomever.
    ///
    /// # Errors
    ///
    /// [`Error::BadEntry`]: never, the entry was good before.
    pub fn reset(&self, host: &Host) -> Result<(), Error> {
        self.stop(host);
        // First: what is still to be sent changes the UART's line, and how a vCPU ended is still to be said.
        self.finish_console();
        *self.uart.lock() = Console::default();
        self.gic_control.store(0, Ordering::Relaxed);
        let gicv3 = self.gic_version() == 3;
        *self.shared.lock() = Shared::new(Routing::new(gicv3, self.vcpus.len()));
        let counter = arch::counter();
        for vcpu in &self.vcpus {
            vcpu.reset(gicv3, counter);
        }
        self.reasons.lock().fill(None);
        self.turn_first_on()
    }

    /// Notes that `cpu`, the calling CPU, loads `vcpu`. Whether it loaded another vCPU of this VM before, whose entries its TLB may
    /// hold.
    pub(crate) fn was_another_here(&self, cpu: CpuId, vcpu: usize) -> bool {
        self.last_on.get(cpu.0).is_some_and(|last| {
            let before = last.load(Ordering::Relaxed);
            last.store(vcpu, Ordering::Relaxed);
            before != NOBODY && before != vcpu
        })
    }

    /// Gives `vcpu` its next command; the one before has been reported. No such vCPU: nothing happens.
    pub fn post(&self, vcpu: usize, command: Command) {
        if let Some(target) = self.vcpus.get(vcpu) {
            target.mailbox.lock().command = Some(command);
            self.alert(target);
        }
    }

    /// Sleeps until `vcpu` asks for a command, and returns what it says of the last: x1 to x4 of the call.
    ///
    /// # Errors
    ///
    /// Why the VM stopped instead; no CPU holds any of it any more.
    pub fn wait(&self, vcpu: usize) -> Result<[u64; 4], StopReason> {
        self.awaited.store(vcpu, Ordering::SeqCst);
        let outcome = loop {
            if let Some(report) = self.take_report(vcpu) {
                break Ok(report);
            }
            if let Some(reason) = self.reasons.lock().iter().flatten().next() {
                break Err(*reason);
            }
            run::rest(self.gic);
        };
        self.awaited.store(NOBODY, Ordering::SeqCst);
        if outcome.is_err() {
            self.wait_until_left();
            self.finish_console();
        }
        outcome
    }

    fn take_report(&self, vcpu: usize) -> Option<[u64; 4]> {
        self.vcpus.get(vcpu)?.mailbox.lock().report.take()
    }

    /// `vcpu` has reported: wakes the controller if that is what it sleeps for. The report came first, as the controller
    /// says first what it sleeps for, so one of the two sees the other.
    pub(crate) fn reported(&self, vcpu: usize) {
        fence(Ordering::SeqCst);
        if self.awaited.load(Ordering::SeqCst) == vcpu {
            self.kick_controller();
        }
    }

    /// Why `vcpu` stopped by itself, if it did.
    pub fn stop_reason(&self, vcpu: usize) -> Option<StopReason> {
        self.reasons.lock().get(vcpu).copied().flatten()
    }

    /// Why the VM stopped by itself, if it did.
    pub fn ended(&self) -> Option<StopReason> {
        self.reasons.lock().iter().flatten().next().copied()
    }

    /// Sleeps until something may have happened that the controller wants to see.
    pub fn rest(&self) {
        run::rest(self.gic);
    }

    /// Makes every vCPU leave its CPU and waits until they have.
    pub fn stop(&self, _host: &Host) {
        self.stopping.store(true, Ordering::SeqCst);
        self.kick_all();
        self.wait_until_left();
    }

    fn wait_until_left(&self) {
        while self.held.load(Ordering::Acquire) != 0 {
            run::rest(self.gic);
        }
    }

    /// Stops the VM and gives back what it has: tables and VMID. Memory behind its slots is the caller's again.
    pub fn destroy(vm: Arc<Self>, host: &Host) {
        vm.stop(host);
        vm.finish_console();
        match Arc::into_inner(vm) {
            Some(vm) => vm.stage2.destroy(this_cpu()),
            None => log::error!("a VM that is still referred to keeps its tables"),
        }
        console::forget();
    }

    /// The VM is to stop: `vcpu` cannot or may not go on.
    pub(crate) fn halt(&self, vcpu: usize, reason: StopReason) {
        if let Some(place) = self.reasons.lock().get_mut(vcpu) {
            *place = Some(reason);
        }
        self.stopping.store(true, Ordering::SeqCst);
        self.announce_end(vcpu);
        self.kick_all();
        self.kick_controller();
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// A vCPU has left its CPU; nothing of the VM is used there any more once the caller has dropped its reference.
    pub(crate) fn release(self: Arc<Self>, vcpu: usize) {
        if let Some(vcpu) = self.vcpus.get(vcpu) {
            vcpu.set_cpu(None);
        }
        let (gic, controller) = (self.gic, self.controller);
        // The count permits the controller to take the VM apart, which wants the only reference there is: so the reference
        // goes first, then the count. The controller's own reference keeps the VM alive in between.
        let this = Arc::into_raw(self);
        // SAFETY: `this` came out of `into_raw` and is given back once.
        unsafe { Arc::decrement_strong_count(this) };
        // SAFETY: the VM is alive until the controller has seen this very count go: it destroys none before ([`Self::stop`]), and
        // lets go of one that has stopped by itself no sooner ([`Self::wait`]).
        let held = unsafe { &(*this).held };
        held.fetch_sub(1, Ordering::AcqRel);
        host::kick(gic, controller);
    }

    /// Something for `vcpu` changed: wakes it if it sleeps, and makes the CPU that has it look.
    pub(crate) fn alert(&self, vcpu: &Vcpu) {
        if vcpu.demand_attention() {
            self.kick(vcpu);
        }
    }

    /// Makes the CPU that has `vcpu` look at what was asked of it.
    pub(crate) fn kick(&self, vcpu: &Vcpu) {
        if let Some(cpu) = vcpu.cpu() {
            self.kick_cpu(cpu);
        }
    }

    /// The machine's interrupt controller, which outlives the VM.
    pub(crate) fn gic(&self) -> &'static Gic {
        self.gic
    }

    pub(crate) fn kick_controller(&self) {
        host::kick(self.gic, self.controller);
    }

    pub(crate) fn kick_cpu(&self, cpu: usize) {
        host::kick(self.gic, cpu);
    }

    fn kick_all(&self) {
        let own = percpu::index();
        for cpu in self
            .vcpus
            .iter()
            .filter_map(Vcpu::cpu)
            .filter(|cpu| *cpu != own)
        {
            host::kick(self.gic, cpu);
        }
    }

    /// The device whose registers are at `ipa`, and where in it.
    pub(crate) fn device_at(&self, ipa: Ipa) -> Option<(Device, u64)> {
        let within = |base: Ipa, bytes: u64| ipa.offset_from(base).filter(|offset| *offset < bytes);
        if let Some(offset) = within(UART, vuart::BYTES) {
            return Some((Device::Uart, offset));
        }
        let interrupts = |frame, offset| Some((Device::Interrupts(frame), offset));
        if self.gic_version() == 2 {
            if let Some(offset) = within(GICD, V2_DISTRIBUTOR_BYTES) {
                return interrupts(Frame::DistributorV2, offset);
            }
            let offset = within(GICC, GICC_BYTES)?.checked_sub(GICV_BYTES)?;
            return interrupts(Frame::Deactivation, offset);
        }
        if let Some(offset) = within(GICD, V3_DISTRIBUTOR_BYTES) {
            return interrupts(Frame::DistributorV3, offset);
        }
        let offset = within(GICR, REDISTRIBUTOR_BYTES * self.vcpus.len() as u64)?;
        let vcpu = usize::try_from(offset / REDISTRIBUTOR_BYTES).ok()?;
        interrupts(Frame::Redistributor(vcpu), offset % REDISTRIBUTOR_BYTES)
    }
}

/// An emulated device.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Device {
    Uart,
    /// A frame of the interrupt controller.
    Interrupts(Frame),
}

/// ID_AA64MMFR0_EL1.PARange for an address size, rounded down.
const fn pa_range(bits: u32) -> u64 {
    match bits {
        0..36 => 0,
        36..40 => 1,
        40..42 => 2,
        42..44 => 3,
        44..48 => 4,
        _ => 5,
    }
}

#[cfg(test)]
mod tests {
    use super::pa_range;

    #[test]
    fn address_sizes_are_rounded_down() {
        for (bits, range) in [
            (32, 0),
            (36, 1),
            (39, 1),
            (40, 2),
            (42, 3),
            (44, 4),
            (48, 5),
            (52, 5),
        ] {
            assert_eq!(pa_range(bits), range, "{bits}");
        }
    }
}
