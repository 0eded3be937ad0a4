//! The oracle itself: each of its rules with raw instructions in the wrong order, which it must catch, and in the right
//! one, which it must let pass.
//!
//! Descriptors are spelled here by hand, from the Arm ARM, so that neither `mmu::descriptor` nor the fake's decoder is
//! judged by itself.
#![cfg(not(loom))]

mod batching;
mod collapsing;
mod indirection;
mod machine;
mod making;
mod marking;
mod protecting;
mod roots;
mod tables;

use vellum::addr::{Ipa, Pa};
use vellum::arch;
use vellum::arch::fake::{Access, Cause, Features, Machine, Outcome, Violation};

pub(crate) const ROOT: u64 = 0x10_0000;
pub(crate) const LEVEL2: u64 = 0x10_1000;
pub(crate) const LEVEL3: u64 = 0x10_2000;
pub(crate) const OTHER_ROOT: u64 = 0x20_0000;
pub(crate) const SPARE: u64 = 0x20_1000;
pub(crate) const VMID: u64 = 5;
pub(crate) const VTTBR: u64 = VMID << 48 | ROOT;
pub(crate) const OTHER_VTTBR: u64 = (VMID + 1) << 48 | OTHER_ROOT;

/// Where the guest's memory begins, and the slots that translate it.
pub(crate) const RAM: Ipa = Ipa::new(0x4000_0000);
pub(crate) const TO_RAM: u64 = ROOT + 8;
pub(crate) const BLOCK: u64 = LEVEL2;
pub(crate) const PAGE: u64 = LEVEL3;

pub(crate) const READ: u64 = 1 << 6;
pub(crate) const WRITE: u64 = 1 << 7;
pub(crate) const YOUNG: u64 = 1 << 10;
pub(crate) const NORMAL: u64 = 0b1111 << 2 | 0b11 << 8;
pub(crate) const DEVICE: u64 = 0b0001 << 2;
pub(crate) const HOST: u64 = 0x8000_0000;

pub(crate) const fn table(at: u64) -> u64 {
    at | 0b11
}
pub(crate) const fn page(to: u64, bits: u64) -> u64 {
    to | bits | NORMAL | YOUNG | 0b11
}
pub(crate) const fn block(to: u64, bits: u64) -> u64 {
    to | bits | NORMAL | YOUNG | 0b01
}
pub(crate) const READ_ONLY: u64 = page(HOST, READ);
pub(crate) const WRITABLE: u64 = page(HOST, READ | WRITE);
pub(crate) const WRITABLE_BLOCK: u64 = block(HOST, READ | WRITE);

pub(crate) fn store(slot: u64, old: u64, new: u64) {
    arch::note_descriptor(Pa::new(slot), old, new);
}

pub(crate) fn begin(at: u64) {
    arch::note_table(Pa::new(at), true);
}

pub(crate) fn end(at: u64) {
    arch::note_table(Pa::new(at), false);
}

/// A guest on CPUs 0 and 1 whose level-2 table is empty.
pub(crate) fn guest_with(features: Features) -> Machine {
    let machine = Machine::new(3, features);
    begin(ROOT);
    begin(LEVEL2);
    store(TO_RAM, 0, table(LEVEL2));
    machine.load_vttbr(0, VTTBR);
    machine.load_vttbr(1, VTTBR);
    machine
}

/// The same with its first page mapped by `descriptor`.
pub(crate) fn guest_with_page(descriptor: u64) -> Machine {
    let machine = guest_with(Features::default());
    begin(LEVEL3);
    store(BLOCK, 0, table(LEVEL3));
    store(PAGE, 0, descriptor);
    arch::dsb_ishst();
    machine
}

/// The same with its first 2 MiB mapped by a writable block.
pub(crate) fn guest_with_block(features: Features) -> Machine {
    let machine = guest_with(features);
    store(BLOCK, 0, WRITABLE_BLOCK);
    arch::dsb_ishst();
    machine
}

pub(crate) fn invalidate(ipa: Ipa) {
    arch::dsb_ishst();
    arch::tlbi_ipas2e1is(ipa);
    arch::dsb_ish();
    arch::tlbi_vmalle1is();
    arch::dsb_ish();
}

/// Fills the level-3 table, which hangs nowhere yet, with what the block said.
pub(crate) fn build_level3(bits: u64) {
    build_table(LEVEL3, HOST, bits);
}

/// Begins the level-3 table `at` and fills it with the pages from `to`.
pub(crate) fn build_table(at: u64, to: u64, bits: u64) {
    begin(at);
    for index in 0..512 {
        store(at + index * 8, 0, page(to + index * 0x1000, bits));
    }
}

pub(crate) fn causes(machine: &Machine) -> Vec<Cause> {
    let cause = |violation| match violation {
        Violation::MadeOverStale { cause, .. }
        | Violation::StaleWritable { cause, .. }
        | Violation::StaleTranslation { cause, .. } => cause,
        other => panic!("unexpected: {other}"),
    };
    machine.take_violations().into_iter().map(cause).collect()
}

pub(crate) fn writes_hit(machine: &Machine, cpu: usize, ipa: Ipa) -> bool {
    let outcomes = machine.outcomes(cpu, ipa, Access::Write);
    outcomes
        .iter()
        .any(|outcome| matches!(outcome, Outcome::Hit(_)))
}

pub(crate) fn writes_fault(machine: &Machine, cpu: usize, ipa: Ipa) -> bool {
    let outcomes = machine.outcomes(cpu, ipa, Access::Write);
    outcomes
        .iter()
        .any(|outcome| matches!(outcome, Outcome::Abort(_)))
}
