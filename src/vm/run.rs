//! The life of a CPU: run the vCPU that is owed most, sleep when none is to run.
//!
//! Each CPU has a queue of turns ([`sched`](crate::vm::sched)), which controllers add to and the CPU itself takes from. What wakes
//! a turn is a flag of its vCPU, set by whoever has something for it and followed by a kick: waking takes no lock.
//!
//! A vCPU that sleeps stays on its CPU while nobody else is ready there, so that a CPU with one vCPU switches nothing. A
//! CPU with several traps their waits and ends a slice by its EL2 timer (CNTHP); that timer also stands for the timers of vCPUs
//! that sleep elsewhere than on the CPU. A CPU with one sets no traps, and its timer for what its guest waits for alone.

use alloc::sync::Arc;
use core::sync::atomic::{AtomicUsize, Ordering};

use spin::Mutex;

use crate::arch;
use crate::dev::gic::Gic;
use crate::dev::machine::MOST_CPUS;
use crate::mem::frames;
use crate::sync::percpu;
use crate::vm::console;
use crate::vm::host::{self, Host};
use crate::vm::resident;
use crate::vm::sched::{End, Queue, Room};
use crate::vm::vcpu::Vcpu;
use crate::vm::vm::Vm;

/// A vCPU on a queue.
#[derive(Clone)]
struct Turn {
    vm: Arc<Vm>,
    vcpu: usize,
}

/// The queue of one CPU. Lock order: nothing else is locked under it, and nothing allocated.
#[repr(align(128))]
struct Place {
    turns: Mutex<Queue<Turn>>,
    /// How many those are, for the CPU to look at without the lock.
    count: AtomicUsize,
}

static PLACES: [Place; MOST_CPUS] = [const {
    Place {
        turns: Mutex::new(Queue::new()),
        count: AtomicUsize::new(0),
    }
}; MOST_CPUS];

/// Slices of a millisecond.
const SLICES_PER_SECOND: u64 = 1000;

/// Ticks that a turn may run while others wait.
pub(crate) fn slice_ticks() -> u64 {
    (arch::counter_hz() / SLICES_PER_SECOND).max(1)
}

/// Adds a vCPU to the queue of `cpu`, who has to be kicked to look. False: there is no such CPU.
pub(crate) fn add(cpu: usize, vm: &Arc<Vm>, vcpu: usize, weight: u32) -> bool {
    let turn = Turn {
        vm: vm.clone(),
        vcpu,
    };
    hand(cpu, turn, weight).is_ok()
}

/// Puts `turn` on the queue of `cpu`, reference and all: that CPU may let go of it at once, and then the VM may be taken apart,
/// which wants the only reference there is. Given back where there is no such CPU.
fn hand(cpu: usize, turn: Turn, weight: u32) -> Result<(), Turn> {
    let Some(place) = PLACES.get(cpu) else {
        return Err(turn);
    };
    let mut room = Room::of(0);
    loop {
        let mut turns = place.turns.lock();
        turns.move_into(&mut room);
        if turns.has_room() {
            turns.add(turn, weight);
            place.count.store(turns.len(), Ordering::Release);
            return Ok(());
        }
        let wanted = 2 * turns.len() + 2;
        drop(turns);
        room = Room::of(wanted);
    }
}

/// Whether `cpu`, the calling CPU, has more than one vCPU to run.
#[inline]
pub(crate) fn is_shared(cpu: usize) -> bool {
    PLACES
        .get(cpu)
        .is_some_and(|place| place.count.load(Ordering::Acquire) > 1)
}

/// Whether the turn that `cpu`, the calling CPU, runs has to make way; `is_over`: its slice has ended, or it cannot go on. The CPU
/// only waited for `idle` ticks of its run.
pub(crate) fn has_rival(cpu: usize, idle: u64, is_over: bool) -> bool {
    let Some(place) = PLACES.get(cpu) else {
        return false;
    };
    let mut turns = place.turns.lock();
    turns.has_rival(arch::counter(), idle, slice_ticks(), is_over, |turn| {
        is_woken(cpu, turn)
    })
}

/// Sets the EL2 timer of `cpu`, the calling CPU, to the first of: `own`, the time of a sleeper on its queue, the slice's end or
/// what comes before it if somebody else is ready. Whether it will come.
pub(crate) fn set_alarm(cpu: usize, own: Option<u64>, slice_end: u64) {
    let queued = PLACES
        .get(cpu)
        .filter(|_| is_shared(cpu))
        .and_then(|place| {
            let turns = place.turns.lock();
            let slice = turns.makes_way_at(slice_end, slice_ticks());
            turns.alarm().into_iter().chain(slice).min()
        });
    arch::set_hypervisor_timer(own.into_iter().chain(queued).min());
}

