//! Suite `ipi`: the kernel's IPI benchmark. vCPU 0 sends, round after round, and waits until all receivers have answered; the
//! others listen.

use alloc::format;
use alloc::vec::Vec;

use crate::guest::abi::{ipi, op};
use crate::mmu::Locking;
use crate::vm::Command;

use super::Refusal;
use super::clock::{Counts, nanoseconds};
use super::cycle::count;
use super::listen::Listening;
use super::params::Receivers;
use super::report::{Row, progress};
use super::scene::{Scene, Stage};

/// Mode, its name, and how many of the other vCPUs it concerns.
type Mode = (u64, &'static str, fn(usize) -> usize);
const MODES: [Mode; 5] = [
    (ipi::DRY, "dry", |_| 0),
    (ipi::OWN, "self", |_| 0),
    (ipi::NORMAL, "normal", |_| 1),
    (ipi::BROADCAST, "broadcast", |others| others),
    (ipi::BROADCAST_LOCK, "broadcast_lock", |others| others),
];

/// Every mode with every number of vCPUs; false when a round had another number of deliveries than receivers.
pub(super) fn run(stage: &Stage<'_>) -> Result<bool, Refusal> {
    let params = stage.params;
    let of = params.vcpus.len() * MODES.len();
    let mut done = 0;
    let mut good = true;
    for &vcpus in &params.vcpus {
        let scene = stage.open(stage.cast(Locking::Lockless, vcpus))?;
        for mode in MODES {
            progress(done, of, format_args!("ipi: {vcpus} vCPUs, {}", mode.1));
            done += 1;
            if mode.0 < ipi::NORMAL || vcpus > 1 {
                good &= case(stage, &scene, mode)?;
            }
        }
        scene.close();
    }
    Ok(good)
}

fn case(stage: &Stage<'_>, scene: &Scene, (mode, name, concerned): Mode) -> Result<bool, Refusal> {
    let rounds = stage.params.rounds;
    let others = scene.cast.vcpus - 1;
    let how = match stage.params.receivers {
        Receivers::Sleeping => Listening::Asleep,
        Receivers::Running => Listening::Running,
    };
    scene.listen(others, how)?;
    let before = Counts::now();
    let command = Command {
        op: op::IPI_MODES,
        args: [mode, rounds, 0, 0, 0],
    };
    let [sent, total] = scene.perform_one(0, command)?.results;
    let counts: Vec<_> = before.since().collect();
    let heard = scene.hear_out(others)?;
    if total == u64::MAX {
        return Err(format!("ipi, {name}: a receiver did not answer"));
    }
    let expected = rounds * concerned(others) as u64;
    Row::new("ipi", name, stage.params.timing.name())
        .param("vcpus", scene.cast.vcpus)
        .param("rounds", rounds)
        .word("receivers", stage.params.receivers.name())
        .share("send_ns", nanoseconds(sent), rounds)
        .share("total_ns", nanoseconds(total), rounds)
        .share("exits", count(&counts, "exits"), rounds)
        .share("kicks", count(&counts, "kicks"), rounds)
        .value("delivered", heard)
        .value("expected", expected)
        .print();
    Ok(heard == expected)
}
