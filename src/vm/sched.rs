//! Who runs next on a CPU: a queue of turns, fair by weight. Pure: time, and what wakes a turn, are arguments.
//!
//! Each turn has a *weighted runtime*: the ticks it has run, divided by its weight. The ready turn with the least runs next,
//! so ready turns share the CPU by their weights. A turn that slept has not saved up for later: when it wakes it is moved
//! up to the queue's floor, the least runtime of those that lately ran, less a credit, so that it runs soon and not for long.
//!
//! Changing turns is not free. One that was picked is left alone for a quarter of a slice by all who were ready then, whatever
//! they are owed; and who yields gets behind those who would work, not only behind the next who would yield. Without either,
//! many that wait for one by yielding keep it from ever running.
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
    state: State,
}

/// What a turn does.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
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
            runtime: self.floor,
            state: State::Ready {
                since: 0,
                yielded: false,
            },
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
        self.wake(now, credit, woken);
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
        if is_before(self.floor, next.runtime) {
            self.floor = next.runtime;
        }
        Some(&next.turn)
    }

    /// Whether the running turn has to make way at `now`: somebody else is ready and is owed more, or anything if the slice
    /// of the running one, of `credit` ticks, `is_over`. In the first quarter of a slice only who woke since it began counts.
    pub fn has_rival(
        &mut self,
        now: u64,
        credit: u64,
        is_over: bool,
        woken: impl Fn(&T) -> bool,
    ) -> bool {
        self.wake(now, credit, woken);
        if is_over {
            return self.has_ready();
        }
        let running = self.entries.iter().find_map(|entry| match entry.state {
            State::Running(since) => Some((entry, since)),
            _ => None,
        });
        let Some((running, began)) = running else {
            return false;
        };
        let runs = running
            .runtime
            .wrapping_add(weighted(now, began, running.weight));
        let disturbs = now.saturating_sub(began) >= credit / 4;
        self.entries.iter().any(|entry| match entry.state {
            State::Ready { since, .. } => {
                (disturbs || since > began) && is_before(entry.runtime, runs)
            }
            _ => false,
        })
    }

    /// The running turn ends at `now`; for `idle` ticks of it the CPU only waited.
    pub fn end(&mut self, now: u64, idle: u64, end: End) {
        let least = self.least_ready();
        for entry in &mut self.entries {
            if let State::Running(since) = entry.state {
                let since = since.wrapping_add(idle);
                entry.runtime = entry
                    .runtime
                    .wrapping_add(weighted(now, since, entry.weight));
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

    fn wake(&mut self, now: u64, credit: u64, woken: impl Fn(&T) -> bool) {
        for entry in &mut self.entries {
            let State::Asleep(until) = entry.state else {
                continue;
            };
            if until.is_some_and(|until| until <= now) || woken(&entry.turn) {
                let least = self.floor.wrapping_sub(weighted(credit, 0, entry.weight));
                if is_before(entry.runtime, least) {
                    entry.runtime = least;
                }
                entry.state = State::Ready {
                    since: now,
                    yielded: false,
                };
            }
        }
    }
}

impl<T> Entry<T> {
    fn is_ready(&self) -> bool {
        matches!(self.state, State::Ready { .. })
    }
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
                queue.end(now + SLICE, 0, End::Ready);
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
        queue.end(10, 0, End::Asleep(None));
        // The other has the CPU for itself for long.
        for slice in 0..100 {
            let now = 10 + slice * SLICE;
            assert_eq!(queue.pick(now, SLICE, |_| false), Some(&1));
            queue.end(now + SLICE, 0, End::Ready);
        }
        let now = 10 + 100 * SLICE;
        assert_eq!(queue.pick(now, SLICE, |turn| *turn == 0), Some(&0));
        queue.end(now + SLICE, 0, End::Ready);
        let [first, second, _] = shares(&mut queue, 10, now + SLICE);
        assert!(first <= 6 && second >= 4, "{first} {second}");
    }

    #[test]
    fn a_sleeper_wakes_when_its_time_comes() {
        let mut queue = Queue::new();
        queue.add(0, 1);
        assert_eq!(queue.pick(0, SLICE, |_| false), Some(&0));
        queue.end(1, 0, End::Asleep(Some(50)));
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
            !queue.has_rival(SLICE, SLICE, true, |_| false),
            "it is alone"
        );
        queue.add(1, 100);
        assert!(queue.has_ready());
        assert!(queue.has_rival(SLICE, SLICE, false, |_| false));
        queue.end(SLICE, 0, End::Ready);
        assert_eq!(queue.pick(SLICE, SLICE, |_| false), Some(&1));
        assert!(!queue.has_rival(SLICE, SLICE, false, |_| false));
        assert!(queue.has_rival(SLICE, SLICE, true, |_| false));
    }

    #[test]
    fn who_yields_runs_after_another_even_if_it_is_owed_more() {
        let mut queue = Queue::new();
        queue.add(0, 100);
        queue.add(1, 100);
        queue.pick(0, SLICE, |_| false);
        queue.end(100 * SLICE, 0, End::Ready);
        for turn in 0..10 {
            let now = 100 * SLICE + turn;
            assert_eq!(queue.pick(now, SLICE, |_| false), Some(&1));
            queue.end(now + 1, 0, End::Yields);
            assert_eq!(queue.pick(now + 1, SLICE, |_| false), Some(&0));
            queue.end(now + 1, 0, End::Yields);
        }
        // Nobody else is there to run first.
        let alone = queue.take(|turn| *turn == 0);
        assert!(alone.is_some());
        queue.pick(200 * SLICE, SLICE, |_| false);
        queue.end(200 * SLICE, 0, End::Yields);
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
        while now < 1000 * SLICE {
            let turn = queue.pick(now, SLICE, |_| false).copied();
            let (picked, slice_end) = (now, now + SLICE);
            now += CHANGE;
            if turn != Some(0) {
                now += 1;
                queue.end(now, 0, End::Yields);
                continue;
            }
            while !queue.has_rival(now, SLICE, now >= slice_end, |_| false) {
                now += 1;
            }
            worked += now - picked - CHANGE;
            queue.end(now, 0, End::Ready);
        }
        // 63 changes beside at least a quarter of a slice.
        assert!(worked > 200 * SLICE, "{worked} of {now}");
    }

    #[test]
    fn who_wakes_and_is_owed_more_runs_at_once() {
        let mut queue = Queue::new();
        queue.add(0, 100);
        queue.add(1, 100);
        queue.pick(0, SLICE, |_| false);
        queue.end(1, 0, End::Asleep(None));
        queue.pick(1, SLICE, |_| false);
        queue.end(50 * SLICE, 0, End::Ready);
        queue.pick(50 * SLICE, SLICE, |_| false);
        let now = 50 * SLICE + 1;
        assert!(!queue.has_rival(now, SLICE, false, |_| false));
        assert!(queue.has_rival(now, SLICE, false, |turn| *turn == 0));
        assert_eq!(queue.len(), 2);
    }

    #[test]
    fn waiting_is_not_running() {
        let mut queue = Queue::new();
        queue.add(0, 100);
        queue.add(1, 100);
        queue.pick(0, SLICE, |_| false);
        queue.end(100 * SLICE, 99 * SLICE, End::Ready);
        queue.pick(100 * SLICE, SLICE, |_| false);
        queue.end(102 * SLICE, 0, End::Ready);
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
