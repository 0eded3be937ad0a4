//! Waiting by WFE, as locks do: an exclusive load arms the monitor, and another's store to the word ends the wait.
//!
//! An exception between the load and the WFE disarms the monitor, so that no store would end the wait; but returning from it
//! is an event itself, and the WFE does not wait (DDI 0487, Wait for Event). Interrupts that EL2 takes come at
//! any place, and nothing of theirs is signalled to this vCPU: it has set its priority mask so.

use core::mem::offset_of;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use vellum::guest::abi::{self, Area};

use super::interrupts::POKE;
use super::pass::Random;
use super::{Done, area_of, asm, gic, this_area};

/// Who waits.
const WAITER: u64 = 1;
/// Seconds after which a store that the waiter has not seen was waited for in vain. An emulator's CPU may itself wait long for
/// one of its host's.
const PATIENCE_SECONDS: u64 = 20;
/// Most times that the teller looks away between what it does.
const PAUSE: u64 = 256;

/// See [`vellum::guest::abi::op::EVENTS`].
pub(super) fn run(rounds: u64) -> Done {
    match this_area().index.load(Relaxed) {
        0 => tell(rounds),
        WAITER => wait(rounds),
        _ => Done::ok(0, 0),
    }
}

fn wait(rounds: u64) -> Done {
    let area = this_area();
    let event = abi::area(WAITER) + offset_of!(Area, event) as u64;
    gic::set_priority_mask(gic::NO_PRIORITY);
    for number in 1..=rounds {
        area.event_awaited.store(number, Release);
        asm::wait_for_store(event, number);
    }
    area.event_awaited.store(rounds + 1, Release);
    gic::set_priority_mask(gic::EVERY_PRIORITY);
    asm::take_interrupts();
    Done::ok(0, 0)
}

fn tell(rounds: u64) -> Done {
    let waiter = area_of(WAITER);
    let mut random = Random::new(rounds);
    for number in 1..=rounds {
        while waiter.event_awaited.load(Acquire) < number {
            asm::yield_now();
        }
        pause(&mut random);
        gic::send(WAITER, POKE);
        pause(&mut random);
        // From here on nobody interrupts it.
        waiter.event.store(number, Release);
        let deadline = asm::counter() + PATIENCE_SECONDS * asm::counter_hz();
        while waiter.event_awaited.load(Acquire) == number && asm::counter() < deadline {
            asm::yield_now();
        }
        if waiter.event_awaited.load(Acquire) == number {
            // All others of its stores are made at once.
            waiter.event.store(rounds, Release);
            asm::send_event();
            return Done::ok(rounds, 1);
        }
    }
    Done::ok(rounds, 0)
}

fn pause(random: &mut Random) {
    for _ in 0..random.below(PAUSE) {
        core::hint::spin_loop();
    }
}
