//! Who may run: a discrete-event schedule of CPUs with clocks of their own.
//!
//! One CPU has the turn at a time. It is always the awake CPU whose clock is furthest behind, and it may get ahead of the next
//! one by a quantum. Nothing here depends on how long the host takes for anything, so a run repeats. A CPU that was woken
//! counts as awake from the moment, on its waker's clock, at which it was: nobody gets further ahead of it than of
//! the others, and nobody gets a turn before its thread has come to wait for one, however late that is. Whether a thread is
//! stopped on its way or after its first block would be for the host to say otherwise.
//!
//! The emulator's main loop takes part: it runs the timers, and is due when every awake CPU has reached its deadline, or at
//! once, and the clock jumps there, when no CPU is awake.

/// CPUs at most.
pub(crate) const MOST: usize = 128;

/// No deadline.
pub(crate) const NEVER: u64 = u64::MAX;

/// How far one clock may get ahead of the others when alone, in quanta.
const ALONE: u64 = 100;

/// What a CPU does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// It sleeps, or was never started.
    Idle,
    /// It was woken and its thread does not know yet.
    Waking,
    /// Its thread is on its way: it executes, or is somewhere in the emulator.
    Away,
    /// Its thread waits for the turn.
    Parked,
}

/// What the main loop does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Main {
    /// Something; CPUs wait until it has done it.
    Busy,
    /// It waits for input and for its deadline.
    Waiting,
}

/// Who is next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Somebody has the turn already, or only input can go on.
    Nobody,
    /// This CPU has the turn now.
    Cpu(usize),
    /// The main loop, whose deadline has come.
    Main,
}

#[derive(Clone, Copy, Debug)]
struct Cpu {
    state: State,
    /// Its clock when it was last looked at; it may have got further, never less far.
    time: u64,
}

/// How far clocks may be apart, in instructions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Quanta {
    /// Between accesses that order memory.
    pub(crate) fine: u64,
    /// While nothing is measured.
    pub(crate) coarse: u64,
}

/// All of it.
#[derive(Debug)]
pub(crate) struct Schedule {
    cpus: [Cpu; MOST],
    turn: Option<usize>,
    main: Main,
    deadline: u64,
    now: u64,
    quanta: Quanta,
    fine: bool,
}

impl Schedule {
    /// Everybody asleep at time zero, the main loop busy.
    pub(crate) const fn new() -> Self {
        let asleep = Cpu {
            state: State::Idle,
            time: 0,
        };
        Self {
            cpus: [asleep; MOST],
            turn: None,
            main: Main::Busy,
            deadline: NEVER,
            now: 0,
            quanta: Quanta {
                fine: 1000,
                coarse: 50_000,
            },
            fine: false,
        }
    }

    /// Sets how far clocks may be apart.
    pub(crate) fn configure(&mut self, quanta: Quanta) {
        self.quanta = quanta;
    }

    /// Something is measured from now on, or no longer.
    pub(crate) fn measure(&mut self, fine: bool) {
        self.fine = fine;
    }

    /// Everybody who sleeps gets as far as the furthest, a CPU at `now` among them; that time.
    pub(crate) fn align(&mut self, now: u64) -> u64 {
        let furthest = self.cpus.iter().map(|cpu| cpu.time).max();
        let now = furthest.map_or(now, |furthest| furthest.max(now));
        let asleep = |cpu: &&mut Cpu| cpu.state == State::Idle;
        for cpu in self.cpus.iter_mut().filter(asleep) {
            cpu.time = now;
        }
        now
    }

    /// What a CPU does.
    pub(crate) fn state(&self, cpu: usize) -> State {
        self.cpus[cpu].state
    }

    /// A CPU's clock as far as it is known.
    pub(crate) fn time(&self, cpu: usize) -> u64 {
        self.cpus[cpu].time
    }

    /// Who has the turn.
    pub(crate) fn turn(&self) -> Option<usize> {
        self.turn
    }

    /// The main loop's clock.
    pub(crate) fn now(&self) -> u64 {
        self.now
    }

