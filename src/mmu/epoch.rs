//! Epochs: protecting everything at once, and asking afterwards what was written before.
//!
//! ```text
//!   next_epoch ── everything written from now on is recorded in the next epoch ── on return every CPU has left the closed one
//!   harvest    ── the pages of the closed epoch, once
//! ```
//!
//! Four engines answer the same call; a VM chooses one when it is created.
//!
//! | engine | the call | afterwards |
//! |---|---|---|
//! | [`Engine::Walk`] | visits every leaf, one invalidation | a write fault per written page |
//! | [`Engine::Lazy`] | defers the root's tables, one invalidation | and one fault per table reached (`lazy`) |
//! | [`Engine::Swap`] | a prepared root under another VMID, no invalidation | and a split per region newly written (`swap`) |
//! | [`Engine::Pie`] | one register per CPU, one invalidation | and nothing (`pie`) |
//!
//! The order is the same for all, and is rule 28: flip the bitmaps, publish, wait; then what was published before is used by
//! nobody, and the engine takes permissions away. [`Engine::Swap`] and [`Engine::Pie`] wait for *acknowledgements* (`sync::acks`)
//! besides a grace period: a CPU in the guest is quiescent and yet writes through the old root or index.
//!
//! Each slot has two bitmaps, so a call is refused while the epoch closed before has not been harvested: no data is lost
//! silently.

use core::fmt;

use crate::mmu::bitmap::GROUP_PAGES;
use crate::mmu::error::Error;
use crate::mmu::pages::PageSet;
use crate::mmu::slot::SlotId;
use crate::mmu::stage2::{Admin, Stage2};
use crate::mmu::tlb::Debt;
use crate::sync::quiescence::CpuId;

/// Who protects everything.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Engine {
    /// A visit of every leaf: the baseline.
    Walk,
    /// Each table when it is first reached.
    Lazy,
    /// A second root, prepared while the guest runs.
    Swap,
    /// Permission indices that name epochs (FEAT_S2PIE).
    Pie,
}

impl Engine {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Walk, Self::Lazy, Self::Swap, Self::Pie];

    /// The engine's name on command lines and in results.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Walk => "walk",
            Self::Lazy => "lazy",
            Self::Swap => "swap",
            Self::Pie => "pie",
        }
    }

    /// The engine called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|engine| engine.name() == name)
    }
}

/// How a write becomes known.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Tracking {
    /// By a fault at the first write to each page.
    Fault,
    /// By hardware, which marks the leaf (FEAT_HAFDBS, dirty state); a scan collects the marks.
    Dbm,
}

impl Tracking {
    /// Its name on command lines and in results.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fault => "fault",
            Self::Dbm => "dbm",
        }
    }

    /// The tracking called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Fault, Self::Dbm]
            .into_iter()
            .find(|tracking| tracking.name() == name)
    }
}

/// An epoch of a VM. They are counted from 1, by successful calls of [`Stage2::next_epoch`].
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Epoch(u64);

impl Epoch {
    /// Epoch `number`.
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// Its number.
    pub const fn number(self) -> u64 {
        self.0
    }

    pub(crate) const fn next(self) -> Self {
        Self(self.0.wrapping_add(1))
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// What a call of [`Stage2::next_epoch`] did.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Closed {
    /// The epoch that it closed: what [`Stage2::harvest`] is asked for.
    pub epoch: Epoch,
    /// Who did it: [`Engine::Walk`] where the VM's own engine could not.
    pub engine: Engine,
    /// The spare root had to be prepared first.
    pub late: bool,
    /// CPUs that were interrupted.
    pub kicked: u64,
    /// Ticks of the counter from the first kick to the last acknowledgement.
    pub wait_ticks: u64,
}

impl Stage2 {
    /// Closes the current epoch and opens the next, for all logged slots. What is written after this call returned is
    /// recorded in the next epoch; what was recorded before is the closed epoch's, for [`Stage2::harvest`].
    ///
    /// Rounding: none. Races: faults and clears; other calls wait. TLB: nothing owed on return. Cost: by engine, see this
    /// module.
    ///
    /// # Errors
    ///
    /// [`Error::NotLogging`] when no slot is logged; [`Error::NotHarvested`] when the epoch closed before still is to be
    /// harvested. Nothing has changed then.
    pub fn next_epoch(&self, cpu: CpuId) -> Result<Closed, Error> {
        let _operation = self.begin_operation();
        let mut admin = self.admin.lock();
        admin.check_harvested()?;
        match self.engine() {
            Engine::Walk => Ok(self.next_by_walk(cpu, &mut admin)),
            Engine::Lazy => Ok(self.next_by_lazy(cpu, &mut admin)),
            Engine::Swap => Ok(self.next_by_swap(cpu, &mut admin)),
            Engine::Pie => Ok(self.next_by_pie(cpu, &mut admin)),
        }
    }

