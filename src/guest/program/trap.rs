//! Exceptions: the ones that a probe expects, and the ones that end the run.

use core::sync::atomic::Ordering::Relaxed;

use vellum::guest::abi::status;

use super::{asm, debug, this_area};

/// No exception is expected.
pub(super) const OFF: u64 = 0;
/// The next exception is recorded; execution goes on behind the instruction.
const ARMED: u64 = 1;
/// An exception was recorded.
const CAUGHT: u64 = 2;
/// Debug exceptions are recorded, any number of them.
pub(super) const DEBUGGED: u64 = 3;

const INSTRUCTION_ABORT: u64 = 0x21;

/// What a probe caught.
#[derive(Clone, Copy)]
pub(super) struct Caught {
    /// ESR_EL1.
    pub(super) esr: u64,
    /// FAR_EL1.
    pub(super) far: u64,
}

impl Caught {
    /// Exception class.
    pub(super) fn class(self) -> u64 {
        self.esr >> 26
    }
}

/// Runs `attempt` and tells which exception it took, if any.
pub(super) fn probe(attempt: impl FnOnce()) -> Option<Caught> {
    let area = this_area();
    area.probe.store(ARMED, Relaxed);
    attempt();
    let caught = area.probe.load(Relaxed) == CAUGHT;
    area.probe.store(OFF, Relaxed);
    caught.then(|| Caught {
        esr: area.probe_esr.load(Relaxed),
        far: area.probe_far.load(Relaxed),
    })
}

/// Called by the vectors; returns where to go on. `link` is the interrupted x30.
#[unsafe(no_mangle)]
extern "C" fn guest_sync(esr: u64, elr: u64, far: u64, link: u64) -> u64 {
    let area = this_area();
    if area.probe.load(Relaxed) == DEBUGGED
        && let Some(next) = debug::on_exception(area, esr >> 26, elr, far)
    {
        return next;
    }
    if area.probe.load(Relaxed) != ARMED {
        asm::fail(status::EXCEPTION, esr, elr);
    }
    area.probe.store(CAUGHT, Relaxed);
    area.probe_esr.store(esr, Relaxed);
    area.probe_far.store(far, Relaxed);
    if esr >> 26 == INSTRUCTION_ABORT {
        link
    } else {
        elr + 4
    }
}
