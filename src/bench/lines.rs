//! Suite `lines`: what moves between CPUs. For timing `parallel`, under which lines can be given a cost and are counted.
//!
//! All vCPUs change one word (how fast can a line move?); each writes its pages for the first time since logging began, in a region of its
//! own or every n-th page of one; and each writes at random while the controller harvests the log again and again.

use alloc::vec::Vec;

use crate::addr::PAGE_BYTES;
use crate::arch;
use crate::guest::abi::op;
use crate::mmu::{Locking, PageSet};
use crate::vm::Command;

use super::Refusal;
use super::clock::{Counts, Moment, longest_ns};
use super::cycle::count;
use super::report::{Row, progress};
use super::scene::{Outcome, Scene, Stage, cpu, refused};

/// Ten microseconds each, between two harvests.
const NAPS: u64 = 5;

/// How vCPUs share memory.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Layout {
    /// A region each: leaf tables and words of the bitmap are nobody else's.
    Apart,
    /// Pages in turn: neighbouring descriptors and bits belong to others.
    Interleaved,
}

impl Layout {
    const ALL: [Self; 2] = [Self::Apart, Self::Interleaved];

    fn name(self) -> &'static str {
        match self {
            Self::Apart => "apart",
            Self::Interleaved => "interleaved",
        }
    }

    /// One store to each of its pages.
    fn pass(self, scene: &Scene, vcpu: usize, pages: u64) -> Command {
        let vcpus = scene.cast.vcpus as u64;
        let (start, step) = match self {
            Self::Apart => (scene.region(vcpu), PAGE_BYTES),
            Self::Interleaved => (
                scene.region(0) + vcpu as u64 * PAGE_BYTES,
                vcpus * PAGE_BYTES,
            ),
        };
        Command {
            op: op::PASS,
            args: [start, pages, step, 100, 3],
        }
    }
}

/// Every vCPU count, and every mode where there is one.
pub(super) fn run(stage: &Stage<'_>) -> Result<bool, Refusal> {
    let params = stage.params;
    let mut done = 0;
    let of = params.vcpus.len() * (1 + params.locking.len());
    for &vcpus in &params.vcpus {
        progress(done, of, format_args!("lines: {vcpus} vCPUs, one word"));
        one_word(stage, vcpus)?;
        done += 1;
        for &locking in &params.locking {
            progress(
                done,
                of,
                format_args!("lines: {vcpus} vCPUs, {}", locking.name()),
            );
            for layout in Layout::ALL {
                write_faults(stage, vcpus, locking, layout)?;
            }
            harvest(stage, vcpus, locking)?;
            done += 1;
        }
    }
    progress(done, of, format_args!("lines: done"));
    Ok(true)
}

fn row(stage: &Stage<'_>, case: &str, vcpus: usize, locking: Locking) -> Row {
    Row::new("lines", case, stage.params.timing.name())
        .param("vcpus", vcpus)
        .word("locking", locking.name())
}

/// All vCPUs add to one word.
fn one_word(stage: &Stage<'_>, vcpus: usize) -> Result<(), Refusal> {
    let scene = stage.open(stage.cast(Locking::Lockless, vcpus))?;
    let add = |rounds| Command {
        op: op::ADD,
        args: [scene.region(0), rounds, 0, 0, 0],
    };
    // So that the page is there.
    scene.perform(|_| add(1))?;
    arch::hint_forget_lines();
    let rounds = stage.params.rounds;
    let outcomes = scene.perform(|_| add(rounds))?;
    arch::hint_tell_lines();
    scene.close();
    let adds = rounds * vcpus as u64;
    row(stage, "one word", vcpus, Locking::Lockless)
        .value("adds", adds)
        .share("ns_per_add", longest_ns(&outcomes), adds)
        .print();
    Ok(())
}

