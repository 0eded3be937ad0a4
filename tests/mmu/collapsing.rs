//! Collapsing tables into blocks: what it restores, what it refuses, and guests in the middle of it.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;

use vellum::arch;
use vellum::arch::fake;
use vellum::mmu::{Access, Bbm, Collapse, Level, Policy};
use vellum::sync::quiescence::CpuId;
use vellum::trace::Event;

use crate::events::{NESTING, at_each, is_notable};
use crate::flat::{Vm, usize_of};
use crate::rig::{BLOCK_BYTES, Interruptions, Plan, Rig};
use crate::splitting::{
    GIB, LEVELS, always_reaches, everywhere, levels, of_blocks, of_one_gib, page, plan,
};

#[test]
fn good_disable_restores_exactly_the_leaves_from_before() {
    for policy in [Policy::Fault, Policy::Enable, Policy::Clear] {
        everywhere(policy, |rig| {
            let vm = of_blocks(rig, 4);
            let before = rig.leaves(&vm);
            for all_set in [false, true] {
                rig.enable(0, &vm, 0, all_set);
                for number in [0, 5, 600, 601, 1023] {
                    rig.write(1, page(number));
                }
                rig.clear(0, &vm, 0, 0, 1536);
                for number in [5, 1100] {
                    rig.write(2, page(number));
                }
                let tables = 4 - levels(&rig.leaves(&vm)).1 as u64;
                assert!(tables > 0, "{policy:?}");
                let done = rig.disable(0, &vm, 0);
                assert_eq!(done, Collapse { tables, left: 0 });
                assert_eq!(rig.leaves(&vm), before);
                rig.check(&vm);
                arch::dsb_ish();
                for number in 0..2048 {
                    rig.write(1 + usize_of(number % 3), page(number));
                }
                assert_eq!(rig.leaves(&vm), before);
            }
            rig.check(&vm);
            rig.destroy(0, vm);
        });
    }
}

#[test]
fn good_disable_makes_1_gib_blocks_again() {
    for bbm in LEVELS {
        let rig = Rig::new(plan(Policy::Enable, bbm));
        let vm = of_one_gib(&rig);
        let before = rig.leaves(&vm);
        rig.enable(0, &vm, 0, false);
        assert_eq!(levels(&rig.leaves(&vm)), (0, 0, 512 * 512));
        for number in [0, 5, 512, 100_000] {
            rig.write(1, page(number));
        }
        let done = rig.disable(0, &vm, 0);
        assert_eq!(
            done,
            Collapse {
                tables: 513,
                left: 0
            }
        );
        assert_eq!(rig.leaves(&vm), before);
        rig.check(&vm);
        rig.destroy(0, vm);
    }
}

#[test]
fn good_disable_gives_back_every_frame_that_splitting_took() {
    everywhere(Policy::Enable, |rig| {
        let left = || rig.frames.load(core::sync::atomic::Ordering::Relaxed);
        let vm = of_blocks(rig, 4);
        let before = left();
        rig.enable(0, &vm, 0, false);
        assert_eq!(before - left(), 4);
        rig.disable(0, &vm, 0);
        assert_eq!(left(), before);
        rig.destroy(0, vm);
    });
}

#[test]
fn good_collapse_takes_whole_blocks_of_its_range_only() {
    for bbm in LEVELS {
        let rig = Rig::new(plan(Policy::Fault, bbm));
        let vm = of_blocks(&rig, 4);
        rig.split(0, &vm, 0, 0, 2048);
        let done = rig.collapse(0, &vm, 0, 64, 1600);
        assert_eq!(done, Collapse { tables: 2, left: 0 });
        assert_eq!(levels(&rig.leaves(&vm)), (0, 2, 1024));
        let done = rig.collapse(1, &vm, 0, 0, 2048);
        assert_eq!(done, Collapse { tables: 2, left: 0 });
        assert_eq!(levels(&rig.leaves(&vm)), (0, 4, 0));
        rig.check(&vm);
    }
}

