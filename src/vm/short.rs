//! The abort short path: what the vectors call with most of the guest's registers still in place.

use crate::arch::context::{Exit, Frame};

/// Judges a stage-2 abort: [`crate::arch::context::RESUME`], or the number of an [`Exit`].
#[unsafe(no_mangle)]
extern "C" fn guest_abort(_frame: *mut Frame, _esr: u64) -> u64 {
    Exit::OtherAbort as u64
}
