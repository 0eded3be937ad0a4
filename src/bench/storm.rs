//! Suite `storm`: every vCPU sends SGIs at random to all others while its timer ticks. Nothing that was sent is lost, and nothing
//! arrives that was not sent. Where sends wait for nothing, vCPUs also look at each other's interrupts, and every other one
//! deactivates them apart from ending them (EOImode 1).

use crate::arch;
use crate::guest::abi::op;
use crate::mmu::Locking;
use crate::vm::Command;

use super::Refusal;
use super::report::{Row, progress};
use super::scene::Stage;

/// Without waiting for answers, and with; false when something was lost.
pub(super) fn run(stage: &Stage<'_>) -> Result<bool, Refusal> {
    let params = stage.params;
    let vcpus = params.vcpus.first().copied().unwrap_or(2);
    if vcpus < 2 {
        return Err("suite storm wants two vCPUs or more".into());
    }
    let mut good = true;
    for (done, (case, flags)) in [("free", op::STORM_MIXED), ("paced", op::STORM_PACED)]
        .into_iter()
        .enumerate()
    {
        progress(done, 2, format_args!("storm: {vcpus} vCPUs, {case}"));
        // Answers are waited for one by one, so fewer will do.
        let paced = flags & op::STORM_PACED != 0;
        let sends = if paced {
            params.rounds.div_ceil(40)
        } else {
            params.rounds
        };
        let locking = params.locking.first().copied().unwrap_or(Locking::Rwlock);
        let scene = stage.open(stage.cast(locking, vcpus))?;
        let period = arch::counter_hz() / params.tick_hz;
        let outcomes = scene.perform(|_| Command {
            op: op::STORM,
            args: [sends, flags, period, params.seed, 0],
        })?;
        let ticks: u64 = scene.timer_ticks()?.iter().sum();
        scene.close();
        let handled: u64 = outcomes.iter().map(|outcome| outcome.results[0]).sum();
        let failed = outcomes
            .iter()
            .fold(0, |bits, outcome| bits | outcome.results[1]);
        let sent = sends * vcpus as u64;
        Row::new("storm", case, params.timing.name())
            .param("vcpus", vcpus)
            .param("guest_cpus", stage.host.cpus() - 1)
            .value("sent", sent)
            .value("handled", handled)
            .value("ticks", ticks)
            .value("failed_mask", failed)
            .print();
        good &= failed == 0 && handled <= sent && (!paced || handled == sent);
    }
    Ok(good)
}
