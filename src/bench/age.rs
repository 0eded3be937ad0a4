//! Suite `age`: marking memory idle, and what it costs those who use it.
//!
//! Case `phases`: those of the kernel's access_tracking_perf_test: populate, write, read, mark idle, write idle memory, mark
//! idle, read idle memory. Case `touched`: after everything was marked idle a part that the guest names itself is written; who
//! is young then? Case `hot`: passes while every vCPU goes round and round over a small part, which is what an imprecise pass
//! does not see. Case `live`, with real concurrency: vCPUs fault memory in while the controller ages it all the time, only
//! spins, or sleeps. Case `faults`, with instructions counted: the same, pass by pass in between.

use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

use crate::addr::{Ipa, PAGE_BYTES, to_index};
use crate::arch;
use crate::guest::abi::{self, flags, op};
use crate::mmu::{Aged, Error, Found, PageSet, Precision, Sighting};
use crate::vm::Command;

use super::Refusal;
use super::clock::{Counts, longest_ns, nanoseconds, timed};
use super::comparison::Comparison;
use super::cycle::count;
use super::heat::{await_rounds, populate, precisions};
use super::params::{Timing, precision_name, size_name};
use super::report::{Row, progress};
use super::scene::{Cast, Outcome, Part, Scene, Stage, cpu};
use super::verify::clear;

/// One page of this many is hot in case `hot`.
const HOT: u64 = 64;
/// Passes of case `hot`.
const HOT_PASSES: u64 = 16;
/// Pages that are faulted in between two passes of case `faults`.
const CHUNK_PAGES: u64 = 64;

/// What is counted of a phase.
const PHASE: [&str; 2] = ["faults_access", "faults_translation"];
/// What is counted of a pass.
const PASS: [&str; 4] = [
    "descriptor_writes",
    "tlbi_broadcast",
    "tlbi_vmid",
    "lock_acquired",
];

/// What everything marked idle at once came to.
struct Mark {
    aged: Aged,
    ns: u64,
    counts: Vec<(&'static str, u64)>,
}

/// What the controller does while vCPUs fault memory in.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Meanwhile {
    Sleeps,
    /// Ages the memory of another VM, which sleeps: the same work, and no business of this VM's.
    AgesAnother,
    Ages,
}

/// vCPUs that faulted memory in.
#[derive(Clone, Copy, Default)]
struct Populated {
    /// Time of a vCPU, mean of all.
    vcpu_ns: u64,
    passes: u64,
    /// Time in passes.
    pass_ns: u64,
    leaves: u64,
    locks: u64,
    faults: u64,
}

/// Every mode with every vCPU count; false when touched memory was reported idle by a precise pass.
pub(super) fn run(stage: &Stage<'_>) -> Result<bool, Refusal> {
    let params = stage.params;
    let of = params.vcpus.len() * params.locking.len();
    let mut good = true;
    let mut done = 0;
    for &vcpus in &params.vcpus {
        for &locking in &params.locking {
            progress(
                done,
                of,
                format_args!("age: {vcpus} vCPUs, {}", locking.name()),
            );
            let cast = stage.cast(locking, vcpus);
            phases(stage, cast)?;
            for &precision in precisions(params) {
                // Who is idle is no question of time, which is what the parallel clock is for.
                if params.timing != Timing::Parallel {
                    good &= touched(stage, cast, precision)?;
                    good &= hot(stage, cast, precision)?;
                }
            }
            if params.timing != Timing::Insn {
                live(stage, cast)?;
            } else if vcpus == 1 {
                faults(stage, cast)?;
            }
            done += 1;
        }
    }
    progress(done, of, format_args!("age: done"));
    Ok(good)
}

fn phases(stage: &Stage<'_>, cast: Cast) -> Result<(), Refusal> {
    let scene = stage.open(cast)?;
    let mut first = row(stage, "phases", cast, Precision::Precise);
    for (name, percent) in [("populate", 100), ("write", 100), ("read", 0)] {
        first = phase(&scene, first, name, percent)?;
    }
    for iteration in 1..=stage.params.iterations {
        let mut row = first.clone().param("iteration", iteration);
        for (idle, percent) in [("write_idle", 100), ("read_idle", 0)] {
            let mark = mark(&scene, Precision::Precise, |_| ());
            row = mark.told(row, &format!("mark_{idle}"));
            row = phase(&scene, row, idle, percent)?;
        }
        // Nothing was accessed since: what looking alone costs.
        mark(&scene, Precision::Precise, |_| ());
        let again = mark(&scene, Precision::Precise, |_| ());
        again.told(row, "mark_marked").print();
        if iteration < stage.params.iterations {
            // It marks what is young again.
            populate(&scene)?;
        }
    }
    scene.close();
    Ok(())
}

