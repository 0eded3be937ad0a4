//! What a vCPU consists of while no CPU holds it, and how the vectors lay out a guest's registers.
//!
//! The layout is shared by the assembly (`vectors.S`), the world switch (`world`) and the host's fake, so it is plain
//! data. EL1 state that is *resident* is not here but in the CPU's own registers: without E2H a guest's EL1 registers
//! stay where they are while EL2 runs, and [`El1`] is read or written only when a CPU changes vCPU.

use core::mem::offset_of;

/// The general registers of a guest and what its exit left in EL2's registers.
///
/// While the guest runs, SP_EL2 holds this structure's address, so that the vectors can save registers before they
/// have any to spare.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub struct Frame {
    /// x0 to x30.
    pub x: [u64; 31],
    /// ELR_EL2: where the guest goes on.
    pub pc: u64,
    /// SPSR_EL2: the guest's PSTATE.
    pub pstate: u64,
    /// Stack pointer of the EL2 code that entered the guest.
    host_stack: u64,
    /// ESR_EL2 of the last full exit.
    pub esr: u64,
    /// FAR_EL2 of the last full exit.
    pub far: u64,
    /// HPFAR_EL2 of the last full exit.
    pub hpfar: u64,
}

/// Offset of [`Frame::pc`], followed by [`Frame::pstate`].
pub const FRAME_PC: usize = 248;
/// Offset of the saved stack pointer.
pub const FRAME_HOST_STACK: usize = 264;
/// Offset of [`Frame::esr`], followed by FAR and HPFAR.
pub const FRAME_ESR: usize = 272;

const _: () = {
    assert!(offset_of!(Frame, x) == 0);
    assert!(offset_of!(Frame, pc) == FRAME_PC);
    assert!(offset_of!(Frame, pstate) == FRAME_PC + 8);
    assert!(offset_of!(Frame, host_stack) == FRAME_HOST_STACK);
    assert!(offset_of!(Frame, esr) == FRAME_ESR);
    assert!(offset_of!(Frame, far) == FRAME_ESR + 8);
    assert!(offset_of!(Frame, hpfar) == FRAME_ESR + 16);
};

impl Frame {
    /// A frame of zeros that starts at `pc` with `pstate`.
    pub const fn new(pc: u64, pstate: u64) -> Self {
        Self {
            x: [0; 31],
            pc,
            pstate,
            host_stack: 0,
            esr: 0,
            far: 0,
            hpfar: 0,
        }
    }

    /// The register that an instruction names `register` for data: 31 is the zero register.
    pub fn read(&self, register: u8) -> u64 {
        self.x.get(usize::from(register)).copied().unwrap_or(0)
    }

    /// Writes the register that an instruction names `register` for data: 31 is discarded.
    pub fn write(&mut self, register: u8, value: u64) {
        if let Some(slot) = self.x.get_mut(usize::from(register)) {
            *slot = value;
        }
    }

    /// Goes on behind the instruction that trapped, as if it had been executed: with PSTATE.BTYPE and PSTATE.SS clear, too.
    pub fn skip_instruction(&mut self) {
        self.pc = self.pc.wrapping_add(INSTRUCTION_BYTES);
        self.pstate &= !(PSTATE_BTYPE | PSTATE_SS);
    }
}

/// Why a guest's run ended. The numbers are shared with the vectors.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u64)]
pub enum Exit {
    /// A synchronous exception that no short path took; `Frame::esr` tells which.
    Sync = 1,
    /// A physical interrupt was taken, and the vCPU may have to make way.
    Interrupt = 2,
    /// A physical SError.
    SError = 3,
    /// An exception out of AArch32, which guests do not have.
    Aarch32 = 4,
    /// The abort short path found no slot at the address.
    NoSlot = 5,
    /// The abort short path found that the slot forbids the access.
    Denied = 6,
    /// The abort short path ran out of tables.
    TopUp = 7,
    /// The abort short path cannot judge this fault.
    OtherAbort = 8,
}

/// What a short path answers to the vectors, in x0 and x1.
///
/// A short path runs with x19 to x29 of the guest in the CPU's own registers, where Rust preserves them, and not in the
/// frame. So a value for one of them is handed to the vectors, and a value of one of them is asked for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
#[must_use = "the vectors go by it"]
pub struct Verdict {
    code: u64,
    value: u64,
}

/// The registers that a short path leaves where they are.
pub const KEPT: core::ops::RangeInclusive<u8> = 19..=29;
/// [`Verdict::SAVE`].
pub const VERDICT_SAVE_BIT: u32 = 4;
/// [`Verdict::load`], with the register's number below this bit.
pub const VERDICT_LOAD_BIT: u32 = 5;

