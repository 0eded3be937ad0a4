//! A scan in the background: passes of `aging` over one slot, one every period, on no more than a share of a CPU.
//!
//! Whoever has a CPU to spare calls [`Scan::step`] until it says to come back later. A step ages one chunk; the pass ends with one
//! invalidation, and the next begins a period after this one began. So an access is missed if it falls between the look at
//! its page and the end of that pass, through an entry that was cached before: keep passes short against the period.

use alloc::sync::Arc;

use crate::arch;
use crate::mmu::aging::{Aged, Precision, Sighting};
use crate::mmu::error::Error;
use crate::mmu::heat::IdleMap;
use crate::mmu::slot::{MemorySlot, SlotId};
use crate::mmu::stage2::Stage2;
use crate::sync::quiescence::CpuId;

/// Pages that one step looks at: 16 MiB, eight tables.
const CHUNK_PAGES: u64 = 4096;
/// Longest period.
const MOST_SECONDS: u64 = 3600;

/// How often, and on how much of a CPU.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Pace {
    /// Ticks of the counter from the beginning of one pass to that of the next: 1 to an hour's.
    pub period_ticks: u64,
    /// Percent of the caller's time that steps may take, 1 to 100.
    pub budget_percent: u64,
}

impl Pace {
    /// Refuses what is out of bounds.
    ///
    /// # Errors
    ///
    /// [`Error::BadPeriod`], [`Error::BadBudget`].
    pub fn check(&self) -> Result<(), Error> {
        let most = arch::counter_hz().saturating_mul(MOST_SECONDS);
        if !(1..=most).contains(&self.period_ticks) {
            return Err(Error::BadPeriod(self.period_ticks));
        }
        if !(1..=100).contains(&self.budget_percent) {
            return Err(Error::BadBudget(self.budget_percent));
        }
        Ok(())
    }

    /// Ticks to wait after work of `spent` ticks.
    fn rest_after(&self, spent: u64) -> u64 {
        let rest = u128::from(spent) * u128::from(100 - self.budget_percent);
        u64::try_from(rest / u128::from(self.budget_percent)).unwrap_or(u64::MAX)
    }
}

/// What a step came to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Step {
    /// Nothing was done: come back in this many ticks.
    Later(u64),
    /// A chunk was looked at.
    Going,
    /// A pass has ended.
    PassEnded(Aged),
}

/// A scan of one slot. Its owner steps it; nobody else knows it.
#[derive(Debug)]
pub struct Scan {
    id: SlotId,
    /// Which slot had that name when the scan began: names are used again.
    slot: Arc<MemorySlot>,
    pace: Pace,
    precision: Precision,
    map: IdleMap,
    /// Where the next step looks.
    at: u64,
    pass: Aged,
    pass_began: u64,
    not_before: u64,
}

impl Scan {
    /// A scan of slot `id`, whose first pass begins with the first step.
    ///
    /// # Errors
    ///
    /// [`Error::NoSlot`], and those of [`Pace::check`].
    pub fn new(
        stage2: &Stage2,
        id: SlotId,
        pace: Pace,
        precision: Precision,
    ) -> Result<Self, Error> {
        pace.check()?;
        let slot = stage2.named(id)?;
        Ok(Self {
            id,
            pace,
            precision,
            map: IdleMap::new(slot.pages),
            slot,
            at: 0,
            pass: Aged::default(),
            pass_began: 0,
            not_before: 0,
        })
    }

    /// Looks at the next chunk, if period and budget permit. `cpu` is the calling CPU.
    ///
    /// # Errors
    ///
    /// [`Error::NoSlot`] once the slot has been removed, even where another has its name now: the scan is over.
    pub fn step(&mut self, stage2: &Stage2, cpu: CpuId) -> Result<Step, Error> {
        let begun = arch::counter();
        self.still_there(stage2)?;
        if begun < self.not_before {
            return Ok(Step::Later(self.not_before - begun));
        }
        if self.at == 0 {
            self.pass = Aged::default();
            self.pass_began = begun;
        }
        let to = (self.at + CHUNK_PAGES).min(self.slot.pages);
        let last = to == self.slot.pages;
        let precision = if last {
            self.precision
        } else {
            // Once a pass is enough.
            Precision::Imprecise
        };
        let map = &mut self.map;
        let see = |sighting: Sighting| map.see(sighting);
        let aged = stage2.age(cpu, self.id, self.at, to, precision, see)?;
        self.still_there(stage2)?;
        self.pass.leaves += aged.leaves;
        self.pass.young += aged.young;
        let now = arch::counter();
        let rested = now.saturating_add(self.pace.rest_after(now.wrapping_sub(begun)));
        if !last {
            self.at = to;
            self.not_before = rested;
            return Ok(Step::Going);
        }
        self.at = 0;
        self.not_before = rested.max(self.pass_began.saturating_add(self.pace.period_ticks));
        self.map.end_pass();
        Ok(Step::PassEnded(self.pass))
    }

    /// The slot may have been removed, and its name given to another.
    fn still_there(&self, stage2: &Stage2) -> Result<(), Error> {
        if Arc::ptr_eq(&self.slot, &stage2.named(self.id)?) {
            Ok(())
        } else {
            Err(Error::NoSlot)
        }
    }

    /// What has been found so far.
    pub fn map(&self) -> &IdleMap {
        &self.map
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::Pace;

    #[test]
    fn a_budget_is_a_share_of_time() {
        let rest = |budget_percent, spent| {
            let pace = Pace {
                period_ticks: 1,
                budget_percent,
            };
            pace.rest_after(spent)
        };
        assert_eq!(
            (rest(100, 500), rest(50, 500), rest(1, 500)),
            (0, 500, 49500)
        );
        assert_eq!(rest(1, u64::MAX), u64::MAX);
    }
}
