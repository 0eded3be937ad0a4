//! Splitting blocks eagerly: every policy, at both levels of break-before-make, alone and with guests in the middle.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::rc::Rc;

use vellum::addr::{Ipa, Pa};
use vellum::arch;
use vellum::arch::fake::{self, Outcome};
use vellum::mmu::descriptor::Leaf;
use vellum::mmu::{Access, Bbm, Error, Level, PageSet, Policy, Split, Splitting, Stage2};
use vellum::sync::quiescence::CpuId;
use vellum::trace::Event;

use crate::events::{NESTING, at_each, is_notable};
use crate::flat::{Vm, usize_of};
use crate::rig::{BLOCK_BYTES, Ended, Interruptions, MODES, Plan, RAM, Rig};

pub(crate) const LEVELS: [Bbm; 2] = [Bbm::Zero, Bbm::Two];
pub(crate) const GIB: u64 = 0x4000_0000;
/// Host memory of slots that only fake guests touch.
pub(crate) const FAR: Pa = Pa::new(0x40_0000_0000);

pub(crate) fn page(number: u64) -> Ipa {
    Ipa::new(RAM + number * 4096)
}

pub(crate) fn plan(policy: Policy, bbm: Bbm) -> Plan {
    let splitting = Splitting {
        policy,
        bbm,
        ..Splitting::default()
    };
    Plan {
        splitting,
        ..Plan::default()
    }
}

/// A machine for every locking mode and level.
pub(crate) fn everywhere(policy: Policy, test: impl Fn(&Rig)) {
    for bbm in LEVELS {
        for locking in MODES {
            test(&Rig::new(Plan {
                locking,
                ..plan(policy, bbm)
            }));
        }
    }
}

/// A VM of `blocks` blocks that are all mapped and writable.
pub(crate) fn of_blocks(rig: &Rig, blocks: u64) -> Rc<Vm> {
    let vm = rig.running_vm(blocks, Level::L2);
    for block in 0..blocks {
        rig.write(1, page(block * 512));
    }
    vm
}

/// A VM of one GiB, mapped by one block.
pub(crate) fn of_one_gib(rig: &Rig) -> Rc<Vm> {
    let vm = rig.vm();
    vm.add_slot(RAM, FAR, GIB, Level::L1, true);
    for cpu in 1..rig.plan.cpus {
        rig.load(cpu, &vm);
    }
    rig.write(1, page(0));
    assert_eq!(rig.leaves(&vm).len(), 1);
    vm
}

pub(crate) fn levels(leaves: &[(Ipa, Level, Leaf)]) -> (usize, usize, usize) {
    let at = |wanted| {
        let leaves = leaves.iter().map(|(_, level, _)| *level);
        leaves.filter(|level| *level == wanted).count()
    };
    (at(Level::L1), at(Level::L2), at(Level::L3))
}

/// Whether every possible outcome of `access` to page `number`, on every CPU, is that it reaches memory.
pub(crate) fn always_reaches(rig: &Rig, number: u64, access: fake::Access) -> bool {
    (1..rig.plan.cpus).all(|cpu| {
        let outcomes = rig.machine.outcomes(cpu, page(number), access);
        let hit = |outcome: &Outcome| matches!(outcome, Outcome::Hit(_));
        outcomes.iter().all(hit)
    })
}

fn assert_same_memory(before: &[(Ipa, Level, Leaf)], after: &[(Ipa, Level, Leaf)]) {
    let mut pieces = after.iter();
    for (ipa, level, leaf) in before {
        let mut done = 0;
        while done < level.span_bytes() {
            let (at, size, piece) = pieces.next().expect("as much memory as before");
            let to = Pa::new(leaf.to.raw() + done);
            assert_eq!(at.raw(), ipa.raw() + done);
            assert_eq!(*piece, Leaf { to, ..*leaf }, "at {at}");
            done += size.span_bytes();
        }
    }
    assert!(pieces.next().is_none());
}

