//! Tables that become blocks again: walk caches, what hangs below them, and when the table may be given up.

use vellum::addr::{Ipa, Pa};
use vellum::arch;
use vellum::arch::fake::{Access, Cause, Change, Features, Machine, Outcome, Violation};

use crate::{
    BLOCK, DEVICE, HOST, LEVEL2, LEVEL3, PAGE, RAM, READ, READ_ONLY, TO_RAM, WRITABLE,
    WRITABLE_BLOCK, WRITE, YOUNG, begin, block, build_level3, build_table, causes, end, guest_with,
    guest_with_block, invalidate, page, store, table, writes_hit,
};

const GIB: u64 = 0x4000_0000;
/// A second table below the level-2 one.
const SECOND: u64 = 0x30_0000;

/// A guest whose first 2 MiB are 512 pages that a block could replace.
fn guest(bbm: u8) -> Machine {
    let machine = guest_with(Features {
        bbm,
        ..Features::default()
    });
    build_level3(READ | WRITE);
    store(BLOCK, 0, table(LEVEL3));
    arch::dsb_ishst();
    machine
}

fn invalidate_vmid() {
    arch::dsb_ishst();
    arch::tlbi_vmalls12e1is();
    arch::dsb_ish();
}

/// Breaks the table, runs `invalidation`, makes the block, gives the table up.
fn collapse_by_breaking(invalidation: impl FnOnce()) -> Machine {
    let machine = guest(0);
    store(BLOCK, table(LEVEL3), 0);
    invalidation();
    store(BLOCK, 0, WRITABLE_BLOCK);
    arch::dsb_ishst();
    end(LEVEL3);
    machine
}

#[test]
fn good_collapse_at_level_0_invalidates_the_vmid_before_the_block_is_made() {
    let machine = collapse_by_breaking(invalidate_vmid);
    begin(LEVEL3);
    assert_eq!(machine.violations(), []);
    for at in [0, 0x1000, 0x1f_f000] {
        let hit = Outcome::Hit(Pa::new(HOST + at));
        let ipa = Ipa::new(RAM.raw() + at);
        assert_eq!(machine.outcomes(1, ipa, Access::Write), [hit]);
    }
}

#[test]
fn good_collapse_at_level_0_may_invalidate_the_whole_range_of_the_table() {
    let machine = collapse_by_breaking(|| {
        arch::dsb_ishst();
        arch::tlbi_ripas2e1is(RAM, 512);
        arch::dsb_ish();
        arch::tlbi_vmalle1is();
        arch::dsb_ish();
    });
    assert_eq!(machine.violations(), []);
}

#[test]
fn bad_collapse_at_level_0_by_one_address_leaves_the_other_pages() {
    let machine = collapse_by_breaking(|| invalidate(RAM));
    let found = causes(&machine);
    assert!(found.len() >= 511, "{}", found.len());
    assert!(found.iter().all(|cause| *cause == Cause::NotInvalidated));
}

#[test]
fn bad_collapse_at_level_0_without_invalidation_is_caught_and_so_is_the_freed_table() {
    let machine = collapse_by_breaking(arch::dsb_ish);
    let found = machine.take_violations();
    let freed = Violation::TableFreedWhileWalkable {
        table: Pa::new(LEVEL3),
    };
    assert_eq!(found.last(), Some(&freed));
    assert!(matches!(found[0], Violation::MadeOverStale { .. }));
}

#[test]
fn bad_collapse_at_level_0_of_stage_1_only_leaves_walk_caches() {
    let machine = collapse_by_breaking(|| {
        arch::dsb_ishst();
        arch::tlbi_vmalle1is();
        arch::dsb_ish();
    });
    let freed = Violation::TableFreedWhileWalkable {
        table: Pa::new(LEVEL3),
    };
    assert!(machine.violations().contains(&freed));
}

#[test]
fn bad_table_to_block_in_one_step_below_bbm_level_2_is_caught() {
    let machine = guest(0);
    store(BLOCK, table(LEVEL3), WRITABLE_BLOCK);
    let changed = Change::Size;
    assert_eq!(
        machine.violations(),
        [Violation::BreakBeforeMake { ipa: RAM, changed }]
    );
}

#[test]
fn good_collapse_at_level_2_keeps_every_translation_in_every_moment() {
    let machine = guest(2);
    let hits = || {
        for at in [0, 0x1000, 0x1f_f000] {
            let hit = Outcome::Hit(Pa::new(HOST + at));
            let ipa = Ipa::new(RAM.raw() + at);
            assert_eq!(machine.outcomes(1, ipa, Access::Write), [hit]);
        }
    };
    hits();
    store(BLOCK, table(LEVEL3), WRITABLE_BLOCK);
    hits();
    invalidate_vmid();
    hits();
    end(LEVEL3);
    begin(LEVEL3);
    assert_eq!(machine.violations(), []);
}

