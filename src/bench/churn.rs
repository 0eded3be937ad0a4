//! Suite `churn`: splits, clears and collapses loop under vCPUs that store at random; nothing may be lost.
//!
//! A copy fed only by reports must equal the guest's memory byte for byte at the end. Now and then logging is disabled and
//! enabled again with everything set: what was written in between is reported then.

use alloc::format;
use alloc::vec::Vec;

use crate::mmu::Level;

use super::Refusal;
use super::clock::{Counts, Moment};
use super::params::size_name;
use super::report::{Row, progress};
use super::scene::{Cast, Scene, Stage, cpu};
use super::shadow::Shadow;
use super::verify::{clear, logged};

/// Rounds between two interruptions of logging.
const INTERRUPTION: u64 = 8;

/// What a run came to.
#[derive(Default)]
struct Sums {
    rounds: u64,
    reported: u64,
    blocks_left: u64,
    interruptions: u64,
}

/// Every policy at every level, with every mode and vCPU count; false when something was lost.
pub(super) fn run(stage: &Stage<'_>) -> Result<bool, Refusal> {
    let params = stage.params;
    let of = params.vcpus.len() * params.locking.len() * stage.bbm.len() * params.splitting.len();
    let mut good = true;
    let mut done = 0;
    for &vcpus in &params.vcpus {
        for &bbm in &stage.bbm {
            for &policy in &params.splitting {
                for &locking in &params.locking {
                    progress(
                        done,
                        of,
                        format_args!(
                            "churn: {vcpus} vCPUs, {}, {}, bbm {}",
                            locking.name(),
                            policy.name(),
                            bbm.level()
                        ),
                    );
                    let cast = stage.cast(locking, vcpus);
                    let cast = Cast {
                        backing: cast.backing.min(Level::L2),
                        splitting: stage.splitting(policy, bbm),
                        ..cast
                    };
                    good &= case(stage, cast)?;
                    done += 1;
                }
            }
        }
    }
    Ok(good)
}

fn case(stage: &Stage<'_>, cast: Cast) -> Result<bool, Refusal> {
    let scene = logged(stage, cast, true)?;
    let mut shadow = Shadow::new(scene.pages());
    let mut sums = Sums::default();
    scene.run_freely(stage.params.seed)?;
    let before = Counts::now();
    let start = Moment::now();
    while sums.rounds == 0 || start.elapsed_ns() < stage.params.seconds * 1_000_000_000 {
        round(&scene, &mut shadow, &mut sums)?;
    }
    let counts: Vec<_> = before.since().collect();
    let stores = scene.end_run()?;
    copy(&scene, &mut shadow, &mut sums)?;
    let lost = shadow.differing(&scene)?;
    scene.close();
    Row::new("churn", "loop", stage.params.timing.name())
        .param("vcpus", cast.vcpus)
        .word("locking", cast.locking.name())
        .word("engine", cast.engine.name())
        .word("tracking", cast.tracking.name())
        .word("splitting", cast.splitting.policy.name())
        .param("bbm", cast.splitting.bbm.level())
        .param("bbm_batch", cast.splitting.batch)
        .word("backing", size_name(cast.backing))
        .param("mib_per_vcpu", stage.params.mib)
        .param("seconds", stage.params.seconds)
        .value("rounds", sums.rounds)
        .value("interruptions", sums.interruptions)
        .value("stores", stores)
        .value("pages_reported", sums.reported)
        .value("pages_lost", lost)
        .value("blocks_left", sums.blocks_left)
        .values(counts)
        .print();
    Ok(lost == 0)
}

/// Splits, clears, collapses and clears again; now and then logging ends and begins.
fn round(scene: &Scene, shadow: &mut Shadow, sums: &mut Sums) -> Result<(), Refusal> {
    let failed = |error| format!("churn: {error}");
    let (stage2, data, pages) = (scene.stage2(), scene.data, scene.pages());
    let split = stage2.split(cpu(), data, 0, pages).map_err(failed)?;
    sums.blocks_left += split.left;
    copy(scene, shadow, sums)?;
    stage2.collapse(cpu(), data, 0, pages).map_err(failed)?;
    copy(scene, shadow, sums)?;
    sums.rounds += 1;
    if sums.rounds.is_multiple_of(INTERRUPTION) {
        stage2.disable_logging(cpu(), data).map_err(failed)?;
        stage2.enable_logging(cpu(), data, true).map_err(failed)?;
        sums.interruptions += 1;
    }
    Ok(())
}

fn copy(scene: &Scene, shadow: &mut Shadow, sums: &mut Sums) -> Result<(), Refusal> {
    let harvest = clear(scene)?;
    sums.reported += harvest.len();
    shadow.copy(scene, &harvest)
}
