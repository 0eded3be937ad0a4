//! Suite `split`: what it costs to split blocks for logging, when, and what vCPUs notice of it.
//!
//! A case: populate; enable (policy `clear`: with everything set, then the first clear, which splits); the measured pass;
//! get; clear; disable. The *eager* phase is what comes before the pass. Afterwards memory must be mapped as before and
//! hold what it held; only `fault-empty` leaves holes in its tables, as the kernel it reproduces does. Case `live` splits
//! while every vCPU stores at random; case `cost` counts instructions on an idle VM.

use alloc::format;
use alloc::vec::Vec;

use crate::addr::{Ipa, PAGE_BYTES};
use crate::arch;
use crate::guest::abi::{flags, op};
use crate::mmu::descriptor::Leaf;
use crate::mmu::{self, Bbm, Collapse, Level, Locking, PageSet, Policy, Split};
use crate::vm::Command;

use super::Refusal;
use super::clock::{Counts, exit_times, longest_ns, measure_exits, timed};
use super::comparison::Comparison;
use super::params::{Params, Timing, size_name, stride_name};
use super::protect::linger;
use super::report::{Row, progress};
use super::scene::{Cast, Scene, Stage, cpu};

/// How the measured pass goes over memory.
#[derive(Clone, Copy)]
struct Workload {
    name: &'static str,
    stride: u64,
    write_percent: u64,
}

const SPARSE: Workload = Workload {
    name: "sparse",
    stride: 2 << 20,
    write_percent: 100,
};
const READ_MOSTLY: Workload = Workload {
    name: "read-mostly",
    stride: PAGE_BYTES,
    write_percent: 10,
};

/// How often logging begins and ends under running vCPUs, and how long they run in between.
#[derive(Clone, Copy)]
struct Pace {
    rounds: u64,
    lead_ns: u64,
}

impl Pace {
    /// The parallel clock has no noise to be averaged away, and every CPU's work is done in turn.
    const fn of(timing: Timing) -> Self {
        match timing {
            Timing::Parallel => Self {
                rounds: 1,
                lead_ns: 20_000,
            },
            Timing::Insn | Timing::Wall | Timing::Hw => Self {
                rounds: 16,
                lead_ns: 5_000_000,
            },
        }
    }
}

