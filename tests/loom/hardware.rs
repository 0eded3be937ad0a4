//! What these models need of hardware: one page of guest memory, and the TLB of the CPU whose guest writes to it.
//!
//! The TLB keeps its entry until it is invalidated. A lock makes each access one step and orders it with invalidations,
//! as a completed `TLBI; DSB` does.

use loom::sync::Mutex;
use vellum::addr::Pa;
use vellum::mmu::bitmap::Bitmap;
use vellum::mmu::descriptor::{Descriptor, Leaf, Tag};
use vellum::mmu::table::Slot;
use vellum::mmu::{Format, Level, Memory, Permissions};

/// The page that everything here is about, and the CPU whose guest writes to it.
pub(crate) const PAGE: u64 = 5;
pub(crate) const GUEST_CPU: usize = 1;

pub(crate) struct Hardware(Mutex<State>);

struct State {
    memory: u64,
    cached: Option<Descriptor>,
}

impl Hardware {
    /// A TLB that holds `cached`.
    pub(crate) fn new(cached: Option<Descriptor>) -> Self {
        Self(Mutex::new(State { memory: 0, cached }))
    }

    /// A store by the guest, through its TLB or by a walk that ends at what `walk` returns. Whether it succeeded.
    pub(crate) fn store(&self, walk: impl FnOnce() -> Descriptor) -> bool {
        let mut state = self.0.lock().unwrap();
        let entry = state.cached.unwrap_or_else(walk);
        if entry.is_young() {
            state.cached = Some(entry);
        }
        if entry.is_writable() {
            state.memory += 1;
        }
        entry.is_writable()
    }

    /// A completed invalidation.
    pub(crate) fn invalidate(&self) {
        self.0.lock().unwrap().cached = None;
    }

    /// A completed invalidation that reaches entries of pages only: one with a level hint.
    pub(crate) fn invalidate_pages(&self) {
        let mut state = self.0.lock().unwrap();
        state.cached = state.cached.filter(|entry| !is_page(*entry));
    }

    /// A completed invalidation of the address at which the block around the page begins: the page has another.
    pub(crate) fn invalidate_block(&self) {
        let mut state = self.0.lock().unwrap();
        state.cached = state.cached.filter(|entry| is_page(*entry));
    }

    /// What a copy of the page made now holds.
    pub(crate) fn copy(&self) -> u64 {
        self.0.lock().unwrap().memory
    }
}

/// A page of memory, and the TLB of the CPU whose guest writes to it, with whatever entries a model needs.
pub(crate) struct Cache<E>(Mutex<(Option<E>, u64)>);

impl<E: Copy> Cache<E> {
    /// A TLB that holds `entry`.
    pub(crate) fn new(entry: Option<E>) -> Self {
        Self(Mutex::new((entry, 0)))
    }

    /// A store by the guest: through the entry that it has, if `usable`, or by a walk that ends at what `walk` returns and
    /// is cached. Whether it succeeded.
    pub(crate) fn store(
        &self,
        usable: impl FnOnce(E) -> bool,
        walk: impl FnOnce() -> Option<E>,
        permits: impl FnOnce(E) -> bool,
    ) -> bool {
        let mut state = self.0.lock().unwrap();
        let entry = state.0.filter(|entry| usable(*entry)).or_else(walk);
        if entry.is_some() {
            state.0 = entry;
        }
        let done = entry.is_some_and(permits);
        state.1 += u64::from(done);
        done
    }

    /// Hardware walks before anybody asks for it, and caches what `walk` returns.
    pub(crate) fn fill(&self, walk: impl FnOnce() -> Option<E>) {
        let mut state = self.0.lock().unwrap();
        state.0 = walk();
    }

    /// A completed invalidation of the entries that are `hit`.
    pub(crate) fn invalidate(&self, hit: impl FnOnce(E) -> bool) {
        let mut state = self.0.lock().unwrap();
        state.0 = state.0.filter(|entry| !hit(*entry));
    }

    /// Somebody other than the guest writes to the page.
    pub(crate) fn write(&self, value: impl FnOnce(u64) -> u64) {
        let mut state = self.0.lock().unwrap();
        state.1 = value(state.1);
    }

    /// What a copy of the page made now holds.
    pub(crate) fn copy(&self) -> u64 {
        self.0.lock().unwrap().1
    }
}

/// Whether an entry came from a page, not from a block.
fn is_page(entry: Descriptor) -> bool {
    entry.is_table(Level::L2)
}

/// A leaf for the page, or for the block around it.
pub(crate) fn leaf(write: bool, level: Level) -> Descriptor {
    leaf_in(write, level, Permissions::Direct)
}

/// The same in a VM whose descriptors have these `permissions`.
pub(crate) fn leaf_in(write: bool, level: Level, permissions: Permissions) -> Descriptor {
    let leaf = Leaf {
        to: Pa::new(0x8000_0000),
        memory: Memory::Normal,
        read: true,
        write,
        young: true,
        frozen: false,
        tag: Tag::new(0).unwrap(),
    };
    let format = Format {
        forced_write_back: false,
        permissions,
    };
    Descriptor::leaf(&leaf, level, format)
}

/// A slot with a leaf for the page.
pub(crate) fn page_slot(write: bool) -> Slot {
    Slot::new(leaf(write, Level::L3))
}

/// Makes the leaf in `slot`, which is of `level`, writable, as a write fault does; whether it was not.
pub(crate) fn make_writable(slot: &Slot, level: Level) -> bool {
    loop {
        let found = slot.load();
        if !found.is_leaf(level) || found.is_writable() {
            return false;
        }
        if slot.compare_and_swap(found, found.writable()).is_ok() {
            return true;
        }
    }
}

/// Makes the leaf in `slot`, which is of `level`, read-only; whether it was writable.
pub(crate) fn protect(slot: &Slot, level: Level) -> bool {
    loop {
        let found = slot.load();
        if !found.is_leaf(level) || !found.is_writable() {
            return false;
        }
        if slot.compare_and_swap(found, found.read_only()).is_ok() {
            return true;
        }
    }
}

/// A small bitmap for two CPUs.
pub(crate) fn bitmap() -> Bitmap {
    Bitmap::new(64, 2)
}

/// Takes what is recorded; whether the page is among it.
pub(crate) fn take(bitmap: &Bitmap) -> bool {
    let mut taken = 0;
    if bitmap.next_group(0, 64).is_some() {
        bitmap.take_group(0, 64, |_, bits| taken |= bits);
    }
    taken & (1 << PAGE) != 0
}

/// Whether the page is recorded.
pub(crate) fn is_recorded(bitmap: &Bitmap) -> bool {
    let mut recorded = 0;
    bitmap.read(0, 64, |_, bits| recorded |= bits);
    recorded & (1 << PAGE) != 0
}
