//! What the controller does beneath a guest that knows nothing of it: splitting, aging, epoch after epoch, collapsing, and
//! logging that ends and begins again, in loops, with a copy fed only by what is reported.

use alloc::format;

use crate::arch;
use crate::mmu::{Error, PageSet, Precision, SlotId, Stage2};
use crate::vm::vm::RAM;

use super::super::Refusal;
use super::super::report::Row;
use super::super::scene::cpu;
use super::super::shadow::Shadow;
use super::Machine;

/// Rounds between two interruptions of logging.
const INTERRUPTION: u64 = 8;

/// The loops' state.
pub(super) struct Beneath {
    shadow: Shadow,
    period_ticks: u64,
    /// When the last round ended.
    last_end: u64,
    precise: bool,
    done: Sums,
}

/// What was done.
#[derive(Default)]
struct Sums {
    rounds: u64,
    epochs: u64,
    /// Epochs that another engine had to end.
    replaced: u64,
    split: u64,
    young: u64,
    interruptions: u64,
    reported: u64,
    lost: u64,
}

impl Beneath {
    /// Begins logging and copies what is there; a round begins `period_us` after the one before has ended.
    pub(super) fn new(machine: &Machine, period_us: u64) -> Result<Self, Refusal> {
        let stage2 = machine.vm.stage2();
        let enabled = stage2.enable_logging(cpu(), machine.ram, false);
        enabled.map_err(failed)?;
        let mut shadow = Shadow::of(RAM, machine.pages);
        shadow.copy_all(machine)?;
        Ok(Self {
            shadow,
            period_ticks: period_us.saturating_mul(arch::counter_hz() / 1_000_000),
            last_end: arch::counter(),
            precise: false,
            done: Sums::default(),
        })
    }

    /// The tick of the counter at which the next round is to begin, unless it is now.
    pub(super) fn next_round(&self) -> Option<u64> {
        let tick = self.last_end.wrapping_add(self.period_ticks);
        (arch::counter() < tick).then_some(tick)
    }

    /// One round.
    pub(super) fn round(&mut self, machine: &Machine) -> Result<(), Refusal> {
        let (stage2, ram, pages) = (machine.vm.stage2(), machine.ram, machine.pages);
        let half = pages / 2 / 64 * 64;
        let (from, to) = match self.done.rounds % 2 {
            0 => (0, half),
            _ => (half, pages),
        };
        let split = stage2.split(cpu(), ram, from, to).map_err(failed)?;
        self.done.split += split.blocks;
        self.age(stage2, ram, from, to)?;
        self.end_epoch(machine)?;
        self.age(stage2, ram, from, to)?;
        self.clear(machine, from, to)?;
        stage2.collapse(cpu(), ram, from, to).map_err(failed)?;
        self.done.rounds += 1;
        if self.done.rounds.is_multiple_of(INTERRUPTION) {
            stage2.disable_logging(cpu(), ram).map_err(failed)?;
            stage2.enable_logging(cpu(), ram, true).map_err(failed)?;
            self.done.interruptions += 1;
        }
        self.last_end = arch::counter();
        Ok(())
    }

    fn age(&mut self, stage2: &Stage2, ram: SlotId, from: u64, to: u64) -> Result<(), Refusal> {
        self.precise = !self.precise;
        let precision = if self.precise {
            Precision::Precise
        } else {
            Precision::Imprecise
        };
        let aged = stage2.age(cpu(), ram, from, to, precision, |_| ());
        self.done.young += aged.map_err(failed)?.young;
        Ok(())
    }

    /// Protects everything at once and copies what was written before.
    fn end_epoch(&mut self, machine: &Machine) -> Result<(), Refusal> {
        let stage2 = machine.vm.stage2();
        match stage2.prepare(cpu()) {
            Ok(_) | Err(Error::NoMemory) => {}
            Err(error) => return Err(failed(error)),
        }
        let closed = stage2.next_epoch(cpu()).map_err(failed)?;
        let mut pages = PageSet::default();
        let harvested = stage2.harvest(cpu(), machine.ram, closed.epoch, &mut pages);
        harvested.map_err(failed)?;
        self.done.epochs += 1;
        self.done.replaced += u64::from(closed.engine != machine.engine);
        self.copy(machine, &pages)
    }

    fn clear(&mut self, machine: &Machine, from: u64, to: u64) -> Result<(), Refusal> {
        let mut pages = PageSet::default();
        let cleared = machine
            .vm
            .stage2()
            .clear(cpu(), machine.ram, from, to, &mut pages);
        cleared.map_err(failed)?;
        self.copy(machine, &pages)
    }

    fn copy(&mut self, machine: &Machine, pages: &PageSet) -> Result<(), Refusal> {
        self.done.reported += pages.len();
        self.shadow.copy(machine, pages)
    }

    /// The VM has stopped: pages of it that were written and not reported.
    pub(super) fn end(&mut self, machine: &Machine) -> Result<u64, Refusal> {
        self.end_epoch(machine)?;
        self.done.lost = self.shadow.differing(machine)?;
        Ok(self.done.lost)
    }

    /// Adds what was done to `row`.
    pub(super) fn told(&self, row: Row) -> Row {
        row.value("rounds", self.done.rounds)
            .value("epochs", self.done.epochs)
            .value("calls_replaced", self.done.replaced)
            .value("blocks_split", self.done.split)
            .value("young", self.done.young)
            .value("interruptions", self.done.interruptions)
            .value("pages_reported", self.done.reported)
            .value("pages_lost", self.done.lost)
    }
}

fn failed(error: Error) -> Refusal {
    format!("beneath the guest: {error}")
}
