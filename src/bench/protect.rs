//! Suite `protect`: what it costs to protect everything at once, and what it costs the guest afterwards, over engines and
//! amounts of memory.
//!
//! Case `stopped`: the vCPUs sleep during each call, and what is reported must equal their own log exactly. Memory is
//! written as a whole before the first calls, so the engines work on *hot* regions; later nothing is written for two
//! epochs, so an engine that tells hot from cold works on *cold* ones. Case `running` (not under `insn`, where CPUs take
//! turns): every vCPU stores at random and has to be interrupted.

use alloc::format;
use alloc::vec::Vec;

use crate::addr::PAGE_BYTES;
use crate::arch;
use crate::guest::abi::{self, flags, op};
use crate::mmu::{Engine, Level, Prepared};
use crate::vm::Command;

use super::Refusal;
use super::clock::{Counts, Moment, longest_ns, timed};
use super::comparison::Comparison;
use super::cycle::{self, Call, Oddities, count};
use super::params::{Timing, stride_name};
use super::report::{Row, progress};
use super::scene::{Cast, Scene, Stage};
use super::verify::{logged, logged_sparsely, steps};

/// Calls under running vCPUs.
const ROUNDS: u64 = 32;
/// How long they run in between.
const LEAD_NS: u64 = 5_000_000;
/// As above under the parallel clock: there is no noise to be averaged away, and every CPU's work is done in turn.
const PARALLEL_ROUNDS: u64 = 1;
const PARALLEL_LEAD_NS: u64 = 20_000;
const BLOCK: u64 = 2 << 20;

/// How the vCPUs go over their memory.
#[derive(Clone, Copy)]
enum Pass {
    Read,
    Write,
    /// One page of a hundred.
    WriteFew,
}

