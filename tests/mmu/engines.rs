//! What one engine has that others have not: what its call costs, a root to prepare, frames that may be short, VMIDs that
//! roll over, callers that run the VM themselves.

use std::sync::atomic::Ordering;

use vellum::addr::Ipa;
use vellum::arch::fake::{self, Event, Random};
use vellum::mmu::{Access, Closed, Engine, Error, Level};
use vellum::sync::quiescence::CpuId;

use crate::epochs::{ENGINES, page, rig_of, set};
use crate::rig::{BLOCK_BYTES, Ended, Plan, RAM, Rig};

/// What one call does to tables and TLBs, on a VM with pages written in both blocks.
fn cost_of_a_call(engine: Engine) -> (Closed, Vec<Event>) {
    let rig = rig_of(engine);
    let vm = rig.running_vm(2, Level::L2);
    rig.enable(0, &vm, 0, false);
    for number in [0, 1, 600] {
        rig.write(1, page(number));
    }
    rig.next_epoch(0, &vm, 0);
    rig.write(1, page(0));
    rig.prepare(0, &vm).expect("frames");
    rig.machine.take_log();
    let closed = rig.close(0, &vm).expect("a logged slot");
    let log = rig.machine.take_log();
    assert_eq!(rig.harvest(0, &vm, 0), set([0]));
    rig.check(&vm);
    rig.destroy(0, vm);
    (closed, log)
}

#[test]
fn good_calls_write_no_more_than_they_say() {
    let cases = [
        (Engine::Lazy, 1, 0),
        (Engine::Swap, 0, 3),
        (Engine::Pie, 0, 3),
    ];
    for (engine, descriptors, kicked) in cases {
        let (closed, log) = cost_of_a_call(engine);
        assert_eq!((closed.engine, closed.late), (engine, false));
        assert_eq!(closed.kicked, kicked, "{engine:?}");
        let count = |is: fn(&Event) -> bool| log.iter().filter(|event| is(event)).count();
        let written = count(|event| matches!(event, Event::Descriptor { .. }));
        assert_eq!(written, descriptors, "{engine:?}");
        let single = count(|event| {
            matches!(
                event,
                Event::TlbiIpas2e1is(_) | Event::TlbiRipas2e1is(..) | Event::TlbiVmalle1is
            )
        });
        let whole = count(|event| matches!(event, Event::TlbiVmalls12e1is));
        let expected = if engine == Engine::Swap { 0 } else { 1 };
        assert_eq!((single, whole), (0, expected), "{engine:?}");
    }
}

#[test]
fn good_reads_fault_after_a_call_by_lazy_alone() {
    for (engine, tracking) in ENGINES {
        let rig = Rig::new(Plan {
            engine,
            tracking,
            ..Plan::default()
        });
        let vm = rig.running_vm(2, Level::L2);
        rig.read(1, page(0));
        rig.read(1, page(600));
        rig.enable(0, &vm, 0, false);
        rig.write(1, page(0));
        rig.next_epoch(0, &vm, 0);
        rig.prepare(0, &vm).expect("frames");
        rig.close(0, &vm).expect("a logged slot");
        let faults = rig.count(vellum::trace::Event::FaultsTranslation);
        for number in [0, 600, 1, 601] {
            rig.read(1, page(number));
        }
        let taken = rig.count(vellum::trace::Event::FaultsTranslation) - faults;
        // The root's entry, once for all; what lies below it holds nothing writable.
        let expected = if engine == Engine::Lazy { 1 } else { 0 };
        assert_eq!(taken, expected, "{engine:?} {tracking:?}");
        rig.destroy(0, vm);
    }
}

#[test]
fn good_a_call_that_comes_too_early_prepares_and_says_so() {
    let rig = rig_of(Engine::Swap);
    let vm = rig.running_vm(2, Level::L2);
    rig.read(1, page(3));
    rig.read(1, page(600));
    rig.enable(0, &vm, 0, false);
    rig.write(1, page(3));
    let closed = rig.close(0, &vm).expect("a logged slot");
    assert_eq!((closed.engine, closed.late), (Engine::Swap, true));
    assert_eq!(rig.harvest(0, &vm, 0), set([3]));
    let prepared = rig.prepare(0, &vm).expect("frames");
    assert_eq!((prepared.hot, prepared.cold), (1, 1), "{prepared:?}");
    let closed = rig.close(0, &vm).expect("a logged slot");
    assert_eq!((closed.engine, closed.late), (Engine::Swap, false));
    rig.harvest(0, &vm, 0);
    rig.destroy(0, vm);
}

