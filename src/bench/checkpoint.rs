//! Suite `checkpoint`: how much slower a guest is while checkpoint after checkpoint is taken of it, over the length of an
//! epoch.
//!
//! Under `insn`, where CPUs take turns, an epoch is as many random passes as take its length alone, and what is compared is
//! the instructions that the guest's CPUs spend on them. Otherwise every vCPU stores at random, first alone, then while the controller ends an epoch, harvests it, copies what was written
//! and prepares the next, again and again. At the end the copy must equal the guest's memory byte for byte.

use alloc::vec::Vec;

use crate::addr::PAGE_BYTES;
use crate::guest::abi::{flags, op};
use crate::vm::Command;

use super::Refusal;
use super::clock::{Counts, Moment, nanoseconds, timed};
use super::cycle::{self, Oddities, count};
use super::params::Timing;
use super::protect::linger;
use super::report::progress;
use super::scene::{Cast, Scene, Stage, cpu};
use super::shadow::Shadow;
use super::verify::logged;

/// How long vCPUs run at least for one figure.
const LEAST_NS: u64 = 500_000_000;

/// How often the guest is measured alone; its fastest counts.
const TRIES: u64 = 4;
/// Epochs before it is.
const WARMING: u64 = 8;

/// Sums over the epochs of one length.
#[derive(Default)]
struct Sums {
    epochs: u64,
    pages: u64,
    call_ns: u64,
    call_max_ns: u64,
    ack_ns: u64,
    harvest_ns: u64,
    copy_ns: u64,
    prepare_ns: u64,
    oddities: Oddities,
}

/// Every engine, number of vCPUs and length; false when the copy differs.
pub(super) fn run(stage: &Stage<'_>) -> Result<bool, Refusal> {
    let params = stage.params;
    let mut casts = Vec::new();
    for &vcpus in &params.vcpus {
        for &locking in &params.locking {
            for &(engine, tracking) in &stage.trackers {
                casts.push(Cast {
                    engine,
                    tracking,
                    ..stage.cast(locking, vcpus)
                });
            }
        }
    }
    let mut good = true;
    for (done, cast) in casts.iter().enumerate() {
        progress(
            done,
            casts.len(),
            format_args!(
                "checkpoint: {} vCPUs, {}, {}",
                cast.vcpus,
                cast.engine.name(),
                cast.tracking.name()
            ),
        );
        good &= match params.timing {
            Timing::Insn => counted(stage, *cast)?,
            Timing::Wall | Timing::Parallel | Timing::Hw => case(stage, *cast)?,
        };
    }
    progress(casts.len(), casts.len(), format_args!("checkpoint: done"));
    Ok(good)
}

fn case(stage: &Stage<'_>, cast: Cast) -> Result<bool, Refusal> {
    let scene = logged(stage, cast, false)?;
    let mut fastest = 0;
    for _ in 0..TRIES {
        warm_up(&scene, stage.params.seed)?;
        fastest = fastest.max(alone(&scene, stage.params.seed)?);
    }
    let mut good = true;
    for &epoch_us in &stage.params.epoch_us {
        let run = Run::of(stage, &scene, epoch_us * 1000)?;
        run.told(stage, &scene, epoch_us, fastest);
        good &= run.lost == 0;
    }
    scene.close();
    Ok(good)
}

/// The same with instructions counted: the vCPUs sleep while an epoch ends.
fn counted(stage: &Stage<'_>, cast: Cast) -> Result<bool, Refusal> {
    let scene = logged(stage, cast, false)?;
    let failed = |error| alloc::format!("dirty logging: {error}");
    let disabled = scene.stage2().disable_logging(cpu(), scene.data);
    disabled.map_err(failed)?;
    let pass_ns = pass(&scene, 0)?;
    let enabled = scene.stage2().enable_logging(cpu(), scene.data, false);
    enabled.map_err(failed)?;
    let stores = cast.region_bytes / PAGE_BYTES * cast.vcpus as u64;
    let mut good = true;
    for &epoch_us in &stage.params.epoch_us {
        let passes = (epoch_us * 1000 / pass_ns.max(1)).max(1);
        let mut shadow = Shadow::new(scene.pages());
        shadow.copy_all(&scene)?;
        let mut sums = Sums::default();
        let mut elapsed_ns = 0;
        cycle::prepare(&scene)?;
        let before = Counts::now();
        for epoch in 1..=stage.params.epochs {
            for number in 1..=passes {
                elapsed_ns += pass(&scene, epoch * passes + number)?;
            }
            sums.turn(&scene, &mut shadow)?;
        }
        let run = Run {
            counts: before.since().collect(),
            elapsed_ns,
            stores: stores * passes * sums.epochs,
            sums,
            lost: shadow.differing(&scene)?,
        };
        run.told(stage, &scene, epoch_us, a_second(stores, pass_ns));
        good &= run.lost == 0;
    }
    scene.close();
    Ok(good)
}

/// Has every vCPU store to as many pages as it has, at random; the time on their CPUs.
fn pass(scene: &Scene, seed: u64) -> Result<u64, Refusal> {
    let steps = scene.cast.region_bytes / PAGE_BYTES;
    let outcomes = scene.perform(|vcpu| Command {
        op: op::PASS,
        args: [
            scene.region(vcpu),
            steps,
            PAGE_BYTES,
            100 | flags::RANDOM,
            (seed & u64::from(u32::MAX)) << 32 | 1,
        ],
    })?;
    let ticks = outcomes.iter().map(|outcome| outcome.ticks).sum();
    Ok(nanoseconds(ticks))
}