#[test]
fn good_split_keeps_every_translation_and_permission() {
    everywhere(Policy::Fault, |rig| {
        let vm = of_blocks(rig, 3);
        rig.enable(0, &vm, 0, true);
        rig.clear(0, &vm, 0, 512, 1024);
        let before = rig.leaves(&vm);
        assert_eq!(levels(&before), (0, 3, 0));
        let split = rig.split(0, &vm, 0, 0, 1536);
        assert_eq!(split, Split { blocks: 3, left: 0 });
        let after = rig.leaves(&vm);
        assert_eq!(levels(&after), (0, 0, 1536));
        assert_same_memory(&before, &after);
        arch::dsb_ish();
        for number in 0..1536 {
            assert!(always_reaches(rig, number, fake::Access::Read));
            let writable = !(512..1024).contains(&number);
            assert_eq!(always_reaches(rig, number, fake::Access::Write), writable);
        }
        rig.write(2, page(700));
        rig.check(&vm);
        let again = rig.split(0, &vm, 0, 0, 1536);
        assert_eq!(again, Split::default());
    });
}

#[test]
fn good_split_of_a_part_of_a_block_splits_the_block_and_no_other() {
    for bbm in LEVELS {
        let rig = Rig::new(plan(Policy::Fault, bbm));
        let vm = of_blocks(&rig, 3);
        let split = rig.split(1, &vm, 0, 576, 640);
        assert_eq!(split, Split { blocks: 1, left: 0 });
        assert_eq!(levels(&rig.leaves(&vm)), (0, 2, 512));
        rig.check(&vm);
    }
}

#[test]
fn good_1_gib_block_becomes_a_subtree_by_one_store() {
    for bbm in LEVELS {
        let rig = Rig::new(plan(Policy::Fault, bbm));
        let vm = of_one_gib(&rig);
        let before = rig.leaves(&vm);
        let stores = rig.count(Event::DescriptorWrites);
        let split = rig.split(0, &vm, 0, 0, GIB / 4096);
        assert_eq!(split, Split { blocks: 1, left: 0 });
        let expected = if bbm == Bbm::Two { 1 } else { 2 };
        assert_eq!(rig.count(Event::DescriptorWrites) - stores, expected);
        let after = rig.leaves(&vm);
        assert_eq!(levels(&after), (0, 0, 512 * 512));
        assert_same_memory(&before, &after);
        arch::dsb_ish();
        for number in [0, 1, 511, 512, 100_000, GIB / 4096 - 1] {
            assert!(always_reaches(&rig, number, fake::Access::Write));
        }
        rig.content();
    }
}

#[test]
fn good_1_gib_block_in_small_chunks_is_split_level_by_level() {
    for bbm in LEVELS {
        let mut plan = plan(Policy::Fault, bbm);
        plan.splitting.chunk_bytes = BLOCK_BYTES;
        plan.splitting.batch = 1;
        let rig = Rig::new(plan);
        let vm = of_one_gib(&rig);
        let split = rig.split(0, &vm, 0, 1024, 2048);
        assert_eq!(split.left, 0);
        assert_eq!(levels(&rig.leaves(&vm)), (0, 510, 1024));
        rig.content();
    }
}

#[test]
fn good_without_frames_the_rest_is_left_whole_and_reported_and_faults_go_on() {
    for bbm in LEVELS {
        for frames in [0, 1, 3] {
            let rig = Rig::new(plan(Policy::Enable, bbm));
            let vm = of_blocks(&rig, 6);
            rig.frames
                .store(usize_of(frames), core::sync::atomic::Ordering::Relaxed);
            let split = rig.enable(0, &vm, 0, false);
            assert_eq!(
                split,
                Split {
                    blocks: frames,
                    left: 6 - frames
                }
            );
            let left = usize_of(6 - frames);
            assert_eq!(levels(&rig.leaves(&vm)), (0, left, 512 * (6 - left)));
            for number in 0..6 * 512 {
                assert_eq!(
                    rig.write(1 + usize_of(number % 3), page(number)),
                    Ended::Done
                );
            }
            assert_eq!(rig.dirty(0, &vm, 0).len(), 6 * 512);
            rig.check(&vm);
            rig.frames
                .store(1 << 40, core::sync::atomic::Ordering::Relaxed);
            rig.clear(0, &vm, 0, 0, 3072);
            rig.write(1, page(3000));
            assert_eq!(rig.dirty(0, &vm, 0), BTreeSet::from([3000]));
            rig.check(&vm);
            rig.destroy(0, vm);
        }
    }
}

