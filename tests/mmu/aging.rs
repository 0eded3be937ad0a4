//! Aging, with every engine: what a pass calls young was accessed since the last, and nothing is lost by it.

use std::collections::BTreeSet;
use std::rc::Rc;

use vellum::mmu::{
    Aged, Error, Found, Level, Pace, Precision, Scan, Sighting, SlotId, Step, Tracking,
};
use vellum::sync::quiescence::CpuId;

use crate::epochs::{ENGINES, page, set};
use crate::flat::Vm;
use crate::rig::{MODES, Plan, RAM, Rig};

/// Two blocks.
const PAGES: u64 = 1024;

/// Runs `test` for each engine and locking mode, with memory mapped by leaves of both sizes.
fn by_each_engine(test: impl Fn(&Rig, &Rc<Vm>, u64)) {
    for (engine, tracking) in ENGINES {
        for locking in MODES {
            for (leaf, pages) in [(Level::L3, 1), (Level::L2, 512)] {
                let rig = Rig::new(Plan {
                    locking,
                    engine,
                    tracking,
                    ..Plan::default()
                });
                let vm = rig.running_vm(2, leaf);
                test(&rig, &vm, pages);
                rig.content();
                rig.destroy(0, vm);
            }
        }
    }
}

fn slot(vm: &Vm) -> SlotId {
    vm.slots.borrow()[0].id
}

/// The first pages of the leaves that a pass finds young.
fn age(rig: &Rig, vm: &Vm, precision: Precision) -> BTreeSet<u64> {
    let mut young = BTreeSet::new();
    let mut next = 0;
    let aged = rig.machine.on(0, || {
        vm.stage2.age(
            CpuId(0),
            slot(vm),
            0,
            PAGES,
            precision,
            |sighting: Sighting| {
                assert_eq!(sighting.page, next, "in order, each once");
                next += sighting.pages;
                if sighting.found == Found::Young {
                    young.insert(sighting.page);
                }
            },
        )
    });
    assert_eq!(aged.map(|aged| aged.young), Ok(young.len() as u64));
    assert_eq!(next, PAGES, "all of it");
    young
}

#[test]
fn good_a_pass_says_what_was_accessed_since_the_last() {
    by_each_engine(|rig, vm, leaf| {
        let leaves = |pages: &[u64]| set(pages.iter().map(|page| page / leaf * leaf));
        for number in 0..PAGES {
            rig.write(1, page(number));
        }
        age(rig, vm, Precision::Precise);
        assert_eq!(age(rig, vm, Precision::Precise), set([]));
        rig.write(1, page(3));
        rig.read(2, page(600));
        rig.read(3, page(3));
        assert_eq!(age(rig, vm, Precision::Precise), leaves(&[3, 600]));
        assert_eq!(age(rig, vm, Precision::Precise), set([]));
    });
}

#[test]
fn good_asking_takes_nothing() {
    by_each_engine(|rig, vm, _| {
        rig.write(1, page(0));
        for _ in 0..2 {
            let asked = rig.machine.on(0, || {
                vm.stage2.test_young(CpuId(0), slot(vm), 0, PAGES, |_| {})
            });
            assert_eq!(asked.map(|aged| aged.young), Ok(1));
        }
    });
}

#[test]
fn good_an_epoch_does_not_hide_who_accessed_memory_in_the_one_before() {
    by_each_engine(|rig, vm, _| {
        for number in 0..PAGES {
            rig.write(1, page(number));
        }
        rig.enable(0, vm, 0, false);
        rig.next_epoch(0, vm, 0);
        rig.prepare(0, vm).expect("frames");
        age(rig, vm, Precision::Precise);
        rig.write(1, page(5));
        rig.next_epoch(0, vm, 0);
        let young = age(rig, vm, Precision::Precise);
        assert!(young.contains(&5) || young.contains(&0), "{young:?}");
        rig.write(2, page(7));
        rig.next_epoch(0, vm, 0);
        rig.prepare(0, vm).expect("frames");
        let young = age(rig, vm, Precision::Precise);
        assert!(young.contains(&7) || young.contains(&0), "{young:?}");
        assert!(young.iter().all(|page| *page < 512), "{young:?}");
    });
}

