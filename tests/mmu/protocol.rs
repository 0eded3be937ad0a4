//! The shipped MMU against the oracle: what each entry point promises, with interruptions at every instruction that
//! another CPU can notice.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;

use vellum::addr::{Ipa, PAGE_BYTES};
use vellum::arch::fake::{self, Event, Outcome};
use vellum::mmu::{Access, Level, Locking};
use vellum::sync::quiescence::CpuId;

use crate::events::{self, NESTING};
use crate::flat::{Vm, usize_of};
use crate::rig::{BLOCK_BYTES, Ended, MODES, Plan, RAM, Rig};

fn page(number: u64) -> Ipa {
    Ipa::new(RAM + number * 4096)
}

fn in_each_mode(test: impl Fn(&Rig)) {
    for locking in MODES {
        test(&Rig::new(Plan {
            locking,
            ..Plan::default()
        }));
    }
}

fn set(pages: impl IntoIterator<Item = u64>) -> BTreeSet<u64> {
    pages.into_iter().collect()
}

#[test]
fn good_split_keeps_every_translation() {
    in_each_mode(|rig| {
        let vm = rig.running_vm(2, Level::L2);
        rig.write(1, page(0));
        rig.enable(0, &vm, 0, false);
        rig.write(2, page(5));
        // What was stored becomes visible to every walker in time.
        vellum::arch::dsb_ish();
        for number in 0..512 {
            for cpu in 1..4 {
                let outcomes = rig.machine.outcomes(cpu, page(number), fake::Access::Read);
                assert!(
                    outcomes
                        .iter()
                        .all(|outcome| matches!(outcome, Outcome::Hit(_)))
                );
                assert_eq!(rig.read(cpu, page(number)), Ended::Done);
            }
        }
        assert_eq!(rig.dirty(0, &vm, 0), set([5]));
        rig.check(&vm);
        rig.destroy(0, vm);
    });
}

#[test]
fn good_write_fault_while_logging_costs_one_descriptor_and_no_broadcast() {
    in_each_mode(|rig| {
        let vm = rig.running_vm(1, Level::L3);
        rig.write(1, page(9));
        rig.enable(0, &vm, 0, false);
        rig.machine.take_log();
        rig.write(1, page(9));
        let log = rig.machine.take_log();
        let descriptors = log
            .iter()
            .filter(|event| matches!(event, Event::Descriptor { .. }));
        assert_eq!(descriptors.count(), 1);
        let broadcast = |event: &&Event| {
            matches!(
                event,
                Event::TlbiIpas2e1is(_) | Event::TlbiVmalle1is | Event::TlbiVmalls12e1is
            )
        };
        assert_eq!(log.iter().find(broadcast), None);
        drop(vm);
    });
}

#[test]
fn good_fault_ends_the_faults_of_its_cpu_whatever_its_tlb_held() {
    in_each_mode(|rig| {
        let vm = rig.running_vm(1, Level::L3);
        rig.write(1, page(9));
        rig.enable(0, &vm, 0, false);
        rig.read(1, page(9));
        rig.write(1, page(9));
        let outcomes = rig.machine.outcomes(1, page(9), fake::Access::Write);
        assert!(
            outcomes
                .iter()
                .all(|outcome| matches!(outcome, Outcome::Hit(_))),
            "{outcomes:?}"
        );
        drop(vm);
    });
}

#[test]
fn good_spurious_fault_elsewhere_is_resolved_without_a_descriptor_write() {
    in_each_mode(|rig| {
        let vm = rig.running_vm(1, Level::L3);
        rig.write(1, page(9));
        rig.enable(0, &vm, 0, false);
        rig.write(1, page(9));
        let outcomes = rig.machine.outcomes(2, page(9), fake::Access::Write);
        let Some(Outcome::Abort(abort)) = outcomes
            .into_iter()
            .find(|outcome| matches!(outcome, Outcome::Abort(_)))
        else {
            panic!("a stale read-only entry may be left on CPU 2");
        };
        rig.machine.take_log();
        rig.take(2, &vm, abort, Access::Write);
        let log = rig.machine.take_log();
        assert!(
            !log.iter()
                .any(|event| matches!(event, Event::Descriptor { .. }))
        );
        let outcomes = rig.machine.outcomes(2, page(9), fake::Access::Write);
        assert!(
            outcomes
                .iter()
                .all(|outcome| matches!(outcome, Outcome::Hit(_)))
        );
        drop(vm);
    });
}

