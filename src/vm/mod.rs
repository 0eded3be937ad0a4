//! Virtual machines: vCPUs, what they trap on, and the devices they are given.
//!
//! Whatever a guest does gets an answer a machine would give (data, UNDEF, external abort, PSCI error), or its VM is
//! stopped with a reason; nothing here panics on a guest's account. This layer never sees a descriptor.

pub mod inject;
pub mod psci;
mod short;
pub mod smccc;
pub mod sysreg;
pub mod trap;
pub mod vgic;
pub mod vuart;
