//! One thing many times: what an exit costs, with the guest's side of it.
//!
//! All at once, a run is the thing itself and two instructions of a loop. One by one, it is also two reads of the counter,
//! which [`NOTHING`](vellum::guest::abi::measure::NOTHING) measures.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use vellum::guest::abi::{MAX_SAMPLES, SAMPLES, measure};

use super::interrupts::{IPI, POKE, TIMER_OFF, TIMER_ON};
use super::{Done, area_of, asm, gic, ipi, this_area};

const PAGE: u64 = 4096;
/// Looks for an interrupt that should have come.
const PATIENCE: u64 = 1 << 24;
/// Parts of a second in which a receiver falls asleep.
const PAUSES_PER_SECOND: u64 = 20_000;

/// See [`vellum::guest::abi::op::MEASURE`].
pub(super) fn run(what: u64, runs: u64, argument: u64, single: bool) -> Done {
    let runs = if single { runs.min(MAX_SAMPLES) } else { runs };
    let mut lost = 0;
    let result = match what {
        measure::NOTHING => clock(runs, single, |_| {}),
        measure::HYPERCALL => clock(runs, single, |_| asm::null_call()),
        measure::LOAD_X0 => clock(runs, single, |_| asm::load_x0(argument)),
        measure::LOAD_X25 => clock(runs, single, |_| asm::load_x25(argument)),
        measure::LOAD_WIDE_X0 => clock(runs, single, |_| asm::load_wide_x0(argument)),
        measure::LOAD_WIDE_X25 => clock(runs, single, |_| asm::load_wide_x25(argument)),
        measure::EOI => clock(runs, single, |_| gic::end(gic::SPURIOUS)),
        measure::IPI => with_interrupts(|| clock(runs, single, |_| lost += send(argument))),
        measure::IPI_AFTER_PAUSE => with_interrupts(|| {
            collect(runs, |_| {
                pause();
                time(|| lost += send(argument))
            })
        }),
        measure::TIMER => with_interrupts(|| collect(runs, |_| timer(argument, &mut lost))),
        measure::WAKE => collect(runs, |_| wake(argument)),
        measure::STORE_PAGES => clock(runs, single, |run| asm::store(argument + run * PAGE, run)),
        measure::LOAD_PAGES => clock(runs, single, |run| ignore(asm::load(argument + run * PAGE))),
        measure::HAND_ON => clock(runs, single, |_| asm::wait_for_event()),
        measure::POKE => clock(runs, false, |_| gic::send(argument, POKE)),
        _ => 0,
    };
    Done::ok(result, lost)
}

#[inline(always)]
fn clock(runs: u64, single: bool, mut work: impl FnMut(u64)) -> u64 {
    if single {
        return collect(runs, |run| time(|| work(run)));
    }
    time(|| (0..runs).for_each(&mut work))
}

#[inline(always)]
fn time(work: impl FnOnce()) -> u64 {
    let start = asm::counter();
    work();
    asm::counter() - start
}

fn collect(runs: u64, mut sample: impl FnMut(u64) -> u64) -> u64 {
    for run in 0..runs {
        let place: &AtomicU64 = asm::place(SAMPLES + 8 * run);
        place.store(sample(run), Relaxed);
    }
    runs
}

fn with_interrupts(work: impl FnOnce() -> u64) -> u64 {
    asm::unmask();
    let result = work();
    asm::mask();
    result
}

/// Sends and waits for the handler. One if it did not run.
#[inline(always)]
fn send(target: u64) -> u64 {
    let handled = &area_of(target).ipis;
    let before = handled.load(Relaxed);
    gic::send(target, IPI);
    u64::from(!ipi::wait(|| handled.load(Relaxed) != before))
}

fn pause() {
    let start = asm::counter();
    while asm::counter() - start < asm::counter_hz() / PAUSES_PER_SECOND {
        asm::yield_now();
    }
}

/// How late the handler of a timer is seen to have run.
fn timer(ticks: u64, lost: &mut u64) -> u64 {
    let handled = &this_area().timer_ticks;
    let before = handled.load(Relaxed);
    let deadline = asm::counter() + ticks;
    asm::set_timer_compare(deadline);
    asm::set_timer_control(TIMER_ON);
    let mut patience = PATIENCE;
    while handled.load(Relaxed) == before && patience > 0 {
        patience -= 1;
    }
    let late = asm::counter().saturating_sub(deadline);
    asm::set_timer_control(TIMER_OFF);
    *lost += u64::from(patience == 0);
    late
}

/// How late execution goes on behind a `WFI` that a timer ends.
fn wake(ticks: u64) -> u64 {
    let deadline = asm::counter() + ticks;
    asm::set_timer_compare(deadline);
    asm::set_timer_control(TIMER_ON);
    asm::wfi();
    let late = asm::counter().saturating_sub(deadline);
    asm::take_interrupts();
    asm::set_timer_control(TIMER_OFF);
    late
}

fn ignore(_value: u64) {}