#[test]
fn good_collapse_of_a_logged_slot_keeps_permissions_and_what_is_recorded() {
    everywhere(Policy::Enable, |rig| {
        let vm = of_blocks(rig, 3);
        rig.enable(0, &vm, 0, false);
        for number in 512..1024 {
            rig.write(1, page(number));
        }
        rig.write(2, page(1030));
        let before = rig.leaves(&vm);
        let done = rig.collapse(0, &vm, 0, 0, 1536);
        // The third has one writable page among read-only ones.
        assert_eq!(done, Collapse { tables: 2, left: 1 });
        let after = rig.leaves(&vm);
        assert_eq!(levels(&after), (0, 2, 512));
        assert!(!after[0].2.write && after[1].2.write);
        assert_eq!(after[2..], before[1024..]);
        assert!(after.iter().all(|(_, _, leaf)| !leaf.frozen));
        let written: BTreeSet<u64> = (512..1024).chain([1030]).collect();
        assert_eq!(rig.dirty(0, &vm, 0), written);
        rig.check(&vm);
        rig.write(1, page(7));
        assert_eq!(rig.clear(0, &vm, 0, 0, 1536).len(), 514);
        for number in 0..1536 {
            assert!(!always_reaches(rig, number, fake::Access::Write));
        }
        rig.check(&vm);
    });
}

#[test]
fn good_collapse_leaves_a_table_with_a_hole_as_it_was() {
    everywhere(Policy::Fault, |rig| {
        let vm = of_blocks(rig, 2);
        rig.split(0, &vm, 0, 0, 1024);
        rig.machine
            .on(0, || vm.stage2.unmap(CpuId(0), page(77), 0x1000))
            .expect("a page of a table");
        let before = rig.leaves(&vm);
        let done = rig.collapse(0, &vm, 0, 0, 512);
        assert_eq!(done, Collapse { tables: 0, left: 1 });
        assert_eq!(rig.leaves(&vm), before);
        rig.write(1, page(77));
        let done = rig.collapse(0, &vm, 0, 0, 1024);
        assert_eq!(done, Collapse { tables: 2, left: 0 });
        rig.check(&vm);
    });
}

#[test]
fn good_memory_that_no_block_can_translate_is_not_collapsed() {
    let rig = Rig::new(plan(Policy::Fault, Bbm::Two));
    let vm = rig.running_vm(1, Level::L3);
    for number in 0..512 {
        rig.write(1, page(number));
    }
    let before = rig.leaves(&vm);
    rig.machine.take_log();
    assert_eq!(rig.collapse(0, &vm, 0, 0, 512), Collapse::default());
    let stores = rig.machine.take_log();
    let store = |event: &fake::Event| matches!(event, fake::Event::Descriptor { .. });
    assert!(!stores.iter().any(store));
    assert_eq!(rig.leaves(&vm), before);
}

#[test]
fn good_collapse_at_level_0_costs_one_vm_wide_invalidation_a_batch() {
    for (batch, expected) in [(1, 20), (16, 2), (64, 1)] {
        for bbm in LEVELS {
            let mut plan = plan(Policy::Fault, bbm);
            plan.splitting.batch = batch;
            let rig = Rig::new(plan);
            let vm = of_blocks(&rig, 20);
            rig.split(0, &vm, 0, 0, 20 * 512);
            let wide = |rig: &Rig| rig.count(Event::TlbiVmid) + rig.count(Event::TlbiStage1);
            let before = (wide(&rig), rig.count(Event::BbmWindows));
            let done = rig.collapse(0, &vm, 0, 0, 20 * 512);
            assert_eq!(done.tables, 20);
            assert_eq!(wide(&rig) - before.0, expected, "batch {batch}");
            let windows = if bbm == Bbm::Two { 0 } else { 20 };
            assert_eq!(rig.count(Event::BbmWindows) - before.1, windows);
            assert_eq!(rig.count(Event::Collapses), 20);
            rig.check(&vm);
        }
    }
}

#[test]
fn good_at_level_2_every_access_succeeds_at_every_instruction_of_a_collapse() {
    for large in [false, true] {
        let rig = Rc::new(Rig::new(plan(Policy::Fault, Bbm::Two)));
        let (vm, pages) = if large {
            (of_one_gib(&rig), GIB / 4096)
        } else {
            (of_blocks(&rig, 2), 1024)
        };
        rig.split(0, &vm, 0, 0, pages);
        if large {
            // Most of it again, so that the rest takes few steps.
            rig.collapse(0, &vm, 0, 1024, pages);
        }
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
        rig.collapse(0, &vm, 0, 0, pages);
        drop(interruptions);
        assert!(looks.get() > 10);
        let expected = if large { (1, 0, 0) } else { (0, 2, 0) };
        assert_eq!(levels(&rig.leaves(&vm)), expected);
        rig.content();
    }
}

