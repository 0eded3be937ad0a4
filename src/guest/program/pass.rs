//! Passes over memory: what is measured.
//!
//! The sequential store loop is 4 instructions a page, 16 with the write log; the kernel's memstress guest needs about 33.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use vellum::guest::abi::{DATA, LOGS, flags};

use super::{Done, asm, params, this_area};

const PAGE_SHIFT: u64 = 12;
const STORES_PER_POLL: u64 = 64;

/// A xorshift generator (Marsaglia 2003, "Xorshift RNGs"); the bench runs the same one.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// The write log of this vCPU: one bit a page from the start of its region.
struct Log {
    words: u64,
    region: u64,
}

impl Log {
    fn new() -> Self {
        let index = this_area().index.load(Relaxed);
        Self {
            words: LOGS + index * params().log_bytes,
            region: DATA + index * params().region_bytes,
        }
    }

    fn record(&self, address: u64) {
        let page = (address - self.region) >> PAGE_SHIFT;
        let word: &AtomicU64 = asm::place(self.words + page / 64 * 8);
        word.store(word.load(Relaxed) | 1 << (page % 64), Relaxed);
    }
}

/// One pass: see [`vellum::guest::abi::op::PASS`].
pub(super) fn run(base: u64, steps: u64, stride: u64, how: u64, seed_and_value: u64) -> Done {
    let percent = how & flags::WRITE_PERCENT;
    let value = seed_and_value & u64::from(u32::MAX);
    let log = (how & flags::LOG != 0).then(Log::new);
    if percent >= 100 && how & flags::RANDOM == 0 {
        return sequential(base, steps, stride, value, log.as_ref());
    }
    let mut random = Random::new(seed_and_value >> 32);
    let mut stores = 0;
    let mut sum = 0_u64;
    for step in 0..steps {
        let at = if how & flags::RANDOM != 0 {
            random.below(steps)
        } else {
            step
        };
        let address = base + at * stride;
        if percent >= 100 || random.below(100) < percent {
            asm::store(address, value << 32 | at);
            stores += 1;
            if let Some(log) = &log {
                log.record(address);
            }
        } else {
            sum = sum.wrapping_add(asm::load(address));
        }
    }
    Done::ok(stores, sum)
}

#[inline(never)]
fn sequential(base: u64, steps: u64, stride: u64, value: u64, log: Option<&Log>) -> Done {
    let end = base + steps * stride;
    let mut address = base;
    match log {
        Some(log) => {
            while address != end {
                asm::store(address, value);
                log.record(address);
                address += stride;
            }
        }
        None => {
            while address != end {
                asm::store(address, value);
                address += stride;
            }
        }
    }
    Done::ok(steps, 0)
}

/// Adds to a word that others add to.
pub(super) fn add(address: u64, times: u64) -> Done {
    let word: &AtomicU64 = asm::place(address);
    for _ in 0..times {
        word.fetch_add(1, Relaxed);
    }
    Done::ok(times, 0)
}

/// Random stores until told to stop. Values differ from store to store, so that a lost one shows.
pub(super) fn free_run(base: u64, pages: u64, seed: u64) -> Done {
    let area = this_area();
    let mut random = Random::new(seed);
    let mut stores = 0_u64;
    while area.stop.load(Relaxed) == 0 {
        for _ in 0..STORES_PER_POLL {
            let at = random.below(pages << PAGE_SHIFT) & !7;
            stores += 1;
            asm::store(base + at, seed << 48 ^ stores);
        }
    }
    Done::ok(stores, 0)
}

/// Stores to one part of a region and loads from another, round after round, until told to stop: see
/// [`vellum::guest::abi::op::ROUNDS`].
pub(super) fn rounds(base: u64, pages: u64, stored: u64, loaded: u64) -> Done {
    let area = this_area();
    let mut rounds = 0;
    while area.stop.load(Relaxed) == 0 {
        for address in part(base, pages, stored) {
            asm::store(address, rounds);
        }
        for address in part(base, pages, loaded) {
            asm::load(address);
        }
        rounds += 1;
        area.rounds.store(rounds, Relaxed);
    }
    Done::ok(rounds, 0)
}

/// The addresses of a part's pages.
fn part(base: u64, pages: u64, part: u64) -> impl Iterator<Item = u64> {
    let (first, count) = (part >> 32, part & u64::from(u32::MAX));
    (first..first + count).map(move |page| base + ((page % pages) << PAGE_SHIFT))
}
