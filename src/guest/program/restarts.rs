//! A vCPU that goes off and is turned on again, over and over: nothing of its life before is left in its registers, and what is
//! sent to it in the new one arrives.
//!
//! It goes off with a timer that has fired, with an interrupt that it acknowledged and did not end, and with nothing. The new
//! life begins without any access that traps, asleep or in a loop: what EL2 owes it from before has to be done by then.

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use vellum::guest::abi::Area;

use super::interrupts::{IPI, POKE, TIMER_ON, bump};
use super::{Done, affinity_of, area_of, asm, gic, this_area};

/// Who goes off.
const RESTARTED: u64 = 1;
/// CNTP_CTL_EL0.ISTATUS.
const FIRED: u64 = 1 << 2;
/// PSCI: AFFINITY_INFO of a CPU that is off, CPU_ON of one that is about to be on, or is.
const OFF: u64 = 1;
const ON_PENDING: u64 = -5_i64 as u64;
const ALREADY_ON: u64 = -4_i64 as u64;
/// Seconds that the other vCPU has for going off, or coming on.
const PATIENCE_SECONDS: u64 = 20;

/// What is wrong, bits of the mask.
mod fault {
    /// The priority mask is not what it is out of reset.
    pub(super) const PRIORITY_MASK: u64 = 1 << 0;
    /// An interrupt came for a timer that was set in a life before.
    pub(super) const TICK: u64 = 1 << 1;
    /// The physical timer is still on.
    pub(super) const TIMER: u64 = 1 << 2;
    /// It did not go off.
    pub(super) const NOT_OFF: u64 = 1 << 3;
    /// CPU_ON did not do what it says.
    pub(super) const CPU_ON: u64 = 1 << 4;
    /// It did not come on.
    pub(super) const NOT_ON: u64 = 1 << 5;
}

/// See [`vellum::guest::abi::op::RESTARTS`].
pub(super) fn run(rounds: u64) -> Done {
    let area = this_area();
    match area.index.load(Relaxed) {
        0 => Done::ok(rounds, restart(rounds)),
        RESTARTED if rounds > 0 => {
            for word in [&area.births, &area.may_sleep, &area.restart_faults] {
                word.store(0, Relaxed);
            }
            area.ticks_before
                .store(area.timer_ticks.load(Relaxed), Relaxed);
            area.lives.store(rounds, Relaxed);
            go_off(rounds)
        }
        _ => Done::ok(0, 0),
    }
}

/// Turns the other on as often as it goes off, and interrupts it each time.
fn restart(rounds: u64) -> u64 {
    let area = area_of(RESTARTED);
    let affinity = affinity_of(RESTARTED);
    let mut faults = 0;
    for birth in 1..=rounds {
        if !soon(|| asm::affinity_info(affinity) == OFF) {
            return faults | fault::NOT_OFF;
        }
        let first = asm::cpu_on(affinity, RESTARTED);
        let second = asm::cpu_on(affinity, RESTARTED);
        if first != 0 || !matches!(second, ON_PENDING | ALREADY_ON) {
            faults |= fault::CPU_ON;
        }
        if !soon(|| area.births.load(Acquire) >= birth) {
            return faults | fault::NOT_ON;
        }
        if in_a_loop(birth) {
            gic::look_at(RESTARTED);
            area.may_sleep.store(birth, Release);
        }
        // For it to fall asleep.
        let sent = asm::counter() + asm::counter_hz() / 1000;
        while asm::counter() < sent {
            asm::yield_now();
        }
        gic::send(RESTARTED, IPI);
    }
    faults
}

/// A new life: until the interrupt has come. The last one goes on with the next operation.
pub(super) fn live(area: &Area) -> Done {
    let mut faults = area.restart_faults.load(Relaxed);
    if gic::priority_mask() != gic::NO_PRIORITY {
        faults |= fault::PRIORITY_MASK;
    }
    gic::init_interface();
    let (ipis, birth) = (area.ipis.load(Relaxed), area.births.load(Relaxed) + 1);
    area.births.store(birth, Release);
    while in_a_loop(birth) && area.may_sleep.load(Acquire) < birth {
        core::hint::spin_loop();
    }
    while area.ipis.load(Relaxed) == ipis {
        asm::wait_for_interrupt();
    }
    if area.timer_ticks.load(Relaxed) != area.ticks_before.load(Relaxed) {
        faults |= fault::TICK;
    }
    if asm::physical_timer_control() != 0 {
        faults |= fault::TIMER;
    }
    gic::forget_active(POKE);
    area.restart_faults.store(faults, Relaxed);
    let lives = area.lives.load(Relaxed) - 1;
    area.lives.store(lives, Relaxed);
    if lives > 0 {
        go_off(lives);
    }
    bump(&area.operations);
    Done::ok(birth, faults)
}

/// Whether the vCPU spins at the beginning of this life, interrupts masked.
fn in_a_loop(birth: u64) -> bool {
    birth.is_multiple_of(2)
}

/// Goes off in one of four ways.
fn go_off(lives: u64) -> ! {
    match lives / 2 % 4 {
        0 => {
            asm::set_physical_timer_value(0);
            asm::set_physical_timer_control(TIMER_ON);
            while asm::physical_timer_control() & FIRED == 0 {}
        }
        1 => {
            gic::send(RESTARTED, POKE);
            while gic::intid(gic::acknowledge()) != POKE {}
        }
        2 => {
            asm::set_timer_value(0);
            asm::set_timer_control(TIMER_ON);
        }
        _ => {}
    }
    asm::cpu_off()
}

fn soon(done: impl Fn() -> bool) -> bool {
    let deadline = asm::counter() + PATIENCE_SECONDS * asm::counter_hz();
    while asm::counter() < deadline {
        if done() {
            return true;
        }
        asm::yield_now();
    }
    done()
}
