//! Suite `starve`: how long the exclusive side of the MMU lock is waited for while every vCPU faults as fast as it can.
//! The controller clears the log again and again, so that there is always something to fault on.

use crate::addr::PAGE_BYTES;
use crate::guest::abi::op;
use crate::mmu::PageSet;
use crate::vm::Command;

use super::Refusal;
use super::clock::{Counts, timed};
use super::report::{Row, progress};
use super::scene::{Cast, Stage, cpu};
use super::verify::set_stop;

/// Exclusive acquisitions after each clear.
const BURST: u64 = 8;

/// Every mode; it is a result that the run ends at all.
pub(super) fn run(stage: &Stage<'_>) -> Result<bool, Refusal> {
    for &vcpus in &stage.params.vcpus {
        for &locking in &stage.params.locking {
            progress(
                0,
                1,
                format_args!("starve: {vcpus} vCPUs, {}", locking.name()),
            );
            case(stage, stage.cast(locking, vcpus))?;
        }
    }
    Ok(true)
}

fn case(stage: &Stage<'_>, cast: Cast) -> Result<(), Refusal> {
    let scene = stage.open(cast)?;
    let failed = |error| alloc::format!("dirty logging: {error}");
    scene
        .stage2()
        .enable_logging(cpu(), scene.data, false)
        .map_err(failed)?;
    set_stop(&scene, 0)?;
    let pages = cast.region_bytes / PAGE_BYTES;
    scene.post(|vcpu| Command {
        op: op::FREE_RUN,
        args: [scene.region(vcpu), pages, 1 + vcpu as u64, 0, 0],
    });
    let before = Counts::now();
    let (mut longest, mut sum, mut taken) = (0, 0, 0);
    for _ in 0..stage.params.rounds {
        let mut cleared = PageSet::default();
        scene
            .stage2()
            .clear(cpu(), scene.data, 0, scene.pages(), &mut cleared)
            .map_err(failed)?;
        for _ in 0..BURST {
            let (held, wait_ns) = timed(|| scene.stage2().exclusive());
            drop(held);
            longest = longest.max(wait_ns);
            sum += wait_ns;
            taken += 1;
        }
    }
    let row = Row::new("starve", "exclusive", stage.params.timing.name()).values(before.since());
    set_stop(&scene, 1)?;
    scene.wait_all()?;
    scene.close();
    row.param("vcpus", cast.vcpus)
        .word("locking", cast.locking.name())
        .value("exclusive_acquired", taken)
        .value("exclusive_mean_ns", sum / taken.max(1))
        .value("exclusive_max_ns", longest)
        .print();
    Ok(())
}
