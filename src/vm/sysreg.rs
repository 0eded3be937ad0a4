//! What trapped system registers answer: identification registers that tell the guest exactly what it may use, and
//! UNDEF for what is not there.
//!
//! Identification registers are built from lists of what is *kept*, so that a feature nobody thought of reads as absent.
//! A feature is given completely or not at all. Field positions: DDI 0487 issue K.a, D24.2.

use crate::vm::debug;
use crate::vm::ptimer;
use crate::vm::trap::{SystemRegister, SystemRegisterAccess};

/// What a trapped access does.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Answer {
    /// A read of this value, or a write that has no effect.
    Value(u64),
    /// A write of ICC_SGI1R_EL1: SGIs in group 1.
    SendGroup1,
    /// A write of ICC_SGI0R_EL1: SGIs in group 0.
    SendGroup0,
    /// A register of the physical timer.
    PhysicalTimer(ptimer::Register),
    /// A debug register.
    Debug(debug::Register),
    /// A write of ICC_DIR_EL1: the end of an interrupt.
    Deactivate,
    /// The register does not exist for the guest.
    Undefined,
}

/// What the guest's identification registers depend on.
#[derive(Clone, Copy, Debug)]
pub struct Given {
    /// The virtual interrupt controller has system registers (GICv3).
    pub gic_registers: bool,
    /// Pointer authentication: instructions and keys.
    pub pauth: bool,
    /// ID_AA64MMFR0_EL1.PARange of the guest's physical address space.
    pub pa_range: u64,
    /// REVIDR_EL1 of this CPU, whose MIDR_EL1 the guest reads.
    pub revidr: u64,
}

/// Decides `access`. `real` is the machine's identification register of a CRm and op2: what all of its CPUs have.
pub fn answer(access: SystemRegisterAccess, given: Given, real: impl Fn(u8, u8) -> u64) -> Answer {
    let SystemRegister {
        op0,
        op1,
        crn,
        crm,
        op2,
    } = access.register;
    match (op0, op1, crn, crm, op2) {
        // Identification registers cannot be written. AArch32's (CRm 1 to 3) and reserved ones read as zero.
        (3, 0, 0, 1..=7, _) if access.write => Answer::Undefined,
        (3, 0, 0, 1..=3, _) => Answer::Value(0),
        (3, 0, 0, 4..=7, _) => Answer::Value(identification(crm, op2, real(crm, op2), given)),
        // REVIDR_EL1 and AIDR_EL1 trap together with SMIDR_EL1, which does not exist.
        (3, 0, 0, 0, 6) if !access.write => Answer::Value(given.revidr),
        (3, 1, 0, 0, 7) if !access.write => Answer::Value(0),
        // ACTLR_EL1 has nothing to offer.
        (3, 0, 1, 0, 1) => Answer::Value(0),
        (3, 0, 12, 11, 5) if access.write && given.gic_registers => Answer::SendGroup1,
        (3, 0, 12, 11, 1) if access.write && given.gic_registers => Answer::Deactivate,
        (3, 0, 12, 11, 7) if access.write && given.gic_registers => Answer::SendGroup0,
        // ICC_ASGI1R_EL1: the other security state's group 1, which does not exist.
        (3, 0, 12, 11, 6) if access.write && given.gic_registers => Answer::Value(0),
        // DC ISW, CSW, CISW and their tag variants do nothing: caches are the machine's, shared with other guests. A guest's
        // memory is cleaned before it sees it. With FEAT_S2FWB it is coherent from then on; without, a guest that wrote
        // through its caches, cleans them by set and way and turns them off reads from memory what it was before.
        (1, 0, 7, 6 | 10 | 14, 2 | 4 | 6) => Answer::Value(0),
        (3, 3, 14, 2, 0) => Answer::PhysicalTimer(ptimer::Register::Value),
        (3, 3, 14, 2, 1) => Answer::PhysicalTimer(ptimer::Register::Control),
        (3, 3, 14, 2, 2) => Answer::PhysicalTimer(ptimer::Register::Compare),
        // ICC_SRE_EL1: system registers, no bypass, and no way to have it otherwise.
        (3, 0, 12, 12, 5) if given.gic_registers => Answer::Value(0b111),
        (2, ..) => debug::register(access).map_or(Answer::Undefined, Answer::Debug),
        _ => Answer::Undefined,
    }
}

