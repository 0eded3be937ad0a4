//! Suite `verify`: whether every write is reported.
//!
//! *Stopped*: after each random pass the reported set is compared with the guest's own log; they must be equal. *Running*:
//! vCPUs write at random without pause while the controller collects, clears and copies; after the last round, with the
//! vCPUs stopped, a copy fed only by the reports must equal the guest's memory byte for byte.

use alloc::format;
use alloc::vec::Vec;

use crate::addr::PAGE_BYTES;
use crate::arch;
use crate::guest::abi::{flags, op};
use crate::mmu::{Level, PageSet};
use crate::vm::Command;

use super::Refusal;
use super::clock::Moment;
use super::comparison::Comparison;
use super::params::size_name;
use super::report::{Row, progress};
use super::scene::{Cast, Scene, Stage, cpu};
use super::shadow::Shadow;

/// How long vCPUs may write nothing new.
pub(super) const PATIENCE_NS: u64 = 30_000_000_000;

/// Every mode, with pages and with blocks; false when anything was lost.
pub(super) fn run(stage: &Stage<'_>) -> Result<bool, Refusal> {
    let params = stage.params;
    let mut cases = Vec::new();
    for &vcpus in &params.vcpus {
        for &locking in &params.locking {
            for (backing, all_set) in [(Level::L3, false), (Level::L2, false), (Level::L2, true)] {
                cases.push((
                    Cast {
                        backing,
                        ..stage.cast(locking, vcpus)
                    },
                    all_set,
                ));
            }
        }
    }
    let mut good = true;
    for (done, (cast, all_set)) in cases.iter().enumerate() {
        progress(
            done,
            cases.len(),
            format_args!("verify: {} vCPUs, {}", cast.vcpus, cast.locking.name()),
        );
        good &= stopped(stage, *cast, *all_set)?;
        good &= running(stage, *cast, *all_set)?;
    }
    Ok(good)
}

fn row(stage: &Stage<'_>, case: &str, cast: Cast, all_set: bool) -> Row {
    Row::new("verify", case, stage.params.timing.name())
        .param("vcpus", cast.vcpus)
        .word("locking", cast.locking.name())
        .word("engine", cast.engine.name())
        .word("tracking", cast.tracking.name())
        .word("backing", size_name(cast.backing))
        .word("splitting", cast.splitting.policy.name())
        .param("bbm", cast.splitting.bbm.level())
        .param("mib_per_vcpu", stage.params.mib)
        .param("initially_all_set", all_set)
}

/// A scene whose memory is populated and logged.
pub(super) fn logged(stage: &Stage<'_>, cast: Cast, all_set: bool) -> Result<Scene, Refusal> {
    logged_sparsely(stage, cast, all_set, PAGE_BYTES)
}

/// As [`logged`]; of its region every vCPU has written a page each `stride` bytes.
pub(super) fn logged_sparsely(
    stage: &Stage<'_>,
    cast: Cast,
    all_set: bool,
    stride: u64,
) -> Result<Scene, Refusal> {
    let scene = stage.open(cast)?;
    let steps = steps(&scene, stride);
    arch::hint_unmeasured();
    scene.perform(|vcpu| Command {
        op: op::PASS,
        args: [scene.region(vcpu), steps, stride, 100, 7],
    })?;
    scene.measured();
    let enabled = scene.stage2().enable_logging(cpu(), scene.data, all_set);
    enabled.map_err(|error| format!("dirty logging: {error}"))?;
    Ok(scene)
}

/// Pages that each vCPU goes over, one each `stride` bytes.
pub(super) fn steps(scene: &Scene, stride: u64) -> u64 {
    (scene.cast.region_bytes / stride).min(scene.pages_each)
}

/// Takes everything, in two ranges, as one who copies a large memory piece by piece does.
pub(super) fn clear(scene: &Scene) -> Result<PageSet, Refusal> {
    let mut pages = PageSet::default();
    let between = scene.pages() / 3 / 64 * 64;
    for (from, to) in [(0, between), (between, scene.pages())] {
        let cleared = scene
            .stage2()
            .clear(cpu(), scene.data, from, to, &mut pages);
        cleared.map_err(|error| format!("dirty logging: {error}"))?;
    }
    Ok(pages)
}

fn stopped(stage: &Stage<'_>, cast: Cast, all_set: bool) -> Result<bool, Refusal> {
    let scene = logged(stage, cast, all_set)?;
    let steps = scene.pages_each;
    let mut sums = Comparison::default();
    if all_set {
        // Everything is reported once, whatever was written.
        let first = clear(&scene)?;
        sums.lost += scene.pages() - first.len();
    }
    for iteration in 1..=stage.params.iterations {
        let how = 50 | flags::RANDOM | flags::LOG;
        let seed = |vcpu: usize| {
            (stage.params.seed + iteration * 1000 + vcpu as u64) & u64::from(u32::MAX)
        };
        scene.perform(|vcpu| Command {
            op: op::PASS,
            args: [
                scene.region(vcpu),
                steps,
                PAGE_BYTES,
                how,
                seed(vcpu) << 32 | iteration,
            ],
        })?;
        sums.add(Comparison::of(&scene.take_write_log()?, &clear(&scene)?));
    }
    scene.close();
    row(stage, "stopped", cast, all_set)
        .value("pages_written", sums.written)
        .value("pages_reported", sums.reported)
        .value("pages_lost", sums.lost)
        .value("pages_extra", sums.extra)
        .print();
    Ok(sums.lost == 0 && sums.extra == 0)
}

fn running(stage: &Stage<'_>, cast: Cast, all_set: bool) -> Result<bool, Refusal> {
    let scene = logged(stage, cast, all_set)?;
    let mut shadow = Shadow::new(scene.pages());
    if !all_set {
        shadow.copy_all(&scene)?;
    }
    scene.run_freely(stage.params.seed)?;
    let (mut rounds, mut reported) = (0, 0);
    let mut last_counted = Moment::now();
    // A round counts when there was something in it; vCPUs may need a while to begin.
    while rounds < stage.params.rounds && last_counted.elapsed_ns() < PATIENCE_NS {
        let harvest = clear(&scene)?;
        if !harvest.is_empty() {
            rounds += 1;
            last_counted = Moment::now();
        }
        reported += harvest.len();
        shadow.copy(&scene, &harvest)?;
    }
    let stores = scene.end_run()?;
    let last = clear(&scene)?;
    shadow.copy(&scene, &last)?;
    let lost = shadow.differing(&scene)?;
    scene.close();
    row(stage, "running", cast, all_set)
        .param("rounds", stage.params.rounds)
        .value("rounds", rounds)
        .value("stores", stores)
        .value("pages_reported", reported + last.len())
        .value("pages_lost", lost)
        .print();
    Ok(lost == 0 && rounds == stage.params.rounds)
}