#[test]
fn good_clear_returns_with_no_writable_entry_cached_anywhere() {
    for range_tlbi in [false, true] {
        for count in [1, 8, 9, 200, 600] {
            let rig = Rig::new(Plan {
                range_tlbi,
                ..Plan::default()
            });
            let vm = rig.running_vm(2, Level::L3);
            rig.enable(0, &vm, 0, false);
            for number in 0..count {
                rig.write(1 + usize_of(number % 3), page(number * 1024 / count));
            }
            let reported = rig.clear(0, &vm, 0, 0, 1024);
            assert_eq!(reported.len() as u64, count);
            for number in reported {
                for cpu in 1..4 {
                    let outcomes = rig.machine.outcomes(cpu, page(number), fake::Access::Write);
                    assert!(outcomes.iter().all(|o| matches!(o, Outcome::Abort(_))));
                }
            }
            rig.check(&vm);
            rig.destroy(0, vm);
        }
    }
}

#[test]
fn good_a_read_while_logging_maps_read_only() {
    in_each_mode(|rig| {
        let vm = rig.running_vm(1, Level::L2);
        rig.enable(0, &vm, 0, false);
        rig.read(1, page(3));
        let outcomes = rig.machine.outcomes(1, page(3), fake::Access::Write);
        assert!(
            outcomes
                .iter()
                .all(|outcome| matches!(outcome, Outcome::Abort(_)))
        );
        assert_eq!(rig.dirty(0, &vm, 0), set([]));
        rig.write(1, page(3));
        assert_eq!(rig.dirty(0, &vm, 0), set([3]));
        rig.check(&vm);
    });
}

#[test]
fn good_destroyed_vm_leaves_nothing_walkable() {
    in_each_mode(|rig| {
        for _ in 0..3 {
            let vm = rig.running_vm(3, Level::L2);
            for number in [0, 600, 1100] {
                rig.write(1, page(number));
            }
            rig.enable(0, &vm, 0, false);
            rig.write(2, page(700));
            rig.destroy(0, vm);
        }
    });
}

#[test]
fn good_removed_slot_is_reached_by_nobody() {
    in_each_mode(|rig| {
        let vm = rig.running_vm(2, Level::L2);
        rig.write(1, page(0));
        rig.write(2, page(600));
        let id = vm.slots.borrow()[0].id;
        let removed = rig.machine.on(0, || vm.stage2.remove_slot(CpuId(0), id));
        assert_eq!(removed, Ok(()));
        let slot = vm.forget_slot(0);
        rig.machine.assert_unreachable(slot.pa, 2 * BLOCK_BYTES);
        assert_eq!(rig.write(1, page(0)), Ended::NoSlot);
        rig.check(&vm);
    });
}

#[test]
fn good_vm_that_ran_through_a_rollover_is_invalidated_under_the_number_it_ran_with() {
    let rig = Rig::new(Plan {
        vmid_bits: 3,
        ..Plan::default()
    });
    let vm = rig.vm();
    vm.add_ram(RAM, 1, Level::L3, true);
    rig.load(1, &vm);
    for _ in 0..8 {
        rig.load(2, &rig.vm());
    }
    rig.write(1, page(0));
    let other = rig.vm();
    rig.load(1, &other);
    rig.destroy(0, vm);
}

