//! Suite `selftest`: does the guest find the machine it was promised?

use alloc::vec::Vec;

use crate::addr::PAGE_BYTES;
use crate::guest::abi::{debug, op};
use crate::mem::frames;
use crate::mmu::Locking;
use crate::sync::percpu;
use crate::vm::{Command, Placement};

use super::Refusal;
use super::report::Row;
use super::scene::{Cast, Outcome, Scene, Stage, cpu};
use super::verify::clear;

const IPI_ROUNDS: u64 = 50;
const EVENT_ROUNDS: u64 = 200;
/// Each way of going off, before a life that begins asleep and one that begins in a loop.
const RESTARTS: u64 = 16;

/// Every check on every vCPU; false when one failed.
pub(super) fn run(stage: &Stage<'_>) -> Result<bool, Refusal> {
    let mut good = true;
    for &vcpus in &stage.params.vcpus {
        for &locking in &stage.params.locking {
            let scene = stage.open(stage.cast(locking, vcpus))?;
            good &= judge(
                stage,
                "timer",
                &scene,
                scene.perform(|_| command(op::TIMER_TEST, 0))?,
            );
            good &= judge(
                stage,
                "physical_timer",
                &scene,
                scene.perform(|_| command(op::TIMER_TEST, 1))?,
            );
            good &= judge(stage, "ipi", &scene, scene.perform(ipi)?);
            if vcpus > 1 {
                let events = scene.perform(|_| command(op::EVENTS, EVENT_ROUNDS))?;
                good &= judge(stage, "events", &scene, events);
                let restarts = scene.perform(|_| command(op::RESTARTS, RESTARTS))?;
                good &= judge(stage, "restarts", &scene, restarts);
            }
            // Hostility meets memory that is being logged, too.
            let enabled = scene.stage2().enable_logging(cpu(), scene.data, false);
            enabled.map_err(|error| alloc::format!("dirty logging: {error}"))?;
            let hostile = scene.perform(|vcpu| command(op::HOSTILE, scene.region(vcpu)))?;
            good &= judge(stage, "hostile", &scene, hostile);
            good &= judge(stage, "recorded", &scene, recorded(&scene)?);
            scene.close();
            good &= judge_ends(stage, locking)?;
        }
    }
    Ok(good & judge_debug(stage)? & judge_nodes(stage)?)
}

const PSCI_SYSTEM_OFF: u64 = 0x8400_0008;
const PSCI_SYSTEM_RESET: u64 = 0x8400_0009;

/// A guest that ends itself ends alone and with a reason, and the next VM is set up after it. 32-bit code at EL0 that reaches
/// for nothing gets an external abort at its EL1; where the CPU has no AArch32 the guest's ERET is an illegal one.
fn judge_ends(stage: &Stage<'_>, locking: Locking) -> Result<bool, Refusal> {
    let ends = [
        (op::FIRMWARE, PSCI_SYSTEM_OFF, "switched off"),
        (op::FIRMWARE, PSCI_SYSTEM_RESET, "reset"),
        (op::AARCH32, 0, "took an exception"),
    ];
    let mut failed = 0;
    for (bit, (op, first, expected)) in ends.into_iter().enumerate() {
        let words = stage
            .open(stage.cast(locking, 1))?
            .last_words(command(op, first));
        failed |= u64::from(!words.contains(expected)) << bit;
    }
    Row::new("selftest", "ends", stage.params.timing.name())
        .param("vcpus", 1)
        .word("locking", locking.name())
        .value("checks", ends.len())
        .value("failed_mask", failed)
        .print();
    Ok(failed == 0)
}

