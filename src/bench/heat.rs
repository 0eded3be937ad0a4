//! Suite `heat`: which memory is hot while the guest runs a pattern that is known.
//!
//! Every vCPU goes over its region in *beats*: the hot part is stored to in each, the warm part behind it is loaded from in
//! one of [`WARM_BEATS`], the rest is cold; every [`MOVE_BEATS`] both move on by half the hot part. A background scan makes
//! one pass in each beat, while the vCPUs run: it begins when each has done a round, and the beat ends when each has done a
//! whole one after the pass. So what a pass finds is known exactly: what was used in its beat, and in the beat before.
//!
//! After each pass a row says how long each 2 MiB have been idle, and compares the working set with the truth, which is
//! rounded to the leaves that map the memory.

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use crate::addr::{PAGE_BYTES, to_index};
use crate::arch;
use crate::guest::abi::{self, op};
use crate::mmu::heat::IdleMap;
use crate::mmu::{Aged, Error, Pace, Precision, Scan, Step};
use crate::vm::Command;

use super::Refusal;
use super::clock::{Counts, Moment, nanoseconds, timed};
use super::cycle::count;
use super::params::{Params, Pattern, precision_name, size_name};
use super::protect::linger;
use super::report::{Row, progress};
use super::scene::{Cast, Part, Scene, Stage, cpu};
use super::verify::PATIENCE_NS;

/// Beats from one move of the pattern to the next.
const MOVE_BEATS: u64 = 4;
/// The warm part is used in one beat of this many.
const WARM_BEATS: u64 = 4;
/// Working sets that are compared, in passes: with and without what is used now and then.
const WINDOWS: [u8; 2] = [1, 4];
/// How much of the truth a precise estimate may be off by, in millionths.
const MOST_ERROR_PPM: u64 = 10_000;
/// Idle ages as one character each; older ones are the last.
const AGES: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";

/// When each page was last used, and what maps it.
struct Truth {
    /// The last pass that finds the page, by page.
    seen: Vec<u64>,
    /// First page and pages of each leaf.
    leaves: Vec<(u64, u64)>,
}

/// One pass of the scan.
struct Pass {
    aged: Aged,
    /// When its first step began.
    began: Moment,
    /// Time it took, waiting for its turn included.
    ns: u64,
    /// Time in steps.
    busy_ns: u64,
    counts: Vec<(&'static str, u64)>,
}

/// All passes of a case.
#[derive(Default)]
struct Sums {
    passes: u64,
    ns: u64,
    busy_ns: u64,
    leaves: u64,
    locks: u64,
    invalidations: u64,
    most_error_ppm: [u64; WINDOWS.len()],
}

/// Every mode with every vCPU count, and imprecise passes too if they are asked for; false when a precise estimate is wrong.
pub(super) fn run(stage: &Stage<'_>) -> Result<bool, Refusal> {
    let params = stage.params;
    let mut cases = Vec::new();
    for &vcpus in &params.vcpus {
        for &locking in &params.locking {
            let cast = stage.cast(locking, vcpus);
            cases.extend(
                precisions(params)
                    .iter()
                    .map(|&precision| (cast, precision)),
            );
        }
    }
    let mut good = true;
    for (done, &(cast, precision)) in cases.iter().enumerate() {
        progress(
            done,
            cases.len(),
            format_args!(
                "heat: {} vCPUs, {}, {}",
                cast.vcpus,
                cast.locking.name(),
                precision_name(precision)
            ),
        );
        good &= case(stage, cast, precision)?;
    }
    Ok(good)
}

/// The precisions that are measured.
pub(super) fn precisions(params: &Params) -> &'static [Precision] {
    match params.precision {
        Precision::Precise => &[Precision::Precise],
        Precision::Imprecise => &[Precision::Precise, Precision::Imprecise],
    }
}

