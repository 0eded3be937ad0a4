//! The lockless protocols through every interleaving that loom finds, weak memory included, with the shipped types:
//! `RUSTFLAGS="--cfg loom" cargo test --release --test loom`.
//!
//! Each rule of `mmu/protocol.md` that orders two CPUs has a `good_*` test of the shipped order and a `bad_*` one of the
//! order that loses a write, reads freed memory or shares a number, which the checker must find: it panics.
//!
//! Loom explores executions with at most three preemptions, two where three take a minute (`LOOM_MAX_PREEMPTIONS` overrides).
#![cfg(loom)]

mod acks;
mod aging;
mod asking;
mod collapsing;
mod dbm;
mod dirty;
mod freeing;
mod hardware;
mod lazy;
mod leaving;
mod locking;
mod pie;
mod splitting;
mod structure;
mod summary;
mod swap;
mod vmid;
mod waking;

/// Explores `body`.
fn check(body: impl Fn() + Send + Sync + 'static) {
    check_within(3, body);
}

/// Explores `body` with at most this many preemptions, where three take too long.
fn check_within(preemptions: usize, body: impl Fn() + Send + Sync + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = model.preemption_bound.or(Some(preemptions));
    model.check(body);
}
