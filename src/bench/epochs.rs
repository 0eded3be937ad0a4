//! Suite `epochs`: whether epoch after epoch reports what was written in it.
//!
//! *Stopped*: every vCPU writes at random, stops, and the epoch ends: what is harvested must equal the guest's own log
//! exactly. *Running*: vCPUs write without pause while epochs end; a copy fed only by the harvests must equal the guest's
//! memory byte for byte at the end. Which part of memory is written changes, so that regions become hot and cold.

use alloc::format;
use alloc::vec::Vec;

use crate::addr::PAGE_BYTES;
use crate::guest::abi::{flags, op};
use crate::mmu::PageSet;
use crate::vm::Command;

use super::Refusal;
use super::clock::Moment;
use super::comparison::Comparison;
use super::cycle::{self, Oddities};
use super::protect::linger;
use super::report::{Row, progress};
use super::scene::{Cast, Scene, Stage, cpu};
use super::shadow::Shadow;
use super::verify::logged;

/// Pages that a vCPU writes to in most epochs, at most.
const WINDOW: u64 = 64;
/// One epoch of this many has no writes, and one of this many writes everywhere.
const RARE: u64 = 16;
/// How long running vCPUs have for an epoch, at most, before anybody looks whether they have written.
const EPOCH_NS: u64 = 400_000;
/// How long that is waited for.
const PATIENCE_NS: u64 = 20_000_000;
/// One epoch of this many ends whether anything was written or not.
const HASTE: u64 = 4;
/// Times that running vCPUs turn to another part of memory.
const SCENES: u64 = 10;

/// A xorshift generator, as the guest has one.
struct Random(u64);

/// Pages that a vCPU writes to.
#[derive(Clone, Copy)]
struct Window {
    first: u64,
    pages: u64,
}

/// Every engine with every number of vCPUs; false when a page was lost, or reported and not written.
pub(super) fn run(stage: &Stage<'_>) -> Result<bool, Refusal> {
    let params = stage.params;
    let mut casts = Vec::new();
    for &vcpus in &params.vcpus {
        for &locking in &params.locking {
            for &(engine, tracking) in &stage.trackers {
                for &bbm in &stage.bbm {
                    let cast = stage.cast(locking, vcpus);
                    casts.push(Cast {
                        engine,
                        tracking,
                        splitting: stage.splitting(cast.splitting.policy, bbm),
                        ..cast
                    });
                }
            }
        }
    }
    let mut good = true;
    for (done, cast) in casts.iter().enumerate() {
        let said = |what: &str| {
            progress(
                done,
                casts.len(),
                format_args!(
                    "epochs: {}, {}, {} vCPUs, {what}",
                    cast.engine.name(),
                    cast.tracking.name(),
                    cast.vcpus
                ),
            );
        };
        said("stopped");
        good &= stopped(stage, *cast)?;
        said("running");
        good &= running(stage, *cast)?;
    }
    Ok(good)
}

fn stopped(stage: &Stage<'_>, cast: Cast) -> Result<bool, Refusal> {
    let scene = logged(stage, cast, false)?;
    let mut random = Random::new(stage.params.seed);
    let mut sums = Comparison::default();
    let mut oddities = Oddities::default();
    let mut done = 0;
    while done < stage.params.epochs && sums.lost == 0 && sums.extra == 0 {
        oddities.unprepared += u64::from(cycle::prepare(&scene)?.0.is_none());
        write(&scene, &mut random)?;
        let call = cycle::call(&scene)?;
        oddities.note(&scene, &call);
        let written = scene.take_write_log()?;
        let (reported, _) = cycle::harvest(&scene, &call)?;
        sums.add(Comparison::of(&written, &reported));
        done += 1;
    }
    let row = row(stage, "stopped", &scene);
    scene.close();
    oddities
        .told(row)
        .value("epochs", done)
        .value("pages_written", sums.written)
        .value("pages_reported", sums.reported)
        .value("pages_lost", sums.lost)
        .value("pages_extra", sums.extra)
        .print();
    Ok(sums.lost == 0 && sums.extra == 0)
}