/// What a pass came to.
struct Passed {
    ns: u64,
    /// Of the vCPU that took longest, by its own clock.
    vcpu_ns: u64,
    counts: Vec<(&'static str, u64)>,
}

/// What the end of one epoch and the beginning of the next came to.
struct Turn {
    call: Call,
    pass: Option<Passed>,
    harvest_ns: u64,
    prepared: Prepared,
    prepare_ns: u64,
}

/// A scene whose epochs end while its vCPUs sleep.
struct Stopped {
    scene: Scene,
    /// From one page that is touched to the next.
    stride: u64,
    sums: Comparison,
    oddities: Oddities,
    /// Calls, and what they took together.
    calls: u64,
    calls_ns: u64,
}

/// Counts of a call that are reported, with their names.
const CALL: [(&str, &str); 8] = [
    ("descriptor_writes", "descriptor_writes_call"),
    ("tlbi_broadcast", "tlbi_broadcast_call"),
    ("tlbi_vmid", "tlbi_vmid_call"),
    ("tlbi_stage1", "tlbi_stage1_call"),
    ("tlbi_range", "tlbi_range_call"),
    ("tlbi_ipa", "tlbi_ipa_call"),
    ("kicks", "kicks_call"),
    ("lock_acquired", "lock_acquired_call"),
];

/// Every engine with every amount of memory; false when a page was lost or reported and not written.
pub(super) fn run(stage: &Stage<'_>) -> Result<bool, Refusal> {
    let casts = casts(stage);
    let mut good = true;
    for (done, cast) in casts.iter().enumerate() {
        progress(
            done,
            casts.len(),
            format_args!(
                "protect: {} MiB, {} vCPUs, {}, {}, bbm {}",
                (cast.region_bytes * cast.vcpus as u64) >> 20,
                cast.vcpus,
                cast.engine.name(),
                cast.tracking.name(),
                cast.splitting.bbm.level()
            ),
        );
        good &= stopped(stage, *cast)?;
        if stage.params.timing != Timing::Insn {
            running(stage, *cast)?;
        }
    }
    progress(casts.len(), casts.len(), format_args!("protect: done"));
    Ok(good)
}

fn casts(stage: &Stage<'_>) -> Vec<Cast> {
    let params = stage.params;
    let mut casts = Vec::new();
    for &vcpus in &params.vcpus {
        for &locking in &params.locking {
            for &mib in &params.slot_mib {
                for &(engine, tracking) in &stage.trackers {
                    let cast = stage.cast(locking, vcpus);
                    // Only the roots of `swap` are made of blocks again and again.
                    let splits = engine == Engine::Swap && cast.backing != Level::L3;
                    let levels = if splits { stage.bbm.len() } else { 1 };
                    casts.extend(stage.bbm.iter().take(levels).map(|&bbm| Cast {
                        engine,
                        tracking,
                        splitting: stage.splitting(cast.splitting.policy, bbm),
                        region_bytes:
                            ((mib << 20) / vcpus as u64).next_multiple_of(params.stride.max(BLOCK)),
                        ..cast
                    }));
                }
            }
        }
    }
    casts
}

fn stopped(stage: &Stage<'_>, cast: Cast) -> Result<bool, Refusal> {
    let mut it = Stopped {
        scene: logged_sparsely(stage, cast, false, stage.params.stride)?,
        stride: stage.params.stride,
        sums: Comparison::default(),
        oddities: Oddities::default(),
        calls: 0,
        calls_ns: 0,
    };
    it.prepare()?;
    it.pass(Pass::Write)?;
    let first = it.turn(None)?;
    it.pass(Pass::Write)?;
    let read = it.turn(Some(Pass::Read))?;
    it.pass(Pass::Write)?;
    let rewrite = it.turn(Some(Pass::Write))?;
    let few = it.turn(Some(Pass::WriteFew))?;
    let after_few = it.turn(None)?;
    let after_nothing = it.turn(None)?;
    let cold = it.turn(Some(Pass::Write))?;
    it.turn(None)?;
    let row = row(stage, "stopped", &it.scene)
        .value("root_entries", root_entries(&it.scene))
        .value("call_ns", read.call.call_ns)
        .value("call_mean_ns", it.calls_ns / it.calls)
        .value("call_first_ns", first.call.call_ns)
        .value("call_1pct_ns", after_few.call.call_ns)
        .value("call_idle_ns", cold.call.call_ns)
        .values(CALL.map(|(event, name)| (name, count(&read.call.counts, event))));
    let row = Passed::told(row, "read", &read.pass);
    let row = Passed::told(row, "rewrite", &rewrite.pass);
    let row = Passed::told(row, "rewrite_1pct", &few.pass);
    let row = Passed::told(row, "rewrite_cold", &cold.pass);
    let row = Turn::background(&rewrite, row, stage.params.timing, "");
    let row = Turn::background(&after_nothing, row, stage.params.timing, "_cold");
    let Stopped {
        scene,
        sums,
        oddities,
        ..
    } = it;
    scene.close();
    oddities
        .told(row)
        .value("harvest_ns", read.harvest_ns)
        .value("harvest_1pct_ns", after_few.harvest_ns)
        .value("pages_written", sums.written)
        .value("pages_reported", sums.reported)
        .value("pages_lost", sums.lost)
        .value("pages_extra", sums.extra)
        .print();
    Ok(sums.lost == 0 && sums.extra == 0)
}

impl Stopped {
    /// Ends an epoch; then every vCPU makes a pass in the new one, then what was written before is harvested and compared.
    fn turn(&mut self, after: Option<Pass>) -> Result<Turn, Refusal> {
        let call = cycle::call(&self.scene)?;
        self.oddities.note(&self.scene, &call);
        self.calls += 1;
        self.calls_ns += call.call_ns;
        let written = self.scene.take_write_log()?;
        let pass = after.map(|pass| self.pass(pass)).transpose()?;
        let (reported, harvest_ns) = cycle::harvest(&self.scene, &call)?;
        self.sums.add(Comparison::of(&written, &reported));
        let (prepared, prepare_ns) = self.prepare()?;
        Ok(Turn {
            call,
            pass,
            harvest_ns,
            prepared,
            prepare_ns,
        })
    }

    fn prepare(&mut self) -> Result<(Prepared, u64), Refusal> {
        let (prepared, prepare_ns) = cycle::prepare(&self.scene)?;
        self.oddities.unprepared += u64::from(prepared.is_none());
        Ok((prepared.unwrap_or_default(), prepare_ns))
    }