/// Event counts of a phase, by name.
type Counted = Vec<(&'static str, u64)>;

/// Counts of the pass whose plain name stands for the eager phase and the pass together.
const TOTALS: [&str; 3] = ["splits", "bbm_windows", "busy_retries"];
/// Counts of the eager phase that are reported, with their names.
const EAGER: [(&str, &str); 8] = [
    ("splits", "splits_eager"),
    ("bbm_windows", "bbm_windows_eager"),
    ("tlbi_ipa", "tlbi_ipa_eager"),
    ("tlbi_stage1", "tlbi_stage1_eager"),
    ("tlbi_vmid", "tlbi_vmid_eager"),
    ("tlbi_range", "tlbi_range_eager"),
    ("faults_translation", "faults_translation_eager"),
    ("busy_retries", "busy_retries_eager"),
];
/// Counts of the end of logging.
const COLLAPSING: [(&str, &str); 5] = [
    ("collapses", "collapses_disable"),
    ("bbm_windows", "bbm_windows_disable"),
    ("tlbi_vmid", "tlbi_vmid_disable"),
    ("tlbi_stage1", "tlbi_stage1_disable"),
    ("tlbi_ipa", "tlbi_ipa_disable"),
];

/// What the phase before the pass took.
struct Eager {
    enable_ns: u64,
    clear_first_ns: Option<u64>,
    split: Split,
    counts: Counted,
}

/// What the end of logging took, and what it changed.
struct End {
    collapse_ns: u64,
    collapse: Collapse,
    counts: Counted,
    leaves_changed: u64,
    /// Nothing where time is all that is asked.
    ram_changed: Option<u64>,
}

/// Every policy at every level, with every mode and vCPU count; false when something was lost or changed.
pub(super) fn run(stage: &Stage<'_>) -> Result<bool, Refusal> {
    let casts = casts(stage);
    let mut good = true;
    for (done, cast) in casts.iter().enumerate() {
        progress(
            done,
            casts.len(),
            format_args!(
                "split: {} vCPUs, {}, {}, bbm {}",
                cast.vcpus,
                cast.locking.name(),
                cast.splitting.policy.name(),
                cast.splitting.bbm.level()
            ),
        );
        for workload in [SPARSE, READ_MOSTLY] {
            good &= case(stage, *cast, workload)?;
        }
        let eager = matches!(cast.splitting.policy, Policy::Enable | Policy::Clear);
        if eager && stage.params.timing != Timing::Insn {
            good &= live(stage, *cast)?;
        }
    }
    if stage.params.timing == Timing::Insn {
        for &bbm in &stage.bbm {
            for &locking in &stage.params.locking {
                cost(stage, bbm, locking)?;
            }
        }
    }
    progress(casts.len(), casts.len(), format_args!("split: done"));
    Ok(good)
}

fn casts(stage: &Stage<'_>) -> Vec<Cast> {
    let params = stage.params;
    let mut casts = Vec::new();
    for &vcpus in &params.vcpus {
        for &locking in &params.locking {
            for &bbm in &stage.bbm {
                for &policy in &params.splitting {
                    casts.push(blocks(stage, policy, bbm, locking, vcpus));
                }
            }
        }
    }
    casts
}

/// The cast, with blocks: pages cannot be split.
fn blocks(stage: &Stage<'_>, policy: Policy, bbm: Bbm, locking: Locking, vcpus: usize) -> Cast {
    let cast = stage.cast(locking, vcpus);
    Cast {
        backing: cast.backing.min(Level::L2),
        splitting: stage.splitting(policy, bbm),
        ..cast
    }
}

fn case(stage: &Stage<'_>, cast: Cast, workload: Workload) -> Result<bool, Refusal> {
    let params = stage.params;
    let scene = populated(stage, cast)?;
    let leaves = scene.leaves();
    scene.measured();
    let eager = begin(&scene)?;
    // Under `insn` measuring would be part of what is measured.
    measure_exits(params.timing != Timing::Insn);
    let before = Counts::now();
    let (outcomes, dirty_ns) =
        timed(|| scene.perform(|vcpu| pass(params, &scene, vcpu, workload, flags::LOG)));
    let vcpu_ns = longest_ns(&outcomes?);
    let counts: Counted = before.since().chain(exit_times()).collect();
    measure_exits(false);
    let mut reported = PageSet::default();
    let (got, get_ns) = timed(|| scene.stage2().dirty(cpu(), scene.data, &mut reported));
    got.map_err(failed)?;
    let sets = Comparison::of(&scene.take_write_log()?, &reported);
    let mut taken = PageSet::default();
    let (cleared, clear_ns) = timed(|| clear(&scene, &mut taken));
    let late = cleared?;
    let end = finish(stage, &scene, &leaves)?;
    scene.close();
    let total = |name: &str| count(&eager.counts, name) + count(&counts, name);
    let row = row(stage, workload.name, cast)
        .word("stride", stride_name(workload.stride))
        .param("write_percent", workload.write_percent)
        .value("dirty_ns", dirty_ns)
        .value("vcpu_ns", vcpu_ns)
        .values((workload.stride == PAGE_BYTES).then_some(("read_mostly_ns", dirty_ns)))
        .value("get_ns", get_ns)
        .value("clear_ns", clear_ns)
        .value("pages_written", sets.written)
        .value("pages_reported", sets.reported)
        .value("pages_lost", sets.lost)
        .value("pages_extra", sets.extra)
        .value("splits_dirty", count(&counts, "splits"))
        .value("blocks_left", eager.split.left + late.left)
        .values(TOTALS.map(|name| (name, total(name))))
        .values(
            counts
                .into_iter()
                .filter(|(name, _)| !TOTALS.contains(name)),
        );
    told(row, &eager, &end).print();
    Ok(sets.lost == 0 && unchanged(cast, &end))
}

/// Splits while every vCPU stores at random, over and over; the counts are those of the eager phases alone, the times of
/// exits those of the whole run.
fn live(stage: &Stage<'_>, cast: Cast) -> Result<bool, Refusal> {
    let scene = populated(stage, cast)?;
    let leaves = scene.leaves();
    scene.measured();
    measure_exits(true);
    scene.run_freely_in(stage.params.seed, |_| (0, scene.pages_each))?;
    let pace = Pace::of(stage.params.timing);
    let eager = rounds(&scene, pace);
    let stores = scene.end_run()?;
    let eager = eager?;
    let times: Counted = exit_times().collect();
    measure_exits(false);
    let end = finish(stage, &scene, &leaves)?;
    scene.close();
    let name = |name: &str| TOTALS.contains(&name) || name.starts_with("faults_");
    let during = eager.counts.iter().copied();
    let row = row(stage, "live", cast)
        .value("rounds", pace.rounds)
        .value("stores", stores)
        .value("blocks_left", eager.split.left)
        .values(during.filter(|(event, _)| name(event)))
        .values(times);
    told(row, &eager, &end).print();
    Ok(unchanged(cast, &end))
}

/// Begins logging again and again, and leaves it on; the sum of what was counted and the mean of what was timed.
fn rounds(scene: &Scene, pace: Pace) -> Result<Eager, Refusal> {
    linger(pace.lead_ns);
    let mut sum = begin(scene)?;
    for _ in 1..pace.rounds {
        linger(pace.lead_ns);
        let disabled = scene.stage2().disable_logging(cpu(), scene.data);
        disabled.map_err(failed)?;
        linger(pace.lead_ns);
        let next = begin(scene)?;
        sum.enable_ns += next.enable_ns;
        sum.clear_first_ns = sum
            .clear_first_ns
            .zip(next.clear_first_ns)
            .map(|(a, b)| a + b);
        sum.split += next.split;
        for (count, (_, more)) in sum.counts.iter_mut().zip(next.counts) {
            count.1 += more;
        }
    }
    linger(pace.lead_ns);
    Ok(Eager {
        enable_ns: sum.enable_ns / pace.rounds,
        clear_first_ns: sum.clear_first_ns.map(|time| time / pace.rounds),
        ..sum
    })
}

/// Instructions of splitting and collapsing everything while no vCPU runs and nothing is logged.
fn cost(stage: &Stage<'_>, bbm: Bbm, locking: Locking) -> Result<(), Refusal> {
    let cast = blocks(stage, Policy::Fault, bbm, locking, 1);
    let scene = populated(stage, cast)?;
    scene.measured();
    let everything = (cpu(), scene.data, 0, scene.pages());
    let (at, data, from, to) = everything;
    let before = Counts::now();
    let (split, split_ns) = timed(|| scene.stage2().split(at, data, from, to));
    let split_counts: Counted = before.since().collect();
    let split = split.map_err(failed)?;
    let before = Counts::now();
    let (collapse, collapse_ns) = timed(|| scene.stage2().collapse(at, data, from, to));
    let collapse_counts: Counted = before.since().collect();
    let collapse = collapse.map_err(failed)?;
    scene.close();
    row(stage, "cost", cast)
        .value("block_insn", split_ns / split.blocks.max(1))
        .value("collapse_insn", collapse_ns / collapse.tables.max(1))
        .value("splits", split.blocks)
        .value("collapses", collapse.tables)
        .value("blocks_left", split.left)
        .values(renamed(&split_counts, &EAGER))
        .values(renamed(&collapse_counts, &COLLAPSING))
        .print();
    Ok(())
}

/// A scene whose memory every vCPU has written once; nothing was measured yet.
fn populated(stage: &Stage<'_>, cast: Cast) -> Result<Scene, Refusal> {
    let scene = stage.open(cast)?;
    arch::hint_unmeasured();
    scene.perform(|vcpu| Command {
        op: op::PASS,
        args: [scene.region(vcpu), scene.pages_each, PAGE_BYTES, 100, 7],
    })?;
    Ok(scene)
}

/// Enables logging; with policy `clear`, everything is set and then cleared.
fn begin(scene: &Scene) -> Result<Eager, Refusal> {
    let late = scene.cast.splitting.policy == Policy::Clear;
    let before = Counts::now();
    let (enabled, enable_ns) = timed(|| scene.stage2().enable_logging(cpu(), scene.data, late));
    let mut split = enabled.map_err(failed)?;
    let mut clear_first_ns = None;
    if late {
        let mut pages = PageSet::default();
        let (cleared, clear_ns) = timed(|| clear(scene, &mut pages));
        split += cleared?;
        clear_first_ns = Some(clear_ns);
    }
    Ok(Eager {
        enable_ns,
        clear_first_ns,
        split,
        counts: before.since().collect(),
    })
}

/// Takes everything, a chunk a call.
fn clear(scene: &Scene, pages: &mut PageSet) -> Result<Split, Refusal> {
    let chunk = scene.cast.splitting.chunk_bytes / PAGE_BYTES;
    let mut done = Split::default();
    let mut from = 0;
    while from < scene.pages() {
        let to = (from + chunk).min(scene.pages());
        let cleared = scene.stage2().clear(cpu(), scene.data, from, to, pages);
        done += cleared.map_err(failed)?;
        from = to;
    }
    Ok(done)
}

/// Disables logging, no vCPU running, and compares with what was before.
fn finish(stage: &Stage<'_>, scene: &Scene, leaves: &[(Ipa, Level, Leaf)]) -> Result<End, Refusal> {
    // Only the call between is measured.
    arch::hint_unmeasured();
    let asked = stage.params.timing != Timing::Parallel;
    let hash = || asked.then(|| scene.hash()).transpose();
    let then = hash()?;
    scene.measured();
    let before = Counts::now();
    let (disabled, collapse_ns) = timed(|| scene.stage2().disable_logging(cpu(), scene.data));
    let counts = before.since().collect();
    arch::hint_unmeasured();
    let collapse = disabled.map_err(failed)?;
    let now = scene.leaves();
    let differing = leaves.iter().zip(&now).filter(|(then, now)| then != now);
    Ok(End {
        collapse_ns,
        collapse,
        counts,
        leaves_changed: (differing.count() + leaves.len().abs_diff(now.len())) as u64,
        ram_changed: hash()?.zip(then).map(|(now, then)| u64::from(now != then)),
    })
}

fn unchanged(cast: Cast, end: &End) -> bool {
    let same = end.leaves_changed == 0 || cast.splitting.policy == Policy::FaultEmpty;
    same && end.ram_changed.unwrap_or(0) == 0
}

fn pass(params: &Params, scene: &Scene, vcpu: usize, workload: Workload, log: u64) -> Command {
    let seed = (params.seed + vcpu as u64) & u64::from(u32::MAX);
    // One page of each block, or so many of the first pages.
    let span = match workload.stride {
        PAGE_BYTES => scene.pages_each * PAGE_BYTES,
        _ => scene.cast.region_bytes,
    };
    let steps = (span / workload.stride).max(1);
    Command {
        op: op::PASS,
        args: [
            scene.region(vcpu),
            steps,
            workload.stride,
            workload.write_percent | log,
            seed << 32 | 1,
        ],
    }
}

/// The parameters that all rows of the suite have.
fn row(stage: &Stage<'_>, case: &str, cast: Cast) -> Row {
    let params = stage.params;
    Row::new("split", case, params.timing.name())
        .param("vcpus", cast.vcpus)
        .word("locking", cast.locking.name())
        .word("engine", cast.engine.name())
        .word("tracking", cast.tracking.name())
        .word("splitting", cast.splitting.policy.name())
        .param("bbm", cast.splitting.bbm.level())
        .param("bbm_batch", cast.splitting.batch)
        .word("chunk", size_name(params.chunk))
        .param("pause_us", params.pause_us)
        .word("backing", size_name(cast.backing))
        .param("mib_per_vcpu", params.mib)
}

/// Adds what the eager phase and the end of logging came to.
fn told(row: Row, eager: &Eager, end: &End) -> Row {
    row.value("enable_ns", eager.enable_ns)
        .values(eager.clear_first_ns.map(|time| ("clear_first_ns", time)))
        .value("collapse_ns", end.collapse_ns)
        .value("tables_left", end.collapse.left)
        .value("leaves_changed", end.leaves_changed)
        .values(end.ram_changed.map(|changed| ("ram_changed", changed)))
        .values(renamed(&eager.counts, &EAGER))
        .values(renamed(&end.counts, &COLLAPSING))
}

/// The counts that have a new name, under it.
fn renamed<'a>(
    counts: &'a [(&str, u64)],
    names: &'a [(&str, &'static str)],
) -> impl Iterator<Item = (&'static str, u64)> + 'a {
    names.iter().map(|(from, to)| (*to, count(counts, from)))
}

fn count(counts: &[(&str, u64)], name: &str) -> u64 {
    let found = counts.iter().find(|(event, _)| *event == name);
    found.map_or(0, |(_, count)| *count)
}

fn failed(error: mmu::Error) -> Refusal {
    format!("dirty logging: {error}")
}
