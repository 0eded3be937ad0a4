//! A guest's own debugging: single steps, two breakpoints and two watchpoints, as Armv8.0 has them (DDI 0487 issue K.a, D2).
//!
//! The registers trap, so [`struct@Debug`] is what they hold for the guest, wherever its vCPU is. What that asks of a CPU is written to
//! the CPU's own registers at the trap and when a CPU takes the vCPU, and is cleared when the vCPU goes. CPUs that hold no vCPU
//! that debugs have nothing in theirs, and a change between vCPUs that do not debug looks at one flag of each.
//!
//! Debug exceptions are EL1's (MDCR_EL2.TDE is zero), and none is taken from an exception level above the one that they go to
//! (D2, enabling debug exceptions from the current Exception level): whatever a guest watches, EL2 is not stopped. To halt the
//! CPU instead takes EDSCR.HDE, which a guest could set by MDSCR_EL1.HDE only: that bit is not given, nor is the channel
//! to an external debugger, at whose other end nobody is.

use crate::arch::context::{Comparator, DebugRegisters};
use crate::vm::trap::SystemRegisterAccess;

/// Breakpoints and watchpoints, two of each: the least that there can be.
pub const COMPARATORS: u8 = 2;
/// The breakpoint that compares with CONTEXTIDR_EL1 too, and that others can be linked to. ID_AA64DFR0_EL1.CTX_CMPs promises
/// one, the highest-numbered.
const LINKABLE: u64 = COMPARATORS as u64 - 1;

/// MDSCR_EL1.SS: software steps.
const SS: u64 = 1 << 0;
/// MDSCR_EL1.TDCC: EL0's accesses to the channel trap to EL1.
const TDCC: u64 = 1 << 12;
/// MDSCR_EL1.KDE: debug exceptions from EL1 itself.
const KDE: u64 = 1 << 13;
/// MDSCR_EL1.MDE: breakpoints and watchpoints.
const MDE: u64 = 1 << 15;

/// DBGBCR_EL1.E and DBGWCR_EL1.E.
const ENABLED: u64 = 1 << 0;
/// DBGBCR_EL1.PMC and DBGWCR_EL1.PAC: at EL1, at EL0.
const PRIVILEGE: u64 = 0b11 << 1;
/// DBGBCR_EL1.BAS: all four bytes of an A64 instruction.
const INSTRUCTION: u64 = 0xf << 5;
/// DBGBCR_EL1.LBN and DBGWCR_EL1.LBN: the breakpoint it is linked to.
const LINK_SHIFT: u32 = 16;
const LINK: u64 = 0xf << LINK_SHIFT;
/// DBGBCR_EL1.BT.
const KIND_SHIFT: u32 = 20;
const KIND: u64 = 0xf << KIND_SHIFT;
/// DBGWCR_EL1.LSC: loads, stores.
const DIRECTION: u64 = 0b11 << 3;
/// DBGWCR_EL1.BAS.
const BYTES: u64 = 0xff << 5;
/// DBGWCR_EL1.WT: linked.
const LINKED: u64 = 1 << 20;
/// DBGWCR_EL1.MASK.
const MASK: u64 = 0x1f << 24;

/// Bits of MDSCR_EL1, DBGBCR_EL1 and DBGWCR_EL1 that a guest can set. HMC and SSC are not among them: they say what happens at
/// EL2 and EL3 and in Secure state, none of which the guest has (table of HMC, SSC and PMC in D2).
const MDSCR_GIVEN: u64 = SS | TDCC | KDE | MDE;
const BREAKPOINT_GIVEN: u64 = ENABLED | PRIVILEGE | INSTRUCTION | LINK | KIND;
const WATCHPOINT_GIVEN: u64 = ENABLED | PRIVILEGE | DIRECTION | BYTES | LINK | LINKED | MASK;

/// OSLSR_EL1.OSLM: there is an OS lock.
const LOCK_EXISTS: u64 = 1 << 3;
const LOCK_SHIFT: u32 = 1;
/// DBGCLAIMSET_EL1: the tags that there are.
const CLAIM_TAGS: u64 = 0xff;

