//! Suite `share`: what each of several VMs gets of CPUs that they share, by the guests' own count of the rounds they did.
//!
//! One VM for each weight named, with as many vCPUs as said, spread over all CPUs but the controller's. Every vCPU runs rounds
//! of loads and stores and never sleeps. With `flood-baud=` those of the last VM write to its console all the time instead, and
//! never wait for it; with `flood-sgis=1` they send each other SGIs all the time. How long exits keep a CPU is measured, too.

use alloc::vec::Vec;

use crate::arch;
use crate::guest::abi::op;
use crate::log;
use crate::mmu::Locking;
use crate::vm::Command;
use crate::vm::run;

use super::Refusal;
use super::clock::{exit_times, measure_exits};
use super::report::{Row, progress};
use super::scene::{Cast, Part, Scene, Stage};

/// One page: after the first round nothing faults.
const PAGE: Part = Part { first: 0, pages: 1 };

/// Runs them side by side; false when a vCPU got nowhere.
pub(super) fn run(stage: &Stage<'_>) -> Result<bool, Refusal> {
    let params = stage.params;
    let vcpus = params.vcpus.first().copied().unwrap_or(1);
    let locking = params.locking.first().copied().unwrap_or(Locking::Rwlock);
    progress(
        0,
        1,
        format_args!("share: {} VMs of {vcpus} vCPUs", params.weights.len()),
    );
    let open = |weight: &u32| {
        stage.open(Cast {
            weight: *weight,
            ..stage.cast(locking, vcpus)
        })
    };
    let scenes = params
        .weights
        .iter()
        .map(open)
        .collect::<Result<Vec<_>, _>>()?;
    let (flood, computing) = match scenes.split_last() {
        Some((last, others)) if params.flood_baud > 0 || params.flood_sgis => (Some(last), others),
        _ => (None, scenes.as_slice()),
    };
    measure_exits(flood.is_some());
    for scene in computing {
        // Those that began before have run without this one for a while, and owe it nothing for that.
        rest_ms(stage, params.run_ms / 10);
        scene.run_rounds(PAGE, PAGE)?;
    }
    if let Some(flood) = flood {
        rest_ms(stage, params.run_ms / 10);
        if params.flood_baud > 0 {
            log::slow_down(params.flood_baud);
        }
        flood.set_stop(0)?;
        flood.post(|_| Command {
            op: op::FLOOD,
            args: [params.flood_sgis.into(), 0, 0, 0, 0],
        });
    }
    let before = all_rounds(&scenes)?;
    rest_ms(stage, params.run_ms);
    let after = all_rounds(&scenes)?;
    let exits: Vec<_> = exit_times().collect();
    for scene in &scenes {
        scene.end_run()?;
    }
    measure_exits(false);
    let done = before.iter().zip(&after).map(|(before, after)| {
        let each = before.iter().zip(after);
        each.map(|(before, after)| after - before)
            .collect::<Vec<u64>>()
    });
    let done: Vec<Vec<u64>> = done.collect();
    let all: u64 = done.iter().flatten().sum();
    let weights: u64 = params.weights.iter().copied().map(u64::from).sum();
    let mut good = true;
    for (rounds, weight) in done.iter().zip(&params.weights) {
        let sum: u64 = rounds.iter().sum();
        let least = rounds.iter().min().copied().unwrap_or(0);
        good &= least > 0;
        let guest_cpus = stage.host.cpus() - 1;
        Row::new("share", "rounds", params.timing.name())
            .param("vms", params.weights.len())
            .param("vcpus", vcpus)
            .param("guest_cpus", guest_cpus)
            .param("weight", weight)
            .param("flood_baud", params.flood_baud)
            .param("flood_sgis", u64::from(params.flood_sgis))
            .value("rounds", sum)
            .value("rounds_least", least)
            .value("rounds_most", rounds.iter().max().copied().unwrap_or(0))
            .value("spread_permille", spread(rounds, guest_cpus))
            .values(exits.iter().copied())
            .value("share_permille", permille(sum, all))
            .value("expected_permille", permille(u64::from(*weight), weights))
            .print();
    }
    scenes.into_iter().for_each(Scene::close);
    Ok(good)
}

fn all_rounds(scenes: &[Scene]) -> Result<Vec<Vec<u64>>, Refusal> {
    scenes.iter().map(Scene::rounds).collect()
}

/// How far vCPUs of one CPU are apart, in thousandths of the most, where that is worst. Those of different CPUs are not compared:
/// an emulator that runs CPUs in turn gives them unequal time.
fn spread(rounds: &[u64], guest_cpus: usize) -> u64 {
    let of_cpu = |cpu: usize| rounds.iter().skip(cpu).step_by(guest_cpus.max(1)).copied();
    let spreads = (0..guest_cpus).filter_map(|cpu| {
        let (least, most) = (of_cpu(cpu).min()?, of_cpu(cpu).max()?);
        Some(permille(most - least, most))
    });
    spreads.max().unwrap_or(0)
}

fn permille(part: u64, whole: u64) -> u64 {
    part.saturating_mul(1000).checked_div(whole).unwrap_or(0)
}

/// Sleeps, so that the controller uses none of the virtual time that all CPUs share.
fn rest_ms(stage: &Stage<'_>, milliseconds: u64) {
    let deadline = arch::counter() + arch::counter_hz() / 1000 * milliseconds;
    while arch::counter() < deadline {
        run::rest_until(stage.host.gic, deadline);
    }
}
