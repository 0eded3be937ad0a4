//! Suite `moves`: a vCPU is moved to another CPU while its guest handles a tick of its timer, between acknowledging the
//! interrupt and ending it, at every tick. No tick is lost, none comes twice, and no CPU is left with the physical
//! interrupt active: afterwards a timer works on each. Then a vCPU that sleeps is moved, too.

use core::mem::offset_of;

use crate::guest::abi::{self, op};
use crate::mmu::Locking;
use crate::vm::{Command, Placement};

use super::Refusal;
use super::clock::Moment;
use super::report::{Row, progress};
use super::scene::{Cast, Part, Scene, Stage};

/// How long the guest may take to come to its next tick.
const PATIENCE_NS: u64 = 10_000_000_000;

/// Every CPU but the controller's in turn; false when a tick was lost or a CPU's timer does not work afterwards. With one
/// such CPU nothing moves.
pub(super) fn run(stage: &Stage<'_>) -> Result<bool, Refusal> {
    let params = stage.params;
    let locking = params.locking.first().copied().unwrap_or(Locking::Rwlock);
    let guest_cpus = stage.host.cpus() - 1;
    progress(
        0,
        1,
        format_args!("moves: {} over {guest_cpus} CPUs", params.rounds),
    );
    let scene = stage.open(Cast {
        placement: Placement::On(1),
        ..stage.cast(locking, 1)
    })?;
    let (mut at, mut moves, mut ticks_moved, mut late) = (1, 0, 0, 0);
    scene.write_word(0, offset_of!(abi::Area, released), 0)?;
    scene.post(|_| command(op::HELD_TICKS, params.rounds));
    for tick in 1..=params.rounds {
        late += u64::from(!comes(&scene, tick)?);
        let before = moves;
        for _ in 0..hops(tick) {
            let next = at % guest_cpus + 1;
            scene.move_to(0, next)?;
            moves += u64::from(next != at);
            at = next;
        }
        ticks_moved += u64::from(moves != before);
        scene.write_word(0, offset_of!(abi::Area, released), tick)?;
    }
    let outcomes = scene.wait_all()?;
    scene.close();
    let ticks = outcomes.first().map_or([0; 2], |outcome| outcome.results);
    let mut stuck = 0;
    for cpu in 1..=guest_cpus {
        let scene = stage.open(Cast {
            placement: Placement::On(cpu),
            ..stage.cast(locking, 1)
        })?;
        let tested = scene.perform(|_| command(op::TIMER_TEST, 0))?;
        stuck += u64::from(tested.iter().any(|outcome| outcome.results[1] != 0));
        scene.close();
    }
    let [ticks, wrong] = ticks;
    Row::new("moves", "timer", params.timing.name())
        .param("guest_cpus", guest_cpus)
        .param("rounds", params.rounds)
        .value("moves", moves)
        .value("ticks_moved", ticks_moved)
        .value("ticks", ticks)
        .value("ticks_wrong", wrong)
        .value("ticks_late", late)
        .value("cpus_stuck", stuck)
        .print();
    let good = ticks == params.rounds && wrong == 0 && late == 0 && stuck == 0;
    Ok(asleep(stage, locking)? && good)
}

/// A vCPU that sleeps is moved to and from a CPU that another keeps busy, and wakes each time.
fn asleep(stage: &Stage<'_>, locking: Locking) -> Result<bool, Refusal> {
    const MOVES: usize = 50;
    const PAGE: Part = Part { first: 0, pages: 1 };
    let guest_cpus = stage.host.cpus() - 1;
    let open = || {
        stage.open(Cast {
            placement: Placement::On(1),
            ..stage.cast(locking, 1)
        })
    };
    let (busy, sleeper) = (open()?, open()?);
    busy.run_rounds(PAGE, PAGE)?;
    for step in 1..=MOVES {
        sleeper.send_to(0, step % guest_cpus + 1)?;
        sleeper.perform_one(0, command(op::HYPERCALLS, 1))?;
    }
    busy.end_run()?;
    busy.close();
    sleeper.close();
    Row::new("moves", "asleep", stage.params.timing.name())
        .param("guest_cpus", guest_cpus)
        .value("moves", MOVES)
        .print();
    Ok(true)
}

/// How often the vCPU goes to the next CPU during `tick`: of two CPUs, twice means there and back.
const fn hops(tick: u64) -> u32 {
    if tick.is_multiple_of(7) { 2 } else { 1 }
}

/// Waits until the guest's handler holds `tick`.
fn comes(scene: &Scene, tick: u64) -> Result<bool, Refusal> {
    let start = Moment::now();
    loop {
        if scene.word(0, offset_of!(abi::Area, held))? >= tick {
            return Ok(true);
        }
        if start.elapsed_ns() > PATIENCE_NS {
            return Ok(false);
        }
        scene.nap();
    }
}

fn command(op: u64, first: u64) -> Command {
    Command {
        op,
        args: [first, 0, 0, 0, 0],
    }
}