/// A register that is more than a value.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Register {
    /// MDSCR_EL1.
    Control,
    /// OSLAR_EL1.
    Lock,
    /// OSLSR_EL1.
    LockStatus,
    /// DBGCLAIMSET_EL1.
    Claim,
    /// DBGCLAIMCLR_EL1.
    Release,
    /// MDCCSR_EL0 and DBGDTR*_EL0: EL0 may be kept from them.
    Channel,
    /// Reads as zero, ignores writes.
    Nothing,
    /// DBGBVR_EL1 of this number.
    BreakpointValue(u8),
    /// DBGBCR_EL1 of this number.
    BreakpointControl(u8),
    /// DBGWVR_EL1 of this number.
    WatchpointValue(u8),
    /// DBGWCR_EL1 of this number.
    WatchpointControl(u8),
}

/// The register that `access`, whose Op0 is 2, is to. `None`: there is none for the guest, or not in this direction.
pub fn register(access: SystemRegisterAccess) -> Option<Register> {
    let it = access.register;
    let register = match (it.op1, it.crn, it.crm, it.op2) {
        (0, 0, 2, 2) => Register::Control,
        (0, 0, n @ 0..COMPARATORS, 4) => Register::BreakpointValue(n),
        (0, 0, n @ 0..COMPARATORS, 5) => Register::BreakpointControl(n),
        (0, 0, n @ 0..COMPARATORS, 6) => Register::WatchpointValue(n),
        (0, 0, n @ 0..COMPARATORS, 7) => Register::WatchpointControl(n),
        (0, 1, 0, 4) if access.write => Register::Lock,
        (0, 1, 1, 4) if !access.write => Register::LockStatus,
        (0, 7, 8, 6) => Register::Claim,
        (0, 7, 9, 6) => Register::Release,
        // MDCCSR, DBGDTR, DBGDTRRX and DBGDTRTX.
        (3, 0, 1, 0) if !access.write => Register::Channel,
        (3, 0, 4 | 5, 0) => Register::Channel,
        // OSDTRRX, MDCCINT, OSDTRTX and OSECCR; OSDLR, for there is no double lock, and DBGPRCR.
        (0, 0, 0, 2) | (0, 0, 2, 0) | (0, 0, 3 | 6, 2) | (0, 1, 3 | 4, 4) => Register::Nothing,
        // MDRAR and DBGAUTHSTATUS.
        (0, 1, 0, 0) | (0, 7, 14, 6) if !access.write => Register::Nothing,
        _ => return None,
    };
    Some(register)
}

/// A vCPU's debug registers. Out of reset they are zero and the OS lock is open, as firmware leaves it.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Debug {
    mdscr: u64,
    locked: bool,
    claimed: u64,
    breakpoints: [Comparator; COMPARATORS as usize],
    watchpoints: [Comparator; COMPARATORS as usize],
    in_use: bool,
}

impl Debug {
    /// Whether a CPU that holds the vCPU has anything in its own registers for it.
    pub fn is_in_use(&self) -> bool {
        self.in_use
    }

    /// Whether instructions may be stepped over one by one.
    pub fn is_stepping(&self) -> bool {
        self.mdscr & SS != 0 && !self.locked
    }

    /// Whether an access to the channel from `pstate` traps to EL1. The trap to EL2 stands behind that one; MDSCR_EL1.TDCC is
    /// judged here so that a guest that sets nothing else (Linux does, for good) has nothing in the CPU's registers.
    pub fn keeps_out(&self, pstate: u64) -> bool {
        /// PSTATE.M[3:0] of EL0.
        const MODE: u64 = 0xf;
        self.mdscr & TDCC != 0 && pstate & MODE == 0
    }

    /// What the guest reads.
    pub fn read(&self, register: Register) -> u64 {
        let [value, control] = [|it: &Comparator| it.value, |it: &Comparator| it.control];
        match register {
            Register::Control => self.mdscr,
            Register::LockStatus => LOCK_EXISTS | u64::from(self.locked) << LOCK_SHIFT,
            Register::Claim => CLAIM_TAGS,
            Register::Release => self.claimed,
            Register::BreakpointValue(n) => at(&self.breakpoints, n).map_or(0, value),
            Register::BreakpointControl(n) => at(&self.breakpoints, n).map_or(0, control),
            Register::WatchpointValue(n) => at(&self.watchpoints, n).map_or(0, value),
            Register::WatchpointControl(n) => at(&self.watchpoints, n).map_or(0, control),
            Register::Lock | Register::Channel | Register::Nothing => 0,
        }
    }

