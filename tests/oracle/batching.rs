//! Several blocks split together: one invalidation for all that were broken, and none for what was replaced in one step.

use vellum::addr::{Ipa, Pa};
use vellum::arch;
use vellum::arch::fake::{Access, Cause, Features, Machine, Outcome};

use crate::{
    BLOCK, HOST, RAM, READ, WRITE, begin, block, build_table, causes, guest_with, invalidate, page,
    store, table,
};

const BLOCK_BYTES: u64 = 0x20_0000;
/// Tables for the blocks.
const TABLES: u64 = 0x30_0000;
const COUNT: u64 = 4;

const fn slot(number: u64) -> u64 {
    BLOCK + 8 * number
}

const fn table_of(number: u64) -> u64 {
    TABLES + 0x1000 * number
}

const fn ipa_of(number: u64) -> Ipa {
    Ipa::new(RAM.raw() + BLOCK_BYTES * number)
}

const fn host_of(number: u64) -> u64 {
    HOST + BLOCK_BYTES * number
}

const fn old(number: u64) -> u64 {
    block(host_of(number), READ | WRITE)
}

/// A guest of `COUNT` blocks, and tables that say the same and hang nowhere yet.
fn guest(bbm: u8) -> Machine {
    let machine = guest_with(Features {
        bbm,
        ..Features::default()
    });
    for number in 0..COUNT {
        store(slot(number), 0, old(number));
    }
    arch::dsb_ishst();
    for number in 0..COUNT {
        build_table(table_of(number), host_of(number), READ | WRITE);
    }
    machine
}

/// Breaks all blocks, runs `invalidation`, makes all tables.
fn split_together(invalidation: impl FnOnce()) -> Machine {
    let machine = guest(0);
    for number in 0..COUNT {
        store(slot(number), old(number), 0);
    }
    invalidation();
    for number in 0..COUNT {
        store(slot(number), 0, table(table_of(number)));
    }
    arch::dsb_ishst();
    machine
}

/// One address of each block in `named`, then stage 1, each completed.
fn invalidate_each(named: impl Iterator<Item = u64>) {
    arch::dsb_ishst();
    for number in named {
        arch::tlbi_ipas2e1is(ipa_of(number));
    }
    arch::dsb_ish();
    arch::tlbi_vmalle1is();
    arch::dsb_ish();
}

fn assert_translates(machine: &Machine) {
    for number in 0..COUNT {
        for at in [0, 0x1000, BLOCK_BYTES - 0x1000] {
            let ipa = Ipa::new(ipa_of(number).raw() + at);
            let hit = Outcome::Hit(Pa::new(host_of(number) + at));
            assert_eq!(machine.outcomes(1, ipa, Access::Write), [hit]);
        }
    }
}

#[test]
fn good_a_batch_is_broken_under_one_invalidation_pair() {
    let machine = split_together(|| invalidate_each(0..COUNT));
    assert_eq!(machine.violations(), []);
    assert_translates(&machine);
}

#[test]
fn good_a_batch_is_broken_under_one_invalidation_of_its_vmid() {
    let machine = split_together(|| {
        arch::dsb_ishst();
        arch::tlbi_vmalls12e1is();
        arch::dsb_ish();
    });
    assert_eq!(machine.violations(), []);
    assert_translates(&machine);
}

#[test]
fn good_a_batch_is_broken_under_one_range() {
    let machine = split_together(|| {
        arch::dsb_ishst();
        arch::tlbi_ripas2e1is(RAM, COUNT * 512);
        arch::dsb_ish();
        arch::tlbi_vmalle1is();
        arch::dsb_ish();
    });
    assert_eq!(machine.violations(), []);
    assert_translates(&machine);
}

#[test]
fn bad_a_block_of_the_batch_that_was_not_named_is_caught() {
    for forgotten in 0..COUNT {
        let named = (0..COUNT).filter(|number| *number != forgotten);
        let machine = split_together(|| invalidate_each(named));
        let found = causes(&machine);
        assert!(found.contains(&Cause::NotInvalidated), "{forgotten}");
    }
}