#[test]
fn good_memory_that_is_not_contiguous_is_swapped_by_tables() {
    let rig = rig_of(Engine::Swap);
    let vm = rig.vm();
    vm.add_scattered_ram(RAM, 2, Level::L2);
    for cpu in 1..4 {
        rig.load(cpu, &vm);
    }
    for number in 0..1024 {
        rig.read(1, page(number));
    }
    rig.enable(0, &vm, 0, false);
    let prepared = rig.prepare(0, &vm).expect("frames");
    assert_eq!((prepared.hot, prepared.cold), (2, 0), "{prepared:?}");
    for number in [0, 255, 256, 1023] {
        rig.write(2, page(number));
        let closed = rig.close(0, &vm).expect("a logged slot");
        assert_eq!(closed.engine, Engine::Swap);
        assert_eq!(rig.harvest(0, &vm, 0), set([number]));
        rig.read(3, page(number ^ 1));
        rig.check(&vm);
    }
    rig.destroy(0, vm);
}

#[test]
fn good_without_frames_for_a_spare_walk_stands_in_and_nothing_is_lost() {
    for short in 0..4 {
        for ask in [false, true] {
            let rig = rig_of(Engine::Swap);
            let vm = rig.running_vm(2, Level::L2);
            rig.enable(0, &vm, 0, false);
            rig.write(1, page(5));
            rig.write(2, page(700));
            let plenty = rig.frames.swap(short, Ordering::Relaxed);
            if ask {
                assert_eq!(rig.prepare(0, &vm), Err(Error::NoMemory), "{short} frames");
            }
            let closed = rig.close(0, &vm).expect("a logged slot");
            assert_eq!((closed.engine, closed.late), (Engine::Walk, true));
            assert_eq!(rig.harvest(0, &vm, 0), set([5, 700]));
            rig.check(&vm);
            rig.write(1, page(5));
            assert_eq!(rig.next_epoch(0, &vm, 0), set([5]));
            rig.frames.fetch_add(plenty, Ordering::Relaxed);
            rig.write(3, page(6));
            let closed = rig.close(0, &vm).expect("a logged slot");
            assert_eq!(closed.engine, Engine::Swap);
            assert_eq!(rig.harvest(0, &vm, 0), set([6]));
            rig.check(&vm);
            rig.destroy(0, vm);
        }
    }
}

/// What is mapped after the spare was prepared needs frames in the call.
#[test]
fn good_without_frames_for_what_was_mapped_since_walk_stands_in() {
    let rig = rig_of(Engine::Swap);
    let vm = rig.running_vm(2, Level::L3);
    vm.add_ram(RAM + 0x8000_0000, 1, Level::L3, true);
    rig.enable(0, &vm, 0, false);
    rig.write(1, page(5));
    rig.prepare(0, &vm).expect("frames");
    rig.write(1, page(700));
    rig.write(1, Ipa::new(RAM + 0x8000_0000));
    let plenty = rig.frames.swap(0, Ordering::Relaxed);
    let closed = rig.close(0, &vm).expect("a logged slot");
    assert_eq!(closed.engine, Engine::Walk);
    assert_eq!(rig.harvest(0, &vm, 0), set([5, 700]));
    rig.check(&vm);
    rig.frames.fetch_add(plenty, Ordering::Relaxed);
    rig.write(2, page(700));
    rig.write(2, Ipa::new(RAM + 0x8000_3000));
    let closed = rig.close(0, &vm).expect("a logged slot");
    assert_eq!(closed.engine, Engine::Swap);
    assert_eq!(rig.harvest(0, &vm, 0), set([700]));
    assert_eq!(rig.read(1, Ipa::new(RAM + 0x8000_3000)), Ended::Done);
    rig.check(&vm);
    rig.destroy(0, vm);
}

