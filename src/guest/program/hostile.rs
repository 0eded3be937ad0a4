//! What a hostile guest does, and what a machine would answer.

use vellum::guest::abi::{DATA, NOT_SUPPORTED};

use super::trap::{Caught, probe};
use super::{Done, affinity_of, asm, params};

const NO_RAM: u64 = 0x7000_0000;
const NO_DEVICE: u64 = 0x0b00_0000;
const GICD: u64 = 0x0800_0000;
/// The CPU interface of GICv2, which is mapped; nothing of GICv3.
const GICC: u64 = 0x0801_0000;

const UNDEFINED: u64 = 0x00;
/// A system register that traps.
const REGISTER: u64 = 0x18;
const INSTRUCTION_ABORT: u64 = 0x21;
const DATA_ABORT: u64 = 0x25;
/// Synchronous external abort, not on a table walk.
const EXTERNAL: u64 = 0x10;
/// The same on a table walk, of some level: these bits are set.
const ON_WALK: u64 = 0x14;
const ALIGNMENT: u64 = 0x21;
/// ESR_EL1: the fault status, cache maintenance or address translation, a write.
const STATUS: u64 = 0x3f;
const CM: u64 = 1 << 8;
const WNR: u64 = 1 << 6;

/// CPACR_EL1.{FPEN,ZEN}.
const SVE_AND_FP: u64 = 0b11 << 20 | 0b11 << 16;

const PSCI_VERSION: u64 = 0x8400_0000;
const PSCI_INVALID_PARAMETERS: u64 = (-2_i64) as u64;
const PSCI_ALREADY_ON: u64 = (-4_i64) as u64;

/// Checks made, and which of them failed.
pub(super) struct Score {
    checks: u64,
    failed: u64,
}

impl Score {
    pub(super) fn new() -> Self {
        Self {
            checks: 0,
            failed: 0,
        }
    }

    pub(super) fn done(self) -> Done {
        Done::ok(self.checks, self.failed)
    }

    pub(super) fn check(&mut self, good: bool) {
        self.failed |= u64::from(!good) << self.checks;
        self.checks += 1;
    }

    fn external(&mut self, caught: Option<Caught>, class: u64, address: u64) {
        let right = |caught: Caught| {
            caught.class() == class && caught.esr & 0x3f == EXTERNAL && caught.far == address
        };
        self.check(caught.is_some_and(right));
    }

    fn undefined(&mut self, caught: Option<Caught>) {
        self.check(caught.is_some_and(|caught| caught.class() == UNDEFINED));
    }
}

/// All checks; `pages` is the first of two writable pages.
pub(super) fn run(pages: u64) -> Done {
    let mut score = Score::new();
    outside_memory(&mut score);
    calls(&mut score);
    instructions(&mut score);
    devices(&mut score);
    memory(&mut score, pages);
    registers(&mut score);
    identification(&mut score);
    walks(&mut score);
    unaligned(&mut score, pages);
    score.done()
}

/// Bits 0 to 4.
fn outside_memory(score: &mut Score) {
    let caught = probe(|| ignore(asm::load(NO_RAM)));
    score.external(caught, DATA_ABORT, NO_RAM);
    let caught = probe(|| asm::store(NO_RAM + 8, 1));
    score.external(caught, DATA_ABORT, NO_RAM + 8);
    let caught = probe(|| asm::store_pair(NO_RAM + 16));
    score.check(caught.is_some_and(|caught| caught.esr & (STATUS | WNR) == EXTERNAL | WNR));
    let caught = probe(|| ignore(asm::load_word(NO_DEVICE)));
    score.external(caught, DATA_ABORT, NO_DEVICE);
    // Stage 1 forbids execution outside the image, so the abort is stage 1's: it must arrive all the same.
    let caught = probe(|| asm::call(NO_RAM));
    score.check(caught.is_some_and(|caught| caught.class() == INSTRUCTION_ABORT));
}

/// Bits 5 to 10.
fn calls(score: &mut Score) {
    score.check(asm::hvc(0xc600_ffff) == NOT_SUPPORTED);
    score.check(asm::hvc(0x1234_5678_9abc_def0) == NOT_SUPPORTED);
    score.check(asm::cpu_on(0xff_ffff, 1) == PSCI_INVALID_PARAMETERS);
    score.check(asm::cpu_on(affinity_of(0), 0) == PSCI_ALREADY_ON);
    let mut answer = 0;
    let caught = probe(|| answer = asm::smc(PSCI_VERSION));
    score
        .check(caught.is_some_and(|caught| caught.class() == UNDEFINED) || answer == NOT_SUPPORTED);
    score.check(asm::hvc_at_el0() >> 26 == UNDEFINED);
}