/// Every vCPU goes over its region once.
fn phase(scene: &Scene, row: Row, name: &str, percent: u64) -> Result<Row, Refusal> {
    let pages = scene.pages_each;
    let before = Counts::now();
    let (done, ns) = timed(|| {
        scene.perform(|vcpu| Command {
            op: op::PASS,
            args: [scene.region(vcpu), pages, PAGE_BYTES, percent, 5],
        })
    });
    let vcpu_ns = longest_ns(&done?);
    let counts: Vec<_> = before.since().collect();
    let row = row
        .value(&format!("{name}_ns"), ns)
        .value(&format!("{name}_vcpu_ns"), vcpu_ns);
    Ok(counted(row, name, &PHASE, &counts))
}

fn counted(row: Row, name: &str, events: &[&str], counts: &[(&str, u64)]) -> Row {
    events.iter().fold(row, |row, event| {
        row.value(&format!("{name}_{event}"), count(counts, event))
    })
}

/// Marks all memory idle; `see` is told of the logged memory.
fn mark(scene: &Scene, precision: Precision, mut see: impl FnMut(Sighting)) -> Mark {
    let before = Counts::own();
    let (aged, ns) = timed(|| {
        scene.stage2().age_all(cpu(), precision, |id, sighting| {
            if id == scene.data {
                see(sighting);
            }
        })
    });
    Mark {
        aged,
        ns,
        counts: before.since().collect(),
    }
}

impl Mark {
    fn told(&self, row: Row, name: &str) -> Row {
        let row = row
            .value(&format!("{name}_ns"), self.ns)
            .value(&format!("{name}_leaves"), self.aged.leaves)
            .value(&format!("{name}_young"), self.aged.young);
        counted(row, name, &PASS, &self.counts)
    }
}

/// The young pages of one pass.
fn young(scene: &Scene, precision: Precision) -> (PageSet, Mark) {
    let mut words = vec![0_u64; to_index(scene.pages().div_ceil(64))];
    let mark = mark(scene, precision, |sighting| {
        if sighting.found == Found::Young {
            for page in sighting.page..sighting.page + sighting.pages {
                if let Some(word) = words.get_mut(to_index(page / 64)) {
                    *word |= 1 << (page % 64);
                }
            }
        }
    });
    let mut pages = PageSet::default();
    for (number, word) in (0_u64..).zip(words).filter(|(_, word)| *word != 0) {
        pages.push(number * 64, word);
    }
    (pages, mark)
}

/// Marks everything idle, has the guest write at random and name what it wrote, and asks who is young.
pub(super) fn touch(scene: &Scene, precision: Precision, seed: u64) -> Result<Comparison, Refusal> {
    let pages = scene.cast.region_bytes / PAGE_BYTES;
    // What is cached when everything is marked is what an imprecise pass does not see again.
    let write = |log: u64| {
        scene.perform(|vcpu| Command {
            op: op::PASS,
            args: [
                scene.region(vcpu),
                pages / 2,
                PAGE_BYTES,
                100 | flags::RANDOM | log,
                (seed + vcpu as u64) << 32 | 6,
            ],
        })
    };
    write(0)?;
    mark(scene, precision, |_| ());
    scene.take_write_log()?;
    write(flags::LOG)?;
    let written = scene.take_write_log()?;
    Ok(Comparison::of(&written, &young(scene, precision).0))
}

fn touched(stage: &Stage<'_>, cast: Cast, precision: Precision) -> Result<bool, Refusal> {
    let scene = stage.open(cast)?;
    populate(&scene)?;
    let mut sums = Comparison::default();
    for iteration in 1..=stage.params.iterations {
        sums.add(touch(&scene, precision, stage.params.seed + iteration)?);
    }
    scene.close();
    row(stage, "touched", cast, precision)
        .value("pages_touched", sums.written)
        .value("pages_young", sums.reported)
        .value("touched_idle", sums.lost)
        .value("untouched_young", sums.extra)
        .print();
    Ok(sums.lost == 0 || precision == Precision::Imprecise)
}

