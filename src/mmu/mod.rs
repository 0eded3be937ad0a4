//! Stage 2: the guest's physical memory, and everything that is tracked about it.
//!
//! The rules that this module is written against, each with the failure behind it, are in `protocol.md`, included below.
//! Start reading at [`fault`], the hot path; then [`logging`]; then [`tlb`] for what is owed when.
//!
//! This module knows VMIDs, IPAs, physical addresses and permissions; it never sees a VM, a device tree or a system
//! register.
#![doc = include_str!("protocol.md")]

pub mod aging;
pub mod bbm;
pub mod bitmap;
pub mod collapse;
pub mod descriptor;
pub mod eager;
pub mod epoch;
pub mod error;
pub mod fault;
pub mod geometry;
mod guest_memory;
pub mod heat;
mod lazy;
pub mod lock;
pub mod logging;
mod map;
pub mod pages;
mod pie;
mod pool;
mod protect;
pub mod rights;
pub mod scan;
pub mod slot;
mod split;
pub mod splitting;
pub mod stage2;
mod swap;
pub mod table;
pub mod tlb;
pub mod unmap;
pub mod vmid;
mod walk;

#[cfg(all(test, not(loom)))]
mod tests;

pub use aging::{AccessFlag, Aged, Found, Precision, Sighting};
pub use collapse::Collapse;
pub use descriptor::{Format, Memory, Permissions};
pub use eager::Split;
pub use epoch::{Closed, Engine, Epoch, Tracking};
pub use error::Error;
pub use fault::{Access, Fault, FaultKind, Resolution};
pub use geometry::{Level, Shape};
pub use lock::Locking;
pub use pages::PageSet;
pub use scan::{Pace, Scan, Step};
pub use slot::{Contents, Extent, SlotConfig, SlotId};
pub use splitting::{Bbm, Policy, Splitting};
pub use stage2::{Config, Hardware, Services, Stage2};
pub use swap::Prepared;
pub use tlb::TlbFeatures;
pub use vmid::VmidAllocator;
