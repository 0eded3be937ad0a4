//! How long exits take, as a log2 histogram per CPU: stalls are what users of live migration complain about.
//!
//! Off by default: measuring costs two reads of the counter per exit, which a count of instructions must not contain.
//! When on, an exit is measured from its first line of Rust until what it asked for is done. Choosing who runs next, and waiting
//! for work, are no part of it.

use core::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use crate::arch;

/// Bucket `n` holds durations below 2^n ticks that bucket `n - 1` does not.
const BUCKETS: usize = 40;

/// The exits of one CPU. Only that CPU adds; [`ExitTimes::restart`] is called while it is not in a guest.
#[derive(Debug)]
pub struct ExitTimes {
    /// [`MEASURED`] and [`STEPPED`]. One word, so that an exit that is neither looks once.
    watched: AtomicU8,
    buckets: [AtomicU64; BUCKETS],
    longest: AtomicU64,
}

impl Default for ExitTimes {
    fn default() -> Self {
        Self {
            watched: AtomicU8::new(0),
            buckets: core::array::from_fn(|_| AtomicU64::new(0)),
            longest: AtomicU64::new(0),
        }
    }
}

/// How long exits take is measured.
const MEASURED: u8 = 1 << 0;
/// The guest steps over its instructions one by one.
const STEPPED: u8 = 1 << 1;

/// Exits of any number of CPUs together.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Histogram {
    buckets: [u64; BUCKETS],
    longest: u64,
}

impl ExitTimes {
    /// Whether exits are measured, or of a guest that steps.
    #[inline]
    pub fn is_watched(&self) -> bool {
        self.watched.load(Ordering::Relaxed) != 0
    }

    #[inline]
    fn is_measuring(&self) -> bool {
        self.watched.load(Ordering::Relaxed) & MEASURED != 0
    }

    /// The guest that this CPU runs from now on steps, or does not.
    pub fn set_stepped(&self, stepped: bool) {
        self.set(STEPPED, stepped);
    }

    fn set(&self, flag: u8, on: bool) {
        // By the controller and by the CPU itself, each its own flag.
        match on {
            true => self.watched.fetch_or(flag, Ordering::Relaxed),
            false => self.watched.fetch_and(!flag, Ordering::Relaxed),
        };
    }

    /// An exit begins: what to hand to [`ExitTimes::end`]. `None` while nothing is measured.
    #[inline]
    pub fn begin(&self) -> Option<u64> {
        self.is_measuring().then(arch::counter)
    }

    /// The exit that began at `begun` is over.
    #[inline]
    pub fn end(&self, begun: Option<u64>) {
        if let Some(begun) = begun {
            self.add(arch::counter().wrapping_sub(begun));
        }
    }

    #[cold]
    fn add(&self, ticks: u64) {
        let bucket = (u64::BITS - ticks.leading_zeros()) as usize;
        if let Some(count) = self.buckets.get(bucket.min(BUCKETS - 1)) {
            count.store(count.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        }
        if ticks > self.longest.load(Ordering::Relaxed) {
            self.longest.store(ticks, Ordering::Relaxed);
        }
    }

    /// Forgets everything and measures from now on, or no longer.
    pub fn restart(&self, measuring: bool) {
        self.buckets
            .iter()
            .for_each(|count| count.store(0, Ordering::Relaxed));
        self.longest.store(0, Ordering::Relaxed);
        self.set(MEASURED, measuring);
    }
}

impl Histogram {
    /// All exits that `times` have measured since they were restarted.
    pub fn of<'a>(times: impl Iterator<Item = &'a ExitTimes>) -> Self {
        let mut sum = Self {
            buckets: [0; BUCKETS],
            longest: 0,
        };
        for times in times {
            for (sum, count) in sum.buckets.iter_mut().zip(&times.buckets) {
                *sum += count.load(Ordering::Relaxed);
            }
            sum.longest = sum.longest.max(times.longest.load(Ordering::Relaxed));
        }
        sum
    }

    /// Ticks that no exit took longer than.
    pub fn longest_ticks(&self) -> u64 {
        self.longest
    }

    /// Ticks that 99 of 100 exits did not exceed, rounded up to a power of two, but no more than the longest took.
    pub fn p99_ticks(&self) -> u64 {
        let total: u64 = self.buckets.iter().sum();
        let enough = total - total / 100;
        let mut seen = 0;
        for (bucket, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= enough {
                return (1 << bucket).min(self.longest);
            }
        }
        self.longest
    }
}

#[cfg(test)]
mod tests {
    use super::{ExitTimes, Histogram};

    fn histogram(ticks: impl IntoIterator<Item = u64>) -> Histogram {
        let times = ExitTimes::default();
        ticks.into_iter().for_each(|ticks| times.add(ticks));
        Histogram::of([&times].into_iter())
    }

    #[test]
    fn the_ninety_ninth_percentile_ignores_one_in_a_hundred() {
        let sum = histogram((0..99).map(|_| 100).chain([1_000_000]));
        assert_eq!((sum.p99_ticks(), sum.longest_ticks()), (128, 1_000_000));
        let sum = histogram((0..98).map(|_| 100).chain([1_000_000, 1_000_000]));
        assert_eq!(sum.p99_ticks(), 1_000_000);
    }

    #[test]
    fn no_exit_at_all_took_no_time() {
        assert_eq!(histogram([]).p99_ticks(), 0);
    }

    #[test]
    fn extreme_durations_find_a_bucket() {
        assert_eq!(histogram([0]).p99_ticks(), 0);
        assert_eq!(histogram([u64::MAX]).longest_ticks(), u64::MAX);
    }

    #[test]
    fn nothing_is_measured_until_asked_for() {
        let times = ExitTimes::default();
        assert_eq!(times.begin(), None);
        times.restart(true);
        assert!(times.begin().is_some());
    }
}