/// Runs `scenario` once for each event in it, with `interruption` after just that one.
fn at_each_event(
    locking: Locking,
    prepare: impl Fn(&Rig) -> Rc<Vm>,
    interruption: impl Fn(&Rig, &Vm) + Copy + 'static,
    scenario: impl Fn(&Rig, &Rc<Vm>),
) {
    let plan = Plan {
        locking,
        ..Plan::default()
    };
    events::at_each(plan, |_| true, prepare, interruption, scenario);
}

/// The marker of a slot between break and make.
const BUSY: u64 = vellum::mmu::descriptor::Descriptor::BUSY.bits();

fn logged(rig: &Rig, leaf: Level) -> Rc<Vm> {
    let vm = rig.running_vm(1, leaf);
    for number in [3, 4, 100] {
        rig.write(1, page(number));
    }
    rig.enable(0, &vm, 0, false);
    vm
}

#[test]
fn good_two_faults_on_one_page_at_every_instruction() {
    for locking in NESTING {
        for leaf in [Level::L2, Level::L3] {
            let second = |rig: &Rig, _: &Vm| {
                rig.provoke(2, page(3), Access::Write);
            };
            at_each_event(
                locking,
                |rig| logged(rig, leaf),
                second,
                |rig, _| {
                    rig.write(1, page(3));
                },
            );
        }
    }
}

#[test]
fn good_write_in_the_middle_of_clear_is_reported_by_it_or_later() {
    for locking in NESTING {
        for leaf in [Level::L2, Level::L3] {
            let prepare = |rig: &Rig| {
                let vm = logged(rig, leaf);
                rig.write(1, page(3));
                rig.write(1, page(100));
                vm
            };
            let write = |rig: &Rig, _: &Vm| {
                rig.provoke(2, page(3), Access::Write);
                rig.provoke(3, page(4), Access::Write);
                rig.provoke(2, page(100), Access::Write);
            };
            at_each_event(locking, prepare, write, |rig, vm| {
                rig.clear(0, vm, 0, 0, 512);
            });
        }
    }
}

#[test]
fn good_write_in_the_middle_of_enable_is_recorded_from_its_return_on() {
    for locking in NESTING {
        for leaf in [Level::L2, Level::L3] {
            let prepare = |rig: &Rig| {
                let vm = rig.running_vm(1, leaf);
                rig.write(1, page(3));
                vm
            };
            let write = |rig: &Rig, _: &Vm| {
                rig.provoke(2, page(3), Access::Write);
                rig.provoke(3, page(77), Access::Write);
            };
            at_each_event(locking, prepare, write, |rig, vm| {
                rig.enable(0, vm, 0, false);
                let recorded = rig.dirty(0, vm, 0);
                rig.write(1, page(3));
                assert!(rig.dirty(0, vm, 0).is_superset(&recorded));
            });
        }
    }
}

#[test]
fn good_write_in_the_middle_of_an_epoch_change_is_reported_in_one_of_the_two() {
    for locking in NESTING {
        let prepare = |rig: &Rig| {
            let vm = logged(rig, Level::L3);
            rig.write(1, page(3));
            vm
        };
        let write = |rig: &Rig, _: &Vm| {
            rig.provoke(2, page(3), Access::Write);
            rig.provoke(3, page(4), Access::Write);
        };
        at_each_event(locking, prepare, write, |rig, vm| {
            rig.next_epoch(0, vm, 0);
        });
    }
}

#[test]
fn good_clear_in_the_middle_of_a_clear_joins_its_debt() {
    for locking in NESTING {
        let prepare = |rig: &Rig| {
            let vm = logged(rig, Level::L3);
            rig.write(1, page(3));
            rig.write(1, page(100));
            vm
        };
        // The bit of page 3 is set again while its leaf is already read-only and not yet invalidated.
        let clear = |rig: &Rig, vm: &Vm| {
            let data = [7; 8];
            let cpu = CpuId(3);
            rig.machine
                .on(3, || vm.stage2.copy_to_guest(cpu, page(3), &data))
                .unwrap();
            vm.written_by_us(page(3));
            rig.clear(3, vm, 0, 0, 512);
        };
        at_each_event(locking, prepare, clear, |rig, vm| {
            rig.clear(0, vm, 0, 0, 512);
        });
    }
}

