//! Physical memory: who owns which frame.

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
