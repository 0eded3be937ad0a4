//! Taking permissions away and giving them: what may be cached meanwhile.

use vellum::addr::{Ipa, Va};
use vellum::arch;
use vellum::arch::fake::{Access, Cause, Features, Outcome, va_of};

use crate::{
    BLOCK, HOST, PAGE, RAM, READ, READ_ONLY, VTTBR, WRITABLE, WRITABLE_BLOCK, block, causes,
    guest_with, guest_with_block, guest_with_page, invalidate, store, writes_fault, writes_hit,
};

#[test]
fn good_protection_leaves_no_writable_entry() {
    let machine = guest_with_page(WRITABLE);
    store(PAGE, WRITABLE, READ_ONLY);
    invalidate(RAM);
    machine.assert_no_writable(5, RAM, 0x1000);
    assert_eq!(machine.violations(), []);
    assert!(!writes_hit(&machine, 1, RAM));
}

#[test]
fn bad_protection_without_invalidation_is_caught() {
    let machine = guest_with_page(WRITABLE);
    store(PAGE, WRITABLE, READ_ONLY);
    arch::dsb_ish();
    assert!(writes_hit(&machine, 1, RAM));
    machine.assert_no_writable(5, RAM, 0x1000);
    assert_eq!(causes(&machine), [Cause::NotInvalidated]);
}

#[test]
fn bad_protection_that_forgets_aliases_is_caught() {
    let machine = guest_with_page(WRITABLE);
    store(PAGE, WRITABLE, READ_ONLY);
    for cpu in 0..3 {
        machine.on(cpu, || {
            arch::with_vttbr(VTTBR, || {
                arch::dsb_ishst();
                arch::tlbi_ipas2e1is(RAM);
                arch::dsb_ish();
                arch::tlbi_vaae1(va_of(RAM));
                arch::dsb_ish();
            });
        });
    }
    assert!(!writes_hit(&machine, 1, RAM));
    machine.assert_no_writable(5, RAM, 0x1000);
    assert_eq!(causes(&machine), [Cause::CombinedLeft]);
}

#[test]
fn good_relaxation_with_local_invalidation_ends_the_faults_of_this_cpu() {
    let machine = guest_with_page(READ_ONLY);
    store(PAGE, READ_ONLY, WRITABLE);
    assert!(writes_fault(&machine, 0, RAM));
    arch::dsb_nshst();
    arch::tlbi_ipas2e1(RAM);
    arch::dsb_nsh();
    arch::tlbi_vaae1(va_of(RAM));
    arch::dsb_nsh();
    assert!(!writes_fault(&machine, 0, RAM));
    assert!(
        writes_fault(&machine, 1, RAM),
        "one spurious fault is permitted elsewhere"
    );
    assert_eq!(machine.violations(), []);
}

#[test]
fn bad_relaxation_without_each_of_its_steps_keeps_faulting() {
    let steps: [fn(); 5] = [
        arch::dsb_nshst,
        || arch::tlbi_ipas2e1(RAM),
        arch::dsb_nsh,
        || arch::tlbi_vaae1(va_of(RAM)),
        arch::dsb_nsh,
    ];
    for left_out in 0..steps.len() {
        let machine = guest_with_page(READ_ONLY);
        store(PAGE, READ_ONLY, WRITABLE);
        for (index, step) in steps.iter().enumerate() {
            if index != left_out {
                step();
            }
        }
        assert!(writes_fault(&machine, 0, RAM), "step {left_out} left out");
    }
}

#[test]
fn bad_local_invalidation_of_the_ipa_in_place_of_the_va_keeps_faulting() {
    let machine = guest_with_page(READ_ONLY);
    store(PAGE, READ_ONLY, WRITABLE);
    arch::dsb_nshst();
    arch::tlbi_ipas2e1(RAM);
    arch::dsb_nsh();
    arch::tlbi_vaae1(Va::new(RAM.raw()));
    arch::dsb_nsh();
    assert!(writes_fault(&machine, 0, RAM));
}

#[test]
fn good_local_invalidation_of_one_page_of_a_block_ends_its_faults_only() {
    let machine = guest_with_block(Features::default());
    store(BLOCK, WRITABLE_BLOCK, block(HOST, READ));
    invalidate(RAM);
    store(BLOCK, block(HOST, READ), WRITABLE_BLOCK);
    arch::dsb_nshst();
    arch::tlbi_ipas2e1(RAM);
    arch::dsb_nsh();
    arch::tlbi_vaae1(va_of(RAM));
    arch::dsb_nsh();
    assert!(!writes_fault(&machine, 0, RAM));
    assert!(writes_fault(&machine, 0, Ipa::new(RAM.raw() + 0x1000)));
}

#[test]
fn good_a_new_mapping_may_fault_until_a_barrier() {
    let machine = guest_with_page(0);
    store(PAGE, 0, WRITABLE);
    assert!(writes_fault(&machine, 1, RAM) && writes_hit(&machine, 1, RAM));
    arch::dsb_ishst();
    assert!(!writes_fault(&machine, 1, RAM));
}

#[test]
fn good_a_permission_fault_tells_nothing_in_hpfar_unless_promised() {
    for promised in [false, true] {
        let features = Features {
            hpfar_on_permission: promised,
            ..Features::default()
        };
        let machine = guest_with(features);
        store(BLOCK, 0, block(HOST, READ));
        arch::dsb_ishst();
        let outcomes = machine.outcomes(0, RAM, Access::Write);
        let [Outcome::Abort(abort)] = outcomes[..] else {
            panic!("{outcomes:?}")
        };
        assert_eq!(abort.hpfar == RAM, promised);
        assert_eq!(arch::at_s1e1r(abort.far), Some(RAM));
    }
}
