//! VMs' consoles: their UARTs, the UARTs' interrupts, and how what guests send gets to the machine's UART.
//!
//! A CPU that runs a guest moves a few bytes and waits for nobody: when its guest has sent something it tries the wire's lock,
//! hands over what the wire takes, and pushes as much as the UART has room for. What is left then is the controllers': `WAITING`
//! says so, and the first who says so kicks the controller. It comes by whenever it sleeps (`attend`), and as long as anything is left
//! it sleeps no longer than the UART's queue lasts.
//!
//! Lock order: `VMS`, a VM's UART, the wire. Whoever has the wire takes no other.

use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};

use log::Level;
use spin::{Mutex, MutexGuard};

use crate::dev::serial::Serial;
use crate::dev::wire::{Place, Wire};
use crate::log::{self as wire, Head};
use crate::vm::vm::Vm;
use crate::vm::vuart::{self, INTID, Outlet, Output, Vuart};

/// VMs that exist. Only controllers look, and what they hold of a VM meanwhile they have let go of when it is destroyed.
static VMS: Mutex<Vec<Weak<Vm>>> = Mutex::new(Vec::new());
/// A guest's CPU left something for controllers to do. Whoever sets it has put that where a controller finds it before; whoever
/// clears it looks everywhere then.
static WAITING: AtomicBool = AtomicBool::new(false);

/// A UART, and how far what it sent has come.
#[derive(Debug, Default)]
pub(crate) struct Console {
    uart: Vuart,
    place: Place,
}

/// What came of handing over.
struct Step {
    /// Something is left, here or on the wire.
    left: bool,
    /// The wire took something.
    pushed: bool,
}

/// The wire, as one UART sees it.
struct Way<'a> {
    wire: &'a mut Wire<Serial>,
    place: &'a mut Place,
}

impl Outlet for Way<'_> {
    fn line(&mut self, line: &str) -> bool {
        let head = Head {
            level: Level::Info,
            module: "guest",
        };
        self.wire
            .take_line(self.place, format_args!("{head} {line}"))
    }

    fn byte(&mut self, byte: u8) -> bool {
        self.wire.take_byte(byte)
    }
}

impl Console {
    /// Hands over what the wire takes, and pushes once. A constant number of steps.
    fn hand_over(&mut self, wire: &mut Wire<Serial>) -> Step {
        let Self { uart, place } = self;
        uart.hand_over(&mut Way { wire, place });
        let pushed = wire.push();
        uart.hand_over(&mut Way { wire, place });
        Step {
            left: uart.is_waiting() || wire.is_waiting(),
            pushed,
        }
    }

    /// Whether something is left after a try that waits for nobody.
    #[cold]
    #[inline(never)]
    fn is_left(&mut self) -> bool {
        wire::try_with(|wire| self.hand_over(wire).left).unwrap_or(true)
    }
}

/// Does what guests' CPUs left to controllers, as far as the wire has room. Whether something is left.
pub(crate) fn attend() -> bool {
    if !WAITING.load(Ordering::Relaxed) || !WAITING.swap(false, Ordering::SeqCst) {
        return false;
    }
    let mut left = false;
    for vm in VMS.lock().iter().filter_map(Weak::upgrade) {
        vm.say_ends();
        left |= vm.push_console();
    }
    let pushed = wire::try_with(|wire| {
        wire.push();
        wire.is_waiting()
    });
    left |= pushed.unwrap_or(true);
    if left {
        WAITING.store(true, Ordering::SeqCst);
    }
    left
}

/// Sends everything that guests have sent and waits for that: the machine is about to be switched off.
pub fn finish() {
    for vm in VMS.lock().iter().filter_map(Weak::upgrade) {
        vm.finish_console();
    }
}

/// Adds a VM to those that controllers attend to.
pub(crate) fn add(vm: &Arc<Vm>) {
    let mut vms = VMS.lock();
    vms.retain(|vm| vm.strong_count() > 0);
    vms.push(Arc::downgrade(vm));
}

/// Forgets those that are gone.
pub(crate) fn forget() {
    VMS.lock().retain(|vm| vm.strong_count() > 0);
}

impl Vm {
    /// Sends what the guest sends as `output` says from here on.
    pub fn set_output(&self, output: Output) {
        self.uart.lock().uart.set_output(output);
    }

