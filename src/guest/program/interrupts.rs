//! Interrupt self-tests: the timer wakes a sleeping vCPU, IPIs arrive and see what was written before them.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use vellum::guest::abi::Area;

use super::{Done, area_of, asm, gic, ipi, params, storm, this_area};

/// The SGI whose handler answers.
pub(super) const IPI: u64 = 3;
/// As [`IPI`]; its handler takes a lock first.
pub(super) const IPI_LOCK: u64 = 4;
/// The SGI that only wakes.
pub(super) const POKE: u64 = 5;
pub(super) const TIMER_ON: u64 = 1;
pub(super) const TIMER_OFF: u64 = 0;
const TIMER_MASKED: u64 = 0b11;
/// Sleeps before a wake-up that does not come is given up: each ends by some interrupt, a timer's at the latest.
const PATIENCE: u64 = 1000;

/// Called by the vectors with interrupts masked.
#[unsafe(no_mangle)]
extern "C" fn guest_irq() {
    let acknowledged = gic::acknowledge();
    let area = this_area();
    match gic::intid(acknowledged) {
        gic::TIMER => {
            bump(&area.timer_ticks);
            hold(area);
            if !storm::tick(area) {
                asm::set_timer_control(TIMER_MASKED);
            }
            return storm::end(area, acknowledged);
        }
        gic::PHYSICAL_TIMER => {
            bump(&area.timer_ticks);
            asm::set_physical_timer_control(TIMER_MASKED);
        }
        IPI => {
            let number = area.ipi_number.load(Relaxed);
            area.ipi_seen.store(number, Relaxed);
            bump(&area.ipis);
        }
        IPI_LOCK => {
            ipi::locked(area_of(0));
            bump(&area.ipis);
        }
        sgi @ storm::FIRST..16 => {
            storm::taken(area, sgi);
            return storm::end(area, acknowledged);
        }
        // Spurious: nothing to end.
        1020.. => return,
        _ => {}
    }
    gic::end(acknowledged);
}

/// Waits, if [`held_ticks`] asks for it. The line stays asserted meanwhile at odd ticks, and drops at even ones.
fn hold(area: &Area) {
    let number = area.handling.load(Relaxed);
    if number == 0 {
        return;
    }
    if number.is_multiple_of(2) {
        asm::set_timer_control(TIMER_MASKED);
    }
    area.held.store(number, Relaxed);
    while area.released.load(Relaxed) < number {
        core::hint::spin_loop();
    }
}

/// SGIs to all others without end, which take them and do the same: see [`vellum::guest::abi::op::FLOOD`].
pub(super) fn flood(area: &Area) -> Done {
    let mut rounds = 0;
    asm::unmask();
    while area.stop.load(Relaxed) == 0 {
        gic::broadcast(IPI);
        rounds += 1;
        area.rounds.store(rounds, Relaxed);
    }
    asm::mask();
    Done::ok(rounds, 0)
}

/// As many ticks, each held by its handler until the hypervisor has done what it wants to do meanwhile.
pub(super) fn held_ticks(rounds: u64) -> Done {
    let area = this_area();
    let first = ticks(area);
    let mut wrong = 0;
    for number in 1..=rounds {
        let before = ticks(area);
        area.handling.store(number, Relaxed);
        asm::set_timer_value(asm::counter_hz() / 100_000);
        asm::set_timer_control(TIMER_ON);
        let mut sleeps = 0;
        while ticks(area) == before && sleeps < PATIENCE {
            asm::wait_for_interrupt();
            sleeps += 1;
        }
        asm::set_timer_control(TIMER_OFF);
        asm::take_interrupts();
        wrong += u64::from(ticks(area) != before + 1);
    }
    area.handling.store(0, Relaxed);
    Done::ok(ticks(area) - first, wrong)
}

pub(super) fn bump(count: &AtomicU64) {
    count.store(count.load(Relaxed) + 1, Relaxed);
}

