//! The interrupt storm: every vCPU sends SGIs to others as fast as it can, its own timer ticks, and every handler says what it
//! saw.
//!
//! Each send first adds one to a number that is the receiver's and the SGI's. A handler reads that number: having run after the
//! send it sees this one or a later one. So when all is over the last seen number is the last sent one, unless an interrupt was
//! lost.

use core::mem::offset_of;
use core::sync::atomic::Ordering::Relaxed;

use vellum::addr::to_usize;
use vellum::guest::abi::{self, Area, STORM_SGIS, op};

use super::interrupts::{TIMER_OFF, TIMER_ON, bump};
use super::pass::Random;
use super::{Done, area_of, asm, gic, params, this_area};

/// The first SGI of the storm; one for each of [`STORM_SGIS`].
pub(super) const FIRST: u64 = 16 - STORM_SGIS as u64;
/// One in so many sends is followed by a look at another's interrupts.
const LOOK_IN: u64 = 256;
/// Seconds after which what has not arrived is lost.
const PATIENCE_SECONDS: u64 = 20;

/// The handler of SGI `intid`.
pub(super) fn taken(area: &Area, intid: u64) {
    let index = to_usize(intid - FIRST);
    let number = area.storm_sent[index].load(Relaxed);
    area.storm_seen[index].store(number, Relaxed);
    bump(&area.storm_taken);
}

/// Ends an interrupt the way this vCPU does.
pub(super) fn end(area: &Area, acknowledged: u64) {
    gic::end(acknowledged);
    if area.storm_deactivates.load(Relaxed) != 0 {
        gic::deactivate(acknowledged);
    }
}

/// The timer's handler: the next tick, if there is to be one.
pub(super) fn tick(area: &Area) -> bool {
    let period = area.storm_period.load(Relaxed);
    if period != 0 {
        asm::set_timer_value(period);
    }
    period != 0
}

/// Sends `sends` SGIs, as the `flags` of [`op::STORM`] say; those that are paced by an SGI that nobody else sends. Then waits
/// until everybody has done so and every number that was sent to this vCPU has been seen. Results: interrupts handled, and what
/// went wrong: bit 0, a number was not seen; bit 1, the timer does not tick; bit 2, others do not end.
pub(super) fn run(sends: u64, flags: u64, period: u64, seed: u64) -> Done {
    let area = this_area();
    let own = area.index.load(Relaxed);
    let vcpus = params().vcpus;
    let mut random = Random::new(seed ^ own << 32 ^ 0x5eed);
    let first_tick = area.timer_ticks.load(Relaxed);
    area.storm_period.store(period, Relaxed);
    asm::set_timer_value(period);
    asm::set_timer_control(TIMER_ON);
    let [paced, mixed] = [op::STORM_PACED, op::STORM_MIXED].map(|flag| flags & flag != 0);
    let deactivates = mixed && !own.is_multiple_of(2);
    area.storm_deactivates
        .store(u64::from(deactivates), Relaxed);
    gic::set_separate_deactivation(deactivates);
    let mut failed = 0;
    for _ in 0..sends {
        let target = (own + 1 + random.below(vcpus - 1)) % vcpus;
        let sgi = if paced {
            own % STORM_SGIS as u64
        } else {
            random.below(STORM_SGIS as u64)
        };
        send(target, sgi);
        let to = area_of(target);
        let number = to.storm_sent[to_usize(sgi)].load(Relaxed);
        let is_seen = || to.storm_seen[to_usize(sgi)].load(Relaxed) >= number;
        if paced && !sleeps_until(is_seen) {
            failed |= 1;
        }
        if mixed && random.below(LOOK_IN) == 0 {
            gic::look_at(target);
        }
        match random.below(4) {
            0 => {
                asm::yield_now();
                asm::take_interrupts();
            }
            1 | 2 => asm::take_interrupts(),
            _ => {}
        }
    }
    area.storm_done.store(1, Relaxed);
    let all_done = || (0..vcpus).all(|vcpu| area_of(vcpu).storm_done.load(Relaxed) != 0);
    // Others may be far behind; it is wrong only if none of them gets any further.
    let done = || {
        let of = |area: &Area| {
            area.storm_sent
                .iter()
                .map(|number| number.load(Relaxed))
                .sum::<u64>()
        };
        (0..vcpus).map(|vcpu| of(area_of(vcpu))).sum::<u64>()
    };
    while !all_done() {
        let before = done();
        if !waits_for(|| all_done() || done() != before) {
            failed |= 1 << 2;
            break;
        }
    }
    let seen = || {
        let sent = area.storm_sent.iter().map(|number| number.load(Relaxed));
        sent.eq(area.storm_seen.iter().map(|number| number.load(Relaxed)))
    };
    failed |= u64::from(!waits_for(seen));
    let ticks = || area.timer_ticks.load(Relaxed) != first_tick;
    failed |= u64::from(!waits_for(ticks)) << 1;
    area.storm_period.store(0, Relaxed);
    asm::set_timer_control(TIMER_OFF);
    asm::take_interrupts();
    area.storm_deactivates.store(0, Relaxed);
    gic::set_separate_deactivation(false);
    Done::ok(area.storm_taken.load(Relaxed), failed)
}

fn send(target: u64, sgi: u64) {
    let number = abi::area(target) + offset_of!(Area, storm_sent) as u64 + 8 * sgi;
    asm::exclusive_add(number);
    gic::send(target, FIRST + sgi);
}

/// Sleeps until `holds`, which the timer's ticks let this vCPU look at again: none is kept from a CPU by those who wait for it.
/// False: it never does.
fn sleeps_until(holds: impl Fn() -> bool) -> bool {
    let deadline = asm::counter() + PATIENCE_SECONDS * asm::counter_hz();
    while !holds() {
        if asm::counter() > deadline {
            return false;
        }
        asm::wait_for_interrupt();
    }
    true
}

/// Lets interrupts in until `holds`. False: it never does.
fn waits_for(holds: impl Fn() -> bool) -> bool {
    let deadline = asm::counter() + PATIENCE_SECONDS * asm::counter_hz();
    while !holds() {
        if asm::counter() > deadline {
            return false;
        }
        asm::take_interrupts();
        asm::yield_now();
    }
    true
}
