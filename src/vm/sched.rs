//! Who runs next on a CPU: a queue of turns, fair by weight. Pure: time, and what wakes a turn, are arguments.
//!
//! Each turn has a *weighted runtime*: the ticks it has run, divided by its weight. The ready turn with the least runs next,
//! so ready turns share the CPU by their weights. A turn that slept, or that comes from elsewhere, has not saved up for now: it
//! is moved up to the queue's floor, which follows the least runtime of those that run or are ready, less a credit for who
//! slept, so that it runs soon and not for long.
//!
//! Changing turns is not free. One that was picked is left alone for a quarter of a slice by all who were ready then, whatever
//! they are owed; if somebody who woke cut its last run shorter than that, by those who wake, too. And who yields gets behind
//! those who would work, not only behind the next who would yield. Without these, many that wait for one by yielding keep it
//! from ever running, and so does one that sleeps until the very moment when the other has been loaded.
//!
//! Weighted runtimes wrap and are compared by their distance.

use alloc::vec::Vec;
use core::ops::RangeInclusive;

/// Weighted runtime of one tick at weight 1.
const UNIT: u64 = 1024;

/// Weights that a turn may have.
pub const WEIGHTS: RangeInclusive<u32> = 1..=1000;

/// The turns of one CPU.
#[derive(Debug)]
pub struct Queue<T> {
    entries: Vec<Entry<T>>,
    floor: u64,
}

#[derive(Debug)]
struct Entry<T> {
    turn: T,
    weight: u32,
    runtime: u64,
    /// Its last run was cut short by somebody who woke, so its next is not.
    cut: bool,
    state: State,
}

/// What a turn does.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    /// Was added, and has no place among the others yet.
    New,
    /// Runs since this tick.
    Running(u64),
    /// Would run, since this tick; whether it gave its last turn away.
    Ready { since: u64, yielded: bool },
    /// Waits to be woken, or for this tick.
    Asleep(Option<u64>),
}

/// How a run ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum End {
    /// It would go on.
    Ready,
    /// It would go on, but another that is ready is to run first.
    Yields,
    /// It sleeps until it is woken, or until this tick.
    Asleep(Option<u64>),
}

/// Memory for a queue's turns, made where allocating is permitted.
#[derive(Debug)]
pub struct Room<T>(Vec<Entry<T>>);

