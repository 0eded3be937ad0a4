//! Suite `dirty`: the phases of the kernel's dirty_log_perf_test.
//!
//! Populate; enable; then per iteration every vCPU passes over its own region, `get`, `clear`; disable. A pass is followed
//! by the same pass again, when every page is writable: the difference is what the faults cost.

use alloc::vec::Vec;

use crate::addr::PAGE_BYTES;
use crate::arch;
use crate::guest::abi::{flags, op};
use crate::mmu::PageSet;
use crate::vm::Command;

use super::Refusal;
use super::clock::{Counts, exit_times, longest_ns, measure_exits, nanoseconds, timed};
use super::comparison::Comparison;
use super::params::{Params, Timing, size_name, stride_name};
use super::report::{Row, progress};
use super::scene::{Cast, Outcome, Scene, Stage, cpu};

/// One iteration's part of a row.
struct Iteration {
    dirty_ns: u64,
    /// The pass of the vCPU that took longest, by its own clock.
    vcpu_ns: u64,
    get_ns: u64,
    clear_ns: u64,
    sets: Comparison,
    fault_insn: Option<u64>,
    counts: Vec<(&'static str, u64)>,
    clear_counts: Vec<(&'static str, u64)>,
}

/// Every mode with every vCPU count; false when a page was lost.
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
                format_args!("dirty: {vcpus} vCPUs, {}", locking.name()),
            );
            good &= case(stage, stage.cast(locking, vcpus))?;
            done += 1;
        }
    }
    progress(done, of, format_args!("dirty: done"));
    Ok(good)
}

fn case(stage: &Stage<'_>, cast: Cast) -> Result<bool, Refusal> {
    let params = stage.params;
    let scene = stage.open(cast)?;
    let (populated, populate_ns) = timed(|| scene.perform(|vcpu| populate(&scene, vcpu)));
    let populate_vcpu_ns = longest_ns(&populated?);
    let failed = |error| alloc::format!("dirty logging: {error}");
    let (enabled, enable_ns) = timed(|| {
        scene
            .stage2()
            .enable_logging(cpu(), scene.data, params.initially_all_set)
    });
    enabled.map_err(failed)?;
    let mut iterations = Vec::new();
    for number in 1..=params.iterations {
        iterations.push(iterate(params, &scene, number)?);
    }
    let (disabled, disable_ns) = timed(|| scene.stage2().disable_logging(cpu(), scene.data));
    disabled.map_err(failed)?;
    let last = scene.perform(|vcpu| pass(params, &scene, vcpu, params.iterations + 1, 0))?;
    arch::hint_unmeasured();
    scene.perform(|vcpu| Command {
        op: op::REPORT,
        args: [
            last.get(vcpu)
                .map_or(0, |outcome| nanoseconds(outcome.ticks)),
            0,
            0,
            0,
            0,
        ],
    })?;
    scene.close();
    let mut good = true;
    for (number, iteration) in (1_u64..).zip(&iterations) {
        good &= iteration.sets.lost == 0;
        let phases = [
            ("populate_ns", populate_ns),
            ("populate_vcpu_ns", populate_vcpu_ns),
            ("enable_ns", enable_ns),
            ("disable_ns", disable_ns),
        ];
        row(params, cast, number, iteration).values(phases).print();
    }
    Ok(good)
}

fn iterate(params: &Params, scene: &Scene, number: u64) -> Result<Iteration, Refusal> {
    // Under `insn` measuring would be part of what is measured.
    measure_exits(params.timing != Timing::Insn);
    let before = Counts::now();
    arch::hint_forget_lines();
    let (outcomes, dirty_ns) =
        timed(|| scene.perform(|vcpu| pass(params, scene, vcpu, number, flags::LOG)));
    let outcomes = outcomes?;
    // One section for each row, in their order.
    arch::hint_tell_lines();
    let counts: Vec<_> = before.since().chain(exit_times()).collect();
    measure_exits(false);
    // The first iteration of `initially_all_set` does not fault, so there is no difference to take.
    let again = scene.perform(|vcpu| pass(params, scene, vcpu, number, flags::LOG))?;
    let failed = |error| alloc::format!("dirty logging: {error}");
    let mut reported = PageSet::default();
    let (got, get_ns) = timed(|| scene.stage2().dirty(cpu(), scene.data, &mut reported));
    got.map_err(failed)?;
    let written = scene.take_write_log()?;
    let mut cleared = PageSet::default();
    let before = Counts::now();
    let (outcome, clear_ns) = timed(|| {
        scene
            .stage2()
            .clear(cpu(), scene.data, 0, scene.pages(), &mut cleared)
    });
    outcome.map_err(failed)?;
    let clear_counts = before.since().collect();
    if cleared != reported {
        return Err(alloc::format!(
            "clear took {} pages where get saw {} and no vCPU ran",
            cleared.len(),
            reported.len()
        ));
    }
    let fault_insn = fault_cost(params, &outcomes, &again, &counts);
    let sets = Comparison::of(&written, &reported);
    Ok(Iteration {
        dirty_ns,
        vcpu_ns: longest_ns(&outcomes),
        get_ns,
        clear_ns,
        sets,
        fault_insn,
        counts,
        clear_counts,
    })
}

