//! Everything that needs an instruction Rust cannot spell, and nothing else.
//!
//! One function per instruction, named by its mnemonic. On the target they are the instruction (`hw`); on the
//! host they are a machine made of data (`fake`), so that code above this module runs and is judged there
//! unchanged. No other module contains `asm!` or names a system register.

pub mod atomic;
#[macro_use]
pub mod context;
pub mod features;
pub mod mitigations;
pub mod offsets;
pub mod stage1;

#[cfg(target_os = "none")]
mod debug;
#[cfg(target_os = "none")]
mod hw;
#[cfg(target_os = "none")]
mod ich;
#[cfg(target_os = "none")]
mod world;
#[cfg(target_os = "none")]
pub use {debug::*, hw::*, ich::*, world::*};

#[cfg(not(target_os = "none"))]
pub mod fake;
#[cfg(not(target_os = "none"))]
pub use fake::{host::*, instructions::*, world::*};