impl<T> Room<T> {
    /// Room for `turns`.
    pub fn of(turns: usize) -> Self {
        Self(Vec::with_capacity(turns))
    }
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> Queue<T> {
    /// A queue without turns, and without room for any.
    pub const fn new() -> Self {
        Self {
            entries: Vec::new(),
            floor: 0,
        }
    }

    /// Number of turns, whatever they do.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether another turn fits.
    pub fn has_room(&self) -> bool {
        self.entries.len() < self.entries.capacity()
    }

    /// Moves into `room`, if it is larger, and leaves the old one there.
    pub fn move_into(&mut self, room: &mut Room<T>) {
        if room.0.capacity() > self.entries.len() && room.0.is_empty() {
            room.0.append(&mut self.entries);
            core::mem::swap(&mut self.entries, &mut room.0);
        }
    }

    /// Adds a turn, which is ready. Allocates unless [`Queue::has_room`].
    pub fn add(&mut self, turn: T, weight: u32) {
        self.entries.push(Entry {
            turn,
            weight: weight.clamp(*WEIGHTS.start(), *WEIGHTS.end()),
            runtime: 0,
            cut: false,
            state: State::New,
        });
    }

    /// Takes out the first turn that `leaves`, with its weight.
    pub fn take(&mut self, leaves: impl Fn(&T) -> bool) -> Option<(T, u32)> {
        let at = self.entries.iter().position(|entry| leaves(&entry.turn))?;
        let entry = self.entries.swap_remove(at);
        Some((entry.turn, entry.weight))
    }

    /// Who runs from `now` on: of those that are ready, or that `woken` names, or whose time has come, the one that is owed
    /// most. A woken one may be behind the others by `credit` ticks at its weight.
    pub fn pick(&mut self, now: u64, credit: u64, woken: impl Fn(&T) -> bool) -> Option<&T> {
        self.wake(now, 0, credit, woken);
        let next = self
            .entries
            .iter_mut()
            .filter(|entry| entry.is_ready())
            .reduce(|least, entry| {
                if is_before(entry.runtime, least.runtime) {
                    entry
                } else {
                    least
                }
            })?;
        next.state = State::Running(now);
        Some(&next.turn)
    }

    /// Whether the running turn has to make way at `now`, after the CPU only waited for `idle` ticks of its run: somebody else
    /// is ready and is owed more, or anything if the slice of the running one, of `credit` ticks, `is_over`. In the first quarter
    /// of a slice only who woke since it began counts, and not even that one if the last run was cut short, too.
    pub fn has_rival(
        &mut self,
        now: u64,
        idle: u64,
        credit: u64,
        is_over: bool,
        woken: impl Fn(&T) -> bool,
    ) -> bool {
        self.wake(now, idle, credit, woken);
        if is_over {
            return self.has_ready();
        }
        let Some((running, began)) = self.running() else {
            return false;
        };
        let runs = running.runtime_at(now, idle);
        let disturbs = now.saturating_sub(began) >= undisturbed(credit);
        self.entries.iter().any(|entry| match entry.state {
            State::Ready { since, .. } => {
                (disturbs || since > began && !running.cut) && is_before(entry.runtime, runs)
            }
            _ => false,
        })
    }

    /// When the running turn makes way for who is ready, if nothing else happens: at the end of its slice, `slice_end`, or as
    /// soon as it may be disturbed if somebody who woke since was owed more from the beginning.
    pub fn makes_way_at(&self, slice_end: u64, credit: u64) -> Option<u64> {
        let (running, began) = self.running()?;
        let is_owed_more = |entry: &Entry<T>| match entry.state {
            State::Ready { since, .. } => {
                since > began && is_before(entry.runtime, running.runtime)
            }
            _ => false,
        };
        let early = self.entries.iter().any(is_owed_more);
        let early = early.then(|| began.saturating_add(undisturbed(credit)));
        self.has_ready()
            .then(|| early.map_or(slice_end, |early| early.min(slice_end)))
    }

    /// The running turn ends at `now`, with slices of `credit` ticks; for `idle` ticks of it the CPU only waited.
    pub fn end(&mut self, now: u64, idle: u64, credit: u64, end: End) {
        self.raise_floor(now, idle);
        let least = self.least_ready();
        for entry in &mut self.entries {
            if let State::Running(began) = entry.state {
                let ran = now.saturating_sub(began.saturating_add(idle));
                entry.runtime = entry.runtime_at(now, idle);
                entry.cut = end == End::Ready && ran < undisturbed(credit);
                // What it was owed it has given away.
                if let Some(least) = least.filter(|_| end == End::Yields)
                    && !is_before(least, entry.runtime)
                {
                    entry.runtime = least.wrapping_add(1);
                }
                entry.state = match end {
                    End::Ready | End::Yields => State::Ready {
                        since: now,
                        yielded: end == End::Yields,
                    },
                    End::Asleep(until) => State::Asleep(until),
                };
            }
        }
    }

    /// When the first sleeper's time comes.
    pub fn alarm(&self) -> Option<u64> {
        let times = self.entries.iter().filter_map(|entry| match entry.state {
            State::Asleep(until) => until,
            _ => None,
        });
        times.min()
    }

    /// Whether a turn is ready that does not run.
    pub fn has_ready(&self) -> bool {
        self.entries.iter().any(Entry::is_ready)
    }

    /// The least runtime of those that are ready and did not yield; if all did, of those.
    fn least_ready(&self) -> Option<u64> {
        let least = |yields: bool| {
            let of_them = self.entries.iter().filter(
                |entry| matches!(entry.state, State::Ready { yielded, .. } if yielded == yields),
            );
            of_them
                .map(|entry| entry.runtime)
                .reduce(|a, b| if is_before(a, b) { a } else { b })
        };
        least(false).or_else(|| least(true))
    }

    fn running(&self) -> Option<(&Entry<T>, u64)> {
        self.entries.iter().find_map(|entry| match entry.state {
            State::Running(began) => Some((entry, began)),
            _ => None,
        })
    }

    /// Has the floor follow the least runtime of those that run or are ready. It never falls.
    fn raise_floor(&mut self, now: u64, idle: u64) {
        let takes_part =
            |entry: &&Entry<T>| matches!(entry.state, State::Running(_) | State::Ready { .. });
        let runtimes = self.entries.iter().filter(takes_part);
        let least = runtimes
            .map(|entry| entry.runtime_at(now, idle))
            .reduce(|a, b| if is_before(a, b) { a } else { b });
        if let Some(least) = least.filter(|least| is_before(self.floor, *least)) {
            self.floor = least;
        }
    }

    /// Gives those their place who were added, or who sleep and are woken.
    fn wake(&mut self, now: u64, idle: u64, credit: u64, woken: impl Fn(&T) -> bool) {
        self.raise_floor(now, idle);
        for entry in &mut self.entries {
            match entry.state {
                // Before its equals, one of whom has the CPU already.
                State::New => entry.runtime = self.floor.wrapping_sub(1),
                State::Asleep(until)
                    if until.is_some_and(|until| until <= now) || woken(&entry.turn) =>
                {
                    let least = self.floor.wrapping_sub(weighted(credit, 0, entry.weight));
                    if is_before(entry.runtime, least) {
                        entry.runtime = least;
                    }
                }
                _ => continue,
            }
            entry.state = State::Ready {
                since: now,
                yielded: false,
            };
        }
    }
}

impl<T> Entry<T> {
    /// Ready, or about to be.
    fn is_ready(&self) -> bool {
        matches!(self.state, State::New | State::Ready { .. })
    }