#[test]
fn bad_a_block_broken_after_the_barrier_of_its_batch_is_caught() {
    let machine = guest(0);
    for number in 1..COUNT {
        store(slot(number), old(number), 0);
    }
    arch::dsb_ishst();
    store(slot(0), old(0), 0);
    for number in 0..COUNT {
        arch::tlbi_ipas2e1is(ipa_of(number));
    }
    arch::dsb_ish();
    arch::tlbi_vmalle1is();
    arch::dsb_ish();
    store(slot(0), 0, table(table_of(0)));
    assert_eq!(causes(&machine)[0], Cause::BeforeBarrier);
}

#[test]
fn bad_a_table_of_the_batch_made_before_stage_1_was_invalidated_is_caught() {
    let machine = guest(0);
    for number in 0..COUNT {
        store(slot(number), old(number), 0);
    }
    arch::dsb_ishst();
    for number in 0..COUNT {
        arch::tlbi_ipas2e1is(ipa_of(number));
    }
    arch::dsb_ish();
    store(slot(0), 0, table(table_of(0)));
    assert_eq!(causes(&machine)[0], Cause::CombinedLeft);
    arch::tlbi_vmalle1is();
    arch::dsb_ish();
    for number in 1..COUNT {
        store(slot(number), 0, table(table_of(number)));
    }
    assert_eq!(machine.violations(), []);
}

#[test]
fn good_an_empty_table_is_made_for_a_broken_block() {
    let machine = guest(0);
    store(slot(0), old(0), 0);
    invalidate(ipa_of(0));
    let empty = TABLES + 0x1000 * COUNT;
    begin(empty);
    store(slot(0), 0, table(empty));
    store(empty, 0, page(host_of(0), READ | WRITE));
    arch::dsb_ishst();
    assert_eq!(machine.violations(), []);
    let hit = Outcome::Hit(Pa::new(host_of(0)));
    assert_eq!(machine.outcomes(1, RAM, Access::Write), [hit]);
}

#[test]
fn good_with_bbm_level_2_a_batch_needs_no_invalidation_to_be_split() {
    let machine = guest(2);
    for number in 0..COUNT {
        store(slot(number), old(number), table(table_of(number)));
        for ipa in [ipa_of(number), Ipa::new(ipa_of(number).raw() + 0x1000)] {
            let outcomes = machine.outcomes(1, ipa, Access::Write);
            let hit = |outcome: &Outcome| matches!(outcome, Outcome::Hit(_));
            assert!(outcomes.iter().all(hit), "{outcomes:?}");
        }
    }
    assert_eq!(machine.violations(), []);
}

/// Splits a block at level 2, owing its invalidation, and protects its second page.
fn protect_after_bbm_2_split(invalidation: impl FnOnce(Ipa)) -> Vec<Cause> {
    let machine = guest(2);
    store(slot(0), old(0), table(table_of(0)));
    let second = table_of(0) + 8;
    store(
        second,
        page(host_of(0) + 0x1000, READ | WRITE),
        page(host_of(0) + 0x1000, READ),
    );
    let ipa = Ipa::new(RAM.raw() + 0x1000);
    invalidation(ipa);
    machine.assert_no_writable(5, ipa, 0x1000);
    causes(&machine)
}

#[test]
fn good_page_protected_after_a_bbm_2_split_drops_the_block_entry_by_its_address() {
    assert_eq!(protect_after_bbm_2_split(invalidate), []);
}

#[test]
fn bad_page_protected_after_a_bbm_2_split_without_invalidation_is_written_by_the_block_entry() {
    let found = protect_after_bbm_2_split(|_| arch::dsb_ish());
    assert!(found.contains(&Cause::NotInvalidated));
}
