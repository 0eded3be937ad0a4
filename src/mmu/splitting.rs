//! When blocks are split, how, and how fast: what a VM chooses when it is created.
//!
//! | policy | blocks are split | reproduces |
//! |---|---|---|
//! | [`Policy::Fault`] | by the first write to each | the 2022 kernel, but with all 512 leaves filled in |
//! | [`Policy::FaultEmpty`] | by the first write; the new table maps that page only | mainline KVM without eager splitting |
//! | [`Policy::Enable`] | all at once, when logging is enabled | KVM's eager splitting |
//! | [`Policy::Clear`] | those that a `clear` takes pages of | KVM's eager splitting with initially-all-set |
//!
//! # Break-before-make levels
//!
//! [`Bbm::Zero`] is what every CPU permits. [`Bbm::Two`] replaces a live block by a table in one step (FEAT_BBM level 2, DDI
//! 0487 issue K.a, D8.16.1). Level 1 (the nT bit: the new entry may fault but is never incoherent) is not used: a guest
//! that faults on nT entries stalls as it does in a level-0 window, nT has to be taken away again by a second pass of
//! stores and invalidations, and no core that this project knows has level 1 without level 2.

use crate::mmu::bbm::MOST_BATCH;
use crate::mmu::error::Error;
use crate::mmu::geometry::Level;

/// When blocks of a logged slot are split.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Policy {
    /// When they are first written.
    Fault,
    /// When they are first written, into a table that maps the written page and nothing else: a baseline to compare with.
    FaultEmpty,
    /// When logging is enabled.
    Enable,
    /// When their pages are cleared.
    Clear,
}

/// Which changes of size go without break-before-make.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Bbm {
    /// None.
    Zero,
    /// All: FEAT_BBM level 2.
    Two,
}

/// How a VM's blocks become tables while it is logged, and its tables blocks afterwards.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Splitting {
    /// When.
    pub policy: Policy,
    /// By which right.
    pub bbm: Bbm,
    /// At level 0, blocks broken under one pair of invalidations, 1 to [`MOST_BATCH`]: bounds how long a vCPU may find them
    /// missing.
    pub batch: usize,
    /// Bytes of guest memory between pauses, and the most that frames are reserved for at once: a block size.
    pub chunk_bytes: u64,
    /// Ticks of the counter to wait between chunks.
    pub pause_ticks: u64,
}

const POLICIES: [(Policy, &str); 4] = [
    (Policy::Fault, "fault"),
    (Policy::FaultEmpty, "fault-empty"),
    (Policy::Enable, "enable"),
    (Policy::Clear, "clear"),
];

impl Policy {
    /// The policy's name on command lines and in results.
    pub fn name(self) -> &'static str {
        POLICIES
            .iter()
            .find(|(policy, _)| *policy == self)
            .map_or("", |(_, name)| name)
    }

    /// The policy called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        POLICIES
            .iter()
            .find(|(_, known)| *known == name)
            .map(|(policy, _)| *policy)
    }
}

impl Bbm {
    /// The level's number.
    pub const fn level(self) -> u32 {
        match self {
            Self::Zero => 0,
            Self::Two => 2,
        }
    }
}

impl Default for Splitting {
    fn default() -> Self {
        Self {
            policy: Policy::Fault,
            bbm: Bbm::Zero,
            batch: 16,
            chunk_bytes: Level::L1.span_bytes(),
            pause_ticks: 0,
        }
    }
}

impl Splitting {
    /// Refuses what makes no sense.
    ///
    /// # Errors
    ///
    /// [`Error::BadChunk`], [`Error::BadBatch`].
    pub fn check(&self) -> Result<(), Error> {
        let blocks = [Level::L1, Level::L2];
        if !blocks
            .iter()
            .any(|level| level.span_bytes() == self.chunk_bytes)
        {
            return Err(Error::BadChunk(self.chunk_bytes));
        }
        if !(1..=MOST_BATCH).contains(&self.batch) {
            return Err(Error::BadBatch(self.batch));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{POLICIES, Policy, Splitting};
    use crate::mmu::error::Error;

    #[test]
    fn policies_have_names_that_come_back() {
        for (policy, name) in POLICIES {
            assert_eq!(policy.name(), name);
            assert_eq!(Policy::from_name(name), Some(policy));
        }
        assert_eq!(Policy::from_name("eager"), None);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let good = Splitting::default();
        assert_eq!(good.check(), Ok(()));
        for chunk_bytes in [0, 4096, 3 << 20, 512 << 30] {
            let bad = Splitting {
                chunk_bytes,
                ..good
            };
            assert_eq!(bad.check(), Err(Error::BadChunk(chunk_bytes)));
        }
        for batch in [0, 65] {
            let bad = Splitting { batch, ..good };
            assert_eq!(bad.check(), Err(Error::BadBatch(batch)));
        }
    }
}
