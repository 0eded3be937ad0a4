//! Virtual machines: vCPUs, what they trap on, and the devices they are given.
//!
//! Whatever a guest does gets an answer a machine would give (data, UNDEF, external abort, PSCI error), or its VM is
//! stopped with a reason; nothing here panics on a guest's account. This layer never sees a descriptor.
//!
//! | file | what |
//! |---|---|
//! | [`vm`] | what a controller sees: create, fill, start, post commands, stop, destroy |
//! | [`vcpu`], `resident` | a vCPU as others see it, and on the CPU that holds it: the run loop |
//! | `short`, `quick`, `exits`, `mmio` | what exits do, from the shortest path to emulated devices |
//! | `deliver` | interrupts on their way to a vCPU and into its list registers |
//! | [`trap`], [`inject`], [`sysreg`], [`psci`], [`smccc`], [`serror`] | decoding and deciding, pure |
//! | [`debug`] | a guest's breakpoints, watchpoints and single steps |
//! | [`vgic`], [`vtimer`], [`ptimer`], [`vuart`] | the devices |
//! | [`console`] | what guests send, on its way to the machine's UART |
//! | [`loader`] | what a kernel finds in memory when it begins |
//! | [`host`], [`run`], [`sched`] | what VMs stand on, the life of a CPU, and who runs next on it |
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing,
        reason = "guests reach it"
    )
)]

pub mod console;
pub mod debug;
mod deliver;
mod exits;
pub mod host;
pub mod inject;
pub mod loader;
mod mmio;
pub mod psci;
pub mod ptimer;
mod quick;
mod resident;
pub mod run;
pub mod sched;
pub mod serror;
mod short;
pub mod smccc;
pub mod sysreg;
pub mod trap;
pub mod vcpu;
pub mod vgic;
#[expect(
    clippy::module_inception,
    reason = "the file about VMs is named after them"
)]
pub mod vm;
pub mod vtimer;
pub mod vuart;

pub use host::Host;
pub use vcpu::Command;
pub use vm::{Error, Placement, StopReason, Vm, VmConfig};
