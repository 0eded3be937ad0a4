//! Suite `ages`: whether anything is lost while memory is aged, split, collapsed, and epochs end, all the time.
//!
//! Every vCPU stores at random without pause. The controller ages between any two other operations, now everything, now a
//! part, precisely or not. A copy fed only by the harvests must equal the guest's memory byte for byte at the end, and what is
//! touched after that is young.

use alloc::format;

use crate::mmu::{Aged, Error, Level, Precision};

use super::Refusal;
use super::age::touch;
use super::clock::{Counts, Moment};
use super::cycle::{self, Oddities};
use super::report::{Row, progress};
use super::scene::{Cast, Scene, Stage, cpu};
use super::shadow::Shadow;
use super::verify::logged;

/// Parts that memory is aged in.
const PARTS: u64 = 4;

/// What a run came to.
#[derive(Default)]
struct Sums {
    rounds: u64,
    passes: u64,
    leaves: u64,
    young: u64,
    reported: u64,
    oddities: Oddities,
}

/// Every mode with every vCPU count and engine; false when something was lost.
pub(super) fn run(stage: &Stage<'_>) -> Result<bool, Refusal> {
    let params = stage.params;
    let of = params.vcpus.len() * params.locking.len() * stage.trackers.len() * stage.bbm.len();
    let mut good = true;
    let mut done = 0;
    for &vcpus in &params.vcpus {
        for &(engine, tracking) in &stage.trackers {
            for &bbm in &stage.bbm {
                for &locking in &params.locking {
                    progress(
                        done,
                        of,
                        format_args!(
                            "ages: {vcpus} vCPUs, {}, {}, {}, bbm {}",
                            locking.name(),
                            engine.name(),
                            tracking.name(),
                            bbm.level()
                        ),
                    );
                    let cast = stage.cast(locking, vcpus);
                    let cast = Cast {
                        backing: cast.backing.min(Level::L2),
                        splitting: stage.splitting(cast.splitting.policy, bbm),
                        engine,
                        tracking,
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
    let scene = logged(stage, cast, false)?;
    let mut shadow = Shadow::new(scene.pages());
    shadow.copy_all(&scene)?;
    let mut sums = Sums::default();
    scene.run_freely(stage.params.seed)?;
    let before = Counts::now();
    let start = Moment::now();
    while sums.rounds == 0 || start.elapsed_ns() < stage.params.seconds * 1_000_000_000 {
        round(&scene, &mut shadow, &mut sums)?;
    }
    let counts = before.since();
    let stores = scene.end_run()?;
    end_epoch(&scene, &mut shadow, &mut sums)?;
    let lost = shadow.differing(&scene)?;
    let seen = touch(&scene, Precision::Precise, stage.params.seed)?;
    let row = cycle::row(stage, "ages", "loop", &scene)
        .word("access_flag", cast.access_flag.name())
        .param("mib_per_vcpu", cast.region_bytes >> 20)
        .param("seconds", stage.params.seconds);
    scene.close();
    sums.told(row)
        .value("stores", stores)
        .value("pages_lost", lost)
        .value("pages_touched", seen.written)
        .value("touched_idle", seen.lost)
        .values(counts)
        .print();
    Ok(lost == 0 && seen.lost == 0)
}

/// Splits, ends an epoch and collapses; ages before each.
fn round(scene: &Scene, shadow: &mut Shadow, sums: &mut Sums) -> Result<(), Refusal> {
    let (stage2, data, pages) = (scene.stage2(), scene.data, scene.pages());
    age(scene, sums)?;
    stage2.split(cpu(), data, 0, pages).map_err(failed)?;
    age(scene, sums)?;
    end_epoch(scene, shadow, sums)?;
    age(scene, sums)?;
    stage2.collapse(cpu(), data, 0, pages).map_err(failed)?;
    sums.rounds += 1;
    Ok(())
}

fn end_epoch(scene: &Scene, shadow: &mut Shadow, sums: &mut Sums) -> Result<(), Refusal> {
    sums.oddities.unprepared += u64::from(cycle::prepare(scene)?.0.is_none());
    let call = cycle::call(scene)?;
    sums.oddities.note(scene, &call);
    // The closed epoch's pages are not harvested yet: what is aged now must not hide them.
    age(scene, sums)?;
    let (pages, _) = cycle::harvest(scene, &call)?;
    sums.reported += pages.len();
    shadow.copy(scene, &pages)
}

/// Ages everything, or a part, by turns.
fn age(scene: &Scene, sums: &mut Sums) -> Result<(), Refusal> {
    let precision = match sums.passes % 2 {
        0 => Precision::Precise,
        _ => Precision::Imprecise,
    };
    let part = sums.passes % (PARTS + 1);
    sums.passes += 1;
    let aged = match part {
        PARTS => scene.stage2().age_all(cpu(), precision, |_, _| ()),
        _ => {
            let edge = |part| scene.pages() * part / PARTS / 64 * 64;
            let (from, to) = (edge(part), edge(part + 1));
            let aged = scene
                .stage2()
                .age(cpu(), scene.data, from, to, precision, |_| ());
            aged.map_err(failed)?
        }
    };
    sums.add(aged);
    Ok(())
}

impl Sums {
    fn add(&mut self, aged: Aged) {
        self.leaves += aged.leaves;
        self.young += aged.young;
    }

    /// Adds them to `row`.
    fn told(&self, row: Row) -> Row {
        self.oddities
            .told(row)
            .value("rounds", self.rounds)
            .value("passes", self.passes)
            .value("leaves", self.leaves)
            .value("young", self.young)
            .value("pages_reported", self.reported)
    }
}

fn failed(error: Error) -> Refusal {
    format!("ages: {error}")
}
