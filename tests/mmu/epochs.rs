//! Epochs, with every engine: what is harvested is what was written, and what makes no sense is refused.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;

use vellum::addr::Ipa;
use vellum::arch::fake::Event;
use vellum::mmu::{
    Access, AccessFlag, Config, Engine, Epoch, Error, Hardware, Level, Locking, PageSet, Shape,
    Splitting, Stage2, Tracking,
};
use vellum::sync::quiescence::CpuId;

use crate::flat::{Vm, usize_of};
use crate::rig::{BLOCK_BYTES, MODES, Plan, RAM, Rig};

pub(crate) const ENGINES: [(Engine, Tracking); 5] = [
    (Engine::Walk, Tracking::Fault),
    (Engine::Walk, Tracking::Dbm),
    (Engine::Lazy, Tracking::Fault),
    (Engine::Swap, Tracking::Fault),
    (Engine::Pie, Tracking::Fault),
];

pub(crate) fn page(number: u64) -> Ipa {
    Ipa::new(RAM + number * 4096)
}

pub(crate) fn set(pages: impl IntoIterator<Item = u64>) -> BTreeSet<u64> {
    pages.into_iter().collect()
}

pub(crate) fn rig_of(engine: Engine) -> Rig {
    Rig::new(Plan {
        engine,
        ..Plan::default()
    })
}

/// Runs `test` for each engine and locking mode, with a VM of two blocks that runs on all CPUs but 0 and is logged.
fn by_each_engine(test: impl Fn(&Rig, &Rc<Vm>)) {
    for (engine, tracking) in ENGINES {
        for locking in MODES {
            let rig = Rig::new(Plan {
                locking,
                engine,
                tracking,
                ..Plan::default()
            });
            let vm = rig.running_vm(2, Level::L2);
            rig.enable(0, &vm, 0, false);
            test(&rig, &vm);
            rig.check(&vm);
            rig.destroy(0, vm);
        }
    }
}

fn harvest(rig: &Rig, vm: &Vm, epoch: Epoch) -> Result<BTreeSet<u64>, Error> {
    let id = vm.slots.borrow()[0].id;
    let mut set = PageSet::default();
    rig.machine
        .on(0, || vm.stage2.harvest(CpuId(0), id, epoch, &mut set))?;
    Ok(set.pages().collect())
}

#[test]
fn good_an_epoch_reports_what_was_written_in_it() {
    by_each_engine(|rig, vm| {
        for number in [0, 63, 64, 511, 512, 1023] {
            rig.write(1, page(number));
        }
        rig.read(2, page(7));
        let first = rig.next_epoch(0, vm, 0);
        assert_eq!(first, set([0, 63, 64, 511, 512, 1023]));
        rig.check(vm);
        rig.write(3, page(64));
        rig.write(1, page(65));
        assert_eq!(rig.next_epoch(0, vm, 0), set([64, 65]));
        assert_eq!(rig.next_epoch(0, vm, 0), set([]));
    });
}

/// Page `n` is written in every epoch that is a multiple of `n + 1`: each index of a ring comes round to pages that were
/// written when it was armed last, to ones written since, and to ones long ago.
#[test]
fn good_epochs_go_round_the_ring_many_times() {
    by_each_engine(|rig, vm| {
        for epoch in 1..=40 {
            let expected: BTreeSet<_> = (0..9).filter(|n| epoch % (n + 1) == 0).collect();
            for number in &expected {
                let cpu = 1 + usize_of(epoch) % 3;
                rig.write(cpu, page(*number));
            }
            if epoch % 5 == 0 {
                rig.cpus.rest(1);
            }
            assert_eq!(rig.next_epoch(0, vm, 0), expected, "epoch {epoch}");
            if epoch % 4 == 0 {
                rig.prepare(0, vm).expect("frames");
            }
            rig.check(vm);
        }
    });
}

#[test]
fn good_pages_written_before_the_harvest_are_in_the_next_epoch() {
    by_each_engine(|rig, vm| {
        rig.write(1, page(3));
        rig.close(0, vm).expect("a logged slot");
        rig.write(1, page(3));
        rig.write(2, page(4));
        rig.check(vm);
        assert_eq!(rig.dirty(0, vm, 0), set([3, 4]));
        assert_eq!(rig.harvest(0, vm, 0), set([3]));
        rig.check(vm);
        assert_eq!(rig.next_epoch(0, vm, 0), set([3, 4]));
    });
}

#[test]
fn good_everything_set_is_reported_by_the_first_epoch_alone() {
    for (engine, tracking) in ENGINES {
        let rig = Rig::new(Plan {
            engine,
            tracking,
            ..Plan::default()
        });
        let vm = rig.running_vm(2, Level::L2);
        rig.write(1, page(9));
        rig.write(1, page(600));
        rig.enable(0, &vm, 0, true);
        rig.write(2, page(9));
        assert_eq!(rig.next_epoch(0, &vm, 0).len(), 1024);
        rig.check(&vm);
        rig.write(2, page(600));
        assert_eq!(rig.next_epoch(0, &vm, 0), set([600]));
        rig.check(&vm);
        rig.destroy(0, vm);
    }
}

