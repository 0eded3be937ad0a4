//! The built-in guest's binary: see `src/guest/mod.rs`. Built by `cargo xtask` with `src/guest/guest.ld`, as a static
//! program at a fixed address, before the hypervisor that contains it.
//!
//! The `target_os` switch stands here because this file is also seen by host builds, where it is an empty program.
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
#[path = "../guest/program/mod.rs"]
mod program;

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("this is a bare-metal guest: use `cargo xtask run`");
}
