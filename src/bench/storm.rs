//! Suite `storm`: every vCPU sends SGIs at random to all others while its timer ticks. Nothing that was sent is lost, and nothing
//! arrives that was not sent. Where sends wait for nothing, vCPUs also look at each other's interrupts, and every other one
//! deactivates them apart from ending them (EOImode 1). Then the same while the VM is stopped again and again, the state of its
//! interrupt controller saved, replaced by that before the storm, and restored.

use alloc::format;

use crate::arch;
use crate::guest::abi::{STORM_SGIS, op};
use crate::mmu::Locking;
use crate::vm::Command;

use super::Refusal;
use super::report::{Row, progress};
use super::scene::Stage;

/// How often the interrupt controller's state is restored.
const RESTORES: u64 = 200;

/// Without waiting for answers, with, and with restoring; false when something was lost.
pub(super) fn run(stage: &Stage<'_>) -> Result<bool, Refusal> {
    let params = stage.params;
    let vcpus = params.vcpus.first().copied().unwrap_or(2);
    if !(2..=STORM_SGIS).contains(&vcpus) {
        // Sends that are paced need an SGI of each vCPU's own: two that merged would be handled once.
        return Err(format!("suite storm wants 2 to {STORM_SGIS} vCPUs"));
    }
    let mut good = true;
    let cases = [
        ("free", op::STORM_MIXED, 1, 0),
        // Answers are waited for one by one, so fewer will do.
        ("paced", op::STORM_PACED, 40, 0),
        ("restored", op::STORM_MIXED, 4, RESTORES),
    ];
    for (done, (case, flags, part, restores)) in cases.into_iter().enumerate() {
        progress(done, 3, format_args!("storm: {vcpus} vCPUs, {case}"));
        let sends = params.rounds.div_ceil(part);
        let locking = params.locking.first().copied().unwrap_or(Locking::Rwlock);
        let scene = stage.open(stage.cast(locking, vcpus))?;
        let period = arch::counter_hz() / params.tick_hz;
        let calm = scene.interrupts()?;
        scene.post(|_| Command {
            op: op::STORM,
            args: [sends, flags, period, params.seed, 0],
        });
        let mut restored = 0;
        for _ in 0..restores {
            scene.nap();
            restored += u64::from(scene.restore_interrupts(&calm));
        }
        let outcomes = scene.wait_all()?;
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
            .value("restored", restored)
            .value("failed_mask", failed)
            .print();
        good &= failed == 0
            && restored == restores
            && handled <= sent
            && (flags != op::STORM_PACED || handled == sent);
    }
    Ok(good)
}
