//! Suite `starve`: how long the exclusive side of the MMU lock is waited for while every vCPU faults as fast as it can.
//! The controller clears the log again and again, so that there is always something to fault on.

use super::Refusal;
use super::clock::{Counts, Moment, timed};
use super::report::{Row, progress};
use super::scene::{Cast, Stage};
use super::verify::{PATIENCE_NS, clear, logged};

/// Exclusive acquisitions after each clear.
const BURST: u64 = 8;

/// Every mode; false when the vCPUs faulted in too few rounds for the run to mean something.
pub(super) fn run(stage: &Stage<'_>) -> Result<bool, Refusal> {
    let mut good = true;
    for &vcpus in &stage.params.vcpus {
        for &locking in &stage.params.locking {
            progress(
                0,
                1,
                format_args!("starve: {vcpus} vCPUs, {}", locking.name()),
            );
            good &= case(stage, stage.cast(locking, vcpus))?;
        }
    }
    Ok(good)
}

fn case(stage: &Stage<'_>, cast: Cast) -> Result<bool, Refusal> {
    let scene = logged(stage, cast, false)?;
    scene.run_freely(1)?;
    let before = Counts::now();
    let start = Moment::now();
    let (mut rounds, mut longest, mut sum, mut taken) = (0, 0, 0, 0);
    while rounds < stage.params.rounds && start.elapsed_ns() < PATIENCE_NS {
        // A round counts when the vCPUs have faulted since the last one; now they will again.
        if clear(&scene)?.len() < cast.vcpus as u64 {
            continue;
        }
        rounds += 1;
        for _ in 0..BURST {
            let (held, wait_ns) = timed(|| scene.stage2().exclusive());
            drop(held);
            longest = longest.max(wait_ns);
            sum += wait_ns;
            taken += 1;
        }
    }
    let row = Row::new("starve", "exclusive", stage.params.timing.name()).values(before.since());
    scene.end_run()?;
    scene.close();
    row.param("vcpus", cast.vcpus)
        .word("locking", cast.locking.name())
        .value("rounds", rounds)
        .value("exclusive_acquired", taken)
        .value("exclusive_mean_ns", sum / taken.max(1))
        .value("exclusive_max_ns", longest)
        .print();
    Ok(rounds == stage.params.rounds)
}
