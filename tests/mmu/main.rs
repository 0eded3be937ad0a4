//! Host tests of the shipped MMU on the fake machine: `protocol` entry point by entry point, `splitting`, `policies` and
//! `collapsing` changes of size, `epochs` and `engines` protecting everything, `aging`, `random` programs of many steps against a flat
//! model, `threads` on real threads, `unprotected` logs that begin with everything set.
#![cfg(not(loom))]

mod aging;
mod closing;
mod collapsing;
mod cpus;
mod engines;
mod epochs;
mod events;
mod flat;
mod hardware;
mod policies;
mod protocol;
mod random;
mod rig;
mod splitting;
mod threads;
mod unprotected;
