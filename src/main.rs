//! The hypervisor image: entry, and nothing else.
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("this is a bare-metal image: use `cargo xtask run`");
}