#[test]
fn good_aging_loses_no_write() {
    by_each_engine(|rig, vm, _| {
        rig.enable(0, vm, 0, false);
        for round in 0..6 {
            rig.write(1, page(round));
            age(rig, vm, Precision::Imprecise);
            rig.write(2, page(round + 100));
            rig.check(vm);
            let expected = set([round, round + 100]);
            let reported = rig.next_epoch(0, vm, 0);
            assert!(reported.is_superset(&expected), "{reported:?}");
            age(rig, vm, Precision::Precise);
            rig.write(3, page(round));
            rig.check(vm);
            rig.next_epoch(0, vm, 0);
        }
    });
}

#[test]
fn good_a_mark_goes_with_its_flag() {
    let rig = Rig::new(Plan {
        tracking: Tracking::Dbm,
        ..Plan::default()
    });
    let vm = rig.running_vm(2, Level::L3);
    rig.write(1, page(9));
    rig.enable(0, &vm, 0, false);
    rig.write(1, page(9));
    age(&rig, &vm, Precision::Imprecise);
    assert_eq!(rig.dirty(0, &vm, 0), set([9]));
    assert_eq!(rig.next_epoch(0, &vm, 0), set([9]));
    rig.write(1, page(9));
    assert_eq!(
        rig.next_epoch(0, &vm, 0),
        set([9]),
        "its entry is gone, too"
    );
}

#[test]
fn good_what_is_no_range_is_refused() {
    let rig = Rig::new(Plan::default());
    let vm = rig.running_vm(2, Level::L2);
    let id = slot(&vm);
    for (from, to) in [(0, 0), (1, 64), (0, 65), (0, PAGES + 64), (128, 64)] {
        let aged = rig.machine.on(0, || {
            let stage2 = &vm.stage2;
            stage2.age(CpuId(0), id, from, to, Precision::Precise, |_| {})
        });
        assert!(matches!(aged, Err(Error::BadRange(..))), "{from} {to}");
    }
}

#[test]
fn good_a_scan_ends_with_its_slot_and_refuses_what_is_out_of_bounds() {
    let rig = Rig::new(Plan::default());
    let vm = rig.running_vm(2, Level::L2);
    let id = slot(&vm);
    let pace = Pace {
        period_ticks: 1,
        budget_percent: 100,
    };
    for (bad, error) in [
        (
            Pace {
                period_ticks: 0,
                ..pace
            },
            Error::BadPeriod(0),
        ),
        (
            Pace {
                period_ticks: u64::MAX,
                ..pace
            },
            Error::BadPeriod(u64::MAX),
        ),
        (
            Pace {
                budget_percent: 0,
                ..pace
            },
            Error::BadBudget(0),
        ),
        (
            Pace {
                budget_percent: 101,
                ..pace
            },
            Error::BadBudget(101),
        ),
    ] {
        let made = Scan::new(&vm.stage2, id, bad, Precision::Precise);
        assert_eq!(made.err(), Some(error));
    }
    rig.write(1, page(0));
    let slow = Pace {
        period_ticks: 1 << 30,
        ..pace
    };
    let mut scan = Scan::new(&vm.stage2, id, slow, Precision::Precise).expect("a slot");
    let ended = Step::PassEnded(Aged {
        leaves: 1,
        young: 1,
    });
    let step = rig.machine.on(0, || scan.step(&vm.stage2, CpuId(0)));
    assert_eq!(step, Ok(ended));
    assert_eq!(scan.map().working_set_bytes(1), 512 * 4096);
    let removed = rig.machine.on(0, || vm.stage2.remove_slot(CpuId(0), id));
    assert_eq!(removed, Ok(()));
    // At once, though the period says to come back later.
    let step = rig.machine.on(0, || scan.step(&vm.stage2, CpuId(0)));
    assert_eq!(step, Err(Error::NoSlot));
    // Nor does a scan go on with another slot of the same name and size.
    let mut scan = {
        vm.add_ram(RAM, 2, Level::L2, true);
        assert_eq!(newest(&vm), id);
        Scan::new(&vm.stage2, id, slow, Precision::Precise).expect("a slot")
    };
    let removed = rig.machine.on(0, || vm.stage2.remove_slot(CpuId(0), id));
    assert_eq!(removed, Ok(()));
    vm.add_ram(RAM, 2, Level::L2, true);
    assert_eq!(newest(&vm), id);
    let step = rig.machine.on(0, || scan.step(&vm.stage2, CpuId(0)));
    assert_eq!(step, Err(Error::NoSlot));
}

fn newest(vm: &Vm) -> SlotId {
    vm.slots.borrow().last().expect("a slot").id
}