    /// Its weighted runtime at `now`; if it runs, the CPU only waited for `idle` ticks of that.
    fn runtime_at(&self, now: u64, idle: u64) -> u64 {
        let runs = match self.state {
            State::Running(began) => weighted(now, began.saturating_add(idle), self.weight),
            _ => 0,
        };
        self.runtime.wrapping_add(runs)
    }
}

/// Ticks that a turn runs undisturbed, of a slice of `credit`.
fn undisturbed(credit: u64) -> u64 {
    credit / 4
}

/// Weighted runtime from tick `since` to `now`; none where a clock went backwards.
fn weighted(now: u64, since: u64, weight: u32) -> u64 {
    now.saturating_sub(since).saturating_mul(UNIT) / u64::from(weight.max(1))
}

/// Whether runtime `a` is less than `b`; both within half the range of each other.
fn is_before(a: u64, b: u64) -> bool {
    a.wrapping_sub(b).cast_signed() < 0
}

#[cfg(test)]
mod tests {
    use super::{End, Queue, Room};

    const SLICE: u64 = 1000;

    /// Runs `slices` slices of turns that never sleep; how many each of three got.
    fn shares(queue: &mut Queue<usize>, slices: u64, start: u64) -> [u64; 3] {
        let mut got = [0; 3];
        for slice in 0..slices {
            let now = start + slice * SLICE;
            if let Some(turn) = queue.pick(now, SLICE, |_| false) {
                got[*turn] += 1;
                queue.end(now + SLICE, 0, SLICE, End::Ready);
            }
        }
        got
    }

    #[test]
    fn ready_turns_share_by_their_weights() {
        let mut queue = Queue::new();
        for (turn, weight) in [(0, 100), (1, 300), (2, 100)] {
            queue.add(turn, weight);
        }
        assert_eq!(shares(&mut queue, 1000, 0), [200, 600, 200]);
    }

