//! Two roots of one guest, and tables that are deferred: what `swap` and `lazy` rest on.

use vellum::addr::Pa;
use vellum::arch;
use vellum::arch::fake::{Cause, Machine, Violation};

use crate::{
    BLOCK, HOST, LEVEL2, LEVEL3, OTHER_ROOT, OTHER_VTTBR, PAGE, RAM, READ, READ_ONLY, ROOT, SPARE,
    TO_RAM, VMID, VTTBR, WRITABLE, begin, block, causes, end, guest_with_page, store, table,
    writes_hit,
};

/// What `swap` calls the other VMID.
const OTHER: u16 = 6;
const NEW_VTTBR: u64 = 7 << 48 | ROOT;

fn invalidate_vmid(vttbr: u64) {
    arch::with_vttbr(vttbr, || {
        arch::dsb_ishst();
        arch::tlbi_vmalls12e1is();
        arch::dsb_ish();
    });
}

/// A guest with a writable page, and a second root that maps it by a read-only block.
fn guest_with_spare() -> Machine {
    let machine = guest_with_page(WRITABLE);
    begin(OTHER_ROOT);
    begin(SPARE);
    store(SPARE, 0, block(HOST, READ));
    store(OTHER_ROOT + 8, 0, table(SPARE));
    arch::dsb_ish();
    machine
}

fn replace(machine: &Machine, cpus: impl IntoIterator<Item = usize>, vttbr: u64) {
    for cpu in cpus {
        machine.on(cpu, || arch::replace_vttbr(vttbr));
        machine.enter_guest(cpu);
    }
}

fn by(cpu: usize, vmid: u16) -> Violation {
    Violation::WritableUnrecorded {
        ipa: RAM,
        vmid,
        cpu,
    }
}

#[test]
fn good_swap_needs_no_invalidation() {
    let machine = guest_with_spare();
    replace(&machine, [0, 1], OTHER_VTTBR);
    machine.assert_unwritable(RAM, Pa::new(HOST));
    machine.assert_no_writable(OTHER, RAM, 0x1000);
    assert!(!writes_hit(&machine, 0, RAM) && !writes_hit(&machine, 1, RAM));
    assert_eq!(machine.violations(), []);
}

#[test]
fn bad_swap_under_one_vmid_is_caught() {
    let machine = guest_with_spare();
    replace(&machine, [0], VMID << 48 | OTHER_ROOT);
    assert!(
        machine
            .take_violations()
            .contains(&Violation::VmidWithTwoRoots { vmid: 5 })
    );
}

#[test]
fn bad_vmid_given_to_another_root_while_a_sleeper_holds_it_is_caught() {
    for rests_on_idle_root in [false, true] {
        let machine = guest_with_spare();
        machine.leave_guest(1);
        if rests_on_idle_root {
            machine.load_vttbr(1, 0);
        }
        machine.load_vttbr(0, 0);
        invalidate_vmid(VTTBR);
        replace(&machine, [0], VMID << 48 | OTHER_ROOT);
        let expected: &[_] = match rests_on_idle_root {
            false => &[Violation::VmidWithTwoRoots { vmid: 5 }],
            true => &[],
        };
        assert_eq!(machine.violations(), expected);
    }
}

#[test]
fn bad_harvest_before_the_last_cpu_left_the_root_is_caught() {
    let machine = guest_with_spare();
    replace(&machine, [0], OTHER_VTTBR);
    machine.assert_unwritable(RAM, Pa::new(HOST));
    // CPU 0 is named, too: while anybody runs under the VMID, it might.
    assert!(machine.take_violations().contains(&by(1, 5)));
    replace(&machine, [1], OTHER_VTTBR);
    machine.assert_unwritable(RAM, Pa::new(HOST));
    assert_eq!(machine.violations(), []);
}

#[test]
fn bad_retired_vmid_given_again_before_its_invalidation_is_caught() {
    for invalidated in [false, true] {
        let machine = guest_with_spare();
        replace(&machine, [0, 1], OTHER_VTTBR);
        if invalidated {
            invalidate_vmid(VTTBR);
        }
        let third = 0x30_0000;
        begin(third);
        replace(&machine, [2], VMID << 48 | third);
        let expected: &[_] = match invalidated {
            false => &[Violation::VmidWithTwoRoots { vmid: 5 }],
            true => &[],
        };
        assert_eq!(machine.violations(), expected);
    }
}

