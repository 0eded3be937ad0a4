//! Permission indirection: what S2PIR_EL2 meant may be remembered, and so may the index of a leaf that is gone.

use vellum::addr::Pa;
use vellum::arch;
use vellum::arch::fake::{Access, Cause, Features, Machine, Outcome, Violation};

use crate::{
    BLOCK, HOST, LEVEL3, OTHER_VTTBR, PAGE, RAM, VTTBR, begin, causes, guest_with, invalidate,
    page, store, table, writes_fault, writes_hit,
};

/// Index 5 may write in the first epoch, index 6 in the second and index 7 in the third; 1 never may.
const FIRST: u64 = 0xbbf0_00b0;
const SECOND: u64 = 0xbfb0_00b0;
const THIRD: u64 = 0xfbb0_00b0;

/// A page with this permission index, bit 7 set.
const fn indexed(index: u64) -> u64 {
    let bits = (index & 1) << 6 | (index >> 1 & 1) << 51 | (index >> 2 & 3) << 53;
    page(HOST, bits | 1 << 7)
}

const READ_ONLY: u64 = indexed(1);

/// Every CPU writes S2PIR_EL2.
fn announce(machine: &Machine, rights: u64) {
    for cpu in 0..3 {
        machine.on(cpu, || arch::set_s2pir(rights));
    }
}

fn invalidate_vmid() {
    arch::dsb_ishst();
    arch::tlbi_vmalls12e1is();
    arch::dsb_ish();
}

/// A guest that runs on CPUs 0 and 1 in the first epoch, with its first page mapped by `descriptor`.
fn guest(descriptor: u64) -> Machine {
    let machine = guest_with(Features {
        indirection: true,
        ..Features::default()
    });
    begin(LEVEL3);
    store(BLOCK, 0, table(LEVEL3));
    store(PAGE, 0, descriptor);
    arch::dsb_ishst();
    announce(&machine, FIRST);
    for cpu in [0, 1] {
        machine.enter_guest(cpu);
    }
    machine
}

/// The call of epochs, as it has to be.
fn open(machine: &Machine, rights: u64) {
    announce(machine, rights);
    invalidate_vmid();
    for cpu in [0, 1] {
        machine.enter_guest(cpu);
    }
}

#[test]
fn a_permission_is_what_the_register_says_of_the_index() {
    let cases = [
        (0b0000, [false, false, false]),
        (0b0100, [false, false, false]),
        (0b1000, [true, false, false]),
        (0b1011, [true, false, true]),
        (0b1100, [true, true, false]),
        (0b1111, [true, true, true]),
    ];
    for index in 0..16 {
        let machine = guest(indexed(index));
        for (right, expected) in cases {
            open(&machine, right << (4 * index));
            let accesses = [Access::Read, Access::Write, Access::Execute];
            let permitted = accesses.map(|access| {
                let outcomes = machine.outcomes(1, RAM, access);
                outcomes == [Outcome::Hit(Pa::new(HOST))]
            });
            assert_eq!(permitted, expected, "index {index}, {right:#06b}");
        }
        assert_eq!(machine.violations(), []);
    }
}

#[test]
fn bad_index_without_the_dirty_bit_is_not_writable() {
    let machine = guest(indexed(5) & !(1 << 7));
    assert!(!writes_hit(&machine, 1, RAM));
}

#[test]
fn good_call_leaves_no_cpu_that_may_write() {
    let machine = guest(indexed(5));
    assert!(writes_hit(&machine, 0, RAM) && writes_hit(&machine, 1, RAM));
    open(&machine, SECOND);
    machine.assert_no_writable(5, RAM, 0x1000);
    machine.assert_unwritable(RAM, Pa::new(HOST));
    assert_eq!(machine.violations(), []);
    assert!(!writes_hit(&machine, 0, RAM) && !writes_hit(&machine, 1, RAM));
}

#[test]
fn bad_register_without_invalidation_is_caught() {
    let machine = guest(indexed(5));
    announce(&machine, SECOND);
    assert!(writes_hit(&machine, 1, RAM), "the permission may be cached");
    machine.assert_no_writable(5, RAM, 0x1000);
    assert_eq!(causes(&machine), [Cause::NotInvalidated]);
}

