//! The clocks of all CPUs, and the threads that wait for their turn.
//!
//! A CPU's clock is derived from a counter that translated code adds to: it is `end` when the counter has reached
//! [`FULL`]. Only the CPU's own thread moves either.
//!
//! Locking: one lock over the [`Schedule`], a leaf. Threads may hold the emulator's locks when they take it, but wait for a
//! turn without any.

use core::ffi::c_uint;
use core::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::account::Sharing;
use crate::api::{Counter, api};
use crate::schedule::{MOST, Main, Next, Quanta, Schedule, State};

/// What a counter is when its CPU has got as far as it may.
pub(crate) const FULL: u64 = 1 << 40;

/// Seconds without a turn after which something is broken: the host, or this.
const STALLED: u32 = 60;

/// A thread that waits for the emulator: for another thread, that is, which may itself wait for its turn.
#[derive(Clone, Copy)]
struct Waiter {
    condition: usize,
    waits: bool,
}

/// What is behind the lock.
pub(crate) struct Shared {
    pub(crate) schedule: Schedule,
    /// CPUs' threads, then the main loop's.
    waiters: [Waiter; MOST + 1],
    waiting: usize,
    /// What a sleeping CPU's thread waits for, and whether it was told.
    halts: [usize; MOST],
    kicked: [bool; MOST],
    totals: Totals,
}

/// What is told at the end.
#[derive(Clone, Copy, Debug, Default)]
struct Totals {
    turns: u64,
    released: u64,
    timeouts: u64,
}

struct Cpu {
    end: AtomicU64,
    asleep: AtomicBool,
    turn: Condvar,
}

/// The clock of this process.
pub(crate) struct Clock {
    active: AtomicBool,
    measured: AtomicBool,
    shared: Mutex<Shared>,
    sharing: Mutex<Option<Sharing>>,
    cpus: [Cpu; MOST],
    counter: OnceLock<Counter>,
    /// Host time when the clock was started, in nanoseconds.
    started: AtomicU64,
    /// The main loop's clock.
    now: AtomicU64,
    /// Wakes the main loop.
    event: AtomicI32,
}

/// The only one.
pub(crate) static CLOCK: Clock = Clock::new();

/// The main loop's place among those who wait.
const MAIN: usize = MOST;

impl Clock {
    const fn new() -> Self {
        let waiter = Waiter {
            condition: 0,
            waits: false,
        };
        Self {
            active: AtomicBool::new(false),
            measured: AtomicBool::new(false),
            sharing: Mutex::new(None),
            shared: Mutex::new(Shared {
                schedule: Schedule::new(),
                waiters: [waiter; MOST + 1],
                waiting: 0,
                halts: [0; MOST],
                kicked: [false; MOST],
                totals: Totals {
                    turns: 0,
                    released: 0,
                    timeouts: 0,
                },
            }),
            cpus: [const {
                Cpu {
                    end: AtomicU64::new(FULL),
                    asleep: AtomicBool::new(false),
                    turn: Condvar::new(),
                }
            }; MOST],
            counter: OnceLock::new(),
            started: AtomicU64::new(0),
            now: AtomicU64::new(0),
            event: AtomicI32::new(-1),
        }
    }

    /// Time is this clock's from now on, which is `host_ns`.
    pub(crate) fn start(&self, counter: Counter, quanta: Quanta, host_ns: u64) {
        self.counter.get_or_init(|| counter);
        self.started.store(host_ns, Ordering::Relaxed);
        // SAFETY: no memory is involved.
        let event = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
        self.event.store(event, Ordering::Relaxed);
        self.lock().schedule.configure(quanta);
        self.active.store(true, Ordering::Release);
        std::thread::spawn(|| CLOCK.watch());
    }

    /// Taking a line from another CPU takes `cost` instructions from now on; where it is done is told on request.
    pub(crate) fn watch_lines(&self, cost: u64, sites: bool) {
        *self.sharing() = Some(Sharing::new(cost, sites));
    }

    /// What this CPU takes from now on is counted apart, or no longer.
    pub(crate) fn count_apart(&self, cpu: usize, apart: bool) {
        if let Some(sharing) = self.sharing().as_mut() {
            sharing.count_apart(cpu, apart);
        }
    }

