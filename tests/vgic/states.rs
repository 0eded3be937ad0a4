//! Saving and restoring.

use vellum::vm::vgic::interface::Saved;
use vellum::vm::vgic::private::Private;
use vellum::vm::vgic::shared::{Routing, Shared};

use crate::cpu::Machine;
use crate::programs::Program;

#[test]
fn what_is_saved_is_restored_exactly() {
    for gicv3 in [false, true] {
        for seed in 0..40 {
            let mut program = Program::new(seed, Machine::new(gicv3, 3, 4, seed % 2 == 0));
            program.run(300);
            let machine = program.stopped();
            let routing = Routing::new(gicv3, 3);
            for cpu in &machine.cpus {
                let private = cpu.private.lock().save().unwrap();
                let restored = Private::restored(&private, gicv3, 27);
                assert_eq!(restored.save(), Some(private));
            }
            let shared = machine.shared.lock().save().unwrap();
            assert_eq!(Shared::restored(&shared, routing, 3).save(), Some(shared));
        }
    }
}

/// A VM is saved and restored every hundred steps, and its guests notice nothing.
#[test]
fn guests_go_on_after_their_state_was_restored() {
    for gicv3 in [false, true] {
        for seed in 0..20 {
            let mut program = Program::new(seed, Machine::new(gicv3, 3, 4, seed % 2 == 0));
            for _ in 0..10 {
                program.run(100);
                let machine = program.stopped();
                for cpu in &mut machine.cpus {
                    let state = cpu.private.lock().save().unwrap();
                    *cpu.private.lock() = Private::restored(&state, gicv3, 27);
                }
                let state = machine.shared.lock().save().unwrap();
                let routing = Routing::new(gicv3, 3);
                *machine.shared.lock() = Shared::restored(&state, routing, 3);
                machine.run_loops();
            }
            program.finish();
        }
    }
}

#[test]
fn what_no_guest_could_have_brought_about_is_made_harmless() {
    let mut private = Private::new(true).save().unwrap();
    private.held = u32::MAX;
    private.senders = [0xff; 16];
    private.line = u32::MAX;
    private.turn = u16::MAX;
    private.priority = [0xff; 32];
    let state = Private::restored(&private, true, 27).save().unwrap();
    assert_eq!((state.held, state.line), (1 << 27, 0xffff_0000));
    assert_eq!((state.senders, state.priority), ([1; 16], [0xf8; 32]));
    let routing = Routing::Targets(3);
    let mut shared = Shared::new(routing).save().unwrap();
    shared.home = [u16::MAX; 96];
    shared.route = [u32::MAX; 96];
    let state = Shared::restored(&shared, routing, 3).save().unwrap();
    assert_eq!((state.home, state.route), ([0; 96], [7; 96]));
    let saved = Saved {
        vmcr: u64::MAX,
        active_priorities: [u64::MAX; 8],
    };
    let (v2, v3) = (saved.restored(false), saved.restored(true));
    assert_eq!((v2.vmcr, v3.vmcr), (0xf8fc_021f, 0xfffc_021b));
    let bits = 0xffff_ffff;
    assert_eq!(v2.active_priorities, [bits, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(
        v3.active_priorities,
        [bits, bits, bits, bits, 0, 0, 0, 0],
        "none in both groups"
    );
}

#[test]
fn a_cpu_interface_that_a_guest_has_brought_about_is_restored_exactly() {
    let saved = Saved {
        vmcr: 0xf84c_0213,
        active_priorities: [1 << 20, 0, 0, 0, 1 << 31 | 1 << 2, 0, 0, 0],
    };
    assert_eq!(saved.restored(true), saved);
}
