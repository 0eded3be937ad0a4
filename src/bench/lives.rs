//! Suite `lives`: VMs are created, run, and destroyed at any moment, one after the other. What was free before is free
//! afterwards.

use crate::guest::abi::op;
use crate::mem::frames;
use crate::mmu::Locking;
use crate::vm::Command;

use super::Refusal;
use super::report::{Row, progress};
use super::scene::{Scene, Stage};

/// VMs before the first count: heap and run queues have their size then.
const WARM_UP: u64 = 16;
/// Between two words about how far the run is.
const STRIDE: u64 = 100;

/// As many VMs as there are rounds; false when something is missing afterwards.
pub(super) fn run(stage: &Stage<'_>) -> Result<bool, Refusal> {
    let params = stage.params;
    let locking = params.locking.first().copied().unwrap_or(Locking::Rwlock);
    let vcpus = params.vcpus.first().copied().unwrap_or(1);
    let guest_cpus = stage.host.cpus() - 1;
    let live = |round| live(stage.open(stage.cast(locking, vcpus))?, round, guest_cpus);
    (0..WARM_UP).try_for_each(live)?;
    let before = Holdings::now(stage);
    for round in 0..params.rounds {
        if round % STRIDE == 0 {
            let (done, of) = (round / STRIDE, params.rounds.div_ceil(STRIDE));
            let number = |count| usize::try_from(count).unwrap_or(usize::MAX);
            progress(number(done), number(of), format_args!("lives: VM {round}"));
        }
        live(round)?;
    }
    let after = Holdings::now(stage);
    Row::new("lives", "vms", params.timing.name())
        .param("vcpus", vcpus)
        .param("rounds", params.rounds)
        .value("free_pages_before", before.free_pages)
        .value("free_pages_after", after.free_pages)
        .value("vmids_before", before.vmids)
        .value("vmids_after", after.vmids)
        .print();
    Ok(before == after)
}

/// What VMs take and have to give back.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Holdings {
    free_pages: usize,
    vmids: usize,
}

impl Holdings {
    fn now(stage: &Stage<'_>) -> Self {
        Self {
            free_pages: frames::free_pages(),
            vmids: stage.host.services.vmids.in_use(),
        }
    }
}

/// A VM runs for a while, or hardly, or is paused, moved, reset or interrupted by its devices before it is destroyed.
fn live(scene: Scene, round: u64, guest_cpus: usize) -> Result<(), Refusal> {
    scene.run_freely(round)?;
    match round % 6 {
        0 => {}
        1 => {
            scene.end_run()?;
        }
        2 => scene.pause_and_resume(),
        5 => {
            scene.interrupt();
            scene.stop();
            scene.interrupt();
        }
        3 => scene.send_to(0, 1 + usize::try_from(round).unwrap_or(0) % guest_cpus)?,
        _ => {
            scene.reset()?;
            scene.perform_one(
                0,
                Command {
                    op: op::HYPERCALLS,
                    args: [10, 0, 0, 0, 0],
                },
            )?;
        }
    }
    scene.close();
    Ok(())
}