    #[test]
    fn weights_out_of_range_are_taken_for_the_nearest() {
        let mut queue = Queue::new();
        queue.add(0, 0);
        queue.add(1, u32::MAX);
        let [least, most, _] = shares(&mut queue, 10_010, 0);
        assert_eq!((least, most), (10, 10_000));
    }

    #[test]
    fn runtimes_may_wrap() {
        let mut queue = Queue::new();
        queue.floor = u64::MAX - 100;
        queue.add(0, 1);
        queue.add(1, 1);
        let [first, second, _] = shares(&mut queue, 100, u64::MAX / 2);
        assert_eq!((first, second), (50, 50));
    }

    #[test]
    fn a_sleeper_saves_nothing_up_but_runs_soon() {
        let mut queue = Queue::new();
        queue.add(0, 100);
        queue.add(1, 100);
        assert_eq!(queue.pick(0, SLICE, |_| false), Some(&0));
        queue.end(10, 0, SLICE, End::Asleep(None));
        // The other has the CPU for itself for long.
        for slice in 0..100 {
            let now = 10 + slice * SLICE;
            assert_eq!(queue.pick(now, SLICE, |_| false), Some(&1));
            queue.end(now + SLICE, 0, SLICE, End::Ready);
        }
        let now = 10 + 100 * SLICE;
        assert_eq!(queue.pick(now, SLICE, |turn| *turn == 0), Some(&0));
        queue.end(now + SLICE, 0, SLICE, End::Ready);
        let [first, second, _] = shares(&mut queue, 10, now + SLICE);
        assert!(first <= 6 && second >= 4, "{first} {second}");
    }

    #[test]
    fn a_sleeper_wakes_when_its_time_comes() {
        let mut queue = Queue::new();
        queue.add(0, 1);
        assert_eq!(queue.pick(0, SLICE, |_| false), Some(&0));
        queue.end(1, 0, SLICE, End::Asleep(Some(50)));
        assert_eq!(queue.alarm(), Some(50));
        assert_eq!(queue.pick(49, SLICE, |_| false), None);
        assert_eq!(queue.pick(50, SLICE, |_| false), Some(&0));
        assert_eq!(queue.alarm(), None);
    }

    #[test]
    fn the_running_turn_makes_way_for_who_is_owed_more_or_when_its_slice_is_over() {
        let mut queue = Queue::new();
        queue.add(0, 100);
        assert_eq!(queue.pick(0, SLICE, |_| false), Some(&0));
        assert!(
            !queue.has_rival(SLICE, 0, SLICE, true, |_| false),
            "it is alone"
        );
        queue.add(1, 100);
        assert!(queue.has_ready());
        assert!(queue.has_rival(SLICE, 0, SLICE, false, |_| false));
        queue.end(SLICE, 0, SLICE, End::Ready);
        assert_eq!(queue.pick(SLICE, SLICE, |_| false), Some(&1));
        assert!(!queue.has_rival(SLICE, 0, SLICE, false, |_| false));
        assert!(queue.has_rival(SLICE, 0, SLICE, true, |_| false));
    }

    #[test]
    fn who_yields_runs_after_another_even_if_it_is_owed_more() {
        let mut queue = Queue::new();
        queue.add(0, 100);
        queue.add(1, 100);
        queue.pick(0, SLICE, |_| false);
        queue.end(100 * SLICE, 0, SLICE, End::Ready);
        for turn in 0..10 {
            let now = 100 * SLICE + turn;
            assert_eq!(queue.pick(now, SLICE, |_| false), Some(&1));
            queue.end(now + 1, 0, SLICE, End::Yields);
            assert_eq!(queue.pick(now + 1, SLICE, |_| false), Some(&0));
            queue.end(now + 1, 0, SLICE, End::Yields);
        }
        // Nobody else is there to run first.
        let alone = queue.take(|turn| *turn == 0);
        assert!(alone.is_some());
        queue.pick(200 * SLICE, SLICE, |_| false);
        queue.end(200 * SLICE, 0, SLICE, End::Yields);
        assert_eq!(queue.pick(200 * SLICE, SLICE, |_| false), Some(&1));
    }