fn running(stage: &Stage<'_>, cast: Cast) -> Result<bool, Refusal> {
    let scene = logged(stage, cast, false)?;
    let mut shadow = Shadow::new(scene.pages());
    shadow.copy_all(&scene)?;
    let mut random = Random::new(stage.params.seed);
    let mut oddities = Oddities::default();
    let (mut done, mut stores, mut reported, mut empty, mut kicked) = (0, 0, 0, 0, 0);
    let mut end = |scene: &Scene| {
        oddities.unprepared += u64::from(cycle::prepare(scene)?.0.is_none());
        let call = cycle::call(scene)?;
        oddities.note(scene, &call);
        let (pages, _) = cycle::harvest(scene, &call)?;
        reported += pages.len();
        empty += u64::from(pages.is_empty());
        kicked += call.closed.kicked;
        shadow.copy(scene, &pages)
    };
    for part in 1..=SCENES {
        let windows: Vec<Window> = (0..cast.vcpus)
            .map(|_| random.window(cast.region_bytes))
            .collect();
        scene.run_freely_in(random.next() >> 48, |vcpu| {
            let window = windows.get(vcpu).copied();
            window.map_or((0, 1), |window| (window.first, window.pages))
        })?;
        while done < stage.params.epochs * part / SCENES {
            linger(random.below(EPOCH_NS));
            if !random.next().is_multiple_of(HASTE) {
                await_writes(&scene)?;
            }
            end(&scene)?;
            done += 1;
        }
        stores += scene.end_run()?;
    }
    end(&scene)?;
    let lost = shadow.differing(&scene)?;
    let row = row(stage, "running", &scene);
    scene.close();
    oddities
        .told(row)
        .value("epochs", done + 1)
        .value("epochs_empty", empty)
        .value("stores", stores)
        .value("kicked", kicked)
        .value("pages_reported", reported)
        .value("pages_lost", lost)
        .print();
    Ok(lost == 0)
}

/// Waits until something was written in this epoch.
fn await_writes(scene: &Scene) -> Result<(), Refusal> {
    let start = Moment::now();
    let mut pages = PageSet::default();
    while pages.is_empty() && start.elapsed_ns() < PATIENCE_NS {
        let read = scene.stage2().dirty(cpu(), scene.data, &mut pages);
        read.map_err(|error| format!("dirty logging: {error}"))?;
    }
    Ok(())
}

/// Every vCPU writes at random to some part of its region: mostly to a small one, at times everywhere or nowhere.
fn write(scene: &Scene, random: &mut Random) -> Result<(), Refusal> {
    let kind = random.next() % RARE;
    if kind == 0 {
        return Ok(());
    }
    let whole = Window {
        first: 0,
        pages: scene.cast.region_bytes / PAGE_BYTES,
    };
    let windows: Vec<Window> = (0..scene.cast.vcpus)
        .map(|_| {
            if kind == 1 {
                whole
            } else {
                random.window(scene.cast.region_bytes)
            }
        })
        .collect();
    let seed = random.next() >> 32;
    scene.perform(|vcpu| {
        let window = windows.get(vcpu).copied().unwrap_or(whole);
        Command {
            op: op::PASS,
            args: [
                scene.region(vcpu) + window.first * PAGE_BYTES,
                window.pages,
                PAGE_BYTES,
                75 | flags::RANDOM | flags::LOG,
                (seed ^ vcpu as u64) << 32 | 1,
            ],
        }
    })?;
    Ok(())
}

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    fn window(&mut self, region_bytes: u64) -> Window {
        let region = region_bytes / PAGE_BYTES;
        let pages = 1 + self.below(WINDOW.min(region));
        Window {
            first: self.below(region - pages + 1),
            pages,
        }
    }
}

fn row(stage: &Stage<'_>, case: &str, scene: &Scene) -> Row {
    cycle::row(stage, "epochs", case, scene).param("mib_per_vcpu", scene.cast.region_bytes >> 20)
}

#[cfg(test)]
mod tests {
    use super::{PAGE_BYTES, Random, WINDOW};

    #[test]
    fn windows_lie_inside_the_region_and_reach_both_ends() {
        let mut random = Random::new(1);
        let region_pages = 128;
        let (mut first, mut last) = (u64::MAX, 0);
        for _ in 0..10_000 {
            let window = random.window(region_pages * PAGE_BYTES);
            assert!((1..=WINDOW).contains(&window.pages));
            first = first.min(window.first);
            last = last.max(window.first + window.pages);
        }
        assert_eq!((first, last), (0, region_pages));
    }
}