fn case(stage: &Stage<'_>, cast: Cast, precision: Precision) -> Result<bool, Refusal> {
    let scene = stage.open(cast)?;
    populate(&scene)?;
    let mut truth = Truth::new(&scene);
    let mut scan = scan(stage.params, &scene, precision)?;
    let before = Counts::now();
    let start = Moment::now();
    pass(&scene, &mut scan)?;
    let mut sums = Sums::default();
    for number in 1..=stage.params.passes {
        let (hot, warm) = beat(stage.params.pattern, cast.region_bytes / PAGE_BYTES, number);
        scene.run_rounds(hot, warm)?;
        await_rounds(&scene, 1)?;
        let pass = pass(&scene, &mut scan)?;
        await_rounds(&scene, 2)?;
        scene.end_run()?;
        for vcpu in 0..cast.vcpus as u64 {
            truth.use_part(vcpu, &scene, hot, number);
            truth.use_part(vcpu, &scene, warm, number);
        }
        let row = row(stage, "pass", cast, precision)
            .value("pass", number)
            .value("at_ns", start.elapsed_ns())
            .value("began_ns", pass.began.since_ns(start))
            .value("ages", format_args!(r#""{}""#, encoded(scan.map())));
        sums.add(&pass, scan.map(), &truth, number, row);
    }
    let used: Vec<_> = before.since().collect();
    let histogram = idle_kib(scan.map());
    let ended = outlives_nothing(&scene, &mut scan)?;
    scene.close();
    let good = sums.most_error_ppm.iter().all(|ppm| *ppm <= MOST_ERROR_PPM);
    row(stage, "scan", cast, precision)
        .value("passes", sums.passes)
        .value("pass_ns", sums.ns / sums.passes.max(1))
        .value("busy_ns", sums.busy_ns / sums.passes.max(1))
        .value("leaves", sums.leaves / sums.passes.max(1))
        .value("lock_acquired_aging", sums.locks)
        .value("tlbi_vmid_aging", sums.invalidations)
        .value("faults_access", count(&used, "faults_access"))
        .values(WINDOWS.iter().zip(sums.most_error_ppm).map(error))
        .value("idle_kib", format_args!("[{histogram}]"))
        .value("ends_with_its_slot", ended)
        .print();
    Ok(ended && (good || precision == Precision::Imprecise))
}

fn error((window, ppm): (&u8, u64)) -> (&'static str, u64) {
    let name = match window {
        1 => "error_1_ppm",
        _ => "error_4_ppm",
    };
    (name, ppm)
}

/// Every vCPU writes all of its region.
pub(super) fn populate(scene: &Scene) -> Result<(), Refusal> {
    scene.perform(|vcpu| Command {
        op: op::PASS,
        args: [scene.region(vcpu), scene.pages_each, PAGE_BYTES, 100, 3],
    })?;
    Ok(())
}

/// A scan of the scene's memory, at the pace that the parameters say.
fn scan(params: &Params, scene: &Scene, precision: Precision) -> Result<Scan, Refusal> {
    let ticks = u128::from(params.period_us) * u128::from(arch::counter_hz()) / 1_000_000;
    let pace = Pace {
        period_ticks: u64::try_from(ticks).unwrap_or(u64::MAX),
        budget_percent: params.budget,
    };
    Scan::new(scene.stage2(), scene.data, pace, precision)
        .map_err(|error| format!("no scan: {error}"))
}

/// Steps until a pass has ended.
fn pass(scene: &Scene, scan: &mut Scan) -> Result<Pass, Refusal> {
    let start = Moment::now();
    let mut began = start;
    let mut busy_ns = 0;
    let before = Counts::own();
    loop {
        if busy_ns == 0 {
            began = Moment::now();
        }
        let (step, ns) = timed(|| scan.step(scene.stage2(), cpu()));
        match step.map_err(|error| format!("scan: {error}"))? {
            Step::Later(ticks) => linger(nanoseconds(ticks)),
            Step::Going => busy_ns += ns,
            Step::PassEnded(aged) => {
                return Ok(Pass {
                    aged,
                    began,
                    ns: start.elapsed_ns(),
                    busy_ns: busy_ns + ns,
                    counts: before.since().collect(),
                });
            }
        }
    }
}

/// Removes the slot; whether that ends the scan.
fn outlives_nothing(scene: &Scene, scan: &mut Scan) -> Result<bool, Refusal> {
    let failed = |error| format!("scan: {error}");
    let (stage2, data) = (scene.stage2(), scene.data);
    stage2.remove_slot(cpu(), data).map_err(failed)?;
    loop {
        match scan.step(stage2, cpu()) {
            Ok(Step::Later(ticks)) => linger(nanoseconds(ticks)),
            outcome => return Ok(outcome == Err(Error::NoSlot)),
        }
    }
}

/// Waits until every vCPU has ended `rounds` rounds from now on. The first of them may have been past a page already.
pub(super) fn await_rounds(scene: &Scene, rounds: u64) -> Result<(), Refusal> {
    let start = Moment::now();
    let before = scene.rounds()?;
    let behind = |(now, before): (&u64, &u64)| *now < before + rounds;
    while scene.rounds()?.iter().zip(&before).any(behind) {
        if start.elapsed_ns() > PATIENCE_NS {
            return Err(format!("a vCPU does not do {rounds} rounds"));
        }
        arch::yield_now();
    }
    Ok(())
}

/// The hot part and the warm part of a region in beat `number`, counted from 1.
fn beat(pattern: Pattern, region_pages: u64, number: u64) -> (Part, Part) {
    let hot = (region_pages * pattern.hot / 100).max(1);
    let moved = (number - 1) / MOVE_BEATS * (hot / 2).max(1);
    let warm = if number.is_multiple_of(WARM_BEATS) {
        region_pages * pattern.warm / 100
    } else {
        0
    };
    let part = |first: u64, pages| Part {
        first: first % region_pages,
        pages,
    };
    (part(moved, hot), part(moved + hot, warm))
}

impl Truth {
    /// Everything was used before the first pass, which has number 0.
    fn new(scene: &Scene) -> Self {
        let leaves = scene.leaves();
        Self {
            seen: vec![0; to_index(scene.pages())],
            leaves: leaves
                .iter()
                .map(|(ipa, level, _)| {
                    let first = (ipa.raw() - abi::DATA) / PAGE_BYTES;
                    (first, level.span_bytes() / PAGE_BYTES)
                })
                .collect(),
        }
    }

    /// A part was used all through beat `number`: before its pass, and after it.
    fn use_part(&mut self, vcpu: u64, scene: &Scene, part: Part, number: u64) {
        let region = scene.cast.region_bytes / PAGE_BYTES;
        for page in part.first..part.first + part.pages {
            if let Some(seen) = self.seen.get_mut(to_index(vcpu * region + page % region)) {
                *seen = number + 1;
            }
        }
    }

    /// Bytes of the leaves that were used within the last `passes` passes, `now` being the last.
    fn working_set_bytes(&self, now: u64, passes: u8) -> u64 {
        let used = |&&(first, pages): &&(u64, u64)| {
            let seen = self.seen.get(to_index(first)..to_index(first + pages));
            seen.unwrap_or_default()
                .iter()
                .any(|seen| seen + u64::from(passes) > now)
        };
        let pages = self.leaves.iter().filter(used).map(|(_, pages)| pages);
        pages.sum::<u64>() * PAGE_BYTES
    }
}

impl Sums {
    /// Takes in a pass and prints its row.
    fn add(&mut self, pass: &Pass, map: &IdleMap, truth: &Truth, number: u64, mut row: Row) {
        self.passes += 1;
        self.ns += pass.ns;
        self.busy_ns += pass.busy_ns;
        self.leaves += pass.aged.leaves;
        self.locks += count(&pass.counts, "lock_acquired");
        self.invalidations += count(&pass.counts, "tlbi_vmid");
        for (window, most) in WINDOWS.iter().zip(&mut self.most_error_ppm) {
            let estimate = map.working_set_bytes(*window);
            let truth = truth.working_set_bytes(number, *window);
            *most = (*most).max(error_ppm(estimate, truth));
            row = row
                .value(&format!("estimate_{window}_bytes"), estimate)
                .value(&format!("truth_{window}_bytes"), truth);
        }
        row.value("leaves", pass.aged.leaves)
            .value("young", pass.aged.young)
            .value("pass_ns", pass.ns)
            .value("busy_ns", pass.busy_ns)
            .print();
    }
}

/// How far an estimate is from the truth, in millionths of it.
fn error_ppm(estimate: u64, truth: u64) -> u64 {
    estimate.abs_diff(truth) * 1_000_000 / truth.max(1)
}

/// The idle age of each region, a character each.
fn encoded(map: &IdleMap) -> String {
    (0..map.regions())
        .map(|region| match map.region_age(region) {
            None => '.',
            Some(age) => char::from(AGES.get(usize::from(age)).copied().unwrap_or(b'z')),
        })
        .collect()
}

/// KiB of each idle age up to the oldest there is.
fn idle_kib(map: &IdleMap) -> String {
    let histogram = map.histogram();
    let mapped = histogram.split_last().map_or(&[][..], |(_, ages)| ages);
    let oldest = mapped.iter().rposition(|bytes| *bytes != 0).unwrap_or(0);
    let kib = |bytes: &u64| format!("{}", bytes >> 10);
    let ages: Vec<String> = mapped.iter().take(oldest + 1).map(kib).collect();
    ages.join(",")
}

fn row(stage: &Stage<'_>, case: &str, cast: Cast, precision: Precision) -> Row {
    let params = stage.params;
    Row::new("heat", case, params.timing.name())
        .param("vcpus", cast.vcpus)
        .word("locking", cast.locking.name())
        .word("access_flag", cast.access_flag.name())
        .word("precision", precision_name(precision))
        .word("backing", size_name(cast.backing))
        .param("mib_per_vcpu", cast.region_bytes >> 20)
        .param("hot_percent", params.pattern.hot)
        .param("warm_percent", params.pattern.warm)
        .param("period_us", params.period_us)
        .param("budget", params.budget)
}

#[cfg(test)]
mod tests {
    use super::{Part, Truth, beat, encoded, error_ppm, idle_kib};
    use crate::bench::params::Pattern;
    use crate::mmu::heat::IdleMap;
    use crate::mmu::{Found, Sighting};

    const PATTERN: Pattern = Pattern { hot: 10, warm: 20 };

    #[test]
    fn the_pattern_moves_on_and_around() {
        let part = |first, pages| Part { first, pages };
        assert_eq!(beat(PATTERN, 1000, 1), (part(0, 100), part(100, 0)));
        assert_eq!(beat(PATTERN, 1000, 4), (part(0, 100), part(100, 200)));
        assert_eq!(beat(PATTERN, 1000, 5), (part(50, 100), part(150, 0)));
        assert_eq!(beat(PATTERN, 1000, 77), (part(950, 100), part(50, 0)));
        assert_eq!(beat(PATTERN, 4, 1).0, part(0, 1), "something is hot");
    }

    #[test]
    fn the_truth_is_rounded_to_leaves() {
        let mut truth = Truth {
            seen: alloc::vec![0; 16],
            leaves: alloc::vec![(0, 8), (8, 8)],
        };
        assert_eq!(truth.working_set_bytes(0, 1), 16 * 4096);
        assert_eq!(truth.working_set_bytes(1, 1), 0);
        truth.seen[9] = 2;
        let sets = [1, 2, 3, 4].map(|now| truth.working_set_bytes(now, 2));
        assert_eq!(sets, [16 * 4096, 8 * 4096, 8 * 4096, 0]);
    }

    #[test]
    fn errors_are_relative_to_the_truth() {
        assert_eq!((error_ppm(101, 100), error_ppm(99, 100)), (10_000, 10_000));
        assert_eq!(error_ppm(0, 0), 0);
    }

    #[test]
    fn ages_are_a_character_a_region() {
        let mut map = IdleMap::new(3 * 512);
        let mut see = |page, found| {
            map.see(Sighting {
                page,
                pages: 512,
                found,
            });
        };
        see(0, Found::Young);
        see(512, Found::Young);
        for _ in 0..40 {
            see(0, Found::Old);
        }
        for _ in 0..11 {
            see(512, Found::Old);
        }
        assert_eq!(encoded(&map), "zb.");
        assert!(idle_kib(&map).ends_with(",0,2048"));
    }
}