    /// The guest writes.
    pub fn write(&mut self, register: Register, value: u64) {
        match register {
            Register::Control => self.mdscr = value & MDSCR_GIVEN,
            Register::Lock => self.locked = value & 1 != 0,
            Register::Claim => self.claimed |= value & CLAIM_TAGS,
            Register::Release => self.claimed &= !value,
            Register::BreakpointValue(n) => {
                change(&mut self.breakpoints, n, |it| it.value = value);
            }
            Register::BreakpointControl(n) => {
                let control = value & BREAKPOINT_GIVEN;
                change(&mut self.breakpoints, n, |it| it.control = control);
            }
            Register::WatchpointValue(n) => {
                change(&mut self.watchpoints, n, |it| it.value = value & !0b11);
            }
            Register::WatchpointControl(n) => {
                let control = value & WATCHPOINT_GIVEN;
                change(&mut self.watchpoints, n, |it| it.control = control);
            }
            Register::LockStatus | Register::Channel | Register::Nothing => {}
        }
        self.in_use = self.registers(LINKABLE) != DebugRegisters::default();
    }

    /// What a CPU is to do for the guest. The guest's second breakpoint is the CPU's last, of number `last`: the last is the one
    /// that is sure to compare with CONTEXTIDR_EL1. The OS lock keeps debug exceptions back.
    pub fn registers(&self, last: u64) -> DebugRegisters {
        let [first, second] = self.breakpoints;
        let given = if self.locked { 0 } else { SS | KDE | MDE };
        DebugRegisters {
            mdscr: self.mdscr & given,
            breakpoints: [
                breakpoint(first, false, last),
                breakpoint(second, true, last),
            ],
            watchpoints: self.watchpoints.map(|it| watchpoint(it, last)),
        }
    }
}

fn at(comparators: &[Comparator], n: u8) -> Option<&Comparator> {
    comparators.get(usize::from(n))
}

fn change(comparators: &mut [Comparator], n: u8, set: impl FnOnce(&mut Comparator)) {
    if let Some(it) = comparators.get_mut(usize::from(n)) {
        set(it);
    }
}

/// A breakpoint as the CPU gets it. One of a kind that the guest was not promised (comparing VMIDs or CONTEXTIDR_EL2, or
/// mismatches), or linked to what cannot be linked to, never matches: the architecture leaves that open, and numbers mean others on the CPU.
fn breakpoint(it: Comparator, context_aware: bool, last: u64) -> Comparator {
    const ADDRESS: u64 = 0b0000;
    const LINKED_ADDRESS: u64 = 0b0001;
    const CONTEXT: u64 = 0b0010;
    const LINKED_CONTEXT: u64 = 0b0011;
    const CONTEXT_BITS: u64 = 0xffff_ffff;
    let (value, link) = match (it.control & KIND) >> KIND_SHIFT {
        ADDRESS => (it.value & !0b11, 0),
        LINKED_ADDRESS if links(it) => (it.value & !0b11, last),
        CONTEXT | LINKED_CONTEXT if context_aware => (it.value & CONTEXT_BITS, 0),
        _ => return Comparator::default(),
    };
    let control = it.control & (ENABLED | PRIVILEGE | KIND);
    enabled(value, control | INSTRUCTION | link << LINK_SHIFT)
}

/// A watchpoint as the CPU gets it.
fn watchpoint(it: Comparator, last: u64) -> Comparator {
    let link = match it.control & LINKED != 0 {
        true if !links(it) => return Comparator::default(),
        true => last,
        false => 0,
    };
    enabled(it.value, it.control & !LINK | link << LINK_SHIFT)
}

/// Whether it names the breakpoint that can be linked to.
fn links(it: Comparator) -> bool {
    (it.control & LINK) >> LINK_SHIFT == LINKABLE
}

