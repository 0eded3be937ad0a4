//! Host tests of the shipped MMU on the fake machine: `protocol` entry point by entry point, `random` by programs of many
//! steps against a flat model.
#![cfg(not(loom))]

mod flat;
mod protocol;
mod random;
mod rig;
