//! What a trap means: ESR_EL2 decoded once into a [`Trap`], by pure functions.
//!
//! Nothing here acts. The run loop matches on the result; each arm is one call. References: DDI 0487 issue K.a,
//! D19.2.40 (ESR_EL2 and its ISS encodings).

use crate::mmu::{Access, FaultKind};

/// ESR_EL2.EC.
const EC_SHIFT: u32 = 26;
const EC_BITS: u64 = 0x3f;
/// ESR_EL2.IL: the trapped instruction has 32 bits.
pub const ESR_IL: u64 = 1 << 25;
/// ESR_EL2.ISS.
pub const ISS_BITS: u64 = (1 << 25) - 1;

/// A synchronous exception out of a guest.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Trap {
    /// `HVC #immediate`; ELR_EL2 is already behind it.
    Hvc {
        /// The immediate.
        immediate: u16,
    },
    /// `SMC`; ELR_EL2 is at it.
    Smc,
    /// `WFI`, `WFE` and their variants with a timeout; ELR_EL2 is at it.
    Wait(Wait),
    /// `MRS` or `MSR`; ELR_EL2 is at it.
    SystemRegister(SystemRegisterAccess),
    /// A stage-2 abort on an instruction fetch.
    InstructionAbort(Abort),
    /// A stage-2 abort on data.
    DataAbort(Abort),
    /// A feature the guest was told it does not have: floating point (never trapped here), SVE, SME, pointer
    /// authentication, ERET, LS64, transactional memory, BTI, guarded stacks, memory operations, 128-bit registers.
    HiddenFeature,
    /// Illegal execution state, set up by the guest's own ERET: an exception at the same level.
    IllegalState,
    /// PC or SP alignment, debug and everything else that should have gone to EL1 and did not.
    Unexpected {
        /// ESR_EL2.EC.
        class: u8,
    },
    /// Out of AArch32, which guests do not have.
    Aarch32,
}

/// A stage-2 data or instruction abort.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Abort {
    /// Why.
    pub status: FaultStatus,
    /// What the guest tried, as stage 2 has to judge it.
    pub access: Access,
    /// The walk of the guest's own tables failed, not the access itself.
    pub stage1_walk: bool,
    /// FAR_EL2 does not hold the address (external aborts only).
    pub far_invalid: bool,
    /// How to emulate the instruction, where the syndrome tells.
    pub transfer: Option<Transfer>,
    /// A cache maintenance instruction.
    pub maintenance: bool,
}

/// DFSC and IFSC of an abort that stage 2 can raise.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum FaultStatus {
    /// Stage 2 denied or did not translate.
    Stage2(FaultKind),
    /// Output address too large: the guest's own tables, or an IPA beyond stage 2's input size.
    AddressSize,
    /// The memory system answered with an error, on the access or on a walk.
    External,
    /// Two TLB entries match.
    TlbConflict,
    /// An exclusive or atomic access to memory that does not support it.
    UnsupportedAtomic,
    /// An unaligned access, or `DC ZVA`, to what stage 2 makes Device memory.
    Alignment,
    /// Tag check and other kinds that belong to stage 1, or reserved ones.
    Other {
        /// The six bits.
        code: u8,
    },
}

/// One load or store of one general register, as the syndrome describes it when ISV is set.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Transfer {
    /// Bytes moved: 1, 2, 4 or 8.
    pub bytes: u8,
    /// A load extends the sign.
    pub sign_extend: bool,
    /// The register, 31 for the zero register.
    pub register: u8,
    /// The register is used as 64 bits wide.
    pub wide: bool,
    /// A store.
    pub write: bool,
}

impl Transfer {
    /// What a load puts into the register when the device answered `data`.
    #[inline(always)]
    pub fn loaded(self, data: u64) -> u64 {
        let unused = 64 - 8 * u32::from(self.bytes).clamp(1, 8);
        let zero_extended = data << unused >> unused;
        if !self.sign_extend {
            return zero_extended;
        }
        let extended = (data << unused).cast_signed() >> unused;
        if self.wide {
            extended.cast_unsigned()
        } else {
            extended.cast_unsigned() & 0xffff_ffff
        }
    }

    /// What a store of a register that holds `value` gives the device.
    pub fn stored(self, value: u64) -> u64 {
        let unused = 64 - 8 * u32::from(self.bytes).clamp(1, 8);
        value << unused >> unused
    }
}

