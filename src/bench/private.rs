//! Suite `private`: what a vCPU does by itself takes as long beside any number of others that do the same, also while the
//! controller invalidates on all CPUs. It tells a clock that makes CPUs wait for each other from one that does not.

use alloc::vec::Vec;

use crate::guest::abi::{flags, op};
use crate::mmu::Precision;
use crate::vm::Command;

use super::Refusal;
use super::clock::{Counts, nanoseconds};
use super::cycle::count;
use super::heat::populate;
use super::report::Row;
use super::scene::{Scene, Stage, cpu, refused};

/// Invalidations on all CPUs meanwhile.
const INVALIDATIONS: u64 = 8;

/// Stores are to as many places as there are rounds, that far apart.
const STEP_BYTES: u64 = 64;
/// Pages whose flags are taken each time.
const PAGES: u64 = 64;

/// Every mode with every vCPU count.
pub(super) fn run(stage: &Stage<'_>) -> Result<bool, Refusal> {
    for &vcpus in &stage.params.vcpus {
        for &locking in &stage.params.locking {
            let scene = stage.open(stage.cast(locking, vcpus))?;
            populate(&scene)?;
            let before = Counts::now();
            scene.post(|vcpu| Command {
                op: op::PASS,
                args: [
                    scene.region(vcpu),
                    stage.params.rounds,
                    STEP_BYTES,
                    100 | flags::RANDOM,
                    7,
                ],
            });
            // On the memory that vCPUs write: what they cached is gone each time.
            for _ in 0..INVALIDATIONS {
                age(&scene)?;
            }
            let outcomes = scene.wait_all()?;
            let counts: Vec<_> = before.since().collect();
            let ticks = outcomes.iter().map(|outcome| outcome.ticks);
            let (least, most) = (ticks.clone().min(), ticks.max());
            scene.close();
            Row::new("private", "private", stage.params.timing.name())
                .param("vcpus", vcpus)
                .word("locking", locking.name())
                .value("least_ns", nanoseconds(least.unwrap_or(0)))
                .value("most_ns", nanoseconds(most.unwrap_or(0)))
                .value("tlbi_vmid", count(&counts, "tlbi_vmid"))
                .print();
        }
    }
    Ok(true)
}

/// Takes the access flags of the first pages, which ends with an invalidation of the whole VMID.
fn age(scene: &Scene) -> Result<(), Refusal> {
    let (stage2, data) = (scene.stage2(), scene.data);
    let pages = scene.pages().min(PAGES);
    let aged = stage2.age(cpu(), data, 0, pages, Precision::Precise, |_| ());
    aged.map(|_| ()).map_err(refused)
}