/// Lets the vCPUs run through a few long epochs: an emulator fits its TLB to what is used when it is invalidated.
fn warm_up(scene: &Scene, seed: u64) -> Result<(), Refusal> {
    scene.run_freely(seed)?;
    let mut shadow = Shadow::new(scene.pages());
    let mut sums = Sums::default();
    for _ in 0..WARMING {
        linger(LEAST_NS / WARMING);
        sums.turn(scene, &mut shadow)?;
    }
    scene.end_run().map(drop)
}

/// Stores a second while nothing is logged.
fn alone(scene: &Scene, seed: u64) -> Result<u64, Refusal> {
    let failed = |error| alloc::format!("dirty logging: {error}");
    let disabled = scene.stage2().disable_logging(cpu(), scene.data);
    disabled.map_err(failed)?;
    let start = Moment::now();
    scene.run_freely(seed)?;
    linger(LEAST_NS);
    let stores = scene.end_run()?;
    let rate = a_second(stores, start.elapsed_ns());
    let enabled = scene.stage2().enable_logging(cpu(), scene.data, false);
    enabled.map_err(failed)?;
    Ok(rate)
}

/// What checkpoints at one length came to.
struct Run {
    sums: Sums,
    counts: Vec<(&'static str, u64)>,
    elapsed_ns: u64,
    stores: u64,
    lost: u64,
}

impl Run {
    fn of(stage: &Stage<'_>, scene: &Scene, epoch_ns: u64) -> Result<Self, Refusal> {
        let mut shadow = Shadow::new(scene.pages());
        shadow.copy_all(scene)?;
        let mut sums = Sums::default();
        cycle::prepare(scene)?;
        let before = Counts::now();
        let start = Moment::now();
        scene.run_freely(stage.params.seed)?;
        let mut end = epoch_ns;
        while sums.epochs < stage.params.epochs || start.elapsed_ns() < LEAST_NS {
            linger(end.saturating_sub(start.elapsed_ns()));
            // What takes longer than an epoch makes epochs longer.
            end = start.elapsed_ns() + epoch_ns;
            sums.turn(scene, &mut shadow)?;
        }
        let counts = before.since().collect();
        let stores = scene.end_run()?;
        let elapsed_ns = start.elapsed_ns();
        Sums::default().turn(scene, &mut shadow)?;
        Ok(Self {
            sums,
            counts,
            elapsed_ns,
            stores,
            lost: shadow.differing(scene)?,
        })
    }

    /// Prints the row, beside the rate of stores without checkpoints.
    fn told(&self, stage: &Stage<'_>, scene: &Scene, epoch_us: u64, alone: u64) {
        let sums = &self.sums;
        let mean = |sum: u64| sum / sums.epochs.max(1);
        let per_epoch = |event| mean(count(&self.counts, event));
        let faults = per_epoch("faults_permission") + per_epoch("faults_translation");
        let row = cycle::row(stage, "checkpoint", "cycle", scene)
            .param("mib_per_vcpu", scene.cast.region_bytes >> 20)
            .param("mapped_mib", (scene.pages() * PAGE_BYTES) >> 20)
            .param("epoch_us", epoch_us)
            .value("epochs", sums.epochs)
            .value("epoch_ns", mean(self.elapsed_ns))
            .value("stores_per_s", a_second(self.stores, self.elapsed_ns))
            .value("stores_per_s_alone", alone)
            .value("call_ns", mean(sums.call_ns))
            .value("call_max_ns", sums.call_max_ns)
            .value("ack_ns", mean(sums.ack_ns))
            .value("harvest_ns", mean(sums.harvest_ns))
            .value("copy_ns", mean(sums.copy_ns))
            .value("background_ns", mean(sums.prepare_ns))
            .value("pages_per_epoch", mean(sums.pages))
            .value("faults_per_epoch", faults)
            .value("splits_per_epoch", per_epoch("splits"))
            .value("kicks_per_epoch", per_epoch("kicks"))
            .value("pages_lost", self.lost);
        sums.oddities.told(row).print();
    }
}

impl Sums {
    /// One checkpoint.
    fn turn(&mut self, scene: &Scene, shadow: &mut Shadow) -> Result<(), Refusal> {
        let call = cycle::call(scene)?;
        self.oddities.note(scene, &call);
        let (pages, harvest_ns) = cycle::harvest(scene, &call)?;
        let (copied, copy_ns) = timed(|| shadow.copy(scene, &pages));
        copied?;
        let (prepared, prepare_ns) = cycle::prepare(scene)?;
        self.oddities.unprepared += u64::from(prepared.is_none());
        self.epochs += 1;
        self.pages += pages.len();
        self.call_ns += call.call_ns;
        self.call_max_ns = self.call_max_ns.max(call.call_ns);
        self.ack_ns += call.ack_ns;
        self.harvest_ns += harvest_ns;
        self.copy_ns += copy_ns;
        self.prepare_ns += prepare_ns;
        Ok(())
    }
}

fn a_second(count: u64, ns: u64) -> u64 {
    let rate = u128::from(count) * 1_000_000_000 / u128::from(ns.max(1));
    u64::try_from(rate).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::a_second;

    #[test]
    fn rates_are_those_of_a_whole_second() {
        assert_eq!(a_second(5, 500_000_000), 10);
        assert_eq!(a_second(u64::MAX, 1_000_000_000), u64::MAX);
        assert_eq!(a_second(5, 0), 5_000_000_000);
    }
}