/// Nothing unless it is enabled.
fn enabled(value: u64, control: u64) -> Comparator {
    match control & ENABLED {
        0 => Comparator::default(),
        _ => Comparator { value, control },
    }
}

#[cfg(test)]
mod tests {
    use super::{Debug, Register, register};
    use crate::arch::context::{Comparator, DebugRegisters};
    use crate::vm::trap::{SystemRegister, SystemRegisterAccess};

    const VALUES: [Register; 4] = [
        Register::BreakpointValue(0),
        Register::BreakpointValue(1),
        Register::WatchpointValue(0),
        Register::WatchpointValue(1),
    ];
    const CONTROLS: [Register; 4] = [
        Register::BreakpointControl(0),
        Register::BreakpointControl(1),
        Register::WatchpointControl(0),
        Register::WatchpointControl(1),
    ];
    /// DBGBCR_EL1 and DBGWCR_EL1 at EL1: enabled, all bytes.
    const BREAK: u64 = 0b11 | 0xf << 5;
    const WATCH: u64 = 0b11 | 0b01 << 3 | 0xff << 5;

    fn debug(writes: &[(Register, u64)]) -> Debug {
        let mut debug = Debug::default();
        for (register, value) in writes {
            debug.write(*register, *value);
        }
        debug
    }

    /// What they read when all bits of each were written.
    fn all<const N: usize>(registers: [Register; N]) -> [u64; N] {
        let debug = debug(&registers.map(|it| (it, u64::MAX)));
        registers.map(|it| debug.read(it))
    }

    fn access(op1: u8, crn: u8, crm: u8, op2: u8, write: bool) -> Option<Register> {
        register(SystemRegisterAccess {
            register: SystemRegister::new(2, op1, crn, crm, op2),
            general: 0,
            write,
        })
    }

    #[test]
    fn registers_exist_in_their_direction_only() {
        for write in [false, true] {
            assert_eq!(access(0, 0, 2, 2, write), Some(Register::Control));
            assert_eq!(
                access(0, 0, 1, 5, write),
                Some(Register::BreakpointControl(1))
            );
            assert_eq!(
                access(0, 0, 0, 6, write),
                Some(Register::WatchpointValue(0))
            );
            // There are two of each.
            assert_eq!(access(0, 0, 2, 5, write), None);
            assert_eq!(access(0, 0, 2, 7, write), None);
            assert_eq!(access(0, 1, 3, 4, write), Some(Register::Nothing));
            assert_eq!(access(3, 0, 5, 0, write), Some(Register::Channel));
        }
        assert_eq!(access(0, 1, 0, 4, true), Some(Register::Lock));
        assert_eq!(access(0, 1, 0, 4, false), None);
        assert_eq!(access(0, 1, 1, 4, false), Some(Register::LockStatus));
        assert_eq!(access(0, 1, 1, 4, true), None);
        assert_eq!(access(0, 1, 0, 0, true), None, "MDRAR_EL1");
    }

    #[test]
    fn a_vcpu_out_of_reset_debugs_nothing() {
        let debug = Debug::default();
        assert!(!debug.is_in_use() && !debug.is_stepping());
        assert_eq!(debug.registers(5), DebugRegisters::default());
        assert_eq!(debug.read(Register::LockStatus), 0b1000);
        for register in VALUES.into_iter().chain(CONTROLS) {
            assert_eq!(debug.read(register), 0, "{register:?}");
        }
    }

    #[test]
    fn what_the_guest_writes_it_reads_but_for_what_it_is_not_given() {
        // SS, TDCC, KDE and MDE; HDE, which would halt the CPU, is bit 14.
        assert_eq!(all([Register::Control]), [0xb001]);
        assert_eq!(all(VALUES), [u64::MAX, u64::MAX, !0b11, !0b11]);
        // Neither HMC (13) nor SSC (15:14).
        assert_eq!(
            all(CONTROLS),
            [0xff_01e7, 0xff_01e7, 0x1f1f_1fff, 0x1f1f_1fff]
        );
        assert_eq!(all([Register::Claim, Register::Release]), [0xff, 0]);
        assert_eq!(all([Register::Channel, Register::Nothing]), [0, 0]);
    }

