//! The heap: small objects, grown from frames.
//!
//! The frame allocator keeps its lists on this heap, so the two may not wait for each other. While it allocates it
//! asks for a few small nodes; a reserve stays free for them. Growing happens when the reserve is touched and the
//! frames' lock is free at that moment; the next allocation tries again otherwise.

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ptr::{self, NonNull};

use buddy_system_allocator::Heap as Buddies;
use spin::Mutex;

use super::frames;
use crate::addr::{PAGE_BYTES, to_usize};
use crate::arch;

/// What boot has before frames exist; part of the image's BSS.
const FIRST_BYTES: usize = 512 << 10;
/// Kept free for the frame allocator.
const RESERVE: usize = 64 << 10;
/// Taken from the frames at a time, at least.
const STEP_BYTES: u64 = 1 << 20;
/// Blocks of up to 2^32 bytes.
const ORDERS: usize = 33;

#[repr(align(4096))]
struct First(UnsafeCell<[u8; FIRST_BYTES]>);

// SAFETY: the bytes are handed to the buddy allocator once, under its lock, and never accessed through this static.
unsafe impl Sync for First {}

static FIRST: First = First(UnsafeCell::new([0; FIRST_BYTES]));

/// The global allocator, on lines of its own: it is written by every allocation.
#[derive(Debug)]
#[repr(align(128))]
pub struct Heap {
    buddies: Mutex<Buddies<ORDERS>>,
}

impl Heap {
    /// An empty heap; it takes its first memory when it is first asked.
    #[expect(clippy::new_without_default, reason = "only a static is made of it")]
    pub const fn new() -> Self {
        Self {
            buddies: Mutex::new(Buddies::new()),
        }
    }

    fn take(&self, layout: Layout) -> (Option<NonNull<u8>>, bool) {
        let mut buddies = self.buddies.lock();
        if buddies.stats_total_bytes() == 0 {
            let first = FIRST.0.get().expose_provenance();
            // SAFETY: the static's bytes are this heap's from here on; the total is zero once only.
            unsafe { buddies.init(first, FIRST_BYTES) };
        }
        let object = buddies.alloc(layout).ok();
        (
            object,
            buddies.stats_total_bytes() - buddies.stats_alloc_actual() < RESERVE,
        )
    }

    /// Adds memory for an object of `layout` if it can be had without waiting.
    fn grow(&self, layout: Layout) -> bool {
        let bytes = (layout.size().max(layout.align()).next_power_of_two() as u64).max(STEP_BYTES);
        let Some(extent) = frames::contiguous_at_once(bytes, PAGE_BYTES) else {
            return false;
        };
        let start = to_usize(extent.pa.raw());
        // SAFETY: the frames belong to the heap from here on.
        unsafe {
            self.buddies
                .lock()
                .add_to_heap(start, start + to_usize(extent.bytes))
        };
        true
    }
}

// SAFETY: objects come from one buddy allocator under a lock, which hands out disjoint, aligned pieces.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        const PATIENCE: u32 = 1 << 20;
        for _ in 0..PATIENCE {
            let (object, low) = self.take(layout);
            let grown = (low || object.is_none()) && self.grow(layout);
            match object {
                Some(object) => return object.as_ptr(),
                None if grown => {}
                None => arch::yield_now(),
            }
        }
        ptr::null_mut()
    }

    unsafe fn dealloc(&self, object: *mut u8, layout: Layout) {
        if let Some(object) = NonNull::new(object) {
            // SAFETY: the caller passes what `alloc` gave for the same layout.
            unsafe { self.buddies.lock().dealloc(object, layout) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{GlobalAlloc, Heap, Layout};

    #[test]
    fn objects_are_aligned_disjoint_and_come_back() {
        static HEAP: Heap = Heap::new();
        let sizes = [1_usize, 24, 4096, 100, 60_000, 8];
        let layouts = sizes
            .map(|size| Layout::from_size_align(size, size.next_power_of_two().min(4096)).unwrap());
        for _ in 0..100 {
            // SAFETY: the layouts are not empty.
            let objects = layouts.map(|layout| unsafe { HEAP.alloc(layout) });
            for ((object, layout), number) in objects.into_iter().zip(layouts).zip(1..) {
                assert!(object.addr().is_multiple_of(layout.align()) && !object.is_null());
                // SAFETY: the object has this size and nobody else has it.
                unsafe { object.write_bytes(number, layout.size()) };
            }
            for ((object, layout), number) in objects.into_iter().zip(layouts).zip(1..) {
                // SAFETY: written above.
                let bytes = unsafe { core::slice::from_raw_parts(object, layout.size()) };
                assert!(bytes.iter().all(|&it| it == number), "objects overlap");
                // SAFETY: allocated above with this layout, and not used any more.
                unsafe { HEAP.dealloc(object, layout) };
            }
        }
        assert_eq!(HEAP.buddies.lock().stats_alloc_actual(), 0);
    }
}