/// Bits 11 to 14.
fn instructions(score: &mut Score) {
    score.undefined(probe(asm::undefined));
    score.undefined(probe(|| ignore(asm::pmu_counter())));
    // Where the CPU has SVE, EL1's own trap comes first and must not be what answers.
    asm::set_feature_access(SVE_AND_FP);
    score.undefined(probe(|| ignore(asm::sve_control())));
    score.undefined(probe(|| ignore(asm::vttbr())));
}

/// Bits 15 and 16: whatever the answer is, it is one that this vCPU survives.
fn devices(score: &mut Score) {
    for offset in [0, 0x4, 0x8, 0xfe8, 0xffc] {
        let _caught = probe(|| ignore(asm::load_byte(GICD + offset)));
        let _caught = probe(|| ignore(asm::load(GICD + (offset & !7))));
    }
    score.check(true);
    for offset in [0x101, 0x402, 0xf01] {
        let _caught = probe(|| asm::store_word(GICD + offset, u64::MAX));
    }
    score.check(asm::load_word(GICD + 4) != u64::MAX);
}

/// Bits 17 to 20: atomics, cache maintenance and a store across pages do to memory what they should.
fn memory(score: &mut Score, pages: u64) {
    let pages = pages.max(DATA);
    asm::store(pages, 41);
    asm::exclusive_add(pages);
    score.check(asm::load(pages) == 42);
    asm::clean_and_invalidate(pages);
    score.check(asm::load(pages) == 42);
    // Not written since logging began: on a read-only leaf this is a permission fault.
    asm::clean_and_invalidate(pages + 0x1000);
    asm::invalidate(pages + 0x1000);
    score.check(asm::load(pages) == 42);
    asm::store(pages + 0x1000 - 4, 0x1122_3344_5566_7788);
    let halves = asm::load_word(pages + 0xffc) | asm::load_word(pages + 0x1000) << 32;
    score.check(halves == 0x1122_3344_5566_7788);
}

/// Bits 21 and 22: a device is reached through every register, and keeps what it is given.
fn registers(score: &mut Score) {
    const UARTIBRD: u64 = 0x0900_0024;
    const DIVISOR: u64 = 0x1234;
    asm::store_word(UARTIBRD, DIVISOR);
    let loaded = asm::load_and_store_through_kept(UARTIBRD);
    score.check(loaded.iter().all(|value| *value == DIVISOR));
    score.check(asm::load_word(UARTIBRD) == DIVISOR);
}

/// Bits 23 to 25: registers of hidden features do not exist, those beside them do, and only little-endian is promised. With FEAT_IDST
/// an ID register that does not exist is told by the class of one that traps.
fn identification(score: &mut Score) {
    let caught = probe(|| ignore(asm::sme_identification()));
    score.check(caught.is_some_and(|caught| matches!(caught.class(), UNDEFINED | REGISTER)));
    let caught = probe(|| ignore(asm::revision() ^ asm::auxiliary()));
    score.check(caught.is_none());
    score.check(asm::endianness() & (0xf << 8 | 0xf << 16) == 0);
}

/// Bits 26 to 29: tables where there is no memory, and where there is a device, are answered by an error; so is an address
/// translation over them.
fn walks(score: &mut Score) {
    for tables in [NO_RAM, GICC] {
        let (load, translation) = asm::with_upper_tables(tables, || {
            let load = probe(|| ignore(asm::load(asm::UPPER)));
            (load, probe(|| ignore(asm::translate(asm::UPPER))))
        });
        let on_walk =
            |caught: Caught| caught.class() == DATA_ABORT && caught.esr & ON_WALK == ON_WALK;
        score.check(load.is_some_and(on_walk));
        score.check(translation.is_some_and(|caught| on_walk(caught) && caught.esr & CM != 0));
    }
}

/// Bit 30: a device that the guest takes for memory is one all the same.
fn unaligned(score: &mut Score, pages: u64) {
    let tables = pages.max(DATA);
    asm::store(tables, asm::FIRST_GIGABYTE);
    asm::dsb();
    let caught = asm::with_upper_tables(tables, || {
        probe(|| ignore(asm::load(asm::UPPER + GICC + 1)))
    });
    let expected = if params().gic == 2 {
        ALIGNMENT
    } else {
        EXTERNAL
    };
    let right = |caught: Caught| caught.class() == DATA_ABORT && caught.esr & STATUS == expected;
    score.check(caught.is_some_and(right));
}

/// The value of an access that is expected to fault.
fn ignore(_value: u64) {}
