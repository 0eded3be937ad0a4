//! Hardware dirty state: the walker marks what is written, in memory, and nothing else forgets.

use vellum::addr::Pa;
use vellum::arch;
use vellum::arch::fake::{Access, Cause, Features, Machine, Outcome};

use crate::{
    BLOCK, HOST, LEVEL3, PAGE, RAM, READ, WRITE, YOUNG, begin, causes, guest_with, invalidate,
    page, store, table, writes_hit,
};

const DBM: u64 = 1 << 51;
const CLEAN: u64 = page(HOST, READ | DBM);
const DIRTY: u64 = page(HOST, READ | WRITE | DBM);

fn guest(descriptor: u64, dirty_state: bool) -> Machine {
    let machine = guest_with(Features {
        dirty_state,
        ..Features::default()
    });
    begin(LEVEL3);
    store(BLOCK, 0, table(LEVEL3));
    store(PAGE, 0, descriptor);
    arch::dsb_ishst();
    machine
}

fn write(machine: &Machine, cpu: usize) -> Outcome {
    machine
        .guest_access(cpu, RAM, Access::Write)
        .expect("a guest")
}

const HIT: Outcome = Outcome::Hit(Pa::new(HOST));

#[test]
fn good_write_to_a_clean_leaf_marks_it_and_does_not_fault() {
    let machine = guest(CLEAN, true);
    assert_eq!(machine.outcomes(1, RAM, Access::Write), [HIT]);
    machine.assert_unwritable(RAM, Pa::new(HOST));
    assert_eq!(write(&machine, 1), HIT);
    // What is not in memory would be found by the next store.
    store(PAGE, DIRTY, CLEAN);
    assert_eq!(machine.violations(), []);
}

#[test]
fn good_read_of_a_clean_leaf_marks_nothing() {
    let machine = guest(CLEAN, true);
    assert_eq!(machine.guest_access(1, RAM, Access::Read), Some(HIT));
    store(PAGE, CLEAN, 0);
    assert_eq!(machine.violations(), []);
}

#[test]
fn good_old_leaf_is_made_young_by_any_access() {
    for access in [Access::Read, Access::Execute, Access::Write] {
        let machine = guest(CLEAN & !YOUNG, true);
        assert_eq!(machine.guest_access(0, RAM, access), Some(HIT));
        let marked = if access == Access::Write {
            DIRTY
        } else {
            CLEAN
        };
        store(PAGE, marked, 0);
        assert_eq!(machine.violations(), []);
    }
}

#[test]
fn bad_machine_without_the_feature_faults_on_a_clean_leaf() {
    let machine = guest(CLEAN, false);
    assert!(!writes_hit(&machine, 1, RAM));
}

#[test]
fn bad_read_only_leaf_without_the_modifier_faults() {
    let machine = guest(page(HOST, READ), true);
    assert!(!writes_hit(&machine, 1, RAM));
}

#[test]
fn bad_copy_after_cleaning_without_invalidation_is_caught() {
    let machine = guest(DIRTY, true);
    store(PAGE, DIRTY, CLEAN);
    arch::dsb_ish();
    machine.assert_no_writable(5, RAM, 0x1000);
    assert_eq!(causes(&machine), [Cause::NotInvalidated]);
    invalidate(RAM);
    machine.assert_no_writable(5, RAM, 0x1000);
    machine.assert_unwritable(RAM, Pa::new(HOST));
    assert_eq!(machine.violations(), []);
}

#[test]
fn good_a_clean_leaf_that_is_cached_asks_memory_before_it_marks() {
    let machine = guest(CLEAN, true);
    store(PAGE, CLEAN, 0);
    arch::dsb_ishst();
    for _ in 0..16 {
        assert!(matches!(write(&machine, 1), Outcome::Abort(_)));
    }
    assert!(
        machine.outcomes(1, RAM, Access::Read).contains(&HIT),
        "reads may use what is cached"
    );
}

#[test]
fn bad_mark_in_a_table_that_was_unlinked_is_not_in_the_new_leaf() {
    let machine = guest(CLEAN, true);
    store(BLOCK, table(LEVEL3), 0);
    arch::dsb_ishst();
    machine.seed(3);
    while write(&machine, 1) != HIT {}
    store(PAGE, DIRTY, CLEAN);
    assert_eq!(
        machine.violations(),
        [],
        "the mark is in the detached table"
    );
}