/// Names an A64 system register, as MRS and MSR do.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct SystemRegister {
    /// Op0.
    pub op0: u8,
    /// Op1.
    pub op1: u8,
    /// CRn.
    pub crn: u8,
    /// CRm.
    pub crm: u8,
    /// Op2.
    pub op2: u8,
}

impl SystemRegister {
    /// S`op0`_`op1`_C`crn`_C`crm`_`op2`.
    pub const fn new(op0: u8, op1: u8, crn: u8, crm: u8, op2: u8) -> Self {
        Self {
            op0,
            op1,
            crn,
            crm,
            op2,
        }
    }
}

/// A trapped MRS or MSR.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct SystemRegisterAccess {
    /// Which register.
    pub register: SystemRegister,
    /// The general register, 31 for the zero register.
    pub general: u8,
    /// MSR.
    pub write: bool,
}

/// A trapped wait.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Wait {
    /// For an event (`WFE`, `WFET`) rather than an interrupt.
    pub for_event: bool,
    /// The general register that says until which tick of the virtual counter (`WFIT`, `WFET`).
    pub until: Option<u8>,
}

/// Decodes ESR_EL2 of a synchronous exception from a lower level.
pub fn decode(esr: u64) -> Trap {
    let iss = esr & ISS_BITS;
    match bits(esr, EC_SHIFT, EC_BITS) {
        0x01 => Trap::Wait(wait(iss)),
        0x16 => Trap::Hvc {
            immediate: low16(iss),
        },
        0x17 => Trap::Smc,
        0x18 => Trap::SystemRegister(system_register(iss)),
        0x20 => Trap::InstructionAbort(instruction_abort(iss)),
        0x24 => Trap::DataAbort(data_abort(iss)),
        // SIMD/FP, pointer authentication, LD64B/ST64B, BTI, 128-bit registers, SVE, ERET, TSTART, SME, memory operations,
        // guarded stack.
        0x07 | 0x09 | 0x0a | 0x0d | 0x14 | 0x19 | 0x1a | 0x1b | 0x1d | 0x27 | 0x2d => {
            Trap::HiddenFeature
        }
        0x0e => Trap::IllegalState,
        0x03..=0x06 | 0x08 | 0x0c | 0x11..=0x13 | 0x28 | 0x38 | 0x3a => Trap::Aarch32,
        class => Trap::Unexpected { class },
    }
}

/// ISS of a trapped WF* instruction: TI, RV, RN (D24.2.40).
fn wait(iss: u64) -> Wait {
    const VALID: u64 = 1 << 2;
    let kind = bits(iss, 0, 3);
    Wait {
        for_event: kind & 1 != 0,
        until: (kind & 2 != 0 && iss & VALID != 0).then(|| bits(iss, 5, 31)),
    }
}

/// How to emulate the load or store that ESR_EL2 of a stage-2 abort describes; `None` if it describes none.
#[inline]
pub fn transfer_of(esr: u64) -> Option<Transfer> {
    abort(esr).transfer
}

/// Decodes ESR_EL2 of a trapped `MRS` or `MSR`.
#[inline]
pub fn system_register_of(esr: u64) -> SystemRegisterAccess {
    system_register(esr & ISS_BITS)
}

fn system_register(iss: u64) -> SystemRegisterAccess {
    SystemRegisterAccess {
        register: SystemRegister {
            op0: bits(iss, 20, 3),
            op1: bits(iss, 14, 7),
            crn: bits(iss, 10, 15),
            crm: bits(iss, 1, 15),
            op2: bits(iss, 17, 7),
        },
        general: bits(iss, 5, 31),
        write: iss & 1 == 0,
    }
}

/// Decodes ESR_EL2 of a stage-2 abort, of either kind.
#[inline(always)]
pub fn abort(esr: u64) -> Abort {
    abort_of(esr).1
}

/// Whether ESR_EL2 is of the abort that logging is made of, and is quickly told: a store that stage 2 forbids, of no special
/// kind. [`abort`] says the same of it.
#[inline(always)]
pub const fn is_forbidden_store(esr: u64) -> bool {
    is_plain_store(esr, 0b00_1100)
}

/// The same of a store to what is old, which aging is made of where software keeps the access flag.
#[inline(always)]
pub const fn is_store_to_old(esr: u64) -> bool {
    is_plain_store(esr, 0b00_1000)
}

