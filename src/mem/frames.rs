//! Page frames: a buddy allocator over all usable RAM.

use alloc::vec::Vec;
use core::ops::Range;
use core::sync::atomic::{AtomicUsize, Ordering};

use buddy_system_allocator::FrameAllocator;
use spin::Mutex;

use super::TableFrames;
use crate::addr::{PAGE_BYTES, PAGE_SHIFT, Pa, to_usize};
use crate::sync::padded::Padded;

/// Blocks of up to 2^32 pages.
const ORDERS: usize = 33;

static FRAMES: Padded<Mutex<FrameAllocator<ORDERS>>> =
    Padded::new(Mutex::new(FrameAllocator::new()));
/// Those that nobody owns; behind the truth for a moment.
static FREE_PAGES: Padded<AtomicUsize> = Padded::new(AtomicUsize::new(0));

/// A piece of contiguous memory, made of whole pages.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Extent {
    /// Its first byte.
    pub pa: Pa,
    /// Its bytes.
    pub bytes: u64,
}

/// Adds RAM that nobody owns.
///
/// # Safety
///
/// `range` is RAM, whole pages, mapped at its own address, referenced by nobody and never added before.
pub unsafe fn add(range: Range<Pa>) {
    let pages = to_usize(range.start.page())..to_usize(range.end.page());
    FREE_PAGES.fetch_add(pages.len(), Ordering::Relaxed);
    FRAMES.lock().insert(pages);
}

/// Pages that nobody owns.
pub fn free_pages() -> usize {
    FREE_PAGES.load(Ordering::Relaxed)
}

/// One page. Its content is what its last owner left.
pub fn allocate() -> Option<Pa> {
    Some(contiguous(PAGE_BYTES, PAGE_BYTES)?.pa)
}

/// `bytes` bytes, rounded up to pages, at a multiple of `align_bytes`, a power of two.
pub fn contiguous(bytes: u64, align_bytes: u64) -> Option<Extent> {
    counted(contiguous_from(&mut FRAMES.lock(), bytes, align_bytes))
}

/// As [`contiguous`], or `None` when another CPU (or this one) is allocating.
pub(super) fn contiguous_at_once(bytes: u64, align_bytes: u64) -> Option<Extent> {
    counted(contiguous_from(
        &mut *FRAMES.try_lock()?,
        bytes,
        align_bytes,
    ))
}

fn counted(taken: Option<Extent>) -> Option<Extent> {
    if let Some(extent) = &taken {
        FREE_PAGES.fetch_sub(to_usize(extent.bytes >> PAGE_SHIFT), Ordering::Relaxed);
    }
    taken
}

fn contiguous_from(
    frames: &mut FrameAllocator<ORDERS>,
    bytes: u64,
    align_bytes: u64,
) -> Option<Extent> {
    let pages = to_usize(bytes.div_ceil(PAGE_BYTES));
    let block = pages
        .checked_next_power_of_two()?
        .max(to_usize(align_bytes >> PAGE_SHIFT));
    let first = frames.alloc(block)?;
    give_back(frames, first + pages..first + block);
    Some(Extent {
        pa: Pa::new((first as u64) << PAGE_SHIFT),
        bytes: (pages as u64) << PAGE_SHIFT,
    })
}

/// `bytes` bytes in as few pieces as there are, each at and of a multiple of `align_bytes`, a power of two; what is
/// left of `bytes` after those is rounded up.
pub fn scattered(bytes: u64, align_bytes: u64) -> Option<Vec<Extent>> {
    let mut extents = Vec::new();
    let mut left = bytes.next_multiple_of(align_bytes);
    let mut piece = left;
    while left > 0 {
        match contiguous(piece.min(left), align_bytes) {
            Some(extent) => {
                left -= extent.bytes;
                extents.push(extent);
            }
            None if piece > align_bytes => piece = (piece / 2).next_power_of_two().max(align_bytes),
            None => {
                extents.into_iter().for_each(release);
                return None;
            }
        }
    }
    Some(extents)
}

/// Takes memory back.
pub fn release(extent: Extent) {
    let first = to_usize(extent.pa.page());
    let pages = first..first + to_usize(extent.bytes >> PAGE_SHIFT);
    FREE_PAGES.fetch_add(pages.len(), Ordering::Relaxed);
    give_back(&mut FRAMES.lock(), pages);
}

/// Returns `pages` block by block, so that buddies join.
fn give_back(frames: &mut FrameAllocator<ORDERS>, pages: Range<usize>) {
    let mut at = pages.start;
    while at < pages.end {
        let order = at.trailing_zeros().min((pages.end - at).ilog2());
        frames.dealloc(at, 1 << order);
        at += 1 << order;
    }
}

/// All of RAM as the MMU's source of tables.
#[derive(Clone, Copy, Debug)]
pub struct System;

impl TableFrames for System {
    fn allocate(&self, pages: usize) -> Option<Pa> {
        let bytes = (pages as u64) << PAGE_SHIFT;
        Some(contiguous(bytes, bytes)?.pa)
    }

    fn release(&self, frames: Pa, pages: usize) {
        release(Extent {
            pa: frames,
            bytes: (pages as u64) << PAGE_SHIFT,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::{FrameAllocator, ORDERS, contiguous_from, give_back};

    #[test]
    fn what_is_not_needed_of_a_block_stays_free() {
        let mut frames = FrameAllocator::<ORDERS>::new();
        frames.insert(0x400..0x800);
        let extent = contiguous_from(&mut frames, 5 * 4096 - 1, 4096).unwrap();
        assert_eq!(extent.bytes, 5 * 4096);
        let rest = (0..)
            .map_while(|_| contiguous_from(&mut frames, 4096, 4096))
            .count();
        assert_eq!(rest, 0x400 - 5);
    }

    #[test]
    fn alignment_is_kept_and_buddies_join_again() {
        let mut frames = FrameAllocator::<ORDERS>::new();
        frames.insert(0x401..0x1000);
        let extent = contiguous_from(&mut frames, 4096, 2 << 20).unwrap();
        assert!(extent.pa.is_aligned(2 << 20));
        let first = usize::try_from(extent.pa.page()).unwrap();
        give_back(&mut frames, first..first + 1);
        assert!(contiguous_from(&mut frames, 8 << 20, 8 << 20).is_some());
        assert!(contiguous_from(&mut frames, 8 << 20, 8 << 20).is_none());
    }
}
