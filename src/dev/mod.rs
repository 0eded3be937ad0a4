//! The machine's devices, and what its firmware tables say of it.

pub mod acpi;
pub mod fifo;
pub mod gic;
pub mod handover;
pub mod machine;
pub mod mini_uart;
pub mod mmio;
pub mod pl011;
#[cfg(test)]
mod posted;
pub mod power;
pub mod psci;
pub mod serial;
pub mod tree;
pub mod uefi;
pub mod wire;