    /// What was counted apart so far is forgotten.
    pub(crate) fn forget_apart(&self) {
        if let Some(sharing) = self.sharing().as_mut() {
            sharing.forget_apart();
        }
    }

    /// Tells what was counted apart since the last time.
    pub(crate) fn tell_apart(&self) {
        if let Some(sharing) = self.sharing().as_mut() {
            sharing.tell_apart();
        }
    }

    fn sharing(&self) -> MutexGuard<'_, Option<Sharing>> {
        self.sharing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether accesses are charged for.
    pub(crate) fn measured(&self) -> bool {
        self.measured.load(Ordering::Relaxed)
    }

    /// The CPU of this thread has accessed `address` at `site`.
    pub(crate) fn accessed(&self, cpu: usize, site: u64, address: u64, stores: bool) {
        let mut sharing = self.sharing();
        let Some(sharing) = sharing.as_mut() else {
            return;
        };
        let time = self.time(cpu);
        let Some(cost) = sharing.access(cpu, site, address, stores, time) else {
            return;
        };
        if cost == 0 {
            return;
        }
        if let Some((counter, api)) = self.counter.get().zip(api()) {
            let cpu = number(cpu);
            // SAFETY: QEMU's functions, with a counter of their own.
            let count = unsafe { (api.get)(*counter, cpu) };
            // SAFETY: as above.
            unsafe { (api.set)(*counter, cpu, count + cost) };
        }
    }

    /// Ends the process when a CPU waits and nothing moves; none is let go out of turn, ever.
    fn watch(&self) {
        let second = libc::timespec {
            tv_sec: 1,
            tv_nsec: 0,
        };
        let (mut turns, mut still) = (0, 0);
        loop {
            // The library's own sleep: the clock is not the host's here.
            // SAFETY: a local variable and no result.
            unsafe { libc::nanosleep(&raw const second, core::ptr::null_mut()) };
            let mut shared = self.lock();
            let parked = (0..MOST).any(|cpu| shared.schedule.state(cpu) == State::Parked);
            if !parked || shared.totals.turns != turns {
                (turns, still) = (shared.totals.turns, 0);
                continue;
            }
            still += 1;
            if still == STALLED {
                shared.totals.timeouts += 1;
                self.give_up(&shared);
            }
        }
    }

