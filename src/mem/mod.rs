//! Physical memory: who owns which frame.
//!
//! ```text
//! RAM that the tree grants --(less image, tree, reservations)--> frames --(1 MiB at a time)--> heap
//!                                                                  |
//!                                                                  +--> stacks, per-CPU blocks, tables, guest memory
//!                                                                  +--(16 at a time)--> a CPU's stash --> tables
//! ```
//!
//! EL2 maps all RAM at its own address, so owning a frame is owning the pointer to it. A frame is owned by whoever
//! [`frames::allocate`] gave it to, until [`frames::release`].
//!
//! Lock order: frames, then heap. The frame allocator keeps its lists on the heap, so the heap never waits for the
//! frames; see [`heap`].

pub mod frames;
pub mod heap;
pub mod nodes;
pub mod ram;

pub use frames::Extent;

use crate::addr::Pa;

/// Where the MMU gets page-sized frames for translation tables, and gives them back.
///
/// Called outside all MMU locks, by any CPU; implementations lock by themselves.
pub trait TableFrames: Send + Sync {
    /// `pages` contiguous frames aligned to their whole size, a power of two; contents undefined. `None` when memory is
    /// short.
    fn allocate(&self, pages: usize) -> Option<Pa>;

    /// Takes back what [`TableFrames::allocate`] gave: nobody refers to it any more.
    fn release(&self, frames: Pa, pages: usize);
}

#[cfg(target_os = "none")]
#[global_allocator]
static HEAP: heap::Heap = heap::Heap::new();