#[test]
fn good_hundreds_of_swaps_roll_8_bit_vmids_over() {
    let rig = rig_of(Engine::Swap);
    let vms = [(); 3].map(|()| {
        let vm = rig.vm();
        vm.add_ram(RAM, 1, Level::L2, true);
        rig.enable(0, &vm, 0, false);
        vm
    });
    let mut random = Random::new(4);
    for swap in 0..330 {
        let vm = &vms[swap % 3];
        if random.once_in(8) {
            rig.unload(1 + random.below(3));
        }
        let cpu = 1 + random.below(3);
        rig.load(cpu, vm);
        let number = random.below(512) as u64;
        rig.write(cpu, page(number));
        if random.once_in(2) {
            rig.prepare(0, vm).expect("frames");
        }
        let closed = rig.close(0, vm).expect("a logged slot");
        assert_eq!(closed.engine, Engine::Swap);
        assert_eq!(rig.harvest(0, vm, 0), set([number]), "swap {swap}");
        rig.check(vm);
    }
    for vm in vms {
        rig.destroy(0, vm);
    }
}

/// With seven numbers and as many VMs each swap rolls over or is about to.
#[test]
fn good_swaps_among_few_vmids_keep_running_vms_apart() {
    let rig = Rig::new(Plan {
        engine: Engine::Swap,
        vmid_bits: 3,
        ..Plan::default()
    });
    let vms = [(); 6].map(|()| {
        let vm = rig.vm();
        vm.add_ram(RAM, 1, Level::L2, true);
        rig.enable(0, &vm, 0, false);
        vm
    });
    let mut random = Random::new(7);
    for _ in 0..400 {
        let vm = &vms[random.below(6)];
        rig.load(1 + random.below(3), vm);
        let cpu = 1 + random.below(3);
        if let Some(vm) = rig.vm_on(cpu) {
            rig.write(cpu, page(random.below(512) as u64));
            if random.once_in(2) {
                rig.next_epoch(0, &vm, 0);
            }
        }
        vms.iter().for_each(|vm| rig.check(vm));
    }
    for vm in vms {
        rig.destroy(0, vm);
    }
}

/// A kick goes through an interrupt, which EL2 does not take while it works: a CPU that calls and runs the VM itself has
/// to see to itself.
#[test]
fn good_a_caller_that_runs_the_vm_waits_for_no_kick_of_its_own() {
    for engine in Engine::ALL {
        let rig = rig_of(engine);
        let vm = rig.running_vm(1, Level::L2);
        rig.enable(0, &vm, 0, false);
        rig.write(1, page(3));
        rig.cpus.leave(1);
        rig.cpus.deaf.set(Some(1));
        assert!(rig.close(1, &vm).is_ok());
        rig.cpus.deaf.set(None);
        assert_eq!(rig.harvest(1, &vm, 0), set([3]));
        rig.write(1, page(4));
        rig.check(&vm);
        rig.destroy(0, vm);
    }
}

/// As above, and what it does under the retired VMID leaves it the one it runs under.
#[test]
fn good_a_cpu_that_runs_the_vm_keeps_its_vmid_while_it_prepares() {
    let rig = Rig::new(Plan {
        engine: Engine::Swap,
        vmid_bits: 3,
        ..Plan::default()
    });
    let vm = rig.vm();
    vm.add_ram(RAM, 1, Level::L2, true);
    rig.load(1, &vm);
    rig.enable(0, &vm, 0, false);
    rig.write(1, page(3));
    rig.next_epoch(0, &vm, 0);
    rig.prepare(1, &vm).expect("frames");
    let others = [(); 12].map(|()| {
        let other = rig.vm();
        other.add_ram(RAM, 1, Level::L2, true);
        rig.load(2, &other);
        rig.write(2, page(3));
        rig.write(1, page(4));
        rig.check(&vm);
        other
    });
    for vm in others {
        rig.destroy(0, vm);
    }
    rig.destroy(0, vm);
}