#[test]
fn bad_invalidation_before_the_register_is_caught() {
    let machine = guest(indexed(5));
    invalidate_vmid();
    announce(&machine, SECOND);
    assert!(writes_hit(&machine, 1, RAM));
    machine.assert_no_writable(5, RAM, 0x1000);
    assert_eq!(causes(&machine), [Cause::NotInvalidated]);
}

#[test]
fn bad_invalidation_of_stage_2_alone_is_caught() {
    let machine = guest(indexed(5));
    announce(&machine, SECOND);
    arch::tlbi_ipas2e1is(RAM);
    arch::dsb_ish();
    machine.assert_no_writable(5, RAM, 0x1000);
    assert_eq!(causes(&machine), [Cause::CombinedLeft]);
}

#[test]
fn bad_invalidation_on_one_cpu_is_caught() {
    let machine = guest(indexed(5));
    announce(&machine, SECOND);
    arch::dsb_ishst();
    arch::tlbi_vmalls12e1();
    arch::dsb_nsh();
    assert!(!writes_hit(&machine, 0, RAM));
    assert!(writes_hit(&machine, 1, RAM));
    machine.assert_no_writable(5, RAM, 0x1000);
    assert_eq!(causes(&machine), [Cause::NotInvalidated]);
}

#[test]
fn bad_harvest_before_the_last_cpu_wrote_the_register_is_caught() {
    let machine = guest(indexed(5));
    arch::set_s2pir(SECOND);
    invalidate_vmid();
    machine.enter_guest(0);
    machine.assert_unwritable(RAM, Pa::new(HOST));
    let expected = Violation::WritableUnrecorded {
        ipa: RAM,
        vmid: 5,
        cpu: 1,
    };
    assert_eq!(machine.take_violations(), [expected]);
    machine.on(1, || arch::set_s2pir(SECOND));
    machine.assert_unwritable(RAM, Pa::new(HOST));
    assert_eq!(
        machine.take_violations(),
        [expected],
        "it ran on after the invalidation"
    );
    invalidate_vmid();
    machine.assert_unwritable(RAM, Pa::new(HOST));
    assert_eq!(machine.violations(), []);
}

#[test]
fn bad_sleeper_that_comes_back_with_what_it_cached_is_caught() {
    let machine = guest(indexed(5));
    machine.load_vttbr(1, 0);
    arch::set_s2pir(SECOND);
    machine.enter_guest(0);
    machine.on(1, || arch::set_s2pir(SECOND));
    machine.load_vttbr(1, VTTBR);
    machine.enter_guest(1);
    assert!(writes_hit(&machine, 1, RAM));
}

#[test]
fn good_sleeper_is_reached_by_the_invalidation_of_the_others() {
    let machine = guest(indexed(5));
    machine.load_vttbr(1, 0);
    arch::set_s2pir(SECOND);
    invalidate_vmid();
    machine.on(1, || arch::set_s2pir(SECOND));
    machine.load_vttbr(1, VTTBR);
    machine.enter_guest(1);
    machine.assert_unwritable(RAM, Pa::new(HOST));
    assert!(!writes_hit(&machine, 1, RAM));
    assert_eq!(machine.violations(), []);
}

#[test]
fn bad_guest_entered_with_the_register_of_another_is_caught() {
    let machine = guest(indexed(5));
    open(&machine, SECOND);
    // CPU 2 comes from a guest that is still in its first epoch.
    machine.on(2, || arch::set_s2pir(FIRST));
    machine.load_vttbr(2, VTTBR);
    machine.enter_guest(2);
    machine.assert_unwritable(RAM, Pa::new(HOST));
    let expected = Violation::WritableUnrecorded {
        ipa: RAM,
        vmid: 5,
        cpu: 2,
    };
    assert_eq!(machine.take_violations(), [expected]);
}

