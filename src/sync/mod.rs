//! What CPUs share and how: per-CPU data, grace periods, acknowledgements, published snapshots, lines of one's own, and a mutex that loom can see.
//!
//! # Lock order
//!
//! Taken from top to bottom, never upwards; nothing is waited for (grace period, acknowledgement, another CPU) while
//! one of them is held:
//!
//! 1. a VM's operation lock (`mmu::Stage2`'s `operations`), held by whole operations of a VM with engine `swap`
//! 2. a VM's configuration lock (slots, logging state): `mmu::Stage2`'s `admin`. No section and no fault ever takes it, so
//!    these two alone may be held across a grace period
//! 3. a VM's MMU lock: `mmu::lock::MmuLock`
//! 4. a CPU's stash of table frames: `mmu::pool::TablePool`
//! 5. the VMID allocator
//! 6. the frame allocator
//! 7. the console

pub mod acks;
pub mod mutex;
pub mod padded;
pub mod percpu;
pub mod published;
pub mod quiescence;