/// Whether ESR_EL2 is of a store, of no special kind, with this DFSC but for the level.
#[inline(always)]
const fn is_plain_store(esr: u64, status: u64) -> bool {
    const EC: u64 = 0x3f << EC_SHIFT;
    const DATA_ABORT: u64 = 0x24 << EC_SHIFT;
    const STATUS: u64 = 0b11_1100;
    const WNR: u64 = 1 << 6;
    const S1PTW: u64 = 1 << 7;
    const CM: u64 = 1 << 8;
    esr & (EC | STATUS | WNR | S1PTW | CM) == DATA_ABORT | status | WNR
}

/// As [`abort`], and whether it is one on an instruction fetch.
#[inline(always)]
pub fn abort_of(esr: u64) -> (bool, Abort) {
    /// What tells the two exception classes apart.
    const DATA: u64 = 1 << (EC_SHIFT + 2);
    let iss = esr & ISS_BITS;
    if esr & DATA != 0 {
        (false, data_abort(iss))
    } else {
        (true, instruction_abort(iss))
    }
}

#[inline(always)]
fn instruction_abort(iss: u64) -> Abort {
    const S1PTW: u64 = 1 << 7;
    let status = fault_status(iss);
    let stage1_walk = iss & S1PTW != 0;
    Abort {
        status,
        access: if stage1_walk {
            walk_access(status)
        } else {
            Access::Execute
        },
        stage1_walk,
        far_invalid: iss & FNV != 0,
        transfer: None,
        maintenance: false,
    }
}

/// FAR not valid; bit 10 in both kinds of abort.
const FNV: u64 = 1 << 10;

/// Decodes the ISS of a data abort, or of anything else that has its layout.
#[inline(always)]
pub fn data_abort(iss: u64) -> Abort {
    const ISV: u64 = 1 << 24;
    const S1PTW: u64 = 1 << 7;
    const CM: u64 = 1 << 8;
    const WNR: u64 = 1 << 6;
    let status = fault_status(iss);
    let stage1_walk = iss & S1PTW != 0;
    let maintenance = iss & CM != 0;
    let access = if stage1_walk || maintenance {
        walk_access(status)
    } else if iss & WNR != 0 {
        Access::Write
    } else {
        Access::Read
    };
    Abort {
        status,
        access,
        stage1_walk,
        far_invalid: iss & FNV != 0,
        transfer: (iss & ISV != 0 && !maintenance && !stage1_walk)
            .then(|| transfer(iss, iss & WNR != 0)),
        maintenance,
    }
}

#[inline(always)]
fn transfer(iss: u64, write: bool) -> Transfer {
    const SSE: u64 = 1 << 21;
    const SF: u64 = 1 << 15;
    Transfer {
        bytes: 1 << bits(iss, 22, 3),
        sign_extend: iss & SSE != 0,
        register: bits(iss, 16, 31),
        wide: iss & SF != 0,
        write,
    }
}

/// Walks of the guest's tables and cache maintenance by address: the syndrome's WnR does not say what stage 2 must
/// permit. A permission fault asks for writing (the walk sets a flag, `DC IVAC` may discard data), any other for reading.
/// If a permission fault were judged as a read of a page that is readable already, it would be retried for ever.
#[inline(always)]
fn walk_access(status: FaultStatus) -> Access {
    if status == FaultStatus::Stage2(FaultKind::Permission) {
        Access::Write
    } else {
        Access::Read
    }
}

#[inline(always)]
fn fault_status(iss: u64) -> FaultStatus {
    match bits(iss, 0, 0x3f) {
        0x00..=0x03 | 0x29 => FaultStatus::AddressSize,
        0x04..=0x07 | 0x2b => FaultStatus::Stage2(FaultKind::Translation),
        0x08..=0x0b => FaultStatus::Stage2(FaultKind::AccessFlag),
        0x0c..=0x0f => FaultStatus::Stage2(FaultKind::Permission),
        // Synchronous external aborts and parity errors: on the access, on a walk at each level.
        0x10 | 0x13..=0x18 | 0x1b..=0x1f => FaultStatus::External,
        0x21 => FaultStatus::Alignment,
        0x30 => FaultStatus::TlbConflict,
        0x31 | 0x35 => FaultStatus::UnsupportedAtomic,
        code => FaultStatus::Other { code },
    }
}

/// `mask` (at most eight bits) of `value` above bit `shift`.
#[inline]
#[expect(
    clippy::cast_possible_truncation,
    reason = "every mask has at most eight bits"
)]
const fn bits(value: u64, shift: u32, mask: u64) -> u8 {
    (value >> shift & mask) as u8
}

const fn low16(value: u64) -> u16 {
    (value & 0xffff) as u16
}