#[test]
fn good_1_gib_block_without_frames_for_all_of_it_is_split_as_far_as_they_go() {
    for bbm in LEVELS {
        let rig = Rig::new(plan(Policy::Fault, bbm));
        let vm = of_one_gib(&rig);
        let before = rig.leaves(&vm);
        rig.frames.store(100, core::sync::atomic::Ordering::Relaxed);
        let split = rig.split(0, &vm, 0, 0, GIB / 4096);
        assert_eq!(
            split,
            Split {
                blocks: 1,
                left: 413
            }
        );
        let after = rig.leaves(&vm);
        assert_eq!(levels(&after), (0, 413, 99 * 512));
        assert_same_memory(&before, &after);
        rig.content();
    }
}

/// Ranges of a slot of `pages` pages that no entry point accepts.
pub(crate) fn bad_ranges(pages: u64) -> [(u64, u64); 8] {
    [
        (0, 0),
        (1, 64),
        (0, 65),
        (64, 0),
        (0, pages + 64),
        (pages, pages + 64),
        (pages + 64, pages + 128),
        (u64::MAX - 63, 64),
    ]
}

#[test]
fn bad_ranges_are_refused_and_split_and_collapse_nothing() {
    everywhere(Policy::Clear, |rig| {
        let vm = of_blocks(rig, 2);
        rig.enable(0, &vm, 0, true);
        rig.split(0, &vm, 0, 0, 512);
        let before = rig.leaves(&vm);
        let id = vm.slots.borrow()[0].id;
        let mut set = PageSet::default();
        rig.machine.take_log();
        for (from, to) in bad_ranges(1024) {
            let stage2 = &vm.stage2;
            let split = rig.machine.on(0, || stage2.split(CpuId(0), id, from, to));
            let collapsed = rig
                .machine
                .on(0, || stage2.collapse(CpuId(0), id, from, to));
            let cleared = rig
                .machine
                .on(0, || stage2.clear(CpuId(0), id, from, to, &mut set));
            for refused in [split.err(), collapsed.err(), cleared.err()] {
                assert!(matches!(refused, Some(Error::BadRange(..))), "{from} {to}");
            }
        }
        assert!(set.is_empty());
        assert_eq!(rig.machine.take_log(), []);
        assert_eq!(rig.leaves(&vm), before);
        assert_eq!(rig.dirty(0, &vm, 0).len(), 1024);
        rig.machine
            .on(0, || vm.stage2.remove_slot(CpuId(0), id))
            .expect("the slot");
        let gone = rig.machine.on(0, || vm.stage2.split(CpuId(0), id, 0, 64));
        assert_eq!(gone, Err(Error::NoSlot));
        let gone = rig
            .machine
            .on(0, || vm.stage2.collapse(CpuId(0), id, 0, 64));
        assert_eq!(gone.err(), Some(Error::NoSlot));
    });
}

#[test]
fn bad_splitting_is_refused_when_the_vm_is_made() {
    let good = Splitting::default();
    let rig = Rig::new(Plan::default());
    for (splitting, expected) in [
        (
            Splitting {
                chunk_bytes: 0x1000,
                ..good
            },
            Error::BadChunk(0x1000),
        ),
        (Splitting { batch: 0, ..good }, Error::BadBatch(0)),
        (Splitting { batch: 65, ..good }, Error::BadBatch(65)),
    ] {
        let config = vellum::mmu::Config {
            locking: vellum::mmu::Locking::Lockless,
            shape: vellum::mmu::Shape::new(40).expect("a shape"),
            splitting,
            engine: vellum::mmu::Engine::Walk,
            tracking: vellum::mmu::Tracking::Fault,
            access_flag: vellum::mmu::AccessFlag::Software,
        };
        let made = Stage2::new(config, rig.services.clone());
        assert_eq!(made.err(), Some(expected));
    }
}

fn vm_wide(rig: &Rig) -> u64 {
    rig.count(Event::TlbiVmid) + rig.count(Event::TlbiStage1)
}