    /// Gives the guest a byte that was typed. False: it has no room; the controller is kicked when it has.
    #[must_use]
    pub fn receive(&self, byte: u8) -> bool {
        self.with_uart(|console| console.uart.receive(byte))
    }

    pub(crate) fn read_uart(&self, offset: u64) -> u32 {
        self.access_uart(|uart| uart.read(offset))
    }

    pub(crate) fn write_uart(&self, offset: u64, value: u32) {
        self.access_uart(|uart| uart.write(offset, value));
    }

    /// Sends as much as the wire takes now, within limits. Whether something is left. Who floods its UART has its lock most of the
    /// time, and pushes as often: that is not waited for.
    fn push_console(&self) -> bool {
        // An emulated wire takes all there is, and a guest may go on and on.
        const STEPS: usize = 64;
        let mut steps = 0..STEPS;
        loop {
            let step = self.try_with_uart(|console| wire::try_with(|wire| console.hand_over(wire)));
            let Some(Step { left, pushed }) = step.flatten() else {
                return true;
            };
            if !left || !pushed || steps.next().is_none() {
                return left;
            }
        }
    }

    /// Everything that the guest has sent is sent, the line that it has not ended too; how it ended is said. For controllers, who
    /// may wait. The VM's vCPUs have left their CPUs or are about to.
    pub(crate) fn finish_console(&self) {
        self.drain_console();
        let lost = self.uart.lock().uart.take_overruns();
        if lost > 0 {
            log::warn!("{lost} bytes that a guest wrote to its UART while that was full are lost");
        }
        self.say_ends();
    }

    /// A vCPU has ended by itself: whoever controls the VM says so, for its own CPU may not wait for the wire.
    pub(crate) fn announce_end(&self, vcpu: usize) {
        if let Some(vcpu) = self.vcpus().get(vcpu) {
            vcpu.ended.store(true, Ordering::SeqCst);
        }
        WAITING.store(true, Ordering::SeqCst);
    }

    fn drain_console(&self) {
        let is_left = |console: &mut Console| {
            wire::with(|wire| console.hand_over(wire));
            if !console.uart.is_waiting() {
                console.uart.end_line();
            }
            console.uart.is_waiting()
        };
        // As many lines as the queue can hold, and the one before; a guest that is not stopped may go on for ever.
        for _ in 0..=vuart::MOST_LINES {
            let left = self.with_uart(is_left);
            wire::with(Wire::drain);
            if !left {
                break;
            }
        }
    }

    /// Says which vCPUs have ended by themselves, each once, behind the last line of the guest's.
    fn say_ends(&self) {
        for vcpu in self.vcpus() {
            if vcpu.ended.load(Ordering::Relaxed) && vcpu.ended.swap(false, Ordering::SeqCst) {
                self.drain_console();
                if let Some(reason) = self.stop_reason(vcpu.index) {
                    log::warn!("vCPU {} {reason}", vcpu.index);
                }
            }
        }
    }

    /// An access of the guest's. What it sent is handed over as far as that is possible at once.
    #[inline]
    fn access_uart<R>(&self, work: impl FnOnce(&mut Vuart) -> R) -> R {
        let (result, left) = self.with_uart(|console| {
            let result = work(&mut console.uart);
            (result, console.uart.is_waiting() && console.is_left())
        });
        if left && !WAITING.swap(true, Ordering::SeqCst) {
            self.kick_controller();
        }
        result
    }

    /// Does something with the UART. Its interrupt's line follows under the same lock, so that of two changes the later one
    /// holds.
    fn with_uart<R>(&self, work: impl FnOnce(&mut Console) -> R) -> R {
        self.with_locked(self.uart.lock(), work)
    }

    /// As [`Self::with_uart`], if nobody else has it now.
    fn try_with_uart<R>(&self, work: impl FnOnce(&mut Console) -> R) -> Option<R> {
        Some(self.with_locked(self.uart.try_lock()?, work))
    }

    #[inline]
    fn with_locked<R>(
        &self,
        mut console: MutexGuard<'_, Console>,
        work: impl FnOnce(&mut Console) -> R,
    ) -> R {
        let (had_room, asserted) = (console.uart.has_room(), console.uart.interrupts());
        let result = work(&mut console);
        let (has_room, asserts) = (console.uart.has_room(), console.uart.interrupts());
        if asserts != asserted {
            self.set_line(INTID, asserts);
        }
        drop(console);
        if has_room && !had_room {
            self.kick_controller();
        }
        result
    }
}