/// Memory that is zeroed when it is first mapped is so once, whichever root is live.
#[test]
fn good_no_page_is_zeroed_twice_by_roots_that_take_turns() {
    for (engine, tracking) in ENGINES {
        let rig = Rig::new(Plan {
            engine,
            tracking,
            ..Plan::default()
        });
        let vm = rig.vm();
        vm.add_zeroed_ram(RAM, 1, Level::L3);
        rig.load(1, &vm);
        rig.enable(0, &vm, 0, false);
        for number in 0..12 {
            let data = [7; 4];
            let ipa = page(number * 40);
            let written = rig
                .machine
                .on(0, || vm.stage2.copy_to_guest(CpuId(0), ipa, &data));
            assert_eq!(written, Ok(()));
            vm.written_by_us(ipa);
            if number % 3 == 0 {
                rig.prepare(0, &vm).expect("frames");
            }
            if number % 2 == 0 {
                rig.next_epoch(0, &vm, 0);
            }
            for before in 0..=number {
                let ipa = page(before * 40);
                rig.read(1, ipa);
                let mut found = [0; 4];
                rig.machine
                    .on(0, || vm.stage2.copy_from_guest(CpuId(0), ipa, &mut found))
                    .expect("memory");
                assert_eq!(found, data, "page {before}, {engine:?}");
            }
        }
        rig.check(&vm);
        rig.destroy(0, vm);
    }
}

#[test]
fn good_unmapped_memory_is_reached_by_neither_root() {
    for prepared in [false, true] {
        let rig = rig_of(Engine::Swap);
        let vm = rig.running_vm(2, Level::L2);
        rig.enable(0, &vm, 0, false);
        rig.write(1, page(3));
        rig.write(1, page(600));
        rig.next_epoch(0, &vm, 0);
        if prepared {
            rig.prepare(0, &vm).expect("frames");
        }
        let (ipa, pa) = (page(0), vm.slots.borrow()[0].pa);
        let done = rig
            .machine
            .on(0, || vm.stage2.unmap(CpuId(0), ipa, BLOCK_BYTES));
        assert_eq!(done, Ok(()));
        rig.machine.assert_unreachable(pa, BLOCK_BYTES);
        rig.next_epoch(0, &vm, 0);
        rig.machine.assert_unreachable(pa, BLOCK_BYTES);
        let outcomes = rig.machine.outcomes(1, ipa, fake::Access::Read);
        let kinds = outcomes.iter().map(|outcome| match outcome {
            fake::Outcome::Abort(abort) => abort.kind,
            fake::Outcome::Hit(pa) => panic!("{pa}"),
        });
        assert!(
            kinds
                .into_iter()
                .all(|kind| kind == fake::FaultKind::Translation)
        );
        rig.access(1, ipa, Access::Read);
        rig.content();
        rig.destroy(0, vm);
    }
}

/// A page that is touched for the first time in the middle of the call, and written, is not zeroed again when it is next
/// touched under the other root.
#[test]
fn good_a_page_first_touched_in_the_middle_of_a_swap_keeps_what_was_written() {
    const MARK: u64 = 7;
    let plan = Plan {
        engine: Engine::Swap,
        ..Plan::default()
    };
    for prepared in [false, true] {
        crate::events::at_each(
            plan,
            |event| *event != Event::Yield && crate::events::is_notable(event),
            move |rig| {
                let vm = rig.vm();
                vm.add_zeroed_ram(RAM, 1, Level::L3);
                rig.load(1, &vm);
                rig.enable(0, &vm, 0, false);
                rig.write(1, page(3));
                if prepared {
                    rig.prepare(0, &vm).expect("frames");
                }
                vm
            },
            |rig, vm| {
                let inside = rig.machine.current() == 1;
                if !inside && rig.attempt(1, page(9), Access::Write, 3).is_some() {
                    vm.word(page(9)).store(MARK, Ordering::Relaxed);
                }
            },
            |rig, vm| {
                rig.next_epoch(0, vm, 0);
                let written = vm.word(page(9)).load(Ordering::Relaxed) == MARK;
                rig.read(1, page(9));
                rig.next_epoch(0, vm, 0);
                rig.read(1, page(9));
                let left = vm.word(page(9)).load(Ordering::Relaxed);
                let was_lost = vm.slots.borrow()[0].writes.borrow()[9] != 0 && left != MARK;
                assert!(!was_lost && (!written || left == MARK), "zeroed again");
            },
        );
    }
}
