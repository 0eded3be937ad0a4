//! Break-before-make: what may replace what, and what must happen in between.

use vellum::addr::{Ipa, Pa};
use vellum::arch;
use vellum::arch::fake::{Access, Cause, Change, Features, Machine, Outcome, Violation};

use crate::{
    BLOCK, DEVICE, HOST, LEVEL2, LEVEL3, OTHER_VTTBR, PAGE, RAM, READ, READ_ONLY, SPARE, TO_RAM,
    VTTBR, WRITABLE, WRITABLE_BLOCK, WRITE, YOUNG, begin, build_level3, causes, guest_with,
    guest_with_block, guest_with_page, invalidate, page, store, table,
};

#[test]
fn bad_block_to_table_in_one_step_is_caught() {
    let machine = guest_with_block(Features::default());
    build_level3(READ | WRITE);
    store(BLOCK, WRITABLE_BLOCK, table(LEVEL3));
    let changed = Change::Size;
    assert_eq!(
        machine.violations(),
        [Violation::BreakBeforeMake { ipa: RAM, changed }]
    );
}

#[test]
fn good_block_to_table_in_one_step_with_bbm_level_2() {
    let machine = guest_with_block(Features {
        bbm: 2,
        ..Features::default()
    });
    build_level3(READ | WRITE);
    store(BLOCK, WRITABLE_BLOCK, table(LEVEL3));
    assert_eq!(machine.violations(), []);
}

#[test]
fn bad_changes_of_a_valid_leaf_are_caught() {
    let to_device = HOST | READ | WRITE | DEVICE | YOUNG | 0b11;
    for (new, changed) in [
        (page(HOST + 0x1000, READ), Change::OutputAddress),
        (to_device, Change::Attributes),
        (WRITABLE | 1 << 52, Change::Attributes),
    ] {
        let machine = guest_with_page(WRITABLE);
        store(PAGE, WRITABLE, new);
        assert_eq!(
            machine.violations(),
            [Violation::BreakBeforeMake { ipa: RAM, changed }]
        );
    }
}

#[test]
fn good_changes_of_permission_age_and_software_bits_need_no_break() {
    for new in [
        READ_ONLY,
        WRITABLE & !YOUNG,
        WRITABLE | 1 << 54,
        WRITABLE | 0b111 << 55,
    ] {
        let machine = guest_with_page(WRITABLE);
        store(PAGE, WRITABLE, new);
        store(PAGE, new, WRITABLE);
        assert_eq!(machine.violations(), [], "{new:#x}");
    }
}

#[test]
fn bad_table_replaced_by_another_is_caught_at_every_bbm_level() {
    for bbm in [0, 2] {
        let machine = guest_with(Features {
            bbm,
            ..Features::default()
        });
        begin(SPARE);
        store(TO_RAM, table(LEVEL2), table(SPARE));
        let changed = Change::TableAddress;
        assert_eq!(
            machine.violations(),
            [Violation::BreakBeforeMake { ipa: RAM, changed }]
        );
    }
}

#[test]
fn good_an_old_leaf_is_cached_nowhere_and_may_be_replaced() {
    let machine = guest_with_page(WRITABLE & !YOUNG);
    store(PAGE, WRITABLE & !YOUNG, page(HOST + 0x1000, READ));
    assert_eq!(machine.violations(), []);
}

/// Breaks the block, runs `invalidation`, makes the table; what the oracle has to say.
fn split(invalidation: impl FnOnce(&Machine)) -> Machine {
    let machine = guest_with_block(Features::default());
    build_level3(READ | WRITE);
    store(BLOCK, WRITABLE_BLOCK, 0);
    invalidation(&machine);
    store(BLOCK, 0, table(LEVEL3));
    arch::dsb_ishst();
    machine
}

#[test]
fn good_split_keeps_every_translation() {
    let machine = split(|_| invalidate(RAM));
    assert_eq!(machine.violations(), []);
    for index in 0..512 {
        let ipa = Ipa::new(RAM.raw() + index * 0x1000);
        let hit = Outcome::Hit(Pa::new(HOST + index * 0x1000));
        assert_eq!(machine.outcomes(1, ipa, Access::Write), [hit]);
    }
}

#[test]
fn good_split_invalidated_by_vmid() {
    let machine = split(|_| {
        arch::dsb_ishst();
        arch::tlbi_vmalls12e1is();
        arch::dsb_ish();
    });
    assert_eq!(machine.violations(), []);
}

#[test]
fn bad_make_without_tlbi_is_caught() {
    let machine = split(|_| arch::dsb_ishst());
    assert_eq!(causes(&machine)[0], Cause::NotInvalidated);
}