    /// Whether time is this clock's.
    pub(crate) fn active(&self) -> bool {
        self.active.load(Ordering::Acquire)
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The descriptor that wakes the main loop.
    pub(crate) fn event(&self) -> i32 {
        self.event.load(Ordering::Relaxed)
    }

    /// Nanoseconds on the clock of a CPU's thread, or of any other.
    pub(crate) fn read(&self, cpu: Option<usize>) -> u64 {
        let now = cpu.map_or_else(|| self.now.load(Ordering::Relaxed), |cpu| self.time(cpu));
        self.started.load(Ordering::Relaxed) + now
    }

    /// A CPU's clock; for its own thread.
    fn time(&self, cpu: usize) -> u64 {
        let count = self
            .counter
            .get()
            .zip(api())
            .map_or(FULL, |(counter, api)| {
                // SAFETY: QEMU's function, with a counter of its own.
                unsafe { (api.get)(*counter, number(cpu)) }
            });
        let end = self.cpus[cpu].end.load(Ordering::Relaxed);
        end.wrapping_add(count).wrapping_sub(FULL)
    }

    /// Sets a CPU's clock and how far it may get; for its own thread.
    fn set(&self, cpu: usize, time: u64, end: u64) {
        self.cpus[cpu].end.store(end, Ordering::Relaxed);
        if let Some((counter, api)) = self.counter.get().zip(api()) {
            // SAFETY: as above.
            unsafe { (api.set)(*counter, number(cpu), FULL - (end - time)) };
        }
    }

    /// The CPU that runs in this thread got as far as it may, or is to do what others must see in order: waits for its turn.
    pub(crate) fn pause(&self, cpu: usize) {
        let time = self.time(cpu);
        let mut shared = self.lock();
        shared.schedule.park(cpu, time);
        self.dispatch(&mut shared);
        loop {
            if shared.schedule.turn() == Some(cpu) {
                let end = shared.schedule.horizon(cpu, time);
                shared.schedule.go(cpu);
                self.set(cpu, time, end);
                return;
            }
            if shared.waiting > 0 {
                // Somebody waits for this thread to get to where it can be stopped; it calls again at the next block.
                shared.totals.released += 1;
                shared.schedule.go(cpu);
                self.set(cpu, time, time);
                return;
            }
            let waited = self.cpus[cpu].turn.wait(shared);
            shared = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Nothing has moved: says where everybody is and ends the process; no CPU is let go out of turn.
    fn give_up(&self, shared: &Shared) -> ! {
        self.report(shared);
        eprintln!(
            "parallel clock: stalled; turn {:?}, main loop {:?}, {} threads wait",
            shared.schedule.turn(),
            shared.schedule.main(),
            shared.waiting
        );
        for cpu in 0..MOST {
            let state = shared.schedule.state(cpu);
            if state != State::Idle {
                eprintln!(
                    "parallel clock: CPU {cpu} {state:?} at {}",
                    shared.schedule.time(cpu)
                );
            }
        }
        // SAFETY: ends the process.
        unsafe { libc::_exit(3) }
    }

    /// Says what there was to count, in one line of JSON.
    pub(crate) fn report(&self, shared: &Shared) {
        let totals = &shared.totals;
        if let Some(sharing) = self.sharing().as_ref() {
            sharing.tell_rest();
        }
        eprintln!(
            r#"{{"clock":{{"turns":{},"released":{},"timeouts":{},"virtual_ns":{}}}}}"#,
            totals.turns,
            totals.released,
            totals.timeouts,
            shared.schedule.now()
        );
    }

    /// Gives the turn to who is next and tells them.
    fn dispatch(&self, shared: &mut Shared) {
        match shared.schedule.next() {
            Next::Nobody => {}
            Next::Cpu(cpu) => {
                shared.totals.turns += 1;
                if shared.schedule.state(cpu) == State::Parked {
                    self.cpus[cpu].turn.notify_one();
                }
            }
            Next::Main => {
                self.now.store(shared.schedule.now(), Ordering::Relaxed);
                self.wake_main();
            }
        }
    }

    fn wake_main(&self) {
        let one = 1_u64;
        // SAFETY: eight bytes of a local variable. It fails only when the event is set already.
        unsafe {
            libc::syscall(
                libc::SYS_write,
                self.event(),
                &raw const one,
                size_of::<u64>(),
            )
        };
    }

    /// Measuring starts or ends: whoever says so, and everybody else at the next turn, gets a new horizon. Nothing that was before
    /// has an influence on what is measured: nobody who sleeps is ahead of whoever starts it, and lines are nobody's.
    pub(crate) fn measure(&self, cpu: usize, fine: bool) {
        if fine && let Some(sharing) = self.sharing().as_mut() {
            sharing.forget_lines();
        }
        let now = self.time(cpu);
        let mut shared = self.lock();
        let time = match fine {
            true => shared.schedule.align(now),
            false => now,
        };
        shared.schedule.measure(fine);
        self.measured.store(fine, Ordering::Relaxed);
        self.set(cpu, time, time);
    }

    /// The CPU of this thread sleeps until somebody wakes it.
    pub(crate) fn sleep(&self, cpu: usize) {
        let time = self.time(cpu);
        let mut shared = self.lock();
        shared.schedule.sleep(cpu, time);
        self.cpus[cpu].asleep.store(true, Ordering::Relaxed);
        self.dispatch(&mut shared);
    }

    /// The CPU of this thread goes on.
    pub(crate) fn resume(&self, cpu: usize) {
        let mut shared = self.lock();
        self.cpus[cpu].asleep.store(false, Ordering::Relaxed);
        let time = shared.schedule.go(cpu);
        self.set(cpu, time, time);
    }

    /// Whether the CPU of this thread sleeps.
    pub(crate) fn asleep(&self, cpu: usize) -> bool {
        self.cpus[cpu].asleep.load(Ordering::Relaxed)
    }

    /// The thread of a sleeping CPU waits for `condition`, which somebody may have signalled already. `release` lets go of the
    /// lock that goes with it.
    pub(crate) fn await_kick(&self, cpu: usize, condition: usize, release: impl FnOnce()) {
        let mut shared = self.lock();
        shared.halts[cpu] = condition;
        if !shared.kicked[cpu] {
            if shared.schedule.state(cpu) == State::Waking {
                // It was woken for nothing.
                let time = shared.schedule.time(cpu);
                shared.schedule.sleep(cpu, time);
            }
            self.dispatch(&mut shared);
            release();
            while !shared.kicked[cpu] {
                let waited = self.cpus[cpu].turn.wait(shared);
                shared = waited.unwrap_or_else(PoisonError::into_inner);
            }
        } else {
            release();
        }
        shared.kicked[cpu] = false;
    }

    /// A thread, that of `cpu` or the main loop's, waits for `condition`.
    pub(crate) fn begin_wait(&self, cpu: Option<usize>, condition: usize) {
        let mut shared = self.lock();
        shared.waiters[cpu.unwrap_or(MAIN)] = Waiter {
            condition,
            waits: true,
        };
        shared.waiting += 1;
        for (number, it) in self.cpus.iter().enumerate() {
            if shared.schedule.state(number) == State::Parked {
                it.turn.notify_one();
            }
        }
    }

    /// It waits no longer.
    pub(crate) fn end_wait(&self, cpu: Option<usize>) {
        let mut shared = self.lock();
        let waiter = &mut shared.waiters[cpu.unwrap_or(MAIN)];
        if waiter.waits {
            waiter.waits = false;
            shared.waiting -= 1;
        }
    }

    /// A thread, that of `cpu` or another, signals `condition`.
    pub(crate) fn signal(&self, cpu: Option<usize>, condition: usize) {
        let mut guard = self.lock();
        let shared = &mut *guard;
        for waiter in &mut shared.waiters {
            if waiter.waits && waiter.condition == condition {
                waiter.waits = false;
                shared.waiting -= 1;
            }
        }
        let sleeper = shared.halts.iter().position(|halt| *halt == condition);
        let Some(sleeper) = sleeper else { return };
        shared.kicked[sleeper] = true;
        let time = cpu.map_or_else(|| shared.schedule.now(), |cpu| self.time(cpu));
        if shared.schedule.wake(sleeper, time) {
            self.cpus[sleeper].turn.notify_one();
            if let Some(cpu) = cpu {
                self.end_turn(shared, cpu);
            }
        } else if shared.schedule.state(sleeper) == State::Waking {
            self.cpus[sleeper].turn.notify_one();
        }
    }

    /// The CPU of this thread gets no further than this block: others are to be waited for, or may be due before it.
    fn end_turn(&self, shared: &Shared, cpu: usize) {
        if shared.schedule.state(cpu) == State::Away {
            let time = self.time(cpu);
            self.set(cpu, time, time);
        }
    }

    /// The thread of a CPU has told the main loop something, which may have a new deadline.
    pub(crate) fn told_main(&self, cpu: usize) {
        let mut shared = self.lock();
        if shared.schedule.main() == Main::Waiting {
            shared.schedule.main_busy();
            self.now.store(shared.schedule.now(), Ordering::Relaxed);
            self.wake_main();
        }
        self.end_turn(&shared, cpu);
    }

    /// The main loop has nothing to do for `after` nanoseconds of its clock.
    pub(crate) fn main_waits(&self, after: u64) {
        let mut shared = self.lock();
        shared.schedule.main_waits(after);
        self.dispatch(&mut shared);
    }

    /// Whether the main loop is to go on.
    pub(crate) fn main_due(&self) -> bool {
        self.lock().schedule.main() == Main::Busy
    }

    /// The main loop has found input.
    pub(crate) fn main_goes_on(&self) {
        let mut shared = self.lock();
        shared.schedule.main_busy();
        self.now.store(shared.schedule.now(), Ordering::Relaxed);
    }
}

fn number(cpu: usize) -> c_uint {
    c_uint::try_from(cpu).unwrap_or(0)
}
