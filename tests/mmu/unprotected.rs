//! Slots whose logging began with everything set: their leaves permit stores by bits that the log did not give.

use vellum::addr::Va;
use vellum::mmu::{Access, Bbm, Engine, Fault, FaultKind, Policy, Resolution, Tracking};
use vellum::sync::quiescence::CpuId;

use crate::events::{at_each, is_notable};
use crate::flat::Vm;
use crate::rig::{Plan, Rig};
use crate::splitting::{LEVELS, of_blocks, page, plan};

/// Everything that gives a permission by other bits than the direct one.
const RIGHTS: [(Engine, Tracking); 3] = [
    (Engine::Walk, Tracking::Fault),
    (Engine::Walk, Tracking::Dbm),
    (Engine::Pie, Tracking::Fault),
];

fn everywhere(test: impl Fn(Plan)) {
    for bbm in LEVELS {
        for (engine, tracking) in RIGHTS {
            test(Plan {
                engine,
                tracking,
                ..plan(Policy::Fault, bbm)
            });
        }
    }
}

/// A write fault on `cpu` at a page whose leaf permits it by now: the entry that it faulted by was older.
fn late_write_fault(rig: &Rig, cpu: usize, number: u64) {
    let vm = rig.vm_on(cpu).expect("a guest");
    let fault = Fault {
        ipa: page(number),
        va: Va::new(page(number).raw()),
        kind: FaultKind::Permission,
        access: Access::Write,
    };
    rig.machine.on(cpu, || {
        while vm.stage2.fault(CpuId(cpu), &fault) == Resolution::TopUp {
            vm.stage2.top_up(CpuId(cpu)).expect("frames");
        }
    });
}

#[test]
fn good_split_by_a_fault_takes_no_permission_from_what_others_may_have_cached() {
    everywhere(|plan| {
        let rig = Rig::new(plan);
        let vm = of_blocks(&rig, 2);
        rig.enable(0, &vm, 0, true);
        late_write_fault(&rig, 2, 7);
        rig.clear(0, &vm, 0, 64, 128);
        rig.write(1, page(70));
        rig.check(&vm);
    });
}

#[test]
fn good_clear_in_the_middle_of_an_eager_split_loses_no_write() {
    everywhere(|plan| {
        // A clear waits for what is broken, and nobody goes on here while it does.
        if plan.splitting.bbm == Bbm::Zero {
            return;
        }
        let prepare = |rig: &Rig| {
            let vm = of_blocks(rig, 2);
            rig.enable(0, &vm, 0, true);
            vm
        };
        let clear = |rig: &Rig, vm: &Vm| {
            rig.clear(3, vm, 0, 64, 128);
            rig.attempt(1, page(70), Access::Write, 3);
        };
        at_each(plan, is_notable, prepare, clear, |rig, vm| {
            rig.split(0, vm, 0, 0, 1024);
        });
    });
}