impl Verdict {
    /// Back to the guest at once.
    pub const RESUME: Self = Self { code: 0, value: 0 };
    /// Save x19 to x29 in the frame, too, and ask again.
    pub const SAVE: Self = Self {
        code: 1 << VERDICT_SAVE_BIT,
        value: 0,
    };

    /// Leave the guest.
    pub const fn leave(exit: Exit) -> Self {
        Self {
            code: exit as u64,
            value: 0,
        }
    }

    /// Back to the guest with `value` in `register`, one of [`KEPT`].
    pub const fn load(register: u8, value: u64) -> Self {
        Self {
            code: 1 << VERDICT_LOAD_BIT | register as u64,
            value,
        }
    }
}

impl Exit {
    /// The exit with the number `code`; `Aarch32`, which stops the VM, for a number that does not exist.
    pub const fn from_code(code: u64) -> Self {
        match code {
            1 => Self::Sync,
            2 => Self::Interrupt,
            3 => Self::SError,
            5 => Self::NoSlot,
            6 => Self::Denied,
            7 => Self::TopUp,
            8 => Self::OtherAbort,
            _ => Self::Aarch32,
        }
    }
}

/// Hands the list of EL1&0 registers that belong to a vCPU to the macro `$with`, as `field "name"` pairs.
///
/// SCTLR_EL1 and TCR_EL1 come last, in this order: erratum 1319367 (see `vttbr.rs`).
macro_rules! for_each_el1_register {
    ($with:ident) => {
        $with! {
            cpacr "cpacr_el1",
            ttbr0 "ttbr0_el1",
            ttbr1 "ttbr1_el1",
            mair "mair_el1",
            amair "amair_el1",
            vbar "vbar_el1",
            esr "esr_el1",
            far "far_el1",
            afsr0 "afsr0_el1",
            afsr1 "afsr1_el1",
            par "par_el1",
            contextidr "contextidr_el1",
            tpidr_el0 "tpidr_el0",
            tpidrro_el0 "tpidrro_el0",
            tpidr_el1 "tpidr_el1",
            sp_el0 "sp_el0",
            sp_el1 "sp_el1",
            elr "elr_el1",
            spsr "spsr_el1",
            cntkctl "cntkctl_el1",
            csselr "csselr_el1",
            cntv_cval "cntv_cval_el0",
            sctlr "sctlr_el1",
            tcr "tcr_el1",
        }
    };
}

macro_rules! el1_structure {
    ($($field:ident $name:literal,)*) => {
        /// The EL1&0 system registers of a vCPU that is not resident, and its virtual timer.
        #[derive(Clone, Debug, Default)]
        #[expect(missing_docs, reason = "each field is the register of that name")]
        pub struct El1 {
            $(pub $field: u64,)*
            /// CNTV_CTL_EL0, which is switched apart: the timer is off while the rest moves.
            pub cntv_ctl: u64,
            /// CNTVOFF_EL2.
            pub cntvoff: u64,
            /// VMPIDR_EL2: what the guest reads as MPIDR_EL1.
            pub vmpidr: u64,
            /// The SIMD and floating-point registers.
            pub simd: Simd,
            /// Pointer-authentication keys, low and high halves of APIA, APIB, APDA, APDB and APGA; zero without
            /// FEAT_PAuth.
            pub keys: [u64; 10],
        }
    };
}
for_each_el1_register!(el1_structure);

/// The SIMD and floating-point state of a guest. EL2 itself is compiled without them.
#[derive(Clone, Debug, Default)]
#[repr(C, align(16))]
pub struct Simd {
    /// v0 to v31.
    pub v: [u128; 32],
    /// FPSR.
    pub fpsr: u64,
    /// FPCR.
    pub fpcr: u64,
}

/// A breakpoint or watchpoint.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Comparator {
    /// DBGBVR_EL1 or DBGWVR_EL1: what it compares with.
    pub value: u64,
    /// DBGBCR_EL1 or DBGWCR_EL1: when and how.
    pub control: u64,
}

/// What a CPU's debug registers hold for a vCPU: nothing at all, unless it debugs.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct DebugRegisters {
    /// MDSCR_EL1.
    pub mdscr: u64,
    /// The CPU's first breakpoint and its last.
    pub breakpoints: [Comparator; 2],
    /// The CPU's first two watchpoints.
    pub watchpoints: [Comparator; 2],
}