fn hot(stage: &Stage<'_>, cast: Cast, precision: Precision) -> Result<bool, Refusal> {
    let scene = stage.open(cast)?;
    populate(&scene)?;
    let part = Part {
        first: 0,
        pages: (cast.region_bytes / PAGE_BYTES / HOT).max(1),
    };
    scene.run_rounds(part, Part { first: 0, pages: 0 })?;
    await_rounds(&scene, 1)?;
    mark(&scene, precision, |_| ());
    let hot: Vec<u64> = (0..scene.pages().div_ceil(64))
        .map(|word| hot_bits(&scene, part, word))
        .collect();
    let mut sums = Comparison::default();
    let (mut pass_ns, mut leaves) = (0, 0);
    for _ in 0..HOT_PASSES {
        await_rounds(&scene, 2)?;
        let (young, mark) = young(&scene, precision);
        sums.add(Comparison::of(&hot, &young));
        pass_ns += mark.ns;
        leaves += mark.aged.leaves;
    }
    scene.end_run()?;
    scene.close();
    row(stage, "hot", cast, precision)
        .value("pages_touched", sums.written)
        .value("pages_young", sums.reported)
        .value("touched_idle", sums.lost)
        .value("passes", HOT_PASSES)
        .value("pass_ns", pass_ns / HOT_PASSES)
        .value("leaves", leaves / HOT_PASSES)
        .print();
    Ok(sums.lost == 0 || precision == Precision::Imprecise)
}

/// Which of the 64 pages from `64 * word` are hot.
fn hot_bits(scene: &Scene, part: Part, word: u64) -> u64 {
    let region = scene.cast.region_bytes / PAGE_BYTES;
    (0..64)
        .filter(|bit| (word * 64 + bit) % region < part.pages)
        .fold(0, |bits, bit| bits | 1 << bit)
}

/// vCPUs fault memory in, by turns with aging and without.
fn live(stage: &Stage<'_>, cast: Cast) -> Result<(), Refusal> {
    let scene = stage.open(cast)?;
    // A host's caches are shared; the parallel clock knows none.
    let shares = stage.params.timing != Timing::Parallel;
    let other = shares.then(|| stage.open(cast)).transpose()?;
    arch::hint_unmeasured();
    populate(&scene)?;
    other.iter().try_for_each(populate)?;
    scene.measured();
    let mut found = [const { Vec::new() }; 3];
    for _ in 0..stage.params.rounds {
        let turns = [Meanwhile::Sleeps, Meanwhile::AgesAnother, Meanwhile::Ages];
        for (meanwhile, rounds) in turns.into_iter().zip(&mut found) {
            let aged = match meanwhile {
                Meanwhile::AgesAnother => other.as_ref(),
                Meanwhile::Sleeps | Meanwhile::Ages => Some(&scene),
            };
            if let Some(aged) = aged {
                rounds.push(fault_in(&scene, aged, meanwhile)?);
            }
        }
    }
    other.into_iter().for_each(Scene::close);
    scene.close();
    let [without, elsewhere, with] = found;
    let other_times = (!elsewhere.is_empty()).then(|| {
        [
            ("elsewhere_vcpu_ns", median(&elsewhere)),
            ("elsewhere_least_ns", least(&elsewhere)),
        ]
    });
    let sum = |of: fn(&Populated) -> u64| with.iter().map(of).sum::<u64>();
    let passes = sum(|round| round.passes);
    row(stage, "live", cast, Precision::Precise)
        .param("rounds", stage.params.rounds)
        .value("without_vcpu_ns", median(&without))
        .value("with_vcpu_ns", median(&with))
        .value("without_least_ns", least(&without))
        .value("with_least_ns", least(&with))
        .values(other_times.into_iter().flatten())
        .value("passes", passes)
        .value("pass_ns", sum(|round| round.pass_ns) / passes.max(1))
        .value("leaves", sum(|round| round.leaves))
        .value("lock_acquired_aging", sum(|round| round.locks))
        .value("faults_access", sum(|round| round.faults))
        .print();
    Ok(())
}

/// The round that the host disturbed least.
fn least(rounds: &[Populated]) -> u64 {
    rounds.iter().map(|round| round.vcpu_ns).min().unwrap_or(0)
}

fn median(rounds: &[Populated]) -> u64 {
    let mut times: Vec<u64> = rounds.iter().map(|round| round.vcpu_ns).collect();
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or(0)
}

