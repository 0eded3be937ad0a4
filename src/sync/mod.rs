//! What CPUs share and how: per-CPU data, grace periods, published snapshots, and a mutex that loom can see.
//!
//! # Lock order
//!
//! Taken from top to bottom, never upwards; nothing is waited for (grace period, acknowledgement, another CPU) while
//! one of them is held:
//!
//! 1. a VM's configuration lock (slots, logging state): `mmu::Stage2`'s `admin`. No section and no fault ever takes it, so
//!    it alone may be held across a grace period
//! 2. a VM's MMU lock: `mmu::lock::MmuLock`
//! 3. a CPU's stash of table frames: `mmu::pool::TablePool`
//! 4. the VMID allocator
//! 5. the frame allocator
//! 6. the console

pub mod mutex;
pub mod percpu;
pub mod published;
pub mod quiescence;