/// Whether a turn on the queue of `cpu` has to be looked at: something for its vCPU changed, or it is here no longer. Whoever
/// wakes a vCPU that was moved kicks its new CPU, so the old one hands it on even if it sleeps.
fn is_woken(cpu: usize, turn: &Turn) -> bool {
    let vcpu = turn.vm.vcpus().get(turn.vcpu);
    let moved_or_woken =
        |vcpu: &Vcpu| vcpu.cpu() != Some(cpu) || vcpu.attention.load(Ordering::SeqCst);
    turn.vm.is_stopping() || vcpu.is_none_or(moved_or_woken)
}

/// What every CPU but a controller's does for ever.
pub fn cpu_loop() -> ! {
    let host = wait_for_host();
    let cpu = percpu::index();
    loop {
        let_go(cpu);
        match pick(cpu) {
            Some(turn) => run(host, cpu, &turn),
            None => {
                set_alarm_of_idle(cpu);
                sleep(host.gic);
            }
        }
    }
}

fn run(host: &'static Host, cpu: usize, turn: &Turn) {
    let Some(vcpu) = turn.vm.vcpus().get(turn.vcpu) else {
        return;
    };
    let held = resident::hold(host, &turn.vm, vcpu);
    if let Some(place) = PLACES.get(cpu) {
        let mut turns = place.turns.lock();
        turns.end(arch::counter(), held.idle_ticks, slice_ticks(), held.end);
    }
}

fn pick(cpu: usize) -> Option<Turn> {
    let mut turns = PLACES.get(cpu)?.turns.lock();
    turns
        .pick(arch::counter(), slice_ticks(), |turn| is_woken(cpu, turn))
        .cloned()
}

fn set_alarm_of_idle(cpu: usize) {
    let alarm = PLACES.get(cpu).and_then(|place| place.turns.lock().alarm());
    arch::set_hypervisor_timer(alarm);
}

/// Takes the turns off the queue whose VM stops, and hands those on that belong to another CPU now.
fn let_go(cpu: usize) {
    while let Some((turn, weight)) = take_leaving(cpu) {
        let gic = turn.vm.gic();
        let vcpu = turn.vm.vcpus().get(turn.vcpu);
        let home = vcpu.and_then(|vcpu| vcpu.cpu());
        let handed = match home.filter(|_| !turn.vm.is_stopping()) {
            Some(home) => hand(home, turn, weight).map(|()| home),
            None => Err(turn),
        };
        match handed {
            // It may have been moved back meanwhile: then the kick is for this CPU. The VM may be gone.
            Ok(home) => host::kick(gic, home),
            Err(turn) => turn.vm.release(turn.vcpu),
        }
    }
}

fn take_leaving(cpu: usize) -> Option<(Turn, u32)> {
    let place = PLACES.get(cpu)?;
    if place.count.load(Ordering::Acquire) == 0 {
        return None;
    }
    let mut turns = place.turns.lock();
    let leaves = |turn: &Turn| {
        let vcpu = turn.vm.vcpus().get(turn.vcpu);
        turn.vm.is_stopping() || vcpu.is_none_or(|vcpu| vcpu.cpu() != Some(cpu))
    };
    let taken = turns.take(leaves);
    place.count.store(turns.len(), Ordering::Release);
    taken
}

/// Boot's end wakes the others by a kick, which then stays pending until [`sleep`] takes it.
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
fn sleep(gic: &Gic) {
    frames::refill();
    arch::wfi();
    if let Some(irq) = gic.acknowledge() {
        // Its line would make the timer pending again at once.
        arch::set_hypervisor_timer(None);
        gic.priority_drop(irq);
        gic.deactivate(irq);
    }
}

/// Attends to consoles, then sleeps until an interrupt is pending for this CPU, and takes it. For controllers.
pub fn rest(gic: &Gic) {
    rest_with(gic, None);
}

/// As [`rest`], until tick `deadline` of the counter at the latest.
pub fn rest_until(gic: &Gic, deadline: u64) {
    rest_with(gic, Some(deadline));
}

fn rest_with(gic: &Gic, deadline: Option<u64>) {
    // 500 microseconds: the smallest UART's queue holds for 700.
    const LOOKS_PER_SECOND: u64 = 2000;
    let look = console::attend().then(|| arch::counter() + arch::counter_hz() / LOOKS_PER_SECOND);
    let alarm = deadline.into_iter().chain(look).min();
    if alarm.is_some() {
        arch::set_hypervisor_timer(alarm);
    }
    sleep(gic);
    if alarm.is_some() {
        arch::set_hypervisor_timer(None);
    }
}

/// How long a vCPU was held, and what it does now.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Held {
    /// Ticks that the CPU only waited.
    pub(crate) idle_ticks: u64,
    pub(crate) end: End,
}