#[test]
fn bad_table_reused_before_the_invalidation_of_a_level_2_collapse_is_caught() {
    let machine = guest(2);
    store(BLOCK, table(LEVEL3), WRITABLE_BLOCK);
    arch::dsb_ish();
    end(LEVEL3);
    begin(LEVEL3);
    let table = Pa::new(LEVEL3);
    assert_eq!(
        machine.violations(),
        [
            Violation::TableFreedWhileWalkable { table },
            Violation::TableReusedWhileWalkable { table }
        ]
    );
}

#[test]
fn bad_table_reused_before_its_invalidation_is_complete_is_caught() {
    let machine = guest(2);
    store(BLOCK, table(LEVEL3), WRITABLE_BLOCK);
    arch::dsb_ishst();
    arch::tlbi_vmalls12e1is();
    end(LEVEL3);
    let table = Pa::new(LEVEL3);
    assert_eq!(
        machine.violations(),
        [Violation::TableFreedWhileWalkable { table }]
    );
}

#[test]
fn bad_late_write_permission_in_a_detached_table_still_lets_the_guest_write() {
    let machine = guest_with(Features {
        bbm: 2,
        ..Features::default()
    });
    build_level3(READ);
    store(BLOCK, 0, table(LEVEL3));
    arch::dsb_ishst();
    store(BLOCK, table(LEVEL3), block(HOST, READ));
    assert!(!writes_hit(&machine, 1, RAM));
    store(PAGE, READ_ONLY, WRITABLE);
    assert!(writes_hit(&machine, 1, RAM), "through a cached table entry");
    invalidate_vmid();
    machine.assert_no_writable(5, RAM, 0x20_0000);
    assert_eq!(machine.violations(), []);
}

#[test]
fn bad_block_protected_by_one_address_leaves_pages_of_its_former_table_writable() {
    let machine = guest(2);
    store(BLOCK, table(LEVEL3), WRITABLE_BLOCK);
    store(BLOCK, WRITABLE_BLOCK, block(HOST, READ));
    invalidate(RAM);
    machine.assert_no_writable(5, RAM, 0x20_0000);
    let found = causes(&machine);
    assert!(found.len() >= 511 && found.iter().all(|cause| *cause == Cause::NotInvalidated));
}

/// A guest whose first GiB is 512 blocks, one of them a table: what a 1 GiB block could replace.
fn gib(bbm: u8) -> Machine {
    let machine = guest_with(Features {
        bbm,
        ..Features::default()
    });
    build_level3(READ | WRITE);
    store(BLOCK, 0, table(LEVEL3));
    for index in 1..512 {
        let to = block(HOST + index * 0x20_0000, READ | WRITE);
        store(LEVEL2 + index * 8, 0, to);
    }
    arch::dsb_ishst();
    machine
}

#[test]
fn good_a_subtree_is_collapsed_and_given_up_bottom_and_top() {
    for bbm in [0, 2] {
        let machine = gib(bbm);
        if bbm == 0 {
            store(TO_RAM, table(LEVEL2), 0);
            invalidate_vmid();
            store(TO_RAM, 0, WRITABLE_BLOCK);
        } else {
            store(TO_RAM, table(LEVEL2), WRITABLE_BLOCK);
            invalidate_vmid();
        }
        for at in [LEVEL3, LEVEL2] {
            end(at);
            begin(at);
        }
        assert_eq!(machine.violations(), [], "level {bbm}");
        let last = GIB - 0x1000;
        let hit = Outcome::Hit(Pa::new(HOST + last));
        let ipa = Ipa::new(RAM.raw() + last);
        arch::dsb_ishst();
        assert_eq!(machine.outcomes(1, ipa, Access::Write), [hit]);
    }
}

#[test]
fn bad_lower_table_of_a_collapsed_subtree_reused_early_is_caught() {
    let machine = gib(2);
    store(TO_RAM, table(LEVEL2), WRITABLE_BLOCK);
    arch::dsb_ishst();
    // Named is only what hangs beside the table.
    arch::tlbi_ipas2e1is(Ipa::new(RAM.raw() + 0x20_0000));
    arch::dsb_ish();
    arch::tlbi_vmalle1is();
    arch::dsb_ish();
    end(LEVEL3);
    let table = Pa::new(LEVEL3);
    assert_eq!(
        machine.violations(),
        [Violation::TableFreedWhileWalkable { table }]
    );
}