#[test]
fn good_fault_in_the_middle_of_unmap_never_reaches_memory_through_a_conflict() {
    for locking in NESTING {
        for (before, logging) in [(Level::L3, false), (Level::L2, false), (Level::L2, true)] {
            let prepare = move |rig: &Rig| {
                let vm = rig.running_vm(1, before);
                rig.write(1, page(3));
                if logging {
                    rig.enable(0, &vm, 0, false);
                }
                vm
            };
            let touch = |rig: &Rig, _: &Vm| {
                rig.provoke(2, page(3), Access::Read);
            };
            at_each_event(locking, prepare, touch, |rig, vm| {
                let cpu = CpuId(0);
                rig.machine
                    .on(0, || vm.stage2.unmap(cpu, page(0), BLOCK_BYTES))
                    .unwrap();
            });
        }
    }
}

#[test]
fn good_clear_waits_for_a_slot_that_is_being_split() {
    let rig = Rc::new(Rig::new(Plan::default()));
    let vm = rig.running_vm(1, Level::L2);
    rig.write(1, page(3));
    rig.enable(0, &vm, 0, true);
    rig.clear(0, &vm, 0, 0, 64);
    let waited = Rc::new(Cell::new(None));
    {
        let (rig, vm, waited) = (Rc::clone(&rig), Rc::clone(&vm), Rc::clone(&waited));
        fake::observe(Some(Rc::new(move |event| match event {
            Event::Descriptor { new: BUSY, .. } => {
                waited.set(Some(false));
                // One thread cannot let the splitter go on, so the first poll ends the call.
                let clear = || rig.clear(0, &vm, 0, 64, 128);
                drop(catch_unwind(AssertUnwindSafe(clear)));
            }
            Event::Yield if waited.get() == Some(false) => {
                waited.set(Some(true));
                resume_unwind(Box::new(()));
            }
            _ => {}
        })));
    }
    rig.write(1, page(3));
    fake::observe(None);
    assert_eq!(waited.get(), Some(true));
}

/// A guest with its caches off reads past them: what it was given has to be in memory, all of it (rule 16 of the world switch).
#[test]
fn good_what_is_copied_to_a_guest_is_shown_to_it() {
    in_each_mode(|rig| {
        let vm = rig.running_vm(1, Level::L3);
        rig.machine.take_log();
        let at = Ipa::new(page(3).raw() + 0xff8);
        let cpu = CpuId(0);
        rig.machine
            .on(0, || vm.stage2.copy_to_guest(cpu, at, &[7; 24]))
            .unwrap();
        let shown: Vec<(u64, u64)> = rig
            .machine
            .take_log()
            .into_iter()
            .filter_map(|event| match event {
                Event::ShowToGuest(start, bytes) => Some((start.raw() % PAGE_BYTES, bytes)),
                _ => None,
            })
            .collect();
        assert_eq!(shown, [(0xff8, 8), (0, 16)]);
        vm.written_by_us(page(3));
        vm.written_by_us(page(4));
        drop(vm);
    });
}

/// A guest may jump to memory that it never wrote: no instruction cache holds what the memory's last owner executed there, and
/// that is so before anybody can map it.
#[test]
fn good_memory_is_given_without_its_last_owners_instructions() {
    in_each_mode(|rig| {
        rig.machine.take_log();
        let vm = rig.running_vm(1, Level::L3);
        let log = rig.machine.take_log();
        let first = |wanted: fn(&Event) -> bool| log.iter().position(wanted);
        let forgotten = first(|event| *event == Event::ForgetInstructions);
        let mapped = first(|event| matches!(event, Event::Descriptor { new, .. } if *new != 0));
        assert!(forgotten.is_some());
        assert!(mapped.is_none_or(|mapped| forgotten < Some(mapped)));
        drop(vm);
    });
}