    /// Adds the pages of the closed `epoch` of a slot to `into`: what was written to them in that epoch is in memory, and the
    /// caller may copy them.
    ///
    /// Rounding: none. Races: faults, clears; a call of [`Stage2::next_epoch`] meanwhile is refused. TLB: nothing owed on return;
    /// with engine `pie` the next call's invalidation is what the relabelled leaves wait for. Cost: the pages recorded.
    ///
    /// # Errors
    ///
    /// [`Error::NoSlot`], [`Error::NotLogging`]; [`Error::NoSuchEpoch`] for one that is not closed or was before the slot was
    /// logged; [`Error::AlreadyHarvested`].
    pub fn harvest(
        &self,
        cpu: CpuId,
        id: SlotId,
        epoch: Epoch,
        into: &mut PageSet,
    ) -> Result<(), Error> {
        let _operation = self.begin_operation();
        let (slot, closed) = {
            let mut admin = self.admin.lock();
            let now = admin.epoch;
            let entry = admin.slot(id)?;
            let log = entry.log.as_mut().ok_or(Error::NotLogging)?;
            (entry.slot.clone(), log.begin_harvest(epoch, now)?)
        };
        let mut at = 0;
        while let Some(group) = closed.next_group(at, slot.pages) {
            at = group + GROUP_PAGES;
            let end = at.min(slot.pages);
            // Before the bits are taken: until then they say which leaves may be writable.
            match self.engine() {
                Engine::Walk | Engine::Swap => {}
                Engine::Lazy => self.push_down_group(cpu, &slot, group..end),
                Engine::Pie => self.relabel_group(cpu, id, &slot, &closed, epoch, group..end),
            }
            closed.take_group(group, end, |first, bits| into.push(first, bits));
        }
        let mut admin = self.admin.lock();
        if let Ok(entry) = admin.slot(id)
            && let Some(log) = &mut entry.log
        {
            log.end_harvest(&closed);
        }
        Ok(())
    }

    /// Flips every log and returns the epoch that this closes. The caller publishes.
    pub(crate) fn flip(&self, admin: &mut Admin) -> Epoch {
        let closed = admin.epoch;
        admin.epoch = closed.next();
        for log in admin
            .slots
            .iter_mut()
            .flatten()
            .filter_map(|slot| slot.log.as_mut())
        {
            log.flip(closed);
        }
        closed
    }

    /// Engine `walk`, and what the others fall back to.
    pub(crate) fn next_by_walk(&self, cpu: CpuId, admin: &mut Admin) -> Closed {
        let epoch = self.flip(admin);
        self.publish(admin);
        let mut debt = Debt::open(self, cpu);
        for (id, slot, log) in admin.logged() {
            self.protect_into(cpu, id, slot, log.closed(), &mut debt);
        }
        debt.pay();
        Closed {
            epoch,
            engine: Engine::Walk,
            late: false,
            kicked: 0,
            wait_ticks: 0,
        }
    }
}

impl Admin {
    /// Whether the next epoch may be opened.
    fn check_harvested(&self) -> Result<(), Error> {
        let mut logged = false;
        for (slot, _, log) in self.logged() {
            logged = true;
            if log.is_unharvested() {
                return Err(Error::NotHarvested(slot));
            }
        }
        if logged {
            Ok(())
        } else {
            Err(Error::NotLogging)
        }
    }
}
