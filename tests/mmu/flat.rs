//! The flat model: what a guest wrote, slot by slot and page by page, and what of it was copied.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::sync::atomic::AtomicU64;

use vellum::addr::{Ipa, PAGE_BYTES, Pa};
use vellum::mmu::{Access, Contents, Extent, Level, Memory, SlotConfig, SlotId, Stage2};

use crate::closing::Closing;
use crate::rig::BLOCK_BYTES;

/// Host memory, freed with its VM.
pub(crate) struct Allocation(*mut u8, Layout);

impl Allocation {
    fn new(bytes: usize, align: usize) -> Self {
        let layout = Layout::from_size_align(bytes, align).expect("a layout");
        // SAFETY: The layout is not empty.
        Self(unsafe { alloc_zeroed(layout) }, layout)
    }

    fn pa(&self) -> Pa {
        Pa::new(self.0.expose_provenance() as u64)
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: Allocated in `new` with this layout.
        unsafe { dealloc(self.0, self.1) };
    }
}

/// One VM and what its guest did.
pub(crate) struct Vm {
    pub(crate) stage2: Stage2,
    pub(crate) slots: RefCell<Vec<ModelSlot>>,
    /// Behind the slots.
    pub(crate) memory: RefCell<Vec<Allocation>>,
}

/// A slot and the truth about it.
pub(crate) struct ModelSlot {
    pub(crate) id: SlotId,
    pub(crate) ipa: Ipa,
    pub(crate) pages: u64,
    pub(crate) writable: bool,
    pub(crate) pa: Pa,
    /// Its memory is not contiguous: every other piece of this size is where its neighbour would be. 0: it is.
    twist: u64,
    /// Writes that reached each page, by anybody.
    pub(crate) writes: RefCell<Vec<u64>>,
    /// While logging: what `writes` was when the page was last copied.
    pub(crate) copied: RefCell<Option<Vec<u64>>>,
    /// Pages that may be reported: written, or tried to, since they were last cleared.
    pub(crate) reportable: RefCell<BTreeSet<u64>>,
    /// The closed epoch that is still to be harvested.
    pub(crate) closing: RefCell<Option<Closing>>,
}

impl Vm {
    /// Adds `blocks` times 2 MiB of RAM at `ipa`.
    pub(crate) fn add_ram(&self, ipa: u64, blocks: u64, max_leaf: Level, writable: bool) {
        let bytes = blocks * BLOCK_BYTES;
        let memory = Allocation::new(usize_of(bytes), usize_of(BLOCK_BYTES));
        self.add_slot(ipa, memory.pa(), bytes, max_leaf, writable);
        self.memory.borrow_mut().push(memory);
    }

    /// The same, zeroed when it is first mapped.
    pub(crate) fn add_zeroed_ram(&self, ipa: u64, blocks: u64, max_leaf: Level) {
        let bytes = blocks * BLOCK_BYTES;
        let memory = Allocation::new(usize_of(bytes), usize_of(BLOCK_BYTES));
        self.add(ipa, memory.pa(), bytes, max_leaf, true, Contents::Zero, 0);
        self.memory.borrow_mut().push(memory);
    }

    /// As [`Vm::add_ram`], with memory of which no block is contiguous.
    pub(crate) fn add_scattered_ram(&self, ipa: u64, blocks: u64, max_leaf: Level) {
        let bytes = blocks * BLOCK_BYTES;
        let memory = Allocation::new(usize_of(bytes), usize_of(BLOCK_BYTES));
        let twist = BLOCK_BYTES / 2;
        self.add(
            ipa,
            memory.pa(),
            bytes,
            max_leaf,
            true,
            Contents::Keep,
            twist,
        );
        self.memory.borrow_mut().push(memory);
    }

    /// Adds `bytes` of memory that nobody touches but the fake machine's guests.
    pub(crate) fn add_slot(&self, ipa: u64, pa: Pa, bytes: u64, max_leaf: Level, writable: bool) {
        self.add(ipa, pa, bytes, max_leaf, writable, Contents::Keep, 0);
    }