#[cfg(test)]
mod tests {
    #[test]
    fn waits_say_for_what_and_until_when() {
        let decoded = |iss: u64| match decode(1 << EC_SHIFT | iss) {
            Trap::Wait(wait) => (wait.for_event, wait.until),
            other => panic!("{other:?}"),
        };
        assert_eq!(decoded(0), (false, None));
        assert_eq!(decoded(1), (true, None));
        assert_eq!(decoded(7 << 5 | 1 << 2 | 2), (false, Some(7)));
        assert_eq!(decoded(31 << 5 | 1 << 2 | 3), (true, Some(31)));
        assert_eq!(decoded(7 << 5 | 2), (false, None), "no register is given");
    }

    use std::vec::Vec;

    use super::{
        Abort, EC_SHIFT, ESR_IL, FaultStatus, SystemRegister, SystemRegisterAccess, Transfer, Trap,
        abort_of, decode, is_forbidden_store, is_store_to_old,
    };
    use crate::mmu::{Access, FaultKind};

    fn data(iss: u64) -> Abort {
        match decode(0x24 << EC_SHIFT | ESR_IL | iss) {
            Trap::DataAbort(abort) => abort,
            other => panic!("{other:?}"),
        }
    }

    fn instruction(iss: u64) -> Abort {
        match decode(0x20 << EC_SHIFT | ESR_IL | iss) {
            Trap::InstructionAbort(abort) => abort,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_exception_class_has_one_meaning() {
        let aarch32 = [
            0x03, 0x04, 0x05, 0x06, 0x08, 0x0c, 0x11, 0x12, 0x13, 0x28, 0x38, 0x3a,
        ];
        let hidden = [
            0x07, 0x09, 0x0a, 0x0d, 0x14, 0x19, 0x1a, 0x1b, 0x1d, 0x27, 0x2d,
        ];
        let mut unexpected = Vec::new();
        for class in 0..64_u64 {
            match decode(class << EC_SHIFT) {
                Trap::Wait(_) => assert_eq!(class, 0x01),
                Trap::Hvc { .. } => assert_eq!(class, 0x16),
                Trap::Smc => assert_eq!(class, 0x17),
                Trap::SystemRegister(_) => assert_eq!(class, 0x18),
                Trap::InstructionAbort(_) => assert_eq!(class, 0x20),
                Trap::DataAbort(_) => assert_eq!(class, 0x24),
                Trap::IllegalState => assert_eq!(class, 0x0e),
                Trap::HiddenFeature => assert!(hidden.contains(&class), "{class:#x}"),
                Trap::Aarch32 => assert!(aarch32.contains(&class), "{class:#x}"),
                Trap::Unexpected { class: found } => {
                    assert_eq!(u64::from(found), class);
                    unexpected.push(class);
                }
            }
        }
        // PC and SP alignment, breakpoints and their kin go to EL1; same-level classes cannot come from a guest.
        for class in [
            0x00, 0x15, 0x21, 0x22, 0x25, 0x26, 0x2c, 0x2f, 0x30, 0x32, 0x34, 0x3c, 0x3f,
        ] {
            assert!(unexpected.contains(&class), "{class:#x}");
        }
    }

    #[test]
    fn every_fault_status_has_one_meaning() {
        use FaultKind::{AccessFlag, Permission, Translation};
        use FaultStatus::{
            AddressSize, Alignment, External, Other, Stage2, TlbConflict, UnsupportedAtomic,
        };
        for code in 0..64_u8 {
            let expected = match code {
                0..4 | 0x29 => AddressSize,
                4..8 | 0x2b => Stage2(Translation),
                8..12 => Stage2(AccessFlag),
                12..16 => Stage2(Permission),
                0x10 | 0x13 | 0x14 | 0x15 | 0x16 | 0x17 | 0x18 | 0x1b..=0x1f => External,
                0x21 => Alignment,
                0x30 => TlbConflict,
                0x31 | 0x35 => UnsupportedAtomic,
                _ => Other { code },
            };
            assert_eq!(data(code.into()).status, expected, "{code:#x}");
            assert_eq!(instruction(code.into()).status, expected, "{code:#x}");
        }
    }

    #[test]
    fn plain_stores_are_told_quickly_from_every_other_abort() {
        let mut found = [0; 2];
        for class in 0x20_u64..=0x25 {
            for iss in 0..0x800 {
                let esr = class << EC_SHIFT | 1 << 25 | iss;
                let (fetch, abort) = abort_of(esr);
                let plain = class == 0x24
                    && !fetch
                    && abort.access == Access::Write
                    && !abort.stage1_walk
                    && !abort.maintenance;
                let quickly = [
                    (FaultKind::Permission, is_forbidden_store(esr)),
                    (FaultKind::AccessFlag, is_store_to_old(esr)),
                ];
                for ((kind, said), found) in quickly.into_iter().zip(&mut found) {
                    let is_one = plain && abort.status == FaultStatus::Stage2(kind);
                    assert_eq!(said, is_one, "{esr:#x}");
                    *found += u32::from(is_one);
                }
            }
        }
        // Four levels; bits 9 and 10 are any.
        assert_eq!(found, [16, 16]);
    }

    #[test]
    fn a_maintenance_or_walk_fault_is_judged_by_what_must_change() {
        const CM: u64 = 1 << 8;
        const S1PTW: u64 = 1 << 7;
        const WNR: u64 = 1 << 6;
        let (translation, permission) = (0x07, 0x0f);
        assert_eq!(data(CM | WNR | translation).access, Access::Read);
        assert_eq!(data(CM | WNR | permission).access, Access::Write);
        assert_eq!(data(S1PTW | WNR | translation).access, Access::Read);
        assert_eq!(data(S1PTW | permission).access, Access::Write);
        assert_eq!(instruction(S1PTW | permission).access, Access::Write);
        assert_eq!(instruction(S1PTW | translation).access, Access::Read);
        assert_eq!(instruction(permission).access, Access::Execute);
        assert_eq!(data(WNR | translation).access, Access::Write);
        assert_eq!(data(permission).access, Access::Read);
    }

    #[test]
    fn a_transfer_comes_out_of_the_syndrome_whole() {
        for (size, bytes) in [(0, 1), (1, 2), (2, 4), (3, 8)] {
            for register in 0..32_u8 {
                for flags in 0..8_u64 {
                    let (sse, sf, wnr) = (flags & 1, flags >> 1 & 1, flags >> 2 & 1);
                    let iss = 1 << 24
                        | size << 22
                        | sse << 21
                        | u64::from(register) << 16
                        | sf << 15
                        | wnr << 6
                        | 0x06;
                    let expected = Transfer {
                        bytes,
                        sign_extend: sse == 1,
                        register,
                        wide: sf == 1,
                        write: wnr == 1,
                    };
                    assert_eq!(data(iss).transfer, Some(expected));
                }
            }
        }
        assert_eq!(data(0x06).transfer, None);
        assert_eq!(data(1 << 24 | 1 << 8 | 0x06).transfer, None);
        assert_eq!(data(1 << 24 | 1 << 7 | 0x06).transfer, None);
    }

    #[test]
    fn loads_extend_as_the_instruction_asks() {
        let load = |bytes, sign_extend, wide| Transfer {
            bytes,
            sign_extend,
            register: 0,
            wide,
            write: false,
        };
        assert_eq!(load(1, false, false).loaded(0xffff_ff80), 0x80);
        assert_eq!(load(1, true, false).loaded(0x80), 0xffff_ff80);
        assert_eq!(load(1, true, true).loaded(0x80), 0xffff_ffff_ffff_ff80);
        assert_eq!(
            load(4, true, true).loaded(0x8000_0000),
            0xffff_ffff_8000_0000
        );
        assert_eq!(load(8, false, true).loaded(u64::MAX), u64::MAX);
        assert_eq!(load(2, false, false).stored(0x12_3456), 0x3456);
        assert_eq!(load(8, false, true).stored(u64::MAX), u64::MAX);
    }

    #[test]
    fn a_system_register_comes_out_of_the_syndrome_whole() {
        // MSR ICC_SGI1R_EL1 (S3_0_C12_C11_5), x7
        let iss = 3 << 20 | 5 << 17 | 12 << 10 | 7 << 5 | 11 << 1;
        let expected = SystemRegisterAccess {
            register: SystemRegister::new(3, 0, 12, 11, 5),
            general: 7,
            write: true,
        };
        assert_eq!(
            decode(0x18 << EC_SHIFT | iss),
            Trap::SystemRegister(expected)
        );
        assert_eq!(
            decode(0x18 << EC_SHIFT | iss | 1),
            Trap::SystemRegister(SystemRegisterAccess {
                write: false,
                ..expected
            })
        );
    }

    #[test]
    fn a_hypercall_keeps_its_immediate() {
        assert_eq!(
            decode(0x16 << EC_SHIFT | ESR_IL | 0xffff),
            Trap::Hvc { immediate: 0xffff }
        );
    }
}