#[test]
fn good_a_subtree_replaces_a_block_by_one_store() {
    for bbm in [0, 2] {
        let machine = guest_with(Features {
            bbm,
            ..Features::default()
        });
        store(TO_RAM, table(LEVEL2), 0);
        invalidate_vmid();
        end(LEVEL2);
        store(TO_RAM, 0, WRITABLE_BLOCK);
        arch::dsb_ishst();
        begin(LEVEL2);
        build_table(SECOND, HOST, READ | WRITE);
        store(LEVEL2, 0, table(SECOND));
        for index in 1..512 {
            let to = block(HOST + index * 0x20_0000, READ | WRITE);
            store(LEVEL2 + index * 8, 0, to);
        }
        if bbm == 0 {
            store(TO_RAM, WRITABLE_BLOCK, 0);
            invalidate(RAM);
            store(TO_RAM, 0, table(LEVEL2));
        } else {
            store(TO_RAM, WRITABLE_BLOCK, table(LEVEL2));
        }
        arch::dsb_ishst();
        assert_eq!(machine.violations(), [], "level {bbm}");
        for at in [0, 0x1000, 0x20_0000, GIB - 0x1000] {
            let hit = Outcome::Hit(Pa::new(HOST + at));
            let ipa = Ipa::new(RAM.raw() + at);
            assert_eq!(machine.outcomes(1, ipa, Access::Write), [hit]);
        }
    }
}

/// Unlinks the level-3 table while CPU 1 is in a section, invalidates, runs `wait`, gives the table up.
fn free_under_a_walker(wait: impl FnOnce(&Machine)) -> Machine {
    let machine = guest(2);
    machine.on(1, || arch::note_section(true));
    store(BLOCK, table(LEVEL3), WRITABLE_BLOCK);
    invalidate_vmid();
    wait(&machine);
    end(LEVEL3);
    machine
}

#[test]
fn good_table_is_freed_once_every_walker_has_left_its_section() {
    let machine = free_under_a_walker(|machine| {
        machine.on(1, || arch::note_section(false));
        // A section that begins now finds the block.
        machine.on(1, || arch::note_section(true));
    });
    assert_eq!(machine.violations(), []);
}

#[test]
fn bad_table_freed_before_its_grace_period_is_caught() {
    let machine = free_under_a_walker(|_| {});
    let table = Pa::new(LEVEL3);
    assert_eq!(
        machine.violations(),
        [Violation::TableFreedInGracePeriod { table }]
    );
}

#[test]
fn bad_table_freed_inside_the_section_that_unlinked_it_is_caught() {
    let machine = guest(2);
    arch::note_section(true);
    store(BLOCK, table(LEVEL3), WRITABLE_BLOCK);
    invalidate_vmid();
    end(LEVEL3);
    let table = Pa::new(LEVEL3);
    assert_eq!(
        machine.violations(),
        [Violation::TableFreedInGracePeriod { table }]
    );
}

#[test]
fn bad_lower_table_of_a_subtree_freed_before_its_grace_period_is_caught() {
    let machine = gib(2);
    machine.on(2, || arch::note_section(true));
    store(TO_RAM, table(LEVEL2), WRITABLE_BLOCK);
    invalidate_vmid();
    end(LEVEL3);
    let table = Pa::new(LEVEL3);
    assert_eq!(
        machine.violations(),
        [Violation::TableFreedInGracePeriod { table }]
    );
}

/// A page that leads elsewhere, or to memory of another type, is in the table.
#[test]
fn bad_table_replaced_by_a_block_that_says_otherwise_is_caught() {
    let device = HOST | READ | WRITE | DEVICE | YOUNG | 0b11;
    for other in [page(HOST + 0x40_0000, READ | WRITE), device] {
        let machine = guest(2);
        store(PAGE, WRITABLE, 0);
        invalidate(RAM);
        store(PAGE, 0, other);
        store(BLOCK, table(LEVEL3), WRITABLE_BLOCK);
        let changed = Change::Contents;
        assert_eq!(
            machine.violations(),
            [Violation::BreakBeforeMake { ipa: RAM, changed }]
        );
    }
}

#[test]
fn bad_block_replaced_by_a_table_that_says_otherwise_is_caught() {
    let machine = guest_with_block(Features {
        bbm: 2,
        ..Features::default()
    });
    build_level3(READ | WRITE);
    store(PAGE, WRITABLE, page(HOST + 0x1000, READ | WRITE));
    store(BLOCK, WRITABLE_BLOCK, table(LEVEL3));
    let changed = Change::Contents;
    assert_eq!(
        machine.violations(),
        [Violation::BreakBeforeMake { ipa: RAM, changed }]
    );
}