#[test]
fn good_all_logged_slots_change_epoch_together() {
    by_each_engine(|rig, vm| {
        let other = RAM + 0x1000_0000;
        vm.add_ram(other, 1, Level::L2, true);
        rig.enable(0, vm, 1, false);
        rig.write(1, page(2));
        rig.write(1, Ipa::new(other + 0x5000));
        rig.close(0, vm).expect("logged slots");
        assert_eq!(rig.harvest(0, vm, 1), set([5]));
        let first = vm.slots.borrow()[0].id;
        assert_eq!(rig.close(0, vm), Err(Error::NotHarvested(first)));
        assert_eq!(rig.harvest(0, vm, 0), set([2]));
        rig.write(2, Ipa::new(other + 0x5000));
        rig.disable(0, vm, 0);
        assert_eq!(rig.next_epoch(0, vm, 1), set([5]));
    });
}

#[test]
fn good_what_was_closed_and_not_harvested_is_forgotten_with_the_log() {
    by_each_engine(|rig, vm| {
        rig.write(1, page(1));
        let closed = rig.close(0, vm).expect("a logged slot");
        rig.disable(0, vm, 0);
        assert_eq!(harvest(rig, vm, closed.epoch), Err(Error::NotLogging));
        rig.write(1, page(2));
        rig.enable(0, vm, 0, false);
        assert_eq!(
            harvest(rig, vm, closed.epoch),
            Err(Error::NoSuchEpoch(closed.epoch)),
            "the slot was not logged then"
        );
        rig.write(1, page(3));
        rig.check(vm);
        assert_eq!(rig.next_epoch(0, vm, 0), set([3]));
    });
}

#[test]
fn bad_epochs_are_refused() {
    by_each_engine(|rig, vm| {
        let first = Epoch::new(1);
        for never in [0, 1, 2, u64::MAX] {
            let never = Epoch::new(never);
            assert_eq!(harvest(rig, vm, never), Err(Error::NoSuchEpoch(never)));
        }
        rig.write(1, page(8));
        assert_eq!(rig.close(0, vm).expect("a logged slot").epoch, first);
        let id = vm.slots.borrow()[0].id;
        assert_eq!(rig.close(0, vm), Err(Error::NotHarvested(id)));
        let open = Epoch::new(2);
        assert_eq!(harvest(rig, vm, open), Err(Error::NoSuchEpoch(open)));
        assert_eq!(rig.harvest(0, vm, 0), set([8]));
        assert_eq!(harvest(rig, vm, first), Err(Error::AlreadyHarvested(first)));
        rig.next_epoch(0, vm, 0);
        assert_eq!(harvest(rig, vm, first), Err(Error::AlreadyHarvested(first)));
        rig.disable(0, vm, 0);
        assert_eq!(rig.close(0, vm), Err(Error::NotLogging));
    });
}

#[test]
fn bad_engines_are_refused_when_the_vm_is_made() {
    let none = Hardware::default();
    let all = Hardware {
        indirection: true,
        access_flag: true,
        dirty_state: true,
    };
    let marks = Hardware {
        access_flag: true,
        ..none
    };
    let cases = [
        (
            Engine::Pie,
            Tracking::Fault,
            none,
            Some(Error::NoIndirection),
        ),
        (
            Engine::Walk,
            Tracking::Dbm,
            marks,
            Some(Error::NoDirtyState),
        ),
        (Engine::Lazy, Tracking::Dbm, all, Some(Error::NotTogether)),
        (Engine::Swap, Tracking::Dbm, all, Some(Error::NotTogether)),
        (Engine::Pie, Tracking::Dbm, all, Some(Error::NotTogether)),
        (Engine::Pie, Tracking::Fault, all, None),
        (Engine::Walk, Tracking::Dbm, all, None),
        (Engine::Swap, Tracking::Fault, none, None),
        (Engine::Lazy, Tracking::Fault, none, None),
    ];
    for (engine, tracking, hardware, expected) in cases {
        let rig = rig_of(Engine::Walk);
        let mut services = Arc::into_inner(rig.services).expect("no VM");
        services.hardware = hardware;
        let config = Config {
            locking: Locking::Lockless,
            shape: Shape::new(40).expect("a shape"),
            splitting: Splitting::default(),
            engine,
            tracking,
            access_flag: match tracking {
                Tracking::Fault => AccessFlag::Software,
                Tracking::Dbm => AccessFlag::Hardware,
            },
        };
        let made = Stage2::new(config, Arc::new(services));
        assert_eq!(
            made.as_ref().err(),
            expected.as_ref(),
            "{engine:?} {tracking:?}"
        );
        if let Ok(stage2) = made {
            stage2.destroy(CpuId(0));
        }
    }
    assert_eq!(Engine::from_name("epochs"), None);
    assert_eq!(Tracking::from_name("pml"), None);
}

