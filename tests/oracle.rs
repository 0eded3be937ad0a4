//! The oracle itself: each of its rules with raw instructions in the wrong order, which it must catch, and in the right
//! one, which it must let pass.
//!
//! Descriptors are spelled here by hand, from the Arm ARM, so that neither `mmu::descriptor` nor the fake's decoder is
//! judged by itself.
#![cfg(not(loom))]

use vellum::addr::{Ipa, Pa};
use vellum::arch;
use vellum::arch::fake::{
    Access, Cause, Change, Event, Features, Machine, Outcome, Violation, va_of,
};

const ROOT: u64 = 0x10_0000;
const LEVEL2: u64 = 0x10_1000;
const LEVEL3: u64 = 0x10_2000;
const OTHER_ROOT: u64 = 0x20_0000;
const SPARE: u64 = 0x20_1000;
const VMID: u64 = 5;
const VTTBR: u64 = VMID << 48 | ROOT;
const OTHER_VTTBR: u64 = (VMID + 1) << 48 | OTHER_ROOT;

/// Where the guest's memory begins, and the slots that translate it.
const RAM: Ipa = Ipa::new(0x4000_0000);
const TO_RAM: u64 = ROOT + 8;
const BLOCK: u64 = LEVEL2;
const PAGE: u64 = LEVEL3;

const READ: u64 = 1 << 6;
const WRITE: u64 = 1 << 7;
const YOUNG: u64 = 1 << 10;
const NORMAL: u64 = 0b1111 << 2 | 0b11 << 8;
const DEVICE: u64 = 0b0001 << 2;
const HOST: u64 = 0x8000_0000;

const fn table(at: u64) -> u64 {
    at | 0b11
}
const fn page(to: u64, bits: u64) -> u64 {
    to | bits | NORMAL | YOUNG | 0b11
}
const fn block(to: u64, bits: u64) -> u64 {
    to | bits | NORMAL | YOUNG | 0b01
}
const READ_ONLY: u64 = page(HOST, READ);
const WRITABLE: u64 = page(HOST, READ | WRITE);
const WRITABLE_BLOCK: u64 = block(HOST, READ | WRITE);

fn store(slot: u64, old: u64, new: u64) {
    arch::note_descriptor(Pa::new(slot), old, new);
}

fn begin(at: u64) {
    arch::note_table(Pa::new(at), true);
}

fn end(at: u64) {
    arch::note_table(Pa::new(at), false);
}

/// A guest on CPUs 0 and 1 whose level-2 table is empty.
fn guest_with(features: Features) -> Machine {
    let machine = Machine::new(3, features);
    begin(ROOT);
    begin(LEVEL2);
    store(TO_RAM, 0, table(LEVEL2));
    machine.load_vttbr(0, VTTBR);
    machine.load_vttbr(1, VTTBR);
    machine
}

/// The same with its first page mapped by `descriptor`.
fn guest_with_page(descriptor: u64) -> Machine {
    let machine = guest_with(Features::default());
    begin(LEVEL3);
    store(BLOCK, 0, table(LEVEL3));
    store(PAGE, 0, descriptor);
    arch::dsb_ishst();
    machine
}

/// The same with its first 2 MiB mapped by a writable block.
fn guest_with_block(features: Features) -> Machine {
    let machine = guest_with(features);
    store(BLOCK, 0, WRITABLE_BLOCK);
    arch::dsb_ishst();
    machine
}

fn invalidate(ipa: Ipa) {
    arch::dsb_ishst();
    arch::tlbi_ipas2e1is(ipa);
    arch::dsb_ish();
    arch::tlbi_vmalle1is();
    arch::dsb_ish();
}

/// Fills the level-3 table, which hangs nowhere yet, with what the block said.
fn build_level3(bits: u64) {
    begin(LEVEL3);
    for index in 0..512 {
        store(LEVEL3 + index * 8, 0, page(HOST + index * 0x1000, bits));
    }
}

fn causes(machine: &Machine) -> Vec<Cause> {
    let cause = |violation| match violation {
        Violation::MadeOverStale { cause, .. }
        | Violation::StaleWritable { cause, .. }
        | Violation::StaleTranslation { cause, .. } => cause,
        other => panic!("unexpected: {other}"),
    };
    machine.take_violations().into_iter().map(cause).collect()
}

fn writes_hit(machine: &Machine, cpu: usize, ipa: Ipa) -> bool {
    let outcomes = machine.outcomes(cpu, ipa, Access::Write);
    outcomes
        .iter()
        .any(|outcome| matches!(outcome, Outcome::Hit(_)))
}

fn writes_fault(machine: &Machine, cpu: usize, ipa: Ipa) -> bool {
    let outcomes = machine.outcomes(cpu, ipa, Access::Write);
    outcomes
        .iter()
        .any(|outcome| matches!(outcome, Outcome::Abort(_)))
}

// Break-before-make.

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

// Make.

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

// Protection and relaxation.

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
    arch::tlbi_vaae1(vellum::addr::Va::new(RAM.raw()));
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

// Tables and roots.

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

// The machine.

#[test]
fn each_cpu_has_its_block_and_its_vttbr() {
    let machine = guest_with_page(WRITABLE);
    let blocks = [0, 1, 2].map(|cpu| machine.on(cpu, arch::percpu_pointer));
    assert!(blocks[0] != blocks[1] && blocks[1] != blocks[2]);
    assert_eq!(machine.on(1, arch::vttbr), VTTBR);
    assert_eq!(
        machine.on(2, || arch::with_vttbr(VTTBR, arch::vttbr)),
        VTTBR
    );
    assert_eq!(machine.on(2, arch::vttbr), 0);
}

#[test]
fn the_log_names_what_was_executed() {
    let machine = guest_with_page(WRITABLE);
    machine.take_log();
    arch::dsb_ishst();
    arch::tlbi_ipas2e1is(RAM);
    assert_eq!(
        machine.take_log(),
        [Event::DsbIshst, Event::TlbiIpas2e1is(RAM)]
    );
}

#[test]
fn concatenated_initial_tables_are_one_root() {
    let machine = Machine::new(
        1,
        Features {
            initial_tables: 2,
            ..Features::default()
        },
    );
    begin(ROOT);
    begin(ROOT + 0x1000);
    store(ROOT + 0x1000, 0, block(HOST, READ));
    machine.load_vttbr(0, VTTBR);
    arch::dsb_ishst();
    let outcomes = machine.outcomes(0, Ipa::new(1 << 39), Access::Read);
    assert_eq!(outcomes, [Outcome::Hit(Pa::new(HOST))]);
}