#[test]
fn good_at_level_0_a_batch_costs_one_vm_wide_invalidation_and_one_address_a_block() {
    for (batch, pairs) in [(1, 20), (3, 7), (16, 2), (64, 1)] {
        let mut plan = plan(Policy::Fault, Bbm::Zero);
        plan.splitting.batch = batch;
        let rig = Rig::new(plan);
        let vm = of_blocks(&rig, 20);
        let before = (vm_wide(&rig), rig.count(Event::TlbiIpa));
        let windows = rig.count(Event::BbmWindows);
        assert_eq!(rig.split(0, &vm, 0, 0, 20 * 512).blocks, 20);
        assert_eq!(vm_wide(&rig) - before.0, pairs, "batch {batch}");
        assert_eq!(rig.count(Event::TlbiIpa) - before.1, 20);
        assert_eq!(rig.count(Event::BbmWindows) - windows, 20);
        assert_eq!(rig.count(Event::Splits), 20);
        rig.check(&vm);
    }
}

#[test]
fn good_clear_policy_at_level_0_invalidates_each_block_once() {
    let mut plan = plan(Policy::Clear, Bbm::Zero);
    plan.splitting.batch = 4;
    let rig = Rig::new(plan);
    let vm = of_blocks(&rig, 8);
    rig.enable(0, &vm, 0, true);
    for block in 0..8 {
        assert_eq!(rig.write(1, page(512 * block + 7)), Ended::Done);
    }
    let before = (vm_wide(&rig), rig.count(Event::TlbiIpa));
    let (_, split) = rig.clear_and_split(0, &vm, 0, 0, 8 * 512);
    assert_eq!(split, Split { blocks: 8, left: 0 });
    assert_eq!(rig.count(Event::TlbiIpa) - before.1, 8);
    assert_eq!(vm_wide(&rig) - before.0, 2);
    rig.check(&vm);
}

#[test]
fn good_clear_policy_without_frames_leaves_nothing_writable_behind() {
    for bbm in LEVELS {
        for frames in [0, 3] {
            let rig = Rig::new(plan(Policy::Clear, bbm));
            let vm = of_blocks(&rig, 6);
            rig.enable(0, &vm, 0, true);
            for block in 0..6 {
                assert_eq!(rig.write(1, page(512 * block)), Ended::Done);
            }
            rig.frames
                .store(usize_of(frames), core::sync::atomic::Ordering::Relaxed);
            // What is reported must not be cached as writable anywhere: the rig looks.
            let (_, split) = rig.clear_and_split(0, &vm, 0, 0, 6 * 512);
            let left = 6 - frames;
            assert_eq!(
                split,
                Split {
                    blocks: frames,
                    left
                }
            );
            rig.check(&vm);
        }
    }
}

#[test]
fn good_at_level_2_no_block_is_ever_broken_and_a_chunk_is_invalidated_once() {
    let rig = Rig::new(plan(Policy::Enable, Bbm::Two));
    let vm = of_blocks(&rig, 20);
    rig.enable(0, &vm, 0, true);
    rig.clear(0, &vm, 0, 0, 20 * 512);
    assert_eq!(rig.count(Event::BbmWindows), 0);
    assert_eq!(rig.count(Event::Splits), 20);
    let mut plan = plan(Policy::Fault, Bbm::Two);
    plan.splitting.batch = 1;
    let rig = Rig::new(plan);
    let vm = of_blocks(&rig, 20);
    let before = vm_wide(&rig);
    rig.split(0, &vm, 0, 0, 20 * 512);
    assert_eq!(vm_wide(&rig) - before, 1);
    rig.check(&vm);
}

#[test]
fn good_at_level_2_every_access_succeeds_at_every_instruction_of_a_split() {
    for large in [false, true] {
        let rig = Rc::new(Rig::new(plan(Policy::Fault, Bbm::Two)));
        let vm = if large {
            of_one_gib(&rig)
        } else {
            of_blocks(&rig, 2)
        };
        let pages = if large { GIB / 4096 } else { 1024 };
        arch::dsb_ish();
        let looks = Rc::new(Cell::new(0));
        let interruptions = {
            let (rig, looks) = (Rc::clone(&rig), Rc::clone(&looks));
            Interruptions::new(move |event| {
                if is_notable(&event) {
                    looks.set(looks.get() + 1);
                    for number in [0, 5, 511, 512, pages - 1] {
                        assert!(always_reaches(&rig, number, fake::Access::Write));
                    }
                }
            })
        };
        rig.split(0, &vm, 0, 0, pages);
        drop(interruptions);
        assert!(looks.get() > 10);
        rig.content();
    }
}