fn ticks(area: &Area) -> u64 {
    area.timer_ticks.load(Relaxed)
}

/// Writes a timer's register.
type SetTimer = fn(u64);

/// The virtual or the physical timer fires once each time it is set, not early, and wakes WFI; masked and disabled it does not
/// fire. While its interrupt is disabled, that one is pending as long as the timer has fired.
pub(super) fn timer_test(physical: bool) -> Done {
    let (intid, set_value, set_control): (u64, SetTimer, SetTimer) = if physical {
        (
            gic::PHYSICAL_TIMER,
            asm::set_physical_timer_value,
            asm::set_physical_timer_control,
        )
    } else {
        (gic::TIMER, asm::set_timer_value, asm::set_timer_control)
    };
    let area = this_area();
    let mut failed = 0;
    let period = asm::counter_hz() / 1000;
    for round in 0..8 {
        let before = ticks(area);
        let start = asm::counter();
        set_value(period);
        set_control(TIMER_ON);
        let mut sleeps = 0;
        while ticks(area) == before && sleeps < PATIENCE {
            asm::wait_for_interrupt();
            sleeps += 1;
        }
        set_control(TIMER_OFF);
        asm::take_interrupts();
        let once = ticks(area) == before + 1;
        let not_early = asm::counter() - start >= period;
        if !once || !not_early {
            failed |= 1 << round;
        }
    }
    let before = ticks(area);
    set_value(0);
    set_control(TIMER_MASKED);
    asm::take_interrupts();
    set_control(TIMER_OFF);
    asm::take_interrupts();
    if ticks(area) != before {
        failed |= 1 << 8;
    }
    gic::set_enabled(intid, false);
    for (bit, control, pending) in [(9, TIMER_ON, true), (10, TIMER_OFF, false)] {
        set_control(control);
        if !(0..PATIENCE).any(|_| gic::is_pending(intid) == pending) {
            failed |= 1 << bit;
        }
    }
    gic::set_enabled(intid, true);
    Done::ok(11, failed)
}

/// Numbers each IPI in memory, sends it, and waits until its receiver has answered with that number or a later one.
pub(super) fn ipi_send(rounds: u64) -> Done {
    let mut checks = 0;
    let mut failed = 0;
    for number in 1..=rounds {
        for target in 1..params().vcpus {
            let area = area_of(target);
            area.ipi_number.store(number, Relaxed);
            gic::send(target, IPI);
            checks += 1;
            if !answered(area, number) {
                failed |= 1 << (target % 64);
            }
        }
    }
    asm::set_timer_control(TIMER_OFF);
    Done::ok(checks, failed)
}

/// The receiver answers by an IPI of its own, so the sender sleeps too.
fn answered(area: &Area, number: u64) -> bool {
    let sees = || area.ipi_seen.load(Relaxed) >= number;
    for _ in 0..PATIENCE {
        if sees() {
            return true;
        }
        arm_alarm();
        asm::wait_for_interrupt();
    }
    sees()
}

/// Sleeps and answers until `rounds` IPIs were seen.
pub(super) fn ipi_serve(rounds: u64) -> Done {
    let area = this_area();
    let mut answered = 0;
    let mut sleeps = 0;
    while answered < rounds && sleeps < PATIENCE * rounds {
        let seen = area.ipi_seen.load(Relaxed);
        if seen > answered {
            answered = seen;
            gic::send(0, IPI);
        } else {
            arm_alarm();
            asm::wait_for_interrupt();
            sleeps += 1;
        }
    }
    asm::set_timer_control(TIMER_OFF);
    Done::ok(rounds, u64::from(answered < rounds))
}

/// An interrupt in 10 ms at the latest, so that a lost one is noticed and not waited for.
fn arm_alarm() {
    asm::set_timer_value(asm::counter_hz() / 100);
    asm::set_timer_control(TIMER_ON);
}