/// Instructions from trap to resume of one fault: what the pass took longer than the same pass without faults.
fn fault_cost(
    params: &Params,
    with: &[Outcome],
    without: &[Outcome],
    counts: &[(&str, u64)],
) -> Option<u64> {
    let faults = counts
        .iter()
        .find(|(name, _)| *name == "faults_permission")?
        .1;
    let sum = |outcomes: &[Outcome]| outcomes.iter().map(|outcome| outcome.ticks).sum::<u64>();
    let extra = sum(with).checked_sub(sum(without))?;
    (params.timing == Timing::Insn && with.len() == 1 && faults != 0)
        .then(|| nanoseconds(extra) / faults)
}

fn populate(scene: &Scene, vcpu: usize) -> Command {
    Command {
        op: op::PASS,
        args: [scene.region(vcpu), scene.pages_each, PAGE_BYTES, 100, 0],
    }
}

fn pass(params: &Params, scene: &Scene, vcpu: usize, iteration: u64, log: u64) -> Command {
    let order = if params.random { flags::RANDOM } else { 0 };
    let seed = params
        .seed
        .wrapping_add(iteration << 8)
        .wrapping_add(vcpu as u64)
        & u64::from(u32::MAX);
    let steps = (scene.pages_each * PAGE_BYTES / params.stride).max(1);
    let value = iteration & u64::from(u32::MAX);
    Command {
        op: op::PASS,
        args: [
            scene.region(vcpu),
            steps,
            params.stride,
            params.write_percent | order | log,
            seed << 32 | value,
        ],
    }
}

/// The parameters and values that all rows of the suite have.
fn row(params: &Params, cast: Cast, number: u64, iteration: &Iteration) -> Row {
    let sets = iteration.sets;
    let row = Row::new("dirty", "phases", params.timing.name())
        .param("vcpus", cast.vcpus)
        .word("locking", cast.locking.name())
        .word("engine", cast.engine.name())
        .word("tracking", cast.tracking.name())
        .word("splitting", cast.splitting.policy.name())
        .param("bbm", cast.splitting.bbm.level())
        .word("backing", size_name(cast.backing))
        .param("mib_per_vcpu", params.mib)
        .param("iteration", number)
        .param("write_percent", params.write_percent)
        .word(
            "order",
            if params.random {
                "random"
            } else {
                "sequential"
            },
        )
        .word("stride", stride_name(params.stride))
        .word("hpfar", if params.trust_hpfar { "trust" } else { "at" })
        .param("initially_all_set", params.initially_all_set)
        .value("dirty_ns", iteration.dirty_ns)
        .value("vcpu_ns", iteration.vcpu_ns)
        .value("get_ns", iteration.get_ns)
        .value("clear_ns", iteration.clear_ns)
        .value("pages_written", sets.written)
        .value("pages_reported", sets.reported)
        .value("pages_lost", sets.lost)
        .value("pages_extra", sets.extra)
        .values(iteration.counts.iter().copied());
    let row = iteration
        .clear_counts
        .iter()
        .fold(row, |row, (name, count)| match *name {
            "descriptor_writes" => row.value("descriptor_writes_clear", count),
            "tlbi_broadcast" => row.value("tlbi_broadcast_clear", count),
            "tlbi_vmid" => row.value("tlbi_vmid_clear", count),
            "tlbi_range" => row.value("tlbi_range_clear", count),
            "lock_acquired" => row.value("lock_acquired_clear", count),
            _ => row,
        });
    match iteration.fault_insn {
        Some(cost) => row.value("fault_insn", cost),
        None => row,
    }
}