    #[test]
    fn many_that_yield_leave_the_cpu_to_the_one_that_works() {
        // What a change of turns takes, and what a turn runs before it yields again.
        const CHANGE: u64 = SLICE / 100;
        let mut queue = Queue::new();
        for turn in 0..64 {
            queue.add(turn, if turn % 2 == 0 { 100 } else { 1000 });
        }
        let (mut now, mut worked) = (0, 0);
        while now < 200 * SLICE {
            let turn = queue.pick(now, SLICE, |_| false).copied();
            let (picked, slice_end) = (now, now + SLICE);
            now += CHANGE;
            if turn != Some(0) {
                now += 1;
                queue.end(now, 0, SLICE, End::Yields);
                continue;
            }
            while !queue.has_rival(now, 0, SLICE, now >= slice_end, |_| false) {
                now += 1;
            }
            worked += now - picked - CHANGE;
            queue.end(now, 0, SLICE, End::Ready);
        }
        // 63 changes beside at least a quarter of a slice.
        assert!(worked > 40 * SLICE, "{worked} of {now}");
    }

    #[test]
    fn who_wakes_and_is_owed_more_runs_at_once() {
        let mut queue = Queue::new();
        queue.add(0, 100);
        queue.add(1, 100);
        queue.pick(0, SLICE, |_| false);
        queue.end(1, 0, SLICE, End::Asleep(None));
        queue.pick(1, SLICE, |_| false);
        queue.end(50 * SLICE, 0, SLICE, End::Ready);
        queue.pick(50 * SLICE, SLICE, |_| false);
        let now = 50 * SLICE + 1;
        assert!(!queue.has_rival(now, 0, SLICE, false, |_| false));
        assert!(queue.has_rival(now, 0, SLICE, false, |turn| *turn == 0));
        assert_eq!(queue.len(), 2);
    }

    /// Runs the queue's turns for `slices` from `start` on, as a CPU does: a turn that nobody would follow runs on.
    fn loaded(queue: &mut Queue<usize>, slices: u64, start: u64) -> [u64; 2] {
        let (mut got, mut now) = ([0; 2], start);
        while now < start + slices * SLICE {
            let turn = *queue.pick(now, SLICE, |_| false).unwrap();
            let (began, mut slice_end) = (now, now + SLICE);
            loop {
                now = queue.makes_way_at(slice_end, SLICE).unwrap_or(slice_end);
                if queue.has_rival(now, 0, SLICE, now >= slice_end, |_| false) {
                    break;
                }
                slice_end = slice_end.max(now + 1);
            }
            got[turn] += now - began;
            queue.end(now, 0, SLICE, End::Ready);
        }
        got
    }

    #[test]
    fn who_ran_alone_owes_nothing_for_it() {
        const ALONE: u64 = 10_000 * SLICE;
        for (weights, idle) in [([100, 100], 0), ([100, 300], 0), ([100, 100], ALONE - 1)] {
            for comes_late in [false, true] {
                let mut queue = Queue::new();
                queue.add(0, weights[0]);
                if !comes_late {
                    queue.add(1, weights[1]);
                    assert_eq!(queue.pick(0, SLICE, |_| false), Some(&0));
                    queue.end(0, 0, SLICE, End::Yields);
                    assert_eq!(queue.pick(0, SLICE, |_| false), Some(&1));
                    queue.end(0, 0, SLICE, End::Asleep(None));
                }
                assert_eq!(queue.pick(0, SLICE, |_| false), Some(&0));
                if comes_late {
                    queue.add(1, weights[1]);
                }
                assert!(queue.has_rival(ALONE, idle, SLICE, true, |turn| *turn == 1));
                queue.end(ALONE, idle, SLICE, End::Ready);
                let got = loaded(&mut queue, 100, ALONE);
                let expected =
                    100 * SLICE * u64::from(weights[1]) / u64::from(weights[0] + weights[1]);
                let apart = got[1].abs_diff(expected);
                assert!(
                    apart <= 3 * SLICE,
                    "{weights:?} {idle} {comes_late}: {got:?}"
                );
            }
        }
    }