/// What vCPUs report of an operation, and what was counted meanwhile.
type Counted = (Vec<Outcome>, Vec<(&'static str, u64)>);

/// An operation of all vCPUs.
fn counted(scene: &Scene, command: impl Fn(usize) -> Command) -> Result<Counted, Refusal> {
    arch::hint_forget_lines();
    let before = Counts::now();
    let outcomes = scene.perform(command)?;
    arch::hint_tell_lines();
    Ok((outcomes, before.since().collect()))
}

/// Each vCPU writes to pages that are not mapped yet, then to the same protected, each once.
fn write_faults(
    stage: &Stage<'_>,
    vcpus: usize,
    locking: Locking,
    layout: Layout,
) -> Result<(), Refusal> {
    let scene = stage.open(stage.cast(locking, vcpus))?;
    let pages = scene.pages_each;
    let pass = |vcpu: usize| layout.pass(&scene, vcpu, pages);
    let (first, mapped) = counted(&scene, pass)?;
    let enabled = scene.stage2().enable_logging(cpu(), scene.data, false);
    enabled.map_err(refused)?;
    let (outcomes, counts) = counted(&scene, pass)?;
    let mut written = PageSet::default();
    let got = scene.stage2().dirty(cpu(), scene.data, &mut written);
    got.map_err(refused)?;
    scene.close();
    row(stage, "populate", vcpus, locking)
        .word("layout", layout.name())
        .value("vcpu_ns", longest_ns(&first))
        .value("faults_translation", count(&mapped, "faults_translation"))
        .print();
    row(stage, "write faults", vcpus, locking)
        .word("layout", layout.name())
        .value("vcpu_ns", longest_ns(&outcomes))
        .value("faults_permission", count(&counts, "faults_permission"))
        .value("pages_reported", written.len())
        .print();
    Ok(())
}

/// Each vCPU stores at random to its pages, first by itself, then while the controller reads and clears the log.
fn harvest(stage: &Stage<'_>, vcpus: usize, locking: Locking) -> Result<(), Refusal> {
    let scene = stage.open(stage.cast(locking, vcpus))?;
    let pages = scene.pages_each;
    scene.perform(|vcpu| Layout::Apart.pass(&scene, vcpu, pages))?;
    let enabled = scene.stage2().enable_logging(cpu(), scene.data, false);
    enabled.map_err(refused)?;
    // Every page is writable now.
    scene.perform(|vcpu| Layout::Apart.pass(&scene, vcpu, pages))?;
    arch::hint_forget_lines();
    let alone = stores_per_ms(stage, &scene, pages, |_| Ok(()))?;
    let (mut get_ns, mut clear_ns, mut cleared) = (0, 0, 0);
    let beside = stores_per_ms(stage, &scene, pages, |scene| {
        let (mut seen, mut taken) = (PageSet::default(), PageSet::default());
        let start = Moment::now();
        let got = scene.stage2().dirty(cpu(), scene.data, &mut seen);
        got.map_err(refused)?;
        let between = Moment::now();
        let pages = scene.pages();
        let outcome = scene
            .stage2()
            .clear(cpu(), scene.data, 0, pages, &mut taken);
        outcome.map_err(refused)?;
        get_ns += between.since_ns(start);
        clear_ns += between.elapsed_ns();
        cleared += taken.len();
        Ok(())
    })?;
    arch::hint_tell_lines();
    scene.close();
    row(stage, "harvest", vcpus, locking)
        .value("harvests", stage.params.iterations)
        .value("stores_per_ms_alone", alone)
        .value("stores_per_ms_beside", beside)
        .value("get_ns", get_ns / stage.params.iterations)
        .value("clear_ns", clear_ns / stage.params.iterations)
        .share("clear_ns_per_page", clear_ns, cleared)
        .print();
    Ok(())
}

/// Stores that all vCPUs made in a millisecond, while `work` is done as often as there are iterations, with pauses.
fn stores_per_ms(
    stage: &Stage<'_>,
    scene: &Scene,
    pages: u64,
    mut work: impl FnMut(&Scene) -> Result<(), Refusal>,
) -> Result<u64, Refusal> {
    scene.run_freely_in(stage.params.seed, |_| (0, pages))?;
    let start = Moment::now();
    for _ in 0..stage.params.iterations {
        for _ in 0..NAPS {
            scene.nap();
        }
        work(scene)?;
    }
    let stores = scene.end_run()?;
    Ok(stores * 1_000_000 / start.elapsed_ns().max(1))
}