#[test]
fn good_a_cpu_that_slept_through_epochs_records_what_it_writes() {
    by_each_engine(|rig, vm| {
        for slept in 1..=4 {
            rig.write(1, page(9));
            rig.cpus.rest(1);
            for _ in 0..slept {
                rig.next_epoch(0, vm, 0);
            }
            rig.write(1, page(9));
            rig.check(vm);
            assert_eq!(rig.next_epoch(0, vm, 0), set([9]), "slept {slept} epochs");
        }
    });
}

#[test]
fn good_a_cpu_that_ran_another_vm_meanwhile_records_what_it_writes() {
    by_each_engine(|rig, vm| {
        let other = rig.vm();
        other.add_ram(RAM, 1, Level::L2, true);
        rig.enable(0, &other, 0, false);
        for away in 1..=4 {
            rig.write(1, page(9));
            rig.load(1, &other);
            rig.write(1, page(9));
            for _ in 0..away {
                rig.next_epoch(0, vm, 0);
            }
            assert_eq!(rig.next_epoch(0, &other, 0), set([9]));
            rig.write(1, page(9));
            rig.load(1, vm);
            rig.write(1, page(9));
            rig.check(vm);
            rig.check(&other);
            assert_eq!(rig.next_epoch(0, vm, 0), set([9]), "away {away} epochs");
            rig.next_epoch(0, &other, 0);
        }
        rig.destroy(0, other);
    });
}

#[test]
fn good_a_walker_that_runs_ahead_while_its_cpu_enters_leaves_nothing_behind() {
    let rig = rig_of(Engine::Pie);
    let vm = rig.running_vm(2, Level::L2);
    rig.enable(0, &vm, 0, false);
    rig.write(1, page(9));
    rig.unload(1);
    rig.close(0, &vm).expect("a logged slot");
    // The root is loaded, S2PIR_EL2 is still the old one.
    let vttbr = rig.machine.on(1, || vm.stage2.load(CpuId(1)));
    rig.machine.load_vttbr(1, vttbr);
    rig.machine.enter_guest(1);
    rig.cpus.set(1, Some(Rc::clone(&vm)));
    rig.cpus.enter(1);
    rig.harvest(0, &vm, 0);
    rig.write(1, page(9));
    rig.check(&vm);
}

#[test]
fn good_a_slot_is_removed_with_whatever_epochs_left_of_it() {
    by_each_engine(|rig, vm| {
        vm.add_ram(RAM + 0x4000_0000, 1, Level::L2, true);
        rig.enable(0, vm, 1, false);
        rig.write(1, Ipa::new(RAM + 0x4000_0000));
        rig.next_epoch(0, vm, 0);
        rig.write(1, Ipa::new(RAM + 0x4000_1000));
        rig.close(0, vm).expect("logged slots");
        let id = vm.slots.borrow()[1].id;
        let removed = rig.machine.on(0, || vm.stage2.remove_slot(CpuId(0), id));
        assert_eq!(removed, Ok(()));
        let slot = vm.forget_slot(1);
        rig.machine.assert_unreachable(slot.pa, BLOCK_BYTES);
        rig.content();
        rig.harvest(0, vm, 0);
        rig.next_epoch(0, vm, 0);
        rig.machine.assert_unreachable(slot.pa, BLOCK_BYTES);
    });
}

/// The call is taken apart by a guest that writes after each of its instructions, on CPUs that obey their kicks late.
#[test]
fn good_writes_in_the_middle_of_the_call_and_of_the_harvest_are_recorded() {
    for (engine, tracking) in ENGINES {
        for locking in crate::events::NESTING {
            let plan = Plan {
                locking,
                engine,
                tracking,
                ..Plan::default()
            };
            crate::events::at_each(
                plan,
                |event| *event != Event::Yield && crate::events::is_notable(event),
                |rig| {
                    let vm = rig.running_vm(1, Level::L2);
                    rig.enable(0, &vm, 0, false);
                    rig.write(1, page(3));
                    rig.write(2, page(4));
                    vm
                },
                |rig, _| {
                    let acts = [
                        (1, 3, Access::Write),
                        (2, 5, Access::Write),
                        (3, 4, Access::Read),
                    ];
                    for (cpu, number, access) in acts {
                        // One that was kicked is in the middle of its own work.
                        if rig.machine.current() != cpu {
                            rig.provoke(cpu, page(number), access);
                        }
                    }
                },
                |rig, vm| {
                    rig.next_epoch(0, vm, 0);
                    rig.check(vm);
                    rig.next_epoch(0, vm, 0);
                },
            );
        }
    }
}