    #[test]
    fn who_went_to_sleep_after_running_alone_owes_nothing_for_it_either() {
        const ALONE: u64 = 10_000 * SLICE;
        let mut queue = Queue::new();
        queue.add(0, 100);
        queue.add(1, 100);
        assert_eq!(queue.pick(0, SLICE, |_| false), Some(&0));
        queue.end(0, 0, SLICE, End::Asleep(None));
        assert_eq!(queue.pick(0, SLICE, |_| false), Some(&1));
        queue.end(ALONE, 0, SLICE, End::Asleep(None));
        assert_eq!(queue.pick(ALONE, SLICE, |turn| *turn == 0), Some(&0));
        assert!(!queue.has_rival(ALONE + 1, 0, SLICE, false, |_| false));
        let woken = |turn: &usize| *turn == 1;
        assert!(queue.has_rival(ALONE + SLICE, 0, SLICE, true, woken));
        queue.end(ALONE + SLICE, 0, SLICE, End::Ready);
        let got = loaded(&mut queue, 100, ALONE + SLICE);
        assert!(got[0].abs_diff(got[1]) <= 4 * SLICE, "{got:?}");
    }

    #[test]
    fn who_wakes_right_after_each_change_leaves_the_other_its_share() {
        // What loading a turn takes, and putting it.
        const CHANGE: u64 = SLICE / 100;
        for (weights, least) in [([100, 100], 350), ([300, 100], 150)] {
            let mut queue = Queue::new();
            queue.add(0, weights[0]);
            queue.add(1, weights[1]);
            let (mut now, mut worked) = (0, 0);
            while now < 1000 * SLICE {
                let turn = *queue.pick(now, SLICE, |_| false).unwrap();
                let picked = now;
                now += CHANGE;
                if turn == 0 {
                    // It sleeps until the other is about to run its first instruction.
                    now += CHANGE;
                    queue.end(now, 0, SLICE, End::Asleep(Some(now + CHANGE + 1)));
                    continue;
                }
                let slice_end = picked + SLICE;
                loop {
                    let ends = queue.makes_way_at(slice_end, SLICE).unwrap_or(slice_end);
                    let (until, before) = (ends.min(queue.alarm().unwrap_or(ends)), now);
                    now = now.max(until);
                    worked += now - before;
                    if queue.has_rival(now, 0, SLICE, now >= slice_end, |_| false) {
                        break;
                    }
                }
                now += CHANGE;
                queue.end(now, 0, SLICE, End::Ready);
            }
            assert!(worked > least * SLICE, "{weights:?}: {worked} of {now}");
        }
    }

    #[test]
    fn waiting_is_not_running() {
        let mut queue = Queue::new();
        queue.add(0, 100);
        queue.add(1, 100);
        queue.pick(0, SLICE, |_| false);
        queue.end(100 * SLICE, 99 * SLICE, SLICE, End::Ready);
        queue.pick(100 * SLICE, SLICE, |_| false);
        queue.end(102 * SLICE, 0, SLICE, End::Ready);
        assert_eq!(queue.pick(102 * SLICE, SLICE, |_| false), Some(&0));
    }

    #[test]
    fn room_is_made_outside_and_the_old_comes_back() {
        let mut queue = Queue::new();
        assert!(!queue.has_room());
        let mut room = Room::of(2);
        queue.move_into(&mut room);
        queue.add(7, 1);
        queue.add(8, 1);
        assert!(!queue.has_room() && queue.len() == 2);
        queue.move_into(&mut room);
        assert!(!queue.has_room(), "too small, so nothing moves");
        let mut room = Room::of(4);
        queue.move_into(&mut room);
        assert!(queue.has_room() && room.0.is_empty());
        assert_eq!(queue.take(|turn| *turn == 7), Some((7, 1)));
        assert_eq!(queue.take(|turn| *turn == 7), None);
        assert!(!queue.is_empty());
    }
}