    /// The CPU waits for the turn, its clock at `time`.
    pub(crate) fn park(&mut self, cpu: usize, time: u64) {
        self.leave(cpu, State::Parked, time);
    }

    /// The CPU sleeps, its clock at `time`.
    pub(crate) fn sleep(&mut self, cpu: usize, time: u64) {
        self.leave(cpu, State::Idle, time);
    }

    fn leave(&mut self, cpu: usize, state: State, time: u64) {
        let it = &mut self.cpus[cpu];
        it.state = state;
        it.time = it.time.max(time);
        if self.turn == Some(cpu) {
            self.turn = None;
        }
    }

    /// Somebody wakes a sleeping CPU at `time`; whether it slept.
    pub(crate) fn wake(&mut self, cpu: usize, time: u64) -> bool {
        let it = &mut self.cpus[cpu];
        let slept = it.state == State::Idle;
        if slept {
            it.state = State::Waking;
            it.time = it.time.max(time);
        }
        slept
    }

    /// The CPU's thread goes its way; its clock.
    pub(crate) fn go(&mut self, cpu: usize) -> u64 {
        let now = self.now;
        let it = &mut self.cpus[cpu];
        if it.state == State::Idle {
            it.time = it.time.max(now);
        }
        it.state = State::Away;
        it.time
    }

    /// The main loop does something, at the time that every awake CPU has reached.
    pub(crate) fn main_busy(&mut self) {
        self.main = Main::Busy;
        if let Some(first) = self.first() {
            self.now = self.now.max(self.cpus[first].time);
        }
    }

    /// The main loop waits, with nothing to do for `after`.
    pub(crate) fn main_waits(&mut self, after: u64) {
        self.main = Main::Waiting;
        self.deadline = self.now.saturating_add(after);
    }

    /// What the main loop does.
    pub(crate) fn main(&self) -> Main {
        self.main
    }

    /// The awake CPU whose clock is furthest behind.
    fn first(&self) -> Option<usize> {
        let awake = self.cpus.iter().enumerate();
        awake
            .filter(|(_, cpu)| cpu.state != State::Idle)
            .min_by_key(|(_, cpu)| cpu.time)
            .map(|(number, _)| number)
    }

    /// Gives the turn to who is next, if nobody has it and nobody's thread is on its way.
    pub(crate) fn next(&mut self) -> Next {
        let on_its_way = |cpu: &Cpu| matches!(cpu.state, State::Waking | State::Away);
        if self.turn.is_some() || self.main == Main::Busy || self.cpus.iter().any(on_its_way) {
            return Next::Nobody;
        }
        match self.first() {
            Some(cpu) if self.cpus[cpu].time < self.deadline => {
                self.turn = Some(cpu);
                Next::Cpu(cpu)
            }
            None if self.deadline == NEVER => Next::Nobody,
            _ => {
                self.now = self.now.max(self.deadline);
                self.main = Main::Busy;
                Next::Main
            }
        }
    }

    /// How far the CPU may get, its clock being at `time`.
    pub(crate) fn horizon(&self, cpu: usize, time: u64) -> u64 {
        let quantum = if self.fine {
            self.quanta.fine
        } else {
            self.quanta.coarse
        };
        let others = self.cpus.iter().enumerate();
        let least = others
            .filter(|(other, it)| *other != cpu && it.state != State::Idle)
            .map(|(_, it)| it.time)
            .min();
        let end = match least {
            Some(least) => least + quantum,
            None => time + ALONE * quantum,
        };
        end.min(self.deadline).max(time)
    }
}

#[cfg(test)]
mod tests {
    use super::{NEVER, Next, Quanta, Schedule};

    fn two_awake() -> Schedule {
        let mut schedule = Schedule::new();
        schedule.configure(Quanta {
            fine: 1000,
            coarse: 50_000,
        });
        schedule.measure(true);
        schedule.main_waits(NEVER);
        for cpu in 0..2 {
            schedule.wake(cpu, 0);
            schedule.go(cpu);
            schedule.park(cpu, 0);
        }
        schedule
    }