/// A four-bit field at `low`.
const fn field(low: u32) -> u64 {
    0xf << low
}

/// The four-bit fields whose lowest bits are listed.
const fn fields(low: &[u32]) -> u64 {
    match low {
        [first, rest @ ..] => field(*first) | fields(rest),
        [] => 0,
    }
}

/// `value` with the field at `low` no larger than `most`.
fn at_most(value: u64, low: u32, most: u64) -> u64 {
    let found = value >> low & 0xf;
    value & !field(low) | found.min(most) << low
}

fn identification(crm: u8, op2: u8, real: u64, given: Given) -> u64 {
    const VA_RANGE: u32 = 16;
    let authentication = |kept: u64| if given.pauth { kept } else { 0 };
    match (crm, op2) {
        (4, 0) => pfr0(real, given),
        // ID_AA64PFR1_EL1: BT, SSBS.
        (4, 1) => real & fields(&[0, 4]),
        (5, 0) => dfr0(),
        // ID_AA64ISAR0_EL1: everything but TME.
        (6, 0) => real & !fields(&[0, 24]),
        // ID_AA64ISAR1_EL1: everything but LS64; APA, API, GPA, GPI if given.
        (6, 1) => {
            real & !fields(&[4, 8, 24, 28, 60]) | authentication(real & fields(&[4, 8, 24, 28]))
        }
        // ID_AA64ISAR2_EL1: WFxT, RPRES, BC, CLRBHB, RPRFM, CSSC; GPA3, APA3, PAC_frac if given.
        (6, 2) => {
            real & fields(&[0, 4, 20, 28, 48, 52]) | authentication(real & fields(&[8, 12, 24]))
        }
        (7, 0) => mmfr0(real, given),
        // ID_AA64MMFR1_EL1: HAFDBS without table flags, HPDS, PAN, ETS, AFP, nTLBPA, ECBHB.
        (7, 1) => at_most(real & fields(&[0, 12, 20, 36, 44, 48, 60]), 0, 2),
        // ID_AA64MMFR2_EL1: CnP, UAO, LSM, VARange, CCIDX, ST, AT, IDS, TTL, BBM, E0PD.
        // VARange without 56 bits, which need what TCR2_EL1 switches on.
        (7, 2) => {
            let kept = real & fields(&[0, 4, 8, VA_RANGE, 20, 28, 32, 36, 48, 52, 60]);
            at_most(kept, VA_RANGE, 1)
        }
        _ => 0,
    }
}

/// EL0 and EL1 in AArch64 only; FP, AdvSIMD, DIT, CSV2 (without its registers), CSV3.
fn pfr0(real: u64, given: Given) -> u64 {
    const EL0: u32 = 0;
    const EL1: u32 = 4;
    const GIC: u32 = 24;
    const CSV2: u32 = 56;
    let kept = real & fields(&[16, 20, 48, CSV2, 60]);
    at_most(kept, CSV2, 1) | 1 << EL0 | 1 << EL1 | u64::from(given.gic_registers) << GIC
}

/// Armv8.0 debug with the fewest breakpoints, the last of which compares contexts, no double lock, nothing that measures or traces.
fn dfr0() -> u64 {
    const DEBUG_V8: u64 = 6;
    const BRPS: u32 = 12;
    const WRPS: u32 = 20;
    const NO_DOUBLE_LOCK: u64 = 0xf << 36;
    let more_than_one = u64::from(debug::COMPARATORS) - 1;
    DEBUG_V8 | more_than_one << BRPS | more_than_one << WRPS | NO_DOUBLE_LOCK
}

/// The guest's own address size; ASIDBits, granules without 52-bit addresses, ExS. Not BigEnd and BigEndEL0: emulated devices
/// are little-endian and nothing swaps what goes to them. Where the CPU has the bits all the same, a guest that sets
/// SCTLR_EL1.EE finds their registers reversed; that is all, because EL2 reads nothing from a guest's memory.
fn mmfr0(real: u64, given: Given) -> u64 {
    const TGRAN16: u32 = 20;
    const TGRAN4: u32 = 28;
    let mut kept = real & fields(&[4, TGRAN16, 24, TGRAN4, 44]);
    kept = at_most(kept, TGRAN16, 1);
    if kept & field(TGRAN4) == 1 << TGRAN4 {
        kept &= !field(TGRAN4);
    }
    kept | given.pa_range
}