fn write_some(rig: &Rig, _: &Vm) {
    rig.provoke(2, page(3), Access::Write);
    rig.provoke(3, page(600), Access::Write);
    rig.provoke(2, page(100), Access::Read);
    rig.provoke(3, page(3), Access::Write);
}

/// Two blocks, read-only and logged.
fn logged(rig: &Rig) -> Rc<Vm> {
    let vm = of_blocks(rig, 2);
    rig.enable(0, &vm, 0, false);
    vm
}

fn at_each_notable(
    policy: Policy,
    prepare: impl Fn(&Rig) -> Rc<Vm> + Copy,
    interruption: impl Fn(&Rig, &Vm) + Copy + 'static,
    scenario: impl Fn(&Rig, &Rc<Vm>) + Copy,
) {
    for locking in NESTING {
        for bbm in LEVELS {
            let plan = Plan {
                locking,
                ..plan(policy, bbm)
            };
            at_each(plan, is_notable, prepare, interruption, scenario);
        }
    }
}

#[test]
fn good_write_in_the_middle_of_a_split_is_recorded() {
    at_each_notable(Policy::Fault, logged, write_some, |rig, vm| {
        rig.split(0, vm, 0, 0, 1024);
        rig.write(1, page(3));
        rig.clear(0, vm, 0, 0, 1024);
    });
}

#[test]
fn good_write_in_the_middle_of_enable_with_its_split_is_recorded() {
    let prepare = |rig: &Rig| of_blocks(rig, 2);
    at_each_notable(Policy::Enable, prepare, write_some, |rig, vm| {
        rig.enable(0, vm, 0, false);
    });
}

#[test]
fn good_write_in_the_middle_of_clear_with_its_split_is_reported_by_it_or_later() {
    let prepare = |rig: &Rig| {
        let vm = of_blocks(rig, 2);
        rig.enable(0, &vm, 0, true);
        vm
    };
    at_each_notable(Policy::Clear, prepare, write_some, |rig, vm| {
        rig.clear(0, vm, 0, 0, 64);
    });
}

#[test]
fn good_split_in_the_middle_of_a_clear_loses_no_write() {
    let prepare = |rig: &Rig| {
        let vm = of_blocks(rig, 2);
        rig.enable(0, &vm, 0, true);
        vm
    };
    let split = |rig: &Rig, vm: &Vm| {
        rig.split(3, vm, 0, 0, 1024);
        rig.provoke(2, page(3), Access::Write);
    };
    at_each_notable(Policy::Fault, prepare, split, |rig, vm| {
        rig.clear(0, vm, 0, 0, 64);
        for number in 0..64 {
            assert!(number == 3 || !always_reaches(rig, number, fake::Access::Write));
        }
    });
}

#[test]
fn good_first_write_to_a_1_gib_block_splits_it_down_to_the_page() {
    for (policy, expected) in [
        (Policy::Fault, (0, 511, 512)),
        (Policy::FaultEmpty, (0, 0, 1)),
    ] {
        for bbm in LEVELS {
            let rig = Rig::new(plan(policy, bbm));
            let vm = of_one_gib(&rig);
            rig.enable(0, &vm, 0, false);
            rig.write(1, page(5));
            assert_eq!(levels(&rig.leaves(&vm)), expected);
            assert_eq!(rig.dirty(0, &vm, 0), BTreeSet::from([5]));
            rig.check(&vm);
        }
    }
}

#[test]
fn good_a_pause_between_chunks_holds_nothing_busy() {
    let mut plan = plan(Policy::Fault, Bbm::Zero);
    plan.splitting.chunk_bytes = BLOCK_BYTES;
    plan.splitting.pause_ticks = 5;
    let rig = Rc::new(Rig::new(plan));
    let vm = of_blocks(&rig, 3);
    let pauses = Rc::new(Cell::new(0));
    let interruptions = {
        let (rig, pauses) = (Rc::clone(&rig), Rc::clone(&pauses));
        Interruptions::new(move |event| {
            if event == fake::Event::Yield {
                pauses.set(pauses.get() + 1);
                arch::dsb_ish();
                for number in [0, 512, 1024] {
                    assert!(always_reaches(&rig, number, fake::Access::Write));
                }
            }
        })
    };
    rig.split(0, &vm, 0, 0, 1536);
    drop(interruptions);
    assert!(pauses.get() > 0);
    rig.check(&vm);
}