    #[test]
    fn who_is_furthest_behind_runs_a_quantum_past_the_next() {
        let mut schedule = two_awake();
        assert_eq!(schedule.next(), Next::Cpu(0));
        assert_eq!(schedule.next(), Next::Nobody);
        assert_eq!(schedule.horizon(0, 0), 1000);
        schedule.go(0);
        schedule.park(0, 1003);
        assert_eq!(schedule.next(), Next::Cpu(1));
        assert_eq!(schedule.horizon(1, 0), 2003);
    }

    #[test]
    fn debts_survive_sleep() {
        let mut schedule = two_awake();
        schedule.sleep(0, 5000);
        schedule.sleep(1, 100);
        assert!(schedule.wake(0, 200));
        assert_eq!(schedule.time(0), 5000);
        assert!(!schedule.wake(0, 9000));
        assert!(schedule.wake(1, 200));
        assert_eq!(schedule.time(1), 200);
    }

    #[test]
    fn who_sleeps_when_measuring_starts_begins_with_the_others() {
        let mut schedule = two_awake();
        schedule.sleep(1, 40_000);
        assert_eq!(schedule.align(700), 40_000);
        assert_eq!((schedule.time(0), schedule.time(1)), (0, 40_000));
        schedule.sleep(0, 40_010);
        assert_eq!(schedule.align(50_000), 50_000);
        assert!(schedule.wake(0, 50_100) && schedule.wake(1, 50_100));
        assert_eq!((schedule.time(0), schedule.time(1)), (50_100, 50_100));
    }

    #[test]
    fn the_main_loop_is_due_when_all_have_reached_its_deadline() {
        let mut schedule = two_awake();
        schedule.main_waits(700);
        assert_eq!(schedule.next(), Next::Cpu(0));
        assert_eq!(schedule.horizon(0, 0), 700);
        schedule.go(0);
        schedule.park(0, 700);
        assert_eq!(schedule.next(), Next::Cpu(1));
        schedule.go(1);
        schedule.park(1, 701);
        assert_eq!(schedule.next(), Next::Main);
        assert_eq!(schedule.now(), 700);
        assert_eq!(schedule.next(), Next::Nobody);
        schedule.main_waits(NEVER);
        assert_eq!(schedule.next(), Next::Cpu(0));
    }

    #[test]
    fn idle_time_is_jumped_over() {
        let mut schedule = two_awake();
        schedule.sleep(0, 10);
        schedule.sleep(1, 20);
        assert_eq!(schedule.next(), Next::Nobody);
        schedule.main_waits(1_000_000);
        assert_eq!(schedule.next(), Next::Main);
        assert_eq!(schedule.now(), 1_000_000);
        schedule.wake(1, schedule.now());
        assert_eq!(schedule.time(1), 1_000_000);
    }

    #[test]
    fn nobody_has_a_turn_while_a_woken_thread_is_on_its_way() {
        let mut schedule = two_awake();
        schedule.sleep(1, 0);
        assert_eq!(schedule.next(), Next::Cpu(0));
        schedule.go(0);
        schedule.wake(1, 300);
        schedule.park(0, 310);
        assert_eq!(schedule.next(), Next::Nobody);
        schedule.go(1);
        assert_eq!(schedule.next(), Next::Nobody);
        schedule.park(1, 300);
        assert_eq!(schedule.next(), Next::Cpu(1));
    }

    #[test]
    fn the_main_loop_waits_for_who_was_woken_for_nothing() {
        let mut schedule = two_awake();
        schedule.sleep(0, 10);
        schedule.sleep(1, 20);
        schedule.main_waits(500);
        schedule.wake(1, 30);
        assert_eq!(schedule.next(), Next::Nobody);
        schedule.sleep(1, 30);
        assert_eq!(schedule.next(), Next::Main);
    }

    #[test]
    fn who_is_woken_counts_before_its_thread_knows() {
        let mut schedule = two_awake();
        schedule.sleep(1, 0);
        assert_eq!(schedule.next(), Next::Cpu(0));
        assert!(schedule.horizon(0, 0) > 1000);
        schedule.wake(1, 300);
        assert_eq!(schedule.horizon(0, 300), 1300);
    }
}
