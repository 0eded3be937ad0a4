//! The life of a CPU: hold the vCPU it is given, sleep when there is none.

use alloc::sync::Arc;

use spin::Mutex;

use crate::arch;
use crate::dev::gic::Gic;
use crate::dev::machine::MOST_CPUS;
use crate::sync::percpu;
use crate::vm::host::{self, Host};
use crate::vm::resident;
use crate::vm::vm::Vm;

/// What a CPU is to hold: written by a controller, taken by the CPU.
type Seat = Mutex<Option<(Arc<Vm>, usize)>>;

static SEATS: [Seat; MOST_CPUS] = [const { Mutex::new(None) }; MOST_CPUS];

/// Gives CPU `cpu` a vCPU to hold when it is next kicked. False: there is no such CPU, or it has not taken the last one.
pub(crate) fn give(cpu: usize, vm: Arc<Vm>, vcpu: usize) -> bool {
    let Some(mut seat) = SEATS.get(cpu).map(Mutex::lock) else {
        return false;
    };
    let free = seat.is_none();
    if free {
        *seat = Some((vm, vcpu));
    }
    free
}

fn take(cpu: usize) -> Option<(Arc<Vm>, usize)> {
    SEATS.get(cpu)?.lock().take()
}

/// What every CPU but a controller's does for ever.
pub fn cpu_loop() -> ! {
    let host = wait_for_host();
    let cpu = percpu::index();
    loop {
        match take(cpu) {
            Some((vm, index)) => {
                if let Some(vcpu) = vm.vcpus().get(index) {
                    resident::hold(host, &vm, vcpu);
                }
                vm.release(index);
            }
            None => rest(host.gic),
        }
    }
}

/// Boot's end wakes the others by a kick, which then stays pending until [`rest`] takes it.
fn wait_for_host() -> &'static Host {
    loop {
        match host::get() {
            Some(host) => return host,
            None => arch::wfi(),
        }
    }
}

/// Sleeps until an interrupt is pending for this CPU, and takes it. Interrupts are masked, so one that arrives between
/// the caller's last look at its work and the sleep ends the sleep at once.
pub fn rest(gic: &Gic) {
    arch::wfi();
    if let Some(irq) = gic.acknowledge() {
        gic.priority_drop(irq);
        gic.deactivate(irq);
    }
}
