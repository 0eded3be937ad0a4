//! The machine's devices, and what its firmware tables say of it.

pub mod gic;
pub mod machine;
pub mod mmio;
pub mod pl011;
pub mod psci;
pub mod tree;
