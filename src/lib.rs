//! Vellum: a Type-1 hypervisor for arm64 whose guests stay fast while every page they write is being tracked.
//!
//! This library is the whole hypervisor except its entry point (`main.rs`). It also builds on the host, where
//! [`arch`] is a fake machine, so that the MMU, trap decoding and interrupt logic are tested as they ship.
//!
//! Imports point one way: `addr <- arch <- sync, trace <- mem <- mmu <- vm <- bench, boot`; `dev` sits beside `mmu`
//! and neither sees the other. `cargo xtask check` enforces it.
#![cfg_attr(not(test), no_std)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod addr;
pub mod arch;
pub mod bench;
pub mod dev;
pub mod guest;
pub mod log;
pub mod mem;
pub mod mmu;
pub mod panic;
pub mod sync;
pub mod trace;
pub mod vm;