    #[expect(clippy::too_many_arguments, reason = "what a slot is")]
    fn add(
        &self,
        ipa: u64,
        pa: Pa,
        bytes: u64,
        max_leaf: Level,
        writable: bool,
        contents: Contents,
        twist: u64,
    ) {
        let piece = if twist == 0 { bytes } else { twist };
        let backing = (0..bytes / piece).map(|index| Extent {
            pa: Pa::new(pa.raw() + ((index * piece) ^ twist)),
            bytes: piece,
        });
        let config = SlotConfig {
            ipa: Ipa::new(ipa),
            backing: backing.collect(),
            max_leaf,
            memory: Memory::Normal,
            writable,
            contents,
        };
        let id = self.stage2.add_slot(config).expect("room for a slot");
        let pages = bytes / PAGE_BYTES;
        self.slots.borrow_mut().push(ModelSlot {
            id,
            ipa: Ipa::new(ipa),
            pages,
            writable,
            pa,
            twist,
            writes: RefCell::new(vec![0; usize_of(pages)]),
            copied: RefCell::new(None),
            reportable: RefCell::default(),
            closing: RefCell::default(),
        });
    }

    /// The first word of the page at `ipa`, which is RAM that was added here.
    pub(crate) fn word(&self, ipa: Ipa) -> &AtomicU64 {
        let pa = self.with_slot(ipa, |slot, _| slot.memory(ipa));
        let at = usize_of(pa.expect("a slot").raw());
        // SAFETY: The memory behind a slot lives as long as `self`, and is as aligned as a page.
        unsafe { &*std::ptr::with_exposed_provenance::<AtomicU64>(at) }
    }

    /// Calls `work` with the slot and page that hold `ipa`.
    pub(crate) fn with_slot<R>(
        &self,
        ipa: Ipa,
        work: impl FnOnce(&ModelSlot, u64) -> R,
    ) -> Option<R> {
        let slots = self.slots.borrow();
        let slot = slots.iter().find(|slot| slot.page_of(ipa).is_some())?;
        Some(work(slot, slot.page_of(ipa)?))
    }

    /// The guest's access reached `pa`.
    pub(crate) fn reached(&self, ipa: Ipa, pa: Pa, access: Access) {
        let known = self.with_slot(ipa, |slot, page| {
            assert_eq!(pa, slot.memory(ipa), "{ipa} leads elsewhere");
            if access == Access::Write {
                assert!(slot.writable, "a read-only slot was written at {ipa}");
                slot.writes.borrow_mut()[usize_of(page)] += 1;
                // A write through a writable leaf needs no fault, but then its bit is set already.
            }
        });
        assert!(known.is_some(), "{ipa} was reached and is in no slot");
    }

    /// The hypervisor wrote to the page at `ipa`.
    pub(crate) fn written_by_us(&self, ipa: Ipa) {
        self.with_slot(ipa, |slot, page| {
            slot.writes.borrow_mut()[usize_of(page)] += 1;
            slot.reportable.borrow_mut().insert(page);
        });
    }

    /// Takes slot `index` out of the model and gives its memory back to the caller, once it has been removed.
    pub(crate) fn forget_slot(&self, index: usize) -> ModelSlot {
        self.slots.borrow_mut().remove(index)
    }
}

impl ModelSlot {
    pub(crate) fn at(&self, page: u64) -> Ipa {
        Ipa::new(self.ipa.raw() + page * PAGE_BYTES)
    }

    /// The memory behind `ipa`.
    pub(crate) fn memory(&self, ipa: Ipa) -> Pa {
        Pa::new(self.pa.raw() + ((ipa.raw() - self.ipa.raw()) ^ self.twist))
    }

    pub(crate) fn page_of(&self, ipa: Ipa) -> Option<u64> {
        let page = ipa.offset_from(self.ipa)? / PAGE_BYTES;
        (page < self.pages).then_some(page)
    }
}

pub(crate) fn usize_of(number: u64) -> usize {
    usize::try_from(number).expect("64-bit host")
}
