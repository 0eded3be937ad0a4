//! Tables, roots, VMIDs and guest memory: when they may be given up.

use vellum::addr::Pa;
use vellum::arch;
use vellum::arch::fake::{Cause, Features, Machine, Violation};

use crate::{
    BLOCK, HOST, LEVEL2, LEVEL3, OTHER_ROOT, PAGE, RAM, READ, READ_ONLY, ROOT, SPARE, VMID, VTTBR,
    WRITABLE, WRITE, begin, block, causes, end, guest_with_page, invalidate, page, store, table,
    writes_hit,
};

/// Unlinks the level-3 table, runs `invalidation`, gives the table up.
fn free_level3(invalidation: impl FnOnce()) -> Machine {
    let machine = guest_with_page(WRITABLE);
    store(BLOCK, table(LEVEL3), 0);
    invalidation();
    end(LEVEL3);
    machine
}

#[test]
fn good_table_is_freed_after_an_invalidation_that_reaches_walk_caches() {
    let machine = free_level3(|| {
        arch::dsb_ishst();
        arch::tlbi_vmalls12e1is();
        arch::dsb_ish();
    });
    begin(LEVEL3);
    assert_eq!(machine.violations(), []);
}

#[test]
fn bad_table_freed_without_invalidation_is_caught() {
    let machine = free_level3(arch::dsb_ish);
    let expected = Violation::TableFreedWhileWalkable {
        table: Pa::new(LEVEL3),
    };
    assert_eq!(machine.take_violations(), [expected]);
    begin(LEVEL3);
    let expected = Violation::TableReusedWhileWalkable {
        table: Pa::new(LEVEL3),
    };
    assert_eq!(machine.take_violations(), [expected]);
}

#[test]
fn bad_table_freed_while_linked_is_caught() {
    let machine = guest_with_page(WRITABLE);
    end(LEVEL3);
    let expected = Violation::TableFreedWhileWalkable {
        table: Pa::new(LEVEL3),
    };
    assert_eq!(machine.violations(), [expected]);
}

#[test]
fn bad_one_page_invalidated_for_a_whole_table_is_caught() {
    let machine = guest_with_page(WRITABLE);
    let second = page(HOST + 0x1000, READ | WRITE);
    store(PAGE + 8, 0, second);
    store(BLOCK, table(LEVEL3), 0);
    invalidate(RAM);
    end(LEVEL3);
    store(BLOCK, 0, block(HOST + 0x40_0000, READ));
    assert_eq!(causes(&machine), [Cause::NotInvalidated]);
}

#[test]
fn bad_write_through_an_unlinked_table_is_still_seen() {
    let machine = guest_with_page(READ_ONLY);
    store(BLOCK, table(LEVEL3), 0);
    store(PAGE, READ_ONLY, WRITABLE);
    arch::dsb_ish();
    assert!(
        writes_hit(&machine, 1, RAM),
        "through a table entry that is still cached"
    );
}

#[test]
fn bad_one_vmid_with_two_roots_is_caught() {
    let machine = guest_with_page(WRITABLE);
    begin(OTHER_ROOT);
    machine.load_vttbr(2, VMID << 48 | OTHER_ROOT);
    assert_eq!(
        machine.violations(),
        [Violation::VmidWithTwoRoots { vmid: 5 }]
    );
}

#[test]
fn good_a_vmid_is_given_again_after_its_invalidation() {
    let machine = guest_with_page(WRITABLE);
    machine.load_vttbr(0, 0);
    machine.load_vttbr(1, 0);
    arch::dsb_ishst();
    arch::tlbi_alle1is();
    arch::dsb_ish();
    begin(OTHER_ROOT);
    machine.load_vttbr(2, VMID << 48 | OTHER_ROOT);
    assert_eq!(machine.violations(), []);
}

#[test]
fn bad_vmid_given_again_while_it_is_loaded_is_caught() {
    let machine = guest_with_page(WRITABLE);
    machine.load_vttbr(0, 0);
    machine.on(2, || {
        arch::tlbi_alle1is();
        arch::dsb_ish();
    });
    begin(OTHER_ROOT);
    machine.load_vttbr(2, VMID << 48 | OTHER_ROOT);
    assert_eq!(
        machine.violations(),
        [Violation::VmidWithTwoRoots { vmid: 5 }]
    );
}

#[test]
fn bad_root_freed_while_loaded_or_cached_is_caught() {
    let machine = guest_with_page(WRITABLE);
    machine.load_vttbr(0, 0);
    machine.load_vttbr(1, 0);
    end(ROOT);
    let expected = Violation::RootFreedWhileLoaded {
        root: Pa::new(ROOT),
    };
    assert_eq!(machine.violations(), [expected]);
}

#[test]
fn good_root_is_freed_after_unloading_and_invalidation() {
    let machine = guest_with_page(WRITABLE);
    machine.load_vttbr(0, 0);
    machine.load_vttbr(1, 0);
    arch::with_vttbr(VTTBR, || {
        arch::tlbi_vmalls12e1is();
        arch::dsb_ish();
    });
    for at in [LEVEL3, LEVEL2, ROOT] {
        end(at);
    }
    machine.assert_unreachable(Pa::new(HOST), 0x1000);
    assert_eq!(machine.violations(), []);
}

#[test]
fn bad_root_that_is_no_table_is_caught() {
    let machine = Machine::new(1, Features::default());
    machine.load_vttbr(0, VTTBR);
    assert_eq!(
        machine.violations(),
        [Violation::RootIsNoTable {
            root: Pa::new(ROOT)
        }]
    );
}

#[test]
fn bad_memory_given_back_while_it_may_be_cached_is_caught() {
    let machine = guest_with_page(WRITABLE);
    store(PAGE, WRITABLE, 0);
    arch::dsb_ish();
    machine.assert_unreachable(Pa::new(HOST), 0x1000);
    assert_eq!(
        machine.violations(),
        [Violation::MemoryStillReachable { ipa: RAM }]
    );
}

#[test]
fn bad_stores_that_nobody_was_told_of_are_caught() {
    let machine = guest_with_page(WRITABLE);
    store(PAGE, READ_ONLY, 0);
    store(SPARE, 0, WRITABLE);
    store(BLOCK + 8, 0, table(SPARE));
    let expected = [
        Violation::UnnotedStore {
            slot: Pa::new(PAGE),
        },
        Violation::WrittenOutsideTables {
            slot: Pa::new(SPARE),
        },
        Violation::LinkedNoTable {
            table: Pa::new(SPARE),
        },
    ];
    assert_eq!(machine.violations(), expected);
}