/// SCTLR_EL1 out of reset: everything off, and the bits that read as one on a CPU without AArch32: LSMAOE, nTLSMD,
/// SPAN, EIS, TSCXT, EOS.
pub const SCTLR_EL1_RESET: u64 = 1 << 29 | 1 << 28 | 1 << 23 | 1 << 22 | 1 << 20 | 1 << 11;
/// Bytes of an A64 instruction.
pub const INSTRUCTION_BYTES: u64 = 4;
/// PSTATE.BTYPE: the instruction before was an indirect branch. Executing any instruction clears it.
pub const PSTATE_BTYPE: u64 = 0b11 << 10;
/// PSTATE.SS: the next instruction is executed before a step's exception. Executing any instruction clears it.
pub const PSTATE_SS: u64 = 1 << 21;
/// SCTLR_EL1.SPAN: taking an exception to EL1 leaves PSTATE.PAN as it is.
pub const SCTLR_EL1_SPAN: u64 = 1 << 23;
/// SCTLR_EL1.DSSBS: PSTATE.SSBS after taking an exception to EL1.
pub const SCTLR_EL1_DSSBS: u64 = 1 << 44;

impl El1 {
    /// The state out of reset of the vCPU whose MPIDR_EL1 is `vmpidr`, its virtual counter at zero now.
    pub fn reset(vmpidr: u64, cntvoff: u64) -> Self {
        Self {
            sctlr: SCTLR_EL1_RESET,
            vmpidr,
            cntvoff,
            ..Self::default()
        }
    }
}

/// The stage-2 geometry that VTCR_EL2 has to declare.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Stage2Geometry {
    /// Bits of guest address space.
    pub ipa_bits: u32,
    /// Level of the initial tables, 0 to 2.
    pub start_level: u32,
    /// ID_AA64MMFR0_EL1.PARange of the weakest CPU.
    pub pa_range: u64,
    /// VMIDs have 16 bits rather than 8.
    pub wide_vmid: bool,
    /// Permission indirection (FEAT_S2PIE).
    pub indirection: bool,
    /// Hardware sets access flags (FEAT_HAFDBS).
    pub access_flag: bool,
    /// Hardware marks what is written (FEAT_HAFDBS, dirty state), which takes `access_flag` too.
    pub dirty_state: bool,
}

#[cfg(test)]
mod tests {
    use super::{Exit, Frame, PSTATE_SS, VERDICT_LOAD_BIT, VERDICT_SAVE_BIT, Verdict};

    #[test]
    fn register_31_is_the_zero_register() {
        let mut frame = Frame::new(0, 0);
        frame.write(31, 5);
        frame.write(30, 6);
        assert_eq!((frame.read(31), frame.read(30)), (0, 6));
    }

    #[test]
    fn an_instruction_that_is_skipped_leaves_the_state_of_one_that_was_executed() {
        const PSTATE: u64 = 0x8000_13c5;
        for left in [0b01 << 10, 0b10 << 10, 0b11 << 10, PSTATE_SS] {
            let mut frame = Frame::new(u64::MAX - 3, PSTATE | left);
            frame.skip_instruction();
            assert_eq!((frame.pc, frame.pstate), (0, PSTATE));
        }
    }

    #[test]
    fn exits_come_back_from_their_numbers() {
        for exit in [
            Exit::Sync,
            Exit::Interrupt,
            Exit::SError,
            Exit::Aarch32,
            Exit::NoSlot,
            Exit::Denied,
            Exit::TopUp,
            Exit::OtherAbort,
        ] {
            assert_eq!(Exit::from_code(exit as u64), exit);
        }
    }

    #[test]
    fn the_null_hypercall_writes_no_system_register() {
        let vectors = include_str!("vectors.S");
        let path = vectors.split("\nhypercall:\n").nth(1).unwrap();
        let path = path.split("eret").next().unwrap();
        assert!(path.contains("mrs") && !path.contains("msr"), "{path}");
        let entry = vectors.split("\n.macro mitigate_nothing").nth(1).unwrap();
        let entry = entry.split("\nhypercall:\n").next().unwrap();
        assert!(entry.contains("mrs") && !entry.contains("msr"), "{entry}");
    }

    #[test]
    fn classes_of_exceptions_are_told_by_their_six_bits() {
        // What is above them (ISS2) is not zero for every abort.
        let vectors = include_str!("vectors.S");
        let uses = vectors
            .lines()
            .filter(|line| line.contains("{ESR_EC_SHIFT}"));
        assert!(uses.clone().count() >= 3);
        for line in uses {
            assert!(line.contains("ubfx") && line.contains(", #6"), "{line}");
        }
    }

    #[test]
    fn verdicts_are_told_apart_by_their_bits() {
        let (save, load) = (1 << VERDICT_SAVE_BIT, 1 << VERDICT_LOAD_BIT);
        assert_eq!(Verdict::RESUME.code, 0);
        assert_eq!(Verdict::leave(Exit::Interrupt).code & (save | load), 0);
        assert_eq!(Verdict::SAVE.code & (save | load), save);
        for register in 19..=29 {
            let verdict = Verdict::load(register, 7);
            assert_eq!(verdict.code & load, load);
            assert_eq!((verdict.code & 31, verdict.value), (u64::from(register), 7));
        }
    }
}