#[cfg(test)]
mod tests {
    use super::{Answer, Given, answer};
    use crate::vm::debug;
    use crate::vm::trap::{SystemRegister, SystemRegisterAccess};

    const GIVEN: Given = Given {
        gic_registers: true,
        pauth: false,
        pa_range: 2,
        revidr: 0x1357,
    };

    fn access(register: SystemRegister, write: bool) -> Answer {
        ask(register, write, GIVEN, u64::MAX)
    }

    fn ask(register: SystemRegister, write: bool, given: Given, real: u64) -> Answer {
        answer(
            SystemRegisterAccess {
                register,
                general: 0,
                write,
            },
            given,
            |_, _| real,
        )
    }

    fn id(crm: u8, op2: u8, real: u64) -> u64 {
        match ask(SystemRegister::new(3, 0, 0, crm, op2), false, GIVEN, real) {
            Answer::Value(value) => value,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn hidden_features_read_as_absent_whatever_the_machine_has() {
        let everything = 0x1111_1111_1111_1111;
        let hidden = [
            (4, 0, [28, 32, 36, 40, 44, 8, 12]), // RAS, SVE, SEL2, MPAM, AMU, EL2, EL3
            (4, 1, [8, 12, 16, 24, 28, 32, 36]), // MTE, RAS_frac, MPAM_frac, SME, RNDR_trap, CSV2_frac, NMI
            (5, 0, [8, 4, 32, 40, 44, 48, 52]), // PMUVer, TraceVer, PMSVer, TraceFilt, TraceBuffer, MTPMU, BRBE
            (6, 1, [4, 8, 24, 28, 60, 60, 60]), // APA, API, GPA, GPI, LS64
            (6, 2, [8, 12, 16, 24, 16, 16, 16]), // GPA3, APA3, MOPS, PAC_frac
            (7, 0, [8, 12, 16, 32, 40, 56, 60]), // BigEnd, SNSMem, BigEndEL0, TGran16_2, TGran4_2, FGT, ECV
            (7, 1, [4, 8, 16, 24, 28, 32, 40]),  // VMIDBits, VH, LO, SpecSEI, XNX, TWED, HCX
            (7, 2, [12, 24, 40, 56, 12, 12, 12]), // IESB, NV, FWB, EVT
        ];
        for (crm, op2, fields) in hidden {
            for low in fields {
                assert_eq!(
                    id(crm, op2, everything) >> low & 0xf,
                    0,
                    "CRm {crm} op2 {op2} bit {low}"
                );
            }
        }
        for (crm, op2) in [
            (4, 2),
            (4, 4),
            (4, 5),
            (4, 7),
            (5, 1),
            (6, 3),
            (7, 3),
            (7, 4),
            (1, 0),
            (2, 7),
            (3, 1),
        ] {
            assert_eq!(id(crm, op2, u64::MAX), 0, "CRm {crm} op2 {op2}");
        }
    }

    #[test]
    fn pointer_authentication_is_given_whole_or_not_at_all() {
        let given = Given {
            pauth: true,
            ..GIVEN
        };
        let isar1 = SystemRegister::new(3, 0, 0, 6, 1);
        let kept = 0xf << 4 | 0xf << 8 | 0xf << 24 | 0xf << 28;
        assert_eq!(ask(isar1, false, given, kept), Answer::Value(kept));
        assert_eq!(ask(isar1, false, GIVEN, kept), Answer::Value(0));
    }

    #[test]
    fn the_guest_sees_its_own_address_size_and_interrupt_controller() {
        assert_eq!(id(7, 0, 5) & 0xf, 2);
        assert_eq!(id(4, 0, 0) >> 24 & 0xf, 1);
        let v2 = Given {
            gic_registers: false,
            ..GIVEN
        };
        let pfr0 = ask(SystemRegister::new(3, 0, 0, 4, 0), false, v2, u64::MAX);
        assert!(matches!(pfr0, Answer::Value(value) if value >> 24 & 0xf == 0));
    }

    #[test]
    fn fifty_two_bit_addresses_are_not_promised() {
        let real = 1 << 28 | 2 << 20;
        assert_eq!(id(7, 0, real) >> 28 & 0xf, 0);
        assert_eq!(id(7, 0, real) >> 20 & 0xf, 1);
        assert_eq!(
            id(7, 0, 0xf << 28) >> 28 & 0xf,
            0xf,
            "an absent granule stays absent"
        );
        for (real, given) in [(0, 0), (1, 1), (2, 1)] {
            assert_eq!(id(7, 2, real << 16) >> 16 & 0xf, given, "VARange");
        }
    }

    #[test]
    fn sgi_registers_exist_with_a_gicv3_and_are_write_only() {
        let sgi1r = SystemRegister::new(3, 0, 12, 11, 5);
        assert_eq!(access(sgi1r, true), Answer::SendGroup1);
        assert_eq!(access(sgi1r, false), Answer::Undefined);
        let v2 = Given {
            gic_registers: false,
            ..GIVEN
        };
        assert_eq!(ask(sgi1r, true, v2, 0), Answer::Undefined);
        assert_eq!(
            access(SystemRegister::new(3, 0, 12, 11, 7), true),
            Answer::SendGroup0
        );
    }

    #[test]
    fn the_debug_registers_are_those_that_are_promised() {
        let promised = id(5, 0, u64::MAX);
        assert_eq!(promised & 0xf, 6, "Armv8.0");
        let [breakpoints, watchpoints, contexts] = [12, 20, 28].map(|low| promised >> low & 0xf);
        assert_eq!(
            [breakpoints, watchpoints, contexts],
            [1, 1, 0],
            "each less one"
        );
        for n in 0..16 {
            for op2 in 4..8 {
                let answer = access(SystemRegister::new(2, 0, 0, n, op2), true);
                let exists = u64::from(n) <= breakpoints;
                assert_eq!(matches!(answer, Answer::Debug(_)), exists, "{n} {op2}");
                assert_eq!(answer == Answer::Undefined, !exists, "{n} {op2}");
            }
        }
        let mdscr = SystemRegister::new(2, 0, 0, 2, 2);
        assert_eq!(access(mdscr, true), Answer::Debug(debug::Register::Control));
    }

    #[test]
    fn a_guest_cannot_turn_its_interrupt_controllers_registers_off() {
        let sre = SystemRegister::new(3, 0, 12, 12, 5);
        assert_eq!(access(sre, false), Answer::Value(0b111));
        assert_eq!(access(sre, true), Answer::Value(0b111), "ignored");
        let v2 = Given {
            gic_registers: false,
            ..GIVEN
        };
        assert_eq!(ask(sre, false, v2, 0), Answer::Undefined);
    }

    #[test]
    fn the_revision_is_this_cpus_and_cannot_be_written() {
        let (revidr, aidr) = (
            SystemRegister::new(3, 0, 0, 0, 6),
            SystemRegister::new(3, 1, 0, 0, 7),
        );
        assert_eq!(access(revidr, false), Answer::Value(0x1357));
        assert_eq!(access(aidr, false), Answer::Value(0));
        assert_eq!(access(revidr, true), Answer::Undefined);
        assert_eq!(access(aidr, true), Answer::Undefined);
    }

    #[test]
    fn everything_else_is_undefined() {
        // CNTP_CTL_EL02, PMCR_EL0, LORC_EL1, an implementation-defined register, the identification registers of hidden
        // features (GMID_EL1, SMIDR_EL1, MPAMIDR_EL1), a write to ID_AA64PFR0_EL1.
        for (op0, op1, crn, crm, op2) in [
            (3, 1, 0, 0, 4),
            (3, 1, 0, 0, 6),
            (3, 0, 10, 4, 4),
            (3, 5, 14, 2, 1),
            (3, 3, 9, 12, 0),
            (3, 0, 10, 4, 3),
            (3, 1, 15, 2, 0),
        ] {
            assert_eq!(
                access(SystemRegister::new(op0, op1, crn, crm, op2), false),
                Answer::Undefined
            );
        }
        assert_eq!(
            access(SystemRegister::new(3, 0, 0, 4, 0), true),
            Answer::Undefined
        );
    }
}