/// A guest debugs itself, and goes on doing so when another VM has had its CPU, and on another CPU; the other VM finds nothing of
/// it on either CPU. Nor does the guest itself after a reset.
fn judge_debug(stage: &Stage<'_>) -> Result<bool, Refusal> {
    let open = || {
        stage.open(Cast {
            placement: Placement::On(1),
            ..stage.cast(Locking::Rwlock, 1)
        })
    };
    let (debugging, other) = (open()?, open()?);
    let mut good = true;
    let mut part = |case, scene: &Scene, part| {
        let outcomes = scene.perform(|_| command(op::DEBUG, part))?;
        good &= judge(stage, case, scene, outcomes);
        Ok::<(), Refusal>(())
    };
    part("debug", &debugging, debug::TRY)?;
    part("debug_apart", &other, debug::APART)?;
    part("debug_kept", &debugging, debug::KEPT)?;
    if stage.host.cpus() > 2 {
        debugging.send_to(0, 2)?;
        part("debug_moved", &debugging, debug::KEPT)?;
        part("debug_left", &other, debug::APART)?;
        other.send_to(0, 2)?;
        part("debug_followed", &other, debug::APART)?;
    }
    debugging.reset()?;
    part("debug_reset", &debugging, debug::APART)?;
    debugging.close();
    other.close();
    Ok(good)
}

/// A VM that begins on a CPU has all its memory from the NUMA node of that CPU, for each node that has RAM and a CPU for
/// guests. Bit `n` fails for node `n`. Machines without nodes have no row.
fn judge_nodes(stage: &Stage<'_>) -> Result<bool, Refusal> {
    let mut first: Vec<usize> = (1..stage.host.cpus()).collect();
    first.retain(|&cpu| frames::has_node(percpu::node_of(cpu)));
    first.dedup_by_key(|cpu| percpu::node_of(*cpu));
    let mut failed = 0_u64;
    for &cpu in &first {
        let scene = stage.open(Cast {
            placement: Placement::On(cpu),
            ..stage.cast(Locking::Rwlock, 1)
        })?;
        let node = percpu::node_of(cpu);
        failed |= u64::from(!scene.is_of(node)) << node;
        scene.close();
    }
    if !first.is_empty() {
        Row::new("selftest", "nodes", stage.params.timing.name())
            .param("vcpus", 1)
            .value("checks", first.len())
            .value("failed_mask", failed)
            .print();
    }
    Ok(failed == 0)
}

/// The hostile guest wrote the first two pages of each region, by ordinary, exclusive and page-crossing stores: they and no
/// others are reported. Bit 0 fails for a page that is missing, bit 1 for one too many.
fn recorded(scene: &Scene) -> Result<Vec<Outcome>, Refusal> {
    let expected = (0..scene.cast.vcpus as u64).flat_map(|vcpu| {
        let first = vcpu * scene.cast.region_bytes / PAGE_BYTES;
        [first, first + 1]
    });
    let expected: Vec<u64> = expected.collect();
    let reported: Vec<u64> = clear(scene)?.pages().collect();
    let missing = expected.iter().any(|page| !reported.contains(page));
    let extra = reported.iter().any(|page| !expected.contains(page));
    let failed = u64::from(missing) | u64::from(extra) << 1;
    Ok(Vec::from([Outcome {
        ticks: 0,
        results: [expected.len() as u64, failed],
    }]))
}

fn command(op: u64, first: u64) -> Command {
    Command {
        op,
        args: [first, 0, 0, 0, 0],
    }
}

fn ipi(vcpu: usize) -> Command {
    command(
        if vcpu == 0 {
            op::IPI_SEND
        } else {
            op::IPI_SERVE
        },
        IPI_ROUNDS,
    )
}

fn judge(stage: &Stage<'_>, case: &str, scene: &Scene, outcomes: Vec<Outcome>) -> bool {
    let checks: u64 = outcomes.iter().map(|outcome| outcome.results[0]).sum();
    let failed = outcomes
        .iter()
        .fold(0, |bits, outcome| bits | outcome.results[1]);
    Row::new("selftest", case, stage.params.timing.name())
        .param("vcpus", scene.cast.vcpus)
        .word("locking", scene.cast.locking.name())
        .value("checks", checks)
        .value("failed_mask", failed)
        .print();
    failed == 0
}