/// Takes all translations away and has every vCPU fault them in again.
fn fault_in(scene: &Scene, aged: &Scene, meanwhile: Meanwhile) -> Result<Populated, Refusal> {
    unmap(scene)?;
    let mut found = Populated::default();
    let pages = scene.pages_each;
    let done = scene.operations()?;
    let all = Counts::now();
    scene.post(|vcpu| Command {
        op: op::PASS,
        args: [scene.region(vcpu), pages, PAGE_BYTES, 100, 8],
    });
    let running = |(now, done): (&u64, &u64)| now == done;
    while meanwhile != Meanwhile::Sleeps && scene.operations()?.iter().zip(&done).any(running) {
        let mark = mark(aged, Precision::Precise, |_| ());
        found.passes += 1;
        found.pass_ns += mark.ns;
        found.leaves += mark.aged.leaves;
        found.locks += count(&mark.counts, "lock_acquired");
    }
    let outcomes = scene.wait_all()?;
    found.faults = count(&all.since().collect::<Vec<_>>(), "faults_access");
    found.vcpu_ns = nanoseconds(ticks(&outcomes)) / outcomes.len().max(1) as u64;
    Ok(found)
}

fn unmap(scene: &Scene) -> Result<(), Refusal> {
    let bytes = scene.pages() * PAGE_BYTES;
    let unmapped = scene.stage2().unmap(cpu(), Ipa::new(abi::DATA), bytes);
    unmapped.map_err(refused)
}

fn ticks(outcomes: &[Outcome]) -> u64 {
    outcomes.iter().map(|outcome| outcome.ticks).sum()
}

/// Instructions that faults take, with passes in between and without.
fn faults(stage: &Stage<'_>, cast: Cast) -> Result<(), Refusal> {
    let scene = stage.open(cast)?;
    populate(&scene)?;
    let mut row = row(stage, "faults", cast, Precision::Precise);
    // In chunks, but nothing faults: what is not the faults' in the other runs.
    let rest = ticks(&chunks(&scene, false)?);
    let extra = |outcomes: &[Outcome]| nanoseconds(ticks(outcomes).saturating_sub(rest));
    for (name, aging) in [("missing", false), ("missing_aging", true)] {
        unmap(&scene)?;
        row = faulted(row, name, || Ok(extra(&chunks(&scene, aging)?)))?;
    }
    let logging = scene.stage2().enable_logging(cpu(), scene.data, false);
    logging.map_err(refused)?;
    for (name, aging) in [("write", false), ("write_aging", true)] {
        populate(&scene)?;
        clear(&scene)?;
        row = faulted(row, name, || Ok(extra(&chunks(&scene, aging)?)))?;
    }
    scene.close();
    row.value("pages", cast.region_bytes / PAGE_BYTES).print();
    Ok(())
}

/// Adds the instructions and the faults of `work`.
fn faulted(
    row: Row,
    name: &str,
    work: impl FnOnce() -> Result<u64, Refusal>,
) -> Result<Row, Refusal> {
    let before = Counts::now();
    let insn = work()?;
    let counts: Vec<_> = before.since().collect();
    let faults = ["faults_translation", "faults_permission", "faults_access"]
        .map(|event| count(&counts, event));
    Ok(row
        .value(&format!("{name}_insn"), insn)
        .value(&format!("{name}_faults"), faults.iter().sum::<u64>()))
}

/// vCPU 0 writes its region piece by piece; after each piece everything is marked idle, or nothing.
fn chunks(scene: &Scene, aging: bool) -> Result<Vec<Outcome>, Refusal> {
    let mut outcomes = Vec::new();
    for chunk in 0..scene.cast.region_bytes / PAGE_BYTES / CHUNK_PAGES {
        let start = scene.region(0) + chunk * CHUNK_PAGES * PAGE_BYTES;
        outcomes.push(scene.perform_one(
            0,
            Command {
                op: op::PASS,
                args: [start, CHUNK_PAGES, PAGE_BYTES, 100, 9],
            },
        )?);
        if aging {
            let (stage2, data) = (scene.stage2(), scene.data);
            let aged = stage2.age(cpu(), data, 0, scene.pages(), Precision::Precise, |_| ());
            aged.map_err(refused)?;
        }
    }
    Ok(outcomes)
}

fn refused(error: Error) -> Refusal {
    format!("age: {error}")
}

fn row(stage: &Stage<'_>, case: &str, cast: Cast, precision: Precision) -> Row {
    Row::new("age", case, stage.params.timing.name())
        .param("vcpus", cast.vcpus)
        .word("locking", cast.locking.name())
        .word("access_flag", cast.access_flag.name())
        .word("precision", precision_name(precision))
        .word("backing", size_name(cast.backing))
        .param("mib_per_vcpu", cast.region_bytes >> 20)
}