#[test]
fn bad_make_without_stage_1_tlbi_is_caught() {
    let machine = split(|_| {
        arch::dsb_ishst();
        arch::tlbi_ipas2e1is(RAM);
        arch::dsb_ish();
    });
    assert_eq!(causes(&machine)[0], Cause::CombinedLeft);
}

#[test]
fn bad_make_with_stage_1_invalidated_first_is_caught() {
    let machine = split(|_| {
        arch::dsb_ishst();
        arch::tlbi_vmalle1is();
        arch::dsb_ish();
        arch::tlbi_ipas2e1is(RAM);
        arch::dsb_ish();
    });
    assert_eq!(causes(&machine)[0], Cause::WrongOrder);
}

#[test]
fn bad_make_without_dsb_between_the_stages_is_caught() {
    let machine = split(|_| {
        arch::dsb_ishst();
        arch::tlbi_ipas2e1is(RAM);
        arch::tlbi_vmalle1is();
        arch::dsb_ish();
    });
    assert_eq!(causes(&machine)[0], Cause::WrongOrder);
}

#[test]
fn bad_make_without_a_barrier_before_the_tlbi_is_caught() {
    let machine = split(|_| {
        arch::tlbi_vmalls12e1is();
        arch::dsb_ish();
    });
    assert_eq!(causes(&machine)[0], Cause::BeforeBarrier);
}

#[test]
fn bad_make_before_the_tlbi_is_complete_is_caught() {
    let machine = split(|_| {
        arch::dsb_ishst();
        arch::tlbi_vmalls12e1is();
    });
    assert_eq!(causes(&machine)[0], Cause::NotCompleted);
}

#[test]
fn bad_make_with_the_dsb_on_another_cpu_is_caught() {
    let machine = split(|machine| {
        arch::dsb_ishst();
        arch::tlbi_vmalls12e1is();
        machine.on(1, arch::dsb_ish);
    });
    assert_eq!(causes(&machine)[0], Cause::NotCompleted);
}

#[test]
fn bad_make_with_a_dsb_that_completes_local_work_only_is_caught() {
    let machine = split(|_| {
        arch::dsb_ishst();
        arch::tlbi_vmalls12e1is();
        arch::dsb_nsh();
    });
    assert_eq!(causes(&machine)[0], Cause::NotCompleted);
}

#[test]
fn bad_make_after_a_local_tlbi_is_caught() {
    let machine = split(|_| {
        arch::dsb_ishst();
        arch::tlbi_vmalls12e1();
        arch::dsb_ish();
    });
    assert_eq!(causes(&machine)[0], Cause::NotInvalidated);
}

#[test]
fn bad_make_after_a_tlbi_under_the_wrong_vmid_is_caught() {
    let machine = split(|_| arch::with_vttbr(OTHER_VTTBR, || invalidate(RAM)));
    assert_eq!(causes(&machine)[0], Cause::WrongVmid);
}

#[test]
fn good_a_controller_invalidates_under_a_borrowed_vmid() {
    let machine = split(|machine| {
        machine.on(2, || arch::with_vttbr(VTTBR, || invalidate(RAM)));
    });
    assert_eq!(machine.violations(), []);
}

#[test]
fn bad_invalidation_where_no_guest_is_loaded_is_caught() {
    let machine = guest_with_page(WRITABLE);
    machine.on(2, || invalidate(RAM));
    assert_eq!(machine.violations(), [Violation::InvalidatedNoGuest; 2]);
}

#[test]
fn good_range_invalidation_reaches_each_page_and_bad_short_one_is_caught() {
    for (pages, expected) in [(2, vec![]), (1, vec![Cause::NotInvalidated])] {
        let machine = guest_with_page(WRITABLE);
        store(PAGE + 8, 0, page(HOST + 0x1000, READ | WRITE));
        store(PAGE, WRITABLE, 0);
        store(PAGE + 8, page(HOST + 0x1000, READ | WRITE), 0);
        arch::dsb_ishst();
        arch::tlbi_ripas2e1is(RAM, pages);
        arch::dsb_ish();
        arch::tlbi_vmalle1is();
        arch::dsb_ish();
        machine.assert_no_stale(5, RAM, 0x2000);
        assert_eq!(causes(&machine), expected);
    }
}

#[test]
fn bad_remap_after_a_bbm_2_split_that_left_the_block_is_caught() {
    let machine = guest_with_block(Features {
        bbm: 2,
        ..Features::default()
    });
    build_level3(READ | WRITE);
    store(BLOCK, WRITABLE_BLOCK, table(LEVEL3));
    store(PAGE, WRITABLE, 0);
    arch::dsb_ishst();
    store(PAGE, 0, page(HOST + 0x40_0000, READ));
    assert!(causes(&machine).contains(&Cause::NotInvalidated));
}