#[test]
fn bad_retired_root_published_before_its_vmid_was_invalidated_is_caught() {
    for invalidated in [false, true] {
        let machine = guest_with_spare();
        replace(&machine, [0, 1], OTHER_VTTBR);
        if invalidated {
            invalidate_vmid(VTTBR);
        }
        store(PAGE, WRITABLE, READ_ONLY);
        arch::dsb_ish();
        replace(&machine, [0, 1], NEW_VTTBR);
        let two = |table| Violation::TableUnderTwoVmids {
            table: Pa::new(table),
            vmid: 5,
        };
        let expected = match invalidated {
            false => vec![two(ROOT), two(LEVEL2), two(LEVEL3)],
            true => vec![],
        };
        assert_eq!(machine.violations(), expected);
    }
}

#[test]
fn bad_retired_table_linked_before_its_vmid_was_invalidated_is_caught() {
    for invalidated in [false, true] {
        for unlinked in [false, true] {
            let machine = guest_with_spare();
            store(SPARE, block(HOST, READ), 0);
            replace(&machine, [0, 1], OTHER_VTTBR);
            store(PAGE, WRITABLE, READ_ONLY);
            if unlinked {
                store(BLOCK, table(LEVEL3), 0);
            }
            if invalidated {
                invalidate_vmid(VTTBR);
            }
            store(SPARE, 0, table(LEVEL3));
            let two = Violation::TableUnderTwoVmids {
                table: Pa::new(LEVEL3),
                vmid: 5,
            };
            let expected: &[_] = match invalidated {
                false => &[two],
                true => &[],
            };
            assert_eq!(machine.violations(), expected, "unlinked: {unlinked}");
        }
    }
}

#[test]
fn bad_root_edited_while_a_cpu_still_walks_it_is_seen() {
    let machine = guest_with_spare();
    replace(&machine, [0], OTHER_VTTBR);
    store(PAGE, WRITABLE, READ_ONLY);
    arch::dsb_ish();
    assert!(writes_hit(&machine, 1, RAM));
    assert!(!writes_hit(&machine, 0, RAM));
}

/// Defers the root's table for the guest's memory.
fn defer() {
    store(TO_RAM, table(LEVEL2), LEVEL2 | 1 << 3);
}

#[test]
fn good_deferred_root_protects_everything_after_its_invalidation() {
    let machine = guest_with_page(WRITABLE);
    defer();
    invalidate_vmid(VTTBR);
    machine.assert_no_writable(5, RAM, 0x1000);
    machine.assert_unwritable(RAM, Pa::new(HOST));
    assert!(!writes_hit(&machine, 1, RAM));
    // Whoever reaches the table first makes it read-only, then links it again.
    store(PAGE, WRITABLE, READ_ONLY);
    store(TO_RAM, LEVEL2 | 1 << 3, table(LEVEL2));
    arch::dsb_ish();
    machine.assert_unwritable(RAM, Pa::new(HOST));
    assert_eq!(machine.violations(), []);
}

#[test]
fn bad_deferred_root_without_invalidation_is_caught() {
    let machine = guest_with_page(WRITABLE);
    defer();
    arch::dsb_ish();
    assert!(writes_hit(&machine, 1, RAM), "walk caches know the table");
    machine.assert_unwritable(RAM, Pa::new(HOST));
    assert_eq!(machine.take_violations(), [by(0, 5), by(1, 5)]);
    machine.assert_no_writable(5, RAM, 0x1000);
    assert_eq!(causes(&machine), [Cause::NotInvalidated]);
}

#[test]
fn bad_deferred_root_invalidated_by_one_address_is_caught() {
    let machine = guest_with_page(WRITABLE);
    let second = crate::page(HOST + 0x1000, READ | crate::WRITE);
    store(PAGE + 8, 0, second);
    defer();
    crate::invalidate(RAM);
    machine.assert_no_writable(5, RAM, 0x2000);
    assert_eq!(causes(&machine), [Cause::NotInvalidated]);
}

#[test]
fn bad_deferred_table_linked_with_a_writable_leaf_is_caught() {
    let machine = guest_with_page(WRITABLE);
    defer();
    invalidate_vmid(VTTBR);
    store(TO_RAM, LEVEL2 | 1 << 3, table(LEVEL2));
    arch::dsb_ish();
    machine.assert_unwritable(RAM, Pa::new(HOST));
    assert_eq!(machine.take_violations(), [by(0, 5), by(1, 5)]);
}

#[test]
fn bad_table_freed_while_a_deferred_descriptor_keeps_it_is_caught() {
    let machine = guest_with_page(WRITABLE);
    defer();
    invalidate_vmid(VTTBR);
    end(LEVEL2);
    let expected = Violation::TableFreedWhileDeferred {
        table: Pa::new(LEVEL2),
    };
    assert_eq!(machine.violations(), [expected]);
}