    #[test]
    fn nothing_that_a_guest_writes_reaches_el2_or_halts() {
        let mut debug = Debug::default();
        // Every kind of breakpoint at every link, with everything else set.
        for bits in 0..=0xff_u64 {
            for register in CONTROLS {
                debug.write(register, !(0xff << 16) | bits << 16);
                debug.write(Register::Control, u64::MAX);
            }
            let cpu = debug.registers(15);
            assert_eq!(cpu.mdscr, 0xa001);
            for it in cpu.breakpoints.iter().chain(&cpu.watchpoints) {
                assert_eq!(it.control & (0b111 << 13), 0, "HMC or SSC");
            }
            for it in cpu.breakpoints {
                let kind = it.control >> 20 & 0xf;
                assert!(kind <= 3 && it.control >> 24 == 0, "{kind}");
            }
            assert!(cpu.breakpoints[0].control >> 20 & 0b10 == 0, "a context");
        }
    }

    #[test]
    fn a_link_leads_to_the_last_breakpoint_of_the_cpu_or_nowhere() {
        let context = (1 << 32 | 0x1234, BREAK | 3 << 20);
        for (link, breaks, watches) in [(0, false, false), (1, true, true), (5, false, false)] {
            let debug = debug(&[
                (Register::BreakpointValue(0), 0x1003),
                (Register::BreakpointControl(0), BREAK | 1 << 20 | link << 16),
                (Register::BreakpointValue(1), context.0),
                (Register::BreakpointControl(1), context.1),
                (Register::WatchpointValue(1), 0x2007),
                (Register::WatchpointControl(1), WATCH | 1 << 20 | link << 16),
            ]);
            let cpu = debug.registers(5);
            let expected = |value, control| Comparator { value, control };
            let there = |exists, it| if exists { it } else { Comparator::default() };
            assert_eq!(
                cpu.breakpoints,
                [
                    there(breaks, expected(0x1000, BREAK | 1 << 20 | 5 << 16)),
                    expected(0x1234, BREAK | 3 << 20)
                ]
            );
            assert_eq!(
                cpu.watchpoints,
                [
                    Comparator::default(),
                    there(watches, expected(0x2004, WATCH | 1 << 20 | 5 << 16))
                ]
            );
        }
    }

    #[test]
    fn a_breakpoint_alone_is_of_any_number_that_it_has() {
        for n in [0, 1] {
            let debug = debug(&[
                (Register::BreakpointValue(n), 0x40_0000),
                (Register::BreakpointControl(n), 0b11 | 7 << 16),
            ]);
            let expected = Comparator {
                value: 0x40_0000,
                control: BREAK,
            };
            assert!(debug.is_in_use());
            assert_eq!(debug.registers(3).breakpoints[usize::from(n)], expected);
        }
    }

    #[test]
    fn the_os_lock_keeps_debug_exceptions_back() {
        let mut debug = debug(&[(Register::Control, 0x8001), (Register::Lock, 1)]);
        assert_eq!(debug.read(Register::LockStatus), 0b1010);
        assert_eq!(debug.read(Register::Control), 0x8001);
        assert_eq!(debug.registers(5).mdscr, 0);
        assert!(!debug.is_stepping() && !debug.is_in_use());
        debug.write(Register::Lock, 0xff00);
        assert_eq!(debug.registers(5).mdscr, 0x8001);
        assert!(debug.is_stepping() && debug.is_in_use());
    }

    #[test]
    fn a_guest_that_only_keeps_el0_from_the_channel_has_nothing_in_the_cpu() {
        let debug = debug(&[(Register::Control, 1 << 12), (Register::Claim, 1)]);
        assert!(!debug.is_in_use());
        assert!(debug.keeps_out(0x3c0) && !debug.keeps_out(0x3c5) && !debug.keeps_out(0x3c4));
        assert!(!Debug::default().keeps_out(0x3c0));
    }

    #[test]
    fn claim_tags_are_set_and_cleared_one_by_one() {
        let debug = debug(&[
            (Register::Claim, 0b0110),
            (Register::Claim, 0b1000),
            (Register::Release, 0b0010),
        ]);
        assert_eq!(debug.read(Register::Release), 0b1100);
        assert_eq!(debug.read(Register::Claim), 0xff);
    }
}
