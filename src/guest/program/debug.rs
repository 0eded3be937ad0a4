//! Debug self-test: single steps, breakpoints and watchpoints, in one VM and beside another.

use core::sync::atomic::Ordering::Relaxed;

use vellum::addr::to_index;
use vellum::guest::abi::{Area, DATA, DEBUG_EVENTS, HVC_NULL, debug};

use super::hostile::Score;
use super::trap::{DEBUGGED, OFF, probe};
use super::{Done, asm, this_area};

/// ESR_EL1.EC of what comes from EL1 itself.
const BREAKPOINT: u64 = 0x31;
const STEP: u64 = 0x33;
const WATCHPOINT: u64 = 0x35;
const CLASS_SHIFT: u32 = 56;

/// MDSCR_EL1.SS, TDCC, KDE, MDE.
const SS: u64 = 1 << 0;
const TDCC: u64 = 1 << 12;
const KDE: u64 = 1 << 13;
const MDE: u64 = 1 << 15;
/// DBGBCR_EL1: enabled, at EL1, all bytes.
const BREAK: u64 = 0b11 | 0xf << 5;
/// DBGBCR_EL1.BT and LBN.
const LINKED_TO_1: u64 = 0b0001 << 20 | 1 << 16;
const LINKED_CONTEXT: u64 = 0b0011 << 20;
/// DBGWCR_EL1: enabled, at EL1, loads, eight bytes.
const WATCH: u64 = 0b11 | 0b01 << 3 | 0xff << 5;

/// UARTFR, which the hypervisor emulates.
const DEVICE: u64 = 0x0900_0018;
/// Instructions of `guest_stepped` before it returns.
const STEPS: u64 = 7;
const CONTEXT: u64 = 0x1234_5678;
/// What is left in DISR_EL1.
const ERROR: u64 = 0x55;

pub(super) fn run(part: u64) -> Done {
    let mut score = Score::new();
    match part {
        debug::TRY => attempt(&mut score),
        debug::APART => apart(&mut score),
        _ => kept(&mut score),
    }
    score.done()
}

/// Bits 0 to 15. Leaves a breakpoint, a watchpoint and a deferred error behind.
fn attempt(score: &mut Score) {
    asm::set_os_lock(0);
    // An instruction that EL2 executes is stepped over as any other: bits 0 to 7.
    let taken = taken(|| {
        asm::set_debug_control(SS | KDE);
        asm::step_through(DEVICE);
        asm::set_debug_control(0);
    });
    score.check(taken == STEPS);
    (1..=STEPS).for_each(|n| score.check(event(n - 1) == (STEP, asm::stepped() + 4 * n)));
    set_both();
    score.check(both_are_hit());
    // A breakpoint that is linked to a context matches in that context only.
    asm::set_breakpoint_value_1(CONTEXT);
    asm::set_breakpoint_control_1(BREAK | LINKED_CONTEXT);
    asm::set_breakpoint_control_0(BREAK | LINKED_TO_1);
    asm::set_context(CONTEXT);
    score.check(both_are_hit());
    asm::set_context(CONTEXT + 1);
    score.check(watched() == 1 && event(0) == (WATCHPOINT, DATA));
    asm::set_context(0);
    asm::set_breakpoint_control_1(0);
    asm::set_breakpoint_value_1(0);
    asm::set_breakpoint_control_0(BREAK);
    // With the OS lock closed there are no debug exceptions.
    asm::set_os_lock(1);
    score.check(asm::os_lock_status() == 0b1010);
    score.check(watched() == 0);
    asm::set_os_lock(0);
    score.check(both_are_hit());
    // Not there without FEAT_RAS, which nobody promised.
    let _caught = probe(|| asm::set_deferred_error(ERROR));
}