fn write_some(rig: &Rig, _: &Vm) {
    rig.provoke(2, page(3), Access::Write);
    rig.provoke(3, page(600), Access::Write);
    rig.provoke(2, page(100), Access::Read);
    rig.provoke(3, page(3), Access::Write);
}

fn at_each_notable(
    prepare: impl Fn(&Rig) -> Rc<Vm> + Copy,
    interruption: impl Fn(&Rig, &Vm) + Copy + 'static,
    scenario: impl Fn(&Rig, &Rc<Vm>) + Copy,
) {
    for locking in NESTING {
        for bbm in LEVELS {
            let plan = Plan {
                locking,
                ..plan(Policy::Enable, bbm)
            };
            at_each(plan, is_notable, prepare, interruption, scenario);
        }
    }
}

#[test]
fn good_write_in_the_middle_of_a_collapse_of_a_logged_slot_is_recorded() {
    let prepare = |rig: &Rig| {
        let vm = of_blocks(rig, 2);
        rig.enable(0, &vm, 0, false);
        vm
    };
    at_each_notable(prepare, write_some, |rig, vm| {
        rig.collapse(0, vm, 0, 0, 1024);
        rig.write(1, page(3));
        rig.check(vm);
        rig.clear(0, vm, 0, 0, 1024);
    });
}

#[test]
fn good_write_in_the_middle_of_disable_reaches_memory() {
    let prepare = |rig: &Rig| {
        let vm = of_blocks(rig, 2);
        rig.enable(0, &vm, 0, false);
        rig.write(1, page(4));
        vm
    };
    at_each_notable(prepare, write_some, |rig, vm| {
        rig.disable(0, vm, 0);
        assert_eq!(levels(&rig.leaves(vm)), (0, 2, 0));
        assert!(rig.leaves(vm).iter().all(|(_, _, leaf)| leaf.write));
        rig.enable(0, vm, 0, false);
    });
}

#[test]
fn good_collapse_waits_for_a_fault_that_may_look_at_its_table() {
    for bbm in LEVELS {
        let rig = Rc::new(Rig::new(plan(Policy::Enable, bbm)));
        let vm = of_blocks(&rig, 1);
        rig.enable(0, &vm, 0, false);
        for number in (0..512).filter(|number| *number != 5) {
            rig.write(1, page(number));
        }
        let waited = Rc::new(Cell::new(None));
        {
            let (rig, vm, waited) = (Rc::clone(&rig), Rc::clone(&vm), Rc::clone(&waited));
            fake::observe(Some(Rc::new(move |event| match event {
                // The last leaf became writable: the table is that of one block, and CPU 2 is in its section.
                fake::Event::Descriptor { .. } if waited.get().is_none() => {
                    waited.set(Some(false));
                    let collapse = || rig.collapse(0, &vm, 0, 0, 512);
                    drop(catch_unwind(AssertUnwindSafe(collapse)));
                }
                fake::Event::Yield if waited.get() == Some(false) => {
                    waited.set(Some(true));
                    // One thread cannot let the fault go on, so the first poll ends the call.
                    resume_unwind(Box::new(()));
                }
                _ => {}
            })));
        }
        rig.write(2, page(5));
        fake::observe(None);
        assert_eq!(waited.get(), Some(true));
        assert_eq!(levels(&rig.leaves(&vm)), (0, 1, 0));
        assert_eq!(rig.dirty(0, &vm, 0).len(), 512);
        rig.check(&vm);
    }
}

/// Collapses a table of writable, recorded pages; at the first event that `when` picks CPU 3 does `work`, which waits.
fn waits_for_collapse(when: fn(&fake::Event) -> bool, work: impl Fn(&Rig, &Vm) + Copy + 'static) {
    for bbm in LEVELS {
        let rig = Rc::new(Rig::new(plan(Policy::Enable, bbm)));
        let vm = of_blocks(&rig, 1);
        rig.enable(0, &vm, 0, true);
        let waited = Rc::new(Cell::new(None));
        {
            let (rig, vm, waited) = (Rc::clone(&rig), Rc::clone(&vm), Rc::clone(&waited));
            fake::observe(Some(Rc::new(move |event| match event {
                fake::Event::Yield if waited.get() == Some(false) => {
                    waited.set(Some(true));
                    // One thread cannot let the collapse go on, so the first poll ends the call.
                    resume_unwind(Box::new(()));
                }
                _ if when(&event) && waited.get().is_none() => {
                    waited.set(Some(false));
                    drop(catch_unwind(AssertUnwindSafe(|| work(&rig, &vm))));
                }
                _ => {}
            })));
        }
        rig.collapse(0, &vm, 0, 0, 512);
        fake::observe(None);
        assert_eq!(waited.get(), Some(true));
    }
}

