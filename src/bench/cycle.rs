//! One checkpoint's steps, timed: close the epoch, harvest it, prepare the next.

use alloc::format;
use alloc::vec::Vec;

use crate::mmu::{Closed, Error, PageSet, Prepared};

use super::Refusal;
use super::clock::{Counts, nanoseconds, timed};
use super::report::Row;
use super::scene::{Scene, Stage, cpu};

/// What one call came to.
pub(super) struct Call {
    pub(super) closed: Closed,
    pub(super) call_ns: u64,
    /// From the first kick to the last acknowledgement; part of the call.
    pub(super) ack_ns: u64,
    /// What all CPUs counted meanwhile, by name.
    pub(super) counts: Vec<(&'static str, u64)>,
}

/// Calls that did not go as the engine would have them.
#[derive(Clone, Copy, Default)]
pub(super) struct Oddities {
    /// The preparation had to be finished first.
    pub(super) late: u64,
    /// Another engine had to do it.
    pub(super) replaced: u64,
    /// There was no memory to prepare with.
    pub(super) unprepared: u64,
}

/// Closes the current epoch of `scene`.
pub(super) fn call(scene: &Scene) -> Result<Call, Refusal> {
    let before = Counts::now();
    let (closed, call_ns) = timed(|| scene.stage2().next_epoch(cpu()));
    let counts = before.since().collect();
    let closed = closed.map_err(failed)?;
    Ok(Call {
        ack_ns: nanoseconds(closed.wait_ticks),
        closed,
        call_ns,
        counts,
    })
}

/// The pages of the epoch that `call` closed, and the time it took.
pub(super) fn harvest(scene: &Scene, call: &Call) -> Result<(PageSet, u64), Refusal> {
    let mut pages = PageSet::default();
    let (taken, harvest_ns) = timed(|| {
        let epoch = call.closed.epoch;
        scene.stage2().harvest(cpu(), scene.data, epoch, &mut pages)
    });
    taken.map_err(failed)?;
    Ok((pages, harvest_ns))
}

/// Does the background work for the next call, and the time it took. Nothing is prepared when memory is short.
pub(super) fn prepare(scene: &Scene) -> Result<(Option<Prepared>, u64), Refusal> {
    let (prepared, prepare_ns) = timed(|| scene.stage2().prepare(cpu()));
    match prepared {
        Ok(prepared) => Ok((Some(prepared), prepare_ns)),
        Err(Error::NoMemory) => Ok((None, prepare_ns)),
        Err(error) => Err(failed(error)),
    }
}

impl Oddities {
    /// Takes note of a call.
    pub(super) fn note(&mut self, scene: &Scene, call: &Call) {
        self.late += u64::from(call.closed.late);
        self.replaced += u64::from(call.closed.engine != scene.cast.engine);
    }

    /// Adds them to `row`.
    pub(super) fn told(self, row: Row) -> Row {
        row.value("calls_late", self.late)
            .value("calls_replaced", self.replaced)
            .value("unprepared", self.unprepared)
    }
}

/// The parameters that rows about epochs have.
pub(super) fn row(stage: &Stage<'_>, suite: &str, case: &str, scene: &Scene) -> Row {
    let cast = scene.cast;
    let backing = super::params::size_name(cast.backing);
    Row::new(suite, case, stage.params.timing.name())
        .param("vcpus", cast.vcpus)
        .word("engine", cast.engine.name())
        .word("tracking", cast.tracking.name())
        .word("locking", cast.locking.name())
        .word("backing", backing)
        .word("splitting", cast.splitting.policy.name())
        .param("bbm", cast.splitting.bbm.level())
}

/// A count by its name; 0 when it is not among them.
pub(super) fn count(counts: &[(&str, u64)], name: &str) -> u64 {
    let found = counts.iter().find(|(event, _)| *event == name);
    found.map_or(0, |(_, count)| *count)
}

fn failed(error: Error) -> Refusal {
    format!("epochs: {error}")
}
