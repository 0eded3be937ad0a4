//! One interruption at every instruction of a scenario that another CPU can notice.

use std::cell::Cell;
use std::rc::Rc;

use vellum::arch::fake::Event;
use vellum::mmu::Locking;

use crate::flat::Vm;
use crate::rig::{Interruptions, Plan, Rig};

/// Modes in which one thread can play a fault in the middle of another CPU's work.
pub(crate) const NESTING: [Locking; 2] = [Locking::Rwlock, Locking::Lockless];

/// Runs `scenario` once for each event in it that `counts` says, with `interruption` after just that one.
pub(crate) fn at_each(
    plan: Plan,
    counts: impl Fn(&Event) -> bool + Copy + 'static,
    prepare: impl Fn(&Rig) -> Rc<Vm>,
    interruption: impl Fn(&Rig, &Vm) + Copy + 'static,
    scenario: impl Fn(&Rig, &Rc<Vm>),
) {
    for at in 0.. {
        let rig = Rc::new(Rig::new(plan));
        rig.machine.seed(at);
        let vm = prepare(&rig);
        let seen = Rc::new(Cell::new(0));
        let interruptions = {
            let (rig, vm, seen) = (Rc::clone(&rig), Rc::clone(&vm), Rc::clone(&seen));
            Interruptions::new(move |event| {
                if counts(&event) && seen.replace(seen.get() + 1) == at {
                    interruption(&rig, &vm);
                }
            })
        };
        scenario(&rig, &vm);
        drop(interruptions);
        rig.check(&vm);
        if seen.get() <= at {
            assert!(at > 0, "the scenario has events");
            break;
        }
    }
}

/// Whether an event is worth an interruption when whole tables are filled and frozen: of the descriptors those that make
/// or break something, and one leaf in 64 of those that are only written into a new table or frozen.
pub(crate) fn is_notable(event: &Event) -> bool {
    const VALID_AND_TYPE: u64 = 0b11;
    let Event::Descriptor { slot, old, new } = *event else {
        return true;
    };
    let changes_size = old != 0 && (old ^ new) & VALID_AND_TYPE != 0;
    changes_size || slot.raw() / 8 % 64 == 5
}
