//! The built-in guest: an EL1 program that dirties memory, times itself and tells.
//!
//! Two sides share this folder. [`abi`] is what guest and hypervisor agree on and belongs to the library. `program/` is
//! the guest itself; it is compiled into the binary `guest` only, linked by `guest.ld`, flattened by `cargo xtask` and
//! included in the hypervisor's image as bytes: nothing of it runs at EL2.

pub mod abi;
