//! The host's stand-in for the machine, one per thread.

extern crate std;

pub mod host;
pub mod instructions;