/// The last leaf of the table is frozen, and the table still linked.
fn all_frozen(event: &fake::Event) -> bool {
    matches!(event, fake::Event::Descriptor { slot, .. } if slot.raw() % 4096 == 511 * 8)
}

/// The table is linked no longer, and still walked.
fn detached(event: &fake::Event) -> bool {
    *event == fake::Event::TlbiVmalls12e1is
}

#[test]
fn good_clear_waits_for_a_table_that_is_being_collapsed() {
    for when in [all_frozen, detached] {
        waits_for_collapse(when, |rig, vm| _ = rig.clear(3, vm, 0, 64, 128));
    }
}

#[test]
fn good_unmap_waits_for_a_table_that_is_being_collapsed() {
    for when in [all_frozen, detached] {
        waits_for_collapse(when, |rig, vm| {
            let unmap = || vm.stage2.unmap(CpuId(3), page(64), 0x1000);
            assert_eq!(rig.machine.on(3, unmap), Ok(()));
        });
    }
}

#[test]
fn good_split_waits_for_a_table_that_is_being_collapsed() {
    waits_for_collapse(detached, |rig, vm| _ = rig.split(3, vm, 0, 0, 512));
}

#[test]
fn good_fault_on_a_table_that_is_being_collapsed_changes_nothing_and_goes_back_to_the_guest() {
    for (bbm, when) in [
        (Bbm::Zero, all_frozen as fn(&_) -> _),
        (Bbm::Two, all_frozen),
        (Bbm::Zero, detached),
        (Bbm::Two, detached),
    ] {
        let rig = Rc::new(Rig::new(plan(Policy::Enable, bbm)));
        let vm = of_blocks(&rig, 1);
        rig.enable(0, &vm, 0, false);
        let faults = Rc::new(Cell::new(0));
        let interruptions = {
            let (rig, vm, faults) = (Rc::clone(&rig), Rc::clone(&vm), Rc::clone(&faults));
            Interruptions::new(move |event| {
                if when(&event) && faults.replace(faults.get() + 1) == 0 {
                    let before = (
                        rig.count(Event::DescriptorWrites),
                        rig.count(Event::BusyRetries),
                    );
                    assert_eq!(rig.attempt(2, page(70), Access::Write, 0), None);
                    assert_eq!(rig.count(Event::DescriptorWrites), before.0);
                    assert_eq!(rig.count(Event::BusyRetries), before.1 + 1);
                    assert_eq!(rig.dirty(3, &vm, 0), BTreeSet::new());
                }
            })
        };
        assert_eq!(rig.collapse(0, &vm, 0, 0, 512).tables, 1);
        drop(interruptions);
        assert!(faults.get() > 0);
        rig.write(2, page(70));
        assert_eq!(rig.dirty(0, &vm, 0), BTreeSet::from([70]));
        rig.check(&vm);
    }
}

#[test]
fn good_split_and_collapse_by_turns_leave_nothing_behind() {
    for bbm in LEVELS {
        let mut plan = plan(Policy::Fault, bbm);
        plan.splitting.chunk_bytes = BLOCK_BYTES;
        let rig = Rig::new(plan);
        let vm = of_blocks(&rig, 3);
        let before = rig.leaves(&vm);
        let frames = rig.frames.load(core::sync::atomic::Ordering::Relaxed);
        for turn in 0..10 {
            rig.split(turn % 4, &vm, 0, 0, 1536);
            rig.write(1, page(700));
            rig.collapse((turn + 1) % 4, &vm, 0, 0, 1536);
            assert_eq!(rig.leaves(&vm), before);
        }
        let left = rig.frames.load(core::sync::atomic::Ordering::Relaxed);
        assert_eq!(left, frames);
        rig.check(&vm);
        rig.destroy(0, vm);
    }
}