/// In a VM that has not debugged: nothing of another's is here. Nor does what it asks for stop anybody.
fn apart(score: &mut Score) {
    score.check(asm::debug_control() == 0);
    score.check(asm::breakpoint_value_0() == 0 && asm::breakpoint_control_0() == 0);
    score.check(asm::breakpoint_value_1() == 0 && asm::breakpoint_control_1() == 0);
    score.check(asm::watchpoint_value_0() == 0 && asm::watchpoint_control_0() == 0);
    score.check(deferred_error_is(0));
    // Before anything of its own is written, and with its own breakpoints and watchpoints, which are off.
    score.check(watched() == 0);
    asm::set_debug_control(MDE | KDE);
    score.check(watched() == 0);
    for value in [u64::MAX, 0] {
        asm::set_breakpoint_value_0(value);
        asm::set_breakpoint_control_0(value);
        asm::set_breakpoint_control_1(value);
        asm::set_watchpoint_value_0(value);
        asm::set_watchpoint_control_0(value);
        asm::set_debug_control(value);
        // EL2 runs, and nobody is stopped.
        score.check(asm::hvc(HVC_NULL) == 0);
        score.check(asm::load_word(DEVICE) != u64::MAX);
        score.check(asm::debug_control() == value & (SS | TDCC | KDE | MDE));
    }
}

/// After another VM had this CPU, or on another CPU: everything is as [`attempt`] left it, but for what nobody was promised.
fn kept(score: &mut Score) {
    score.check(asm::debug_control() == MDE | KDE);
    score.check(asm::breakpoint_value_0() == asm::broken());
    score.check(asm::breakpoint_control_0() == BREAK);
    score.check(asm::watchpoint_value_0() == DATA && asm::watchpoint_control_0() == WATCH);
    score.check(both_are_hit());
}

fn deferred_error_is(expected: u64) -> bool {
    let mut found = expected;
    let caught = probe(|| found = asm::deferred_error());
    caught.is_some() || found == expected
}

fn set_both() {
    asm::set_breakpoint_value_0(asm::broken());
    asm::set_breakpoint_control_0(BREAK);
    asm::set_watchpoint_value_0(DATA);
    asm::set_watchpoint_control_0(WATCH);
    asm::set_debug_control(MDE | KDE);
}

fn both_are_hit() -> bool {
    watched() == 2 && event(0) == (BREAKPOINT, asm::broken()) && event(1) == (WATCHPOINT, DATA)
}

/// Debug exceptions that an instruction of its own and a load from [`DATA`] took.
fn watched() -> u64 {
    taken(|| asm::run_watched(DATA))
}

/// Debug exceptions that `attempt` took.
fn taken(attempt: impl FnOnce()) -> u64 {
    let area = this_area();
    area.debug_taken.store(0, Relaxed);
    area.probe.store(DEBUGGED, Relaxed);
    attempt();
    area.probe.store(OFF, Relaxed);
    area.debug_taken.load(Relaxed)
}

/// Class and address of debug exception `n` since [`taken`] began.
fn event(n: u64) -> (u64, u64) {
    let event = this_area()
        .debug_events
        .get(to_index(n))
        .map_or(0, |event| event.load(Relaxed));
    (event >> CLASS_SHIFT, event & ((1 << CLASS_SHIFT) - 1))
}

/// Called for an exception while they are expected; returns where to go on, or `None` if it is no debug exception.
pub(super) fn on_exception(area: &Area, class: u64, elr: u64, far: u64) -> Option<u64> {
    let n = area.debug_taken.load(Relaxed);
    if n >= DEBUG_EVENTS as u64 {
        return None;
    }
    let (address, next) = match class {
        STEP => {
            asm::step_on(n + 1 < STEPS);
            (elr, elr)
        }
        BREAKPOINT => (elr, elr + 4),
        WATCHPOINT => (far, elr + 4),
        _ => return None,
    };
    if let Some(event) = area.debug_events.get(to_index(n)) {
        event.store(class << CLASS_SHIFT | address, Relaxed);
    }
    area.debug_taken.store(n + 1, Relaxed);
    Some(next)
}
