//! The CPU's own debug registers (DDI 0487 issue K.a, D2). They hold something only while the CPU holds a vCPU that debugs.

use core::arch::asm;

use super::context::{Comparator, DebugRegisters};
use super::{isb, note_register_writes};

/// ID_AA64DFR0_EL1.BRPs and WRPs: numbers of the last breakpoint and the last watchpoint.
const BRPS: u32 = 12;
const WRPS: u32 = 20;

fn last(low: u32) -> u64 {
    let dfr0: u64;
    // SAFETY: reading an identification register has no effect.
    unsafe {
        asm!("mrs {}, id_aa64dfr0_el1", out(reg) dfr0, options(pure, nomem, nostack, preserves_flags))
    };
    dfr0 >> low & 0xf
}

/// Number of this CPU's last breakpoint, which is one that compares with CONTEXTIDR_EL1: the highest-numbered are.
pub fn last_breakpoint() -> u64 {
    last(BRPS)
}

macro_rules! comparators {
    ($set:ident, $value:literal, $control:literal: $($n:literal)*) => {
        fn $set(n: u64, to: Comparator) {
            note_register_writes(2);
            match n {
                $($n => {
                    // SAFETY: no debug exception is taken from EL2; the CPU has this one.
                    unsafe { asm!(concat!("msr ", $value, $n, "_el1, {}"), in(reg) to.value, options(nomem, nostack, preserves_flags)) };
                    // SAFETY: as above.
                    unsafe { asm!(concat!("msr ", $control, $n, "_el1, {}"), in(reg) to.control, options(nomem, nostack, preserves_flags)) };
                })*
                _ => {}
            }
        }
    };
}
comparators!(set_breakpoint, "dbgbvr", "dbgbcr": 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
comparators!(set_watchpoint, "dbgwvr", "dbgwcr": 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);

/// Gives this CPU's debug registers these values. The others of the CPU hold nothing ever.
pub fn set_debug_registers(to: &DebugRegisters) {
    note_register_writes(1);
    // SAFETY: no debug exception is taken from EL2, and nobody sets the bit that halts.
    unsafe {
        asm!("msr mdscr_el1, {}", in(reg) to.mdscr, options(nomem, nostack, preserves_flags))
    };
    let [first, second] = to.breakpoints;
    set_breakpoint(last_breakpoint(), second);
    set_breakpoint(0, first);
    for (n, it) in (0..).zip(to.watchpoints) {
        set_watchpoint(n, it);
    }
    isb();
}

/// Clears every breakpoint and watchpoint, which hold anything when a CPU starts.
pub(super) fn clear_comparators() {
    (0..=last(BRPS)).for_each(|n| set_breakpoint(n, Comparator::default()));
    (0..=last(WRPS)).for_each(|n| set_watchpoint(n, Comparator::default()));
}