#[test]
fn good_registers_of_another_guest_matter_only_inside_of_it() {
    let machine = guest(indexed(5));
    open(&machine, SECOND);
    machine.on(2, || arch::set_s2pir(FIRST));
    machine.load_vttbr(2, VTTBR);
    machine.on(2, || arch::set_s2pir(SECOND));
    machine.enter_guest(2);
    machine.assert_unwritable(RAM, Pa::new(HOST));
    machine.load_vttbr(2, OTHER_VTTBR & 0xffff << 48);
    machine.on(2, || arch::set_s2pir(FIRST));
    machine.assert_unwritable(RAM, Pa::new(HOST));
    assert_eq!(machine.violations(), []);
}

/// Epoch 1 wrote the page; three epochs later its index is armed again. `relabel` and `then` come before the call that
/// opens epoch 3 and before the one that opens epoch 4.
fn wrap_around(relabel: impl FnOnce(), then: impl FnOnce(&Machine)) -> Machine {
    let machine = guest(indexed(5));
    open(&machine, SECOND);
    relabel();
    open(&machine, THIRD);
    then(&machine);
    announce(&machine, FIRST);
    machine
}

#[test]
fn good_index_is_armed_again_after_relabelling_and_an_invalidation() {
    let machine = wrap_around(|| store(PAGE, indexed(5), READ_ONLY), |_| {});
    invalidate_vmid();
    machine.assert_no_writable(5, RAM, 0x1000);
    machine.assert_unwritable(RAM, Pa::new(HOST));
    assert_eq!(machine.violations(), []);
}

#[test]
fn bad_index_armed_again_before_its_leaves_were_relabelled_is_caught() {
    let machine = wrap_around(|| {}, |_| {});
    invalidate_vmid();
    machine.assert_unwritable(RAM, Pa::new(HOST));
    let by = |cpu| Violation::WritableUnrecorded {
        ipa: RAM,
        vmid: 5,
        cpu,
    };
    assert_eq!(machine.take_violations(), [by(0), by(1)]);
}

#[test]
fn bad_index_armed_again_before_an_invalidation_that_followed_is_caught() {
    let machine = wrap_around(|| {}, |_| store(PAGE, indexed(5), READ_ONLY));
    // The call's own invalidation comes too late: the CPUs already run by the new value.
    assert!(writes_hit(&machine, 1, RAM), "by an index that is cached");
    machine.assert_no_writable(5, RAM, 0x1000);
    assert!(!causes(&machine).is_empty());
}

#[test]
fn bad_stale_index_is_armed_again_even_if_its_permission_was_not_cached() {
    let machine = guest(indexed(6));
    assert!(!writes_hit(&machine, 1, RAM));
    store(PAGE, indexed(6), READ_ONLY);
    arch::dsb_ish();
    machine.assert_no_writable(5, RAM, 0x1000);
    assert_eq!(machine.violations(), [], "nobody may write by it now");
    announce(&machine, SECOND);
    assert!(writes_hit(&machine, 1, RAM));
    machine.assert_no_writable(5, RAM, 0x1000);
    assert_eq!(causes(&machine), [Cause::NotInvalidated]);
}

#[test]
fn good_relabelled_page_may_be_invalidated_by_its_address() {
    let machine = guest(indexed(5));
    open(&machine, SECOND);
    store(PAGE, indexed(5), READ_ONLY);
    invalidate(RAM);
    announce(&machine, FIRST);
    machine.assert_no_writable(5, RAM, 0x1000);
    machine.assert_unwritable(RAM, Pa::new(HOST));
    assert_eq!(machine.violations(), []);
}

#[test]
fn good_write_fault_in_the_new_epoch_needs_a_local_invalidation_only() {
    let machine = guest(indexed(5));
    open(&machine, SECOND);
    store(PAGE, indexed(5), indexed(6));
    arch::dsb_nshst();
    arch::tlbi_ipas2e1(RAM);
    arch::dsb_nsh();
    arch::tlbi_vaae1(arch::fake::va_of(RAM));
    arch::dsb_nsh();
    assert!(!writes_fault(&machine, 0, RAM));
    assert!(
        writes_fault(&machine, 1, RAM),
        "one spurious fault elsewhere"
    );
    assert_eq!(machine.violations(), []);
}
