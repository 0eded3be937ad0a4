//! A vCPU, as everybody but the CPU that holds it sees it.
//!
//! What only the holder touches is in `Parked` while nobody holds the vCPU and in a
//! `Resident` while somebody does. The rest is shared and small: requests to the vCPU, each
//! followed by a kick of the CPU that holds it.

use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use alloc::boxed::Box;
use spin::Mutex;

use crate::arch::context::{El1, Frame};
use crate::vm::debug::Debug;
use crate::vm::inject::{PSTATE_DAIF, PSTATE_EL1H};
use crate::vm::psci::Power;
use crate::vm::ptimer::PhysicalTimer;
use crate::vm::resident::Sleep;
use crate::vm::vgic::distributor::vmpidr;
use crate::vm::vgic::interface::Saved;
use crate::vm::vgic::private::Private;

/// What a controller asks of the built-in guest.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Command {
    /// Which operation; the guest's x0.
    pub op: u64,
    /// Its arguments; the guest's x1 to x5.
    pub args: [u64; 5],
}

/// No CPU.
const NOWHERE: usize = usize::MAX;

/// A vCPU.
pub struct Vcpu {
    /// Position in its VM.
    pub index: usize,
    /// Its private interrupts.
    pub(crate) private: Mutex<Private>,
    /// Something for the vCPU changed (its interrupts, its power, a command): the CPU that has it looks before it goes on, and a
    /// sleeping vCPU is woken to look. Cleared by the holder before it looks.
    pub(crate) attention: AtomicBool,
    /// A shared interrupt may be in flight for it; set and cleared under the lock of the shared interrupts.
    pub(crate) spis: AtomicBool,
    /// It has ended by itself, and nobody has said so yet.
    pub(crate) ended: AtomicBool,
    /// Whether it is on.
    pub(crate) power: Mutex<Power>,
    pub(crate) mailbox: Mutex<Mailbox>,
    /// State of a vCPU that nobody holds; locked by the holder all the while it holds it.
    pub(crate) parked: Mutex<Parked>,
    /// The CPU whose queue it is on, or is about to be.
    cpu: AtomicUsize,
    /// The CPU that has loaded it.
    held_by: AtomicUsize,
}

/// Commands to the built-in guest, one at a time.
#[derive(Debug, Default)]
pub(crate) struct Mailbox {
    /// Posted and not taken.
    pub(crate) command: Option<Command>,
    /// What the guest said of the last command, not yet read by the controller.
    pub(crate) report: Option<[u64; 4]>,
}

/// What moves between memory and a CPU when the vCPU does.
#[derive(Debug)]
pub(crate) struct Parked {
    pub(crate) frame: Frame,
    pub(crate) el1: Box<El1>,
    pub(crate) interface: Saved,
    /// The guest waits inside a call for its next command.
    pub(crate) awaiting: bool,
    /// It waits for an interrupt.
    pub(crate) asleep: Option<Sleep>,
    pub(crate) timer: PhysicalTimer,
    pub(crate) debug: Debug,
}

impl Parked {
    fn out_of_reset(index: usize, cntvoff: u64) -> Self {
        Self {
            frame: Frame::new(0, 0),
            el1: Box::new(El1::reset(vmpidr(index), cntvoff)),
            interface: Saved::default(),
            awaiting: false,
            asleep: None,
            timer: PhysicalTimer::default(),
            debug: Debug::default(),
        }
    }
}

impl Vcpu {
    /// A vCPU that is off.
    pub(crate) fn new(index: usize, gicv3: bool, cntvoff: u64) -> Self {
        Self {
            index,
            private: Mutex::new(Private::new(gicv3)),
            attention: AtomicBool::new(false),
            spis: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            power: Mutex::new(Power::Off),
            mailbox: Mutex::new(Mailbox::default()),
            parked: Mutex::new(Parked::out_of_reset(index, cntvoff)),
            cpu: AtomicUsize::new(NOWHERE),
            held_by: AtomicUsize::new(NOWHERE),
        }
    }

    /// Makes it a vCPU that is off, as [`Vcpu::new`] does. No CPU has it.
    pub(crate) fn reset(&self, gicv3: bool, cntvoff: u64) {
        *self.private.lock() = Private::new(gicv3);
        self.spis.store(false, Ordering::Relaxed);
        *self.power.lock() = Power::Off;
        *self.mailbox.lock() = Mailbox::default();
        *self.parked.lock() = Parked::out_of_reset(self.index, cntvoff);
    }

    /// Whether `cpu` has loaded it.
    pub fn is_held_by(&self, cpu: usize) -> bool {
        self.held_by.load(Ordering::Acquire) == cpu
    }

    pub(crate) fn set_held_by(&self, cpu: Option<usize>) {
        self.held_by
            .store(cpu.unwrap_or(NOWHERE), Ordering::Release);
    }

    /// The CPU whose queue it is on.
    pub fn cpu(&self) -> Option<usize> {
        Some(self.cpu.load(Ordering::SeqCst)).filter(|cpu| *cpu != NOWHERE)
    }

    pub(crate) fn set_cpu(&self, cpu: Option<usize>) {
        self.cpu.store(cpu.unwrap_or(NOWHERE), Ordering::SeqCst);
    }

    /// Changes the CPU that has it, if one has. That CPU hands it on when it next looks. Whoever demands attention before this
    /// kicks that CPU, and the new one looks after it is handed the vCPU; whoever does so later kicks the new one: of flag and
    /// place each side writes one and then reads the other.
    pub(crate) fn move_to(&self, cpu: usize) -> Option<usize> {
        let changed = self
            .cpu
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |held| {
                (held != NOWHERE).then_some(cpu)
            });
        changed.ok()
    }

    /// Tells the holder that something changed. True: a kick is needed, because none is on its way.
    pub(crate) fn demand_attention(&self) -> bool {
        !self.attention.swap(true, Ordering::SeqCst)
    }

    /// As [`Self::demand_attention`], by the holder itself or while there is none: no kick. A plain store would hide from it what
    /// others wrote before a demand that it overwrites.
    pub(crate) fn look_again(&self) {
        self.attention.swap(true, Ordering::AcqRel);
    }

    /// Takes CPU_ON's request, if there is one: the registers to begin with.
    pub(crate) fn begin(&self) -> Option<Frame> {
        let mut power = self.power.lock();
        let Power::Pending { entry, context } = *power else {
            return None;
        };
        *power = Power::On;
        let mut frame = Frame::new(entry, PSTATE_DAIF | PSTATE_EL1H);
        frame.write(0, context);
        Some(frame)
    }

    pub(crate) fn is_on(&self) -> bool {
        *self.power.lock() == Power::On
    }
}
