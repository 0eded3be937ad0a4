//! Time and counts, as differences.

use crate::arch;
use crate::sync::percpu;
use crate::trace::times::Histogram;
use crate::trace::{EVENT_NAMES, EVENTS};

use super::scene::Outcome;

/// A moment of the physical counter.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moment(u64);

impl Moment {
    /// Now.
    pub(super) fn now() -> Self {
        Self(arch::counter())
    }

    /// Nanoseconds from `earlier` to this.
    pub(super) fn since_ns(self, earlier: Self) -> u64 {
        nanoseconds(self.0.wrapping_sub(earlier.0))
    }

    /// Nanoseconds since.
    pub(super) fn elapsed_ns(self) -> u64 {
        nanoseconds(arch::counter().wrapping_sub(self.0))
    }
}

/// `ticks` of the architected counters in nanoseconds.
pub(super) fn nanoseconds(ticks: u64) -> u64 {
    let hz = u128::from(arch::counter_hz().max(1));
    u64::try_from(u128::from(ticks) * 1_000_000_000 / hz).unwrap_or(u64::MAX)
}

/// The pass of the vCPU that took longest, by its own clock, in nanoseconds.
pub(super) fn longest_ns(outcomes: &[Outcome]) -> u64 {
    let ticks = outcomes.iter().map(|outcome| outcome.ticks);
    nanoseconds(ticks.max().unwrap_or(0))
}

/// How long `work` took.
pub(super) fn timed<T>(work: impl FnOnce() -> T) -> (T, u64) {
    let start = Moment::now();
    let result = work();
    (result, start.elapsed_ns())
}

/// The sums of all CPUs' counters at some moment, or those of the controller alone.
#[derive(Clone, Copy, Debug)]
pub(super) struct Counts {
    values: [u64; EVENTS],
    whose: Whose,
}

#[derive(Clone, Copy, Debug)]
enum Whose {
    All,
    Own,
}

impl Counts {
    /// Now.
    pub(super) fn now() -> Self {
        Self::of(Whose::All)
    }

    /// What the controller itself has counted by now.
    pub(super) fn own() -> Self {
        Self::of(Whose::Own)
    }

    fn of(whose: Whose) -> Self {
        let values = EVENT_NAMES.map(|(event, _)| match whose {
            Whose::All => percpu::all()
                .iter()
                .map(|block| block.counters.read(event))
                .sum(),
            Whose::Own => percpu::this().counters.read(event),
        });
        Self { values, whose }
    }

    /// What was counted since, by name.
    pub(super) fn since(self) -> impl Iterator<Item = (&'static str, u64)> {
        let now = Self::of(self.whose);
        EVENT_NAMES
            .iter()
            .zip(now.values)
            .zip(self.values)
            .map(|(((_, name), now), then)| (*name, now.wrapping_sub(then)))
    }
}

/// Measures the exits of all CPUs from now on, or no longer. Every vCPU waits for work.
pub(super) fn measure_exits(measuring: bool) {
    percpu::all()
        .iter()
        .for_each(|block| block.exit_times.restart(measuring));
}

/// What exits have taken since, by name; nothing when none was measured.
pub(super) fn exit_times() -> impl Iterator<Item = (&'static str, u64)> {
    let sum = Histogram::of(percpu::all().iter().map(|block| &block.exit_times));
    let longest = sum.longest_ticks();
    [
        ("exit_p99_ns", nanoseconds(sum.p99_ticks())),
        ("exit_max_ns", nanoseconds(longest)),
    ]
    .into_iter()
    .filter(move |_| longest != 0)
}
