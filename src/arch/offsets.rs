//! Where assembly finds what it needs in a CPU's block, which lies above this module.
//!
//! [`crate::sync::percpu`] asserts that the block is laid out so.

/// `CpuBlock::emergency_stack_top`.
pub const EMERGENCY_STACK_TOP: usize = 0;

/// `CpuBlock::mitigation`.
pub const MITIGATION: usize = 8;

/// The counter of [`crate::trace::Event::Exits`] in `CpuBlock::counters`.
pub const EXITS: usize = 128 + 8 * 18;

/// As [`EXITS`], of [`crate::trace::Event::RegisterWrites`].
pub const REGISTER_WRITES: usize = 128 + 8 * 24;
