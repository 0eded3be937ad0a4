//! Suite `lives`: VMs are created, run, and destroyed at any moment, one after the other. What was free before is free
//! afterwards, frames, VMIDs and the CPUs' own interrupts.

use crate::addr::to_index;
use crate::arch;
use crate::guest::abi::op;
use crate::mem::frames;
use crate::mmu::Locking;
use crate::vm::{Command, run};

use super::Refusal;
use super::protect::linger;
use super::report::{Row, progress};
use super::scene::{Scene, Stage};

/// VMs before the first count: heap and run queues have their size then.
const WARM_UP: u64 = 16;
/// Between two words about how far the run is.
const STRIDE: u64 = 100;
/// What may be done to a VM before it is destroyed.
const LIVES: u64 = 6;
/// Between a move and the end: as many times, that far apart.
const MOMENTS: u64 = 80;
const MOMENT_NS: u64 = 1000;
/// So many looks, that far apart, find the same frames free when nobody moves any.
const SETTLED: u32 = 50;
const LOOKS_PER_SECOND: u64 = 1000;
/// What is in flight after so many looks stays.
const MOST_LOOKS: u32 = 2000;

/// As many VMs as there are rounds; false when something is missing afterwards.
pub(super) fn run(stage: &Stage<'_>) -> Result<bool, Refusal> {
    let params = stage.params;
    let locking = params.locking.first().copied().unwrap_or(Locking::Rwlock);
    let vcpus = params.vcpus.first().copied().unwrap_or(1);
    let guest_cpus = stage.host.cpus() - 1;
    let live = |round| live(stage.open(stage.cast(locking, vcpus))?, round, guest_cpus);
    (0..WARM_UP).try_for_each(live)?;
    let before = Holdings::settled(stage);
    for round in 0..params.rounds {
        if round % STRIDE == 0 {
            let (done, of) = (round / STRIDE, params.rounds.div_ceil(STRIDE));
            let number = |count| usize::try_from(count).unwrap_or(usize::MAX);
            progress(number(done), number(of), format_args!("lives: VM {round}"));
        }
        live(round)?;
    }
    let after = Holdings::settled(stage);
    Row::new("lives", "vms", params.timing.name())
        .param("vcpus", vcpus)
        .param("rounds", params.rounds)
        .value("free_pages_before", before.free_pages)
        .value("free_pages_after", after.free_pages)
        .value("vmids_before", before.vmids)
        .value("vmids_after", after.vmids)
        .value("interrupts_before", before.interrupts)
        .value("interrupts_after", after.interrupts)
        .value("interrupts_of_cpus", after.interrupts_of)
        .print();
    let kept = |holdings: Holdings| (holdings.free_pages, holdings.vmids);
    Ok(kept(before) == kept(after) && after.interrupts == 0)
}

/// What VMs take and have to give back.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Holdings {
    free_pages: usize,
    vmids: usize,
    /// SGIs and virtual timers that are pending or active in the machine's interrupt controller.
    interrupts: u32,
    /// Of so many CPUs: all of them with a GICv3, the controller's alone with a GICv2.
    interrupts_of: usize,
}

impl Holdings {
    /// As soon as they are the same for a while: frames on their way between a CPU's stash and the others are counted nowhere,
    /// and a word for a CPU is pending until that CPU gets to it.
    fn settled(stage: &Stage<'_>) -> Self {
        let mut found = Self::now(stage);
        let mut same = 0;
        let mut looks = 0..MOST_LOOKS;
        while same < SETTLED {
            let moment = arch::counter_hz() / LOOKS_PER_SECOND;
            run::rest_until(stage.host.gic, arch::counter() + moment);
            let now = Self::now(stage);
            let is_still = now == found && (now.interrupts == 0 || looks.next().is_none());
            same = if is_still { same + 1 } else { 0 };
            found = now;
        }
        found
    }

    fn now(stage: &Stage<'_>) -> Self {
        let host = stage.host;
        let timer = host.machine.interrupts.virtual_timer;
        let in_flight = |cpu| host.gic.in_flight(cpu, timer);
        let of_cpus = || (0..host.cpus()).filter_map(in_flight);
        Self {
            free_pages: frames::free_pages(),
            vmids: host.services.vmids.in_use(),
            interrupts: of_cpus().map(u32::count_ones).sum(),
            interrupts_of: of_cpus().count(),
        }
    }
}

/// A VM runs for a while, or hardly, or is paused, moved, reset or interrupted by its devices before it is destroyed.
fn live(scene: Scene, round: u64, guest_cpus: usize) -> Result<(), Refusal> {
    scene.run_freely(round)?;
    match round % LIVES {
        0 => {}
        1 => {
            scene.end_run()?;
        }
        2 => scene.pause_and_resume(),
        5 => {
            scene.interrupt();
            scene.stop();
            scene.interrupt();
        }
        3 => {
            scene.send_to(0, 1 + (1 + to_index(round / LIVES)) % guest_cpus)?;
            // The VM ends anywhere between the word and the vCPU's first instruction on its new CPU.
            linger(round / LIVES % MOMENTS * MOMENT_NS);
        }
        _ => {
            scene.reset()?;
            scene.perform_one(
                0,
                Command {
                    op: op::HYPERCALLS,
                    args: [10, 0, 0, 0, 0],
                },
            )?;
        }
    }
    scene.close();
    Ok(())
}