    fn pass(&self, pass: Pass) -> Result<Passed, Refusal> {
        let steps = steps(&self.scene, self.stride);
        let (steps, stride, percent) = match pass {
            Pass::Read => (steps, self.stride, 0),
            Pass::Write => (steps, self.stride, 100),
            Pass::WriteFew => ((steps / 100).max(1), 100 * self.stride, 100),
        };
        let before = Counts::now();
        let (done, ns) = timed(|| {
            self.scene.perform(|vcpu| Command {
                op: op::PASS,
                args: [
                    self.scene.region(vcpu),
                    steps,
                    stride,
                    percent | flags::LOG,
                    9,
                ],
            })
        });
        let vcpu_ns = longest_ns(&done?);
        let counts = before.since().collect();
        Ok(Passed {
            ns,
            vcpu_ns,
            counts,
        })
    }
}

impl Passed {
    /// Adds what the pass `name` came to.
    fn told(row: Row, name: &str, pass: &Option<Self>) -> Row {
        let Some(pass) = pass else {
            return row;
        };
        let of = |event| count(&pass.counts, event);
        row.value(&format!("{name}_ns"), pass.ns)
            .value(&format!("{name}_vcpu_ns"), pass.vcpu_ns)
            .value(
                &format!("{name}_faults"),
                of("faults_permission") + of("faults_translation"),
            )
            .value(&format!("{name}_splits"), of("splits"))
            .value(&format!("{name}_bbm_windows"), of("bbm_windows"))
            .value(&format!("{name}_push_downs"), of("push_downs"))
    }
}

impl Turn {
    /// Adds what was done for the next call.
    fn background(&self, row: Row, timing: Timing, suffix: &str) -> Row {
        let unit = if timing == Timing::Insn { "insn" } else { "ns" };
        row.value(&format!("background{suffix}_{unit}"), self.prepare_ns)
            .value(&format!("background{suffix}_tables"), self.prepared.tables)
            .value(
                &format!("background{suffix}_descriptors"),
                self.prepared.descriptors,
            )
            .value(&format!("regions_hot{suffix}"), self.prepared.hot)
            .value(&format!("regions_cold{suffix}"), self.prepared.cold)
    }
}

/// Calls while every vCPU stores at random.
fn running(stage: &Stage<'_>, cast: Cast) -> Result<(), Refusal> {
    let scene = logged(stage, cast, false)?;
    cycle::prepare(&scene)?;
    scene.run_freely_in(stage.params.seed, |_| (0, scene.pages_each))?;
    let (rounds, lead_ns) = match stage.params.timing {
        Timing::Parallel => (PARALLEL_ROUNDS, PARALLEL_LEAD_NS),
        Timing::Insn | Timing::Wall | Timing::Hw => (ROUNDS, LEAD_NS),
    };
    let calls = calls(&scene, rounds, lead_ns);
    let stores = scene.end_run()?;
    let (calls, oddities) = calls?;
    let row = row(stage, "running", &scene);
    scene.close();
    let mean = |of: fn(&Call) -> u64| calls.iter().map(of).sum::<u64>() / rounds;
    let most = |of: fn(&Call) -> u64| calls.iter().map(of).max().unwrap_or(0);
    let sum = |event| calls.iter().map(|call| count(&call.counts, event)).sum();
    let mut acks: Vec<u64> = calls.iter().map(|call| call.ack_ns).collect();
    acks.sort_unstable();
    let ack = |place: usize| acks.get(place).copied().unwrap_or(0);
    let work = |call: &Call| call.call_ns.saturating_sub(call.ack_ns);
    let row = row
        .value("rounds", rounds)
        .value("stores", stores)
        .value("call_ns", mean(|call| call.call_ns))
        .value("call_max_ns", most(|call| call.call_ns))
        .value("ack_ns", mean(|call| call.ack_ns))
        .value("ack_min_ns", ack(0))
        .value("ack_median_ns", ack(acks.len() / 2))
        .value("ack_max_ns", most(|call| call.ack_ns))
        .value("call_without_ack_ns", mean(work))
        .value(
            "kicked",
            calls.iter().map(|call| call.closed.kicked).sum::<u64>(),
        )
        .values([
            ("tlbi_broadcast", sum("tlbi_broadcast")),
            ("tlbi_vmid", sum("tlbi_vmid")),
        ]);
    oddities.told(row).print();
    Ok(())
}

fn calls(scene: &Scene, rounds: u64, lead_ns: u64) -> Result<(Vec<Call>, Oddities), Refusal> {
    let mut oddities = Oddities::default();
    let mut calls = Vec::new();
    for round in 1..=rounds {
        linger(lead_ns);
        let call = cycle::call(scene)?;
        oddities.note(scene, &call);
        // There is no next call otherwise.
        if round < rounds {
            cycle::harvest(scene, &call)?;
            oddities.unprepared += u64::from(cycle::prepare(scene)?.0.is_none());
        }
        calls.push(call);
    }
    Ok((calls, oddities))
}

/// Lets vCPUs run for a while.
pub(super) fn linger(ns: u64) {
    let start = Moment::now();
    while start.elapsed_ns() < ns {
        arch::yield_now();
    }
}

/// Entries of the initial tables that logged memory lies below.
fn root_entries(scene: &Scene) -> u64 {
    let span = scene.stage2().shape().start().span_bytes();
    let end = abi::DATA + scene.pages() * PAGE_BYTES;
    end.div_ceil(span) - abi::DATA / span
}

fn row(stage: &Stage<'_>, case: &str, scene: &Scene) -> Row {
    cycle::row(stage, "protect", case, scene)
        .word("stride", stride_name(stage.params.stride))
        .param("mapped_mib", (scene.pages() * PAGE_BYTES) >> 20)
}
