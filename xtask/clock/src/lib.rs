//! A QEMU plugin: a virtual clock in which all CPUs advance together, a nanosecond an instruction, whatever the host
//! has to run them on.
//!
//! The same library is preloaded into QEMU and loaded as its plugin. As a plugin it counts the instructions of every CPU and
//! makes each wait for its turn (`schedule`): a CPU gets a quantum ahead of the others at most, and less where it executes what
//! orders memory (`decode`). Preloaded, it is the clock that QEMU reads, and sees who sleeps and who waits for whom
//! (`interpose`).
//!
//! On request (`lines`) a CPU that takes a line of memory from another is charged for it, and it is told who takes which where
//! (`account`).
//!
//! A CPU's thread is let go without its turn in one case only: another thread waits until all have left translated code
//! (QEMU's exclusive sections, for broadcast invalidations for example). It then executes one block, and what that took stays on its clock.

#![cfg_attr(test, expect(dead_code, reason = "QEMU calls what tests do not"))]

mod account;
mod api;
mod clock;
mod decode;
mod interpose;
mod lines;
mod plugin;
mod schedule;
