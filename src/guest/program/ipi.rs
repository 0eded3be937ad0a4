//! The kernel's IPI benchmark: one vCPU sends, the others listen.

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use vellum::guest::abi::{Area, ipi, listen};

use super::interrupts::{IPI, IPI_LOCK, bump};
use super::{Done, area_of, asm, gic, params, this_area};

/// Looks for an answer that should have come.
const PATIENCE: u64 = 1 << 26;

/// Lets interrupts in until told to stop, in one of the ways of [`listen`](vellum::guest::abi::listen).
pub(super) fn listen(how: u64) -> Done {
    let area = this_area();
    let before = area.ipis.load(Relaxed);
    let goes_on = || area.stop.load(Relaxed) == 0;
    match how {
        listen::ASLEEP => {
            while goes_on() {
                asm::wait_for_interrupt();
            }
        }
        listen::HANDING_ON => {
            while goes_on() {
                asm::wait_for_event();
            }
        }
        _ => {
            asm::unmask();
            while goes_on() {
                asm::yield_now();
            }
            asm::mask();
        }
    }
    Done::ok(area.ipis.load(Relaxed) - before, 0)
}

/// Looks until `done`. False: it took too long.
#[inline(always)]
pub(super) fn wait(done: impl Fn() -> bool) -> bool {
    for _ in 0..PATIENCE {
        if done() {
            return true;
        }
        asm::yield_now();
    }
    done()
}

/// Handler of [`IPI_LOCK`]: takes the lock, counts, gives it back.
pub(super) fn locked(first: &Area) {
    while first.lock.compare_exchange(0, 1, Acquire, Relaxed).is_err() {
        asm::yield_now();
    }
    bump(&first.locked);
    first.lock.store(0, Release);
}

/// See [`vellum::guest::abi::op::IPI_MODES`].
pub(super) fn modes(mode: u64, rounds: u64) -> Done {
    let vcpus = params().vcpus;
    let receivers = match mode {
        ipi::DRY => 0..0,
        ipi::OWN => 0..1,
        ipi::NORMAL => 1..vcpus.min(2),
        _ => 1..vcpus,
    };
    let mut sends = 0;
    let start = asm::counter();
    asm::unmask();
    for _ in 0..rounds {
        let round = receivers.clone();
        let before: u64 = answers(round.clone());
        let expected = before + (round.end - round.start);
        let sent = asm::counter();
        match mode {
            ipi::DRY => {}
            ipi::OWN => gic::send(0, IPI),
            ipi::NORMAL => gic::send(1, IPI),
            ipi::BROADCAST_LOCK => gic::broadcast(IPI_LOCK),
            _ => gic::broadcast(IPI),
        }
        sends += asm::counter() - sent;
        if !wait(|| answers(round.clone()) >= expected) {
            asm::mask();
            return Done::ok(u64::MAX, u64::MAX);
        }
    }
    asm::mask();
    Done::ok(sends, asm::counter() - start)
}

/// Interrupts that vCPUs have taken.
fn answers(of: core::ops::Range<u64>) -> u64 {
    of.map(|index| area_of(index).ipis.load(Relaxed)).sum()
}
