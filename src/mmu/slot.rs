//! Memory slots: which of the guest's addresses are memory, and whose frames are behind them.
//!
//! A slot is fixed once it is added; what changes about it (logging) lives in the snapshot that faults read
//! (`Context`).

use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::addr::{Ipa, PAGE_BYTES, Pa};
use crate::mmu::bitmap::{Bitmap, WORD_PAGES};
use crate::mmu::descriptor::{Leaf, Memory, TAGS, Tag};
use crate::mmu::error::Error;
use crate::mmu::geometry::{Level, Shape};
use crate::mmu::rights::Rights;
use crate::mmu::walk::Tree;

/// Names a slot of a VM: 0 to 7.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct SlotId(pub(crate) Tag);

impl SlotId {
    /// Every slot that a VM can have.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        (0..TAGS).filter_map(Tag::new).map(Self)
    }

    /// Position among the VM's slots.
    pub const fn index(self) -> usize {
        self.0.index()
    }
}

/// A piece of contiguous host memory.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Extent {
    /// First byte, page-aligned; 2 MiB-aligned where blocks are wanted.
    pub pa: Pa,
    /// A multiple of the page size.
    pub bytes: u64,
}

/// What a page holds when the guest first sees it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Contents {
    /// Zeros, written when the page is first mapped: untouched memory costs nothing.
    Zero,
    /// Whatever is there: devices, and memory that somebody else fills.
    Keep,
}

/// A slot to be added.
#[derive(Clone, Debug)]
pub struct SlotConfig {
    /// First guest address, page-aligned.
    pub ipa: Ipa,
    /// What is behind it, in order; its total is the slot's size.
    pub backing: Vec<Extent>,
    /// The largest leaf to map with.
    pub max_leaf: Level,
    /// Memory type.
    pub memory: Memory,
    /// Whether the guest may write.
    pub writable: bool,
    /// What the guest first sees.
    pub contents: Contents,
}

/// A slot as it was added.
#[derive(Debug)]
pub(crate) struct MemorySlot {
    pub(crate) config: SlotConfig,
    pub(crate) pages: u64,
}

impl MemorySlot {
    /// Checks `config` against `shape`.
    pub(crate) fn new(config: SlotConfig, shape: Shape) -> Result<Self, Error> {
        let bytes = config.backing.iter().try_fold(0_u64, |sum, extent| {
            let aligned =
                extent.pa.is_aligned(PAGE_BYTES) && extent.bytes.is_multiple_of(PAGE_BYTES);
            if aligned && extent.bytes != 0 {
                sum.checked_add(extent.bytes)
            } else {
                None
            }
        });
        let bytes = bytes.ok_or(Error::BadRange(config.ipa, 0))?;
        if bytes == 0 || !config.ipa.is_aligned(PAGE_BYTES) || !shape.contains(config.ipa, bytes) {
            return Err(Error::BadRange(config.ipa, bytes));
        }
        if !config.max_leaf.can_be_leaf() {
            return Err(Error::BadRange(config.ipa, bytes));
        }
        Ok(Self {
            pages: bytes / PAGE_BYTES,
            config,
        })
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.pages * PAGE_BYTES
    }

    pub(crate) fn end(&self) -> Ipa {
        Ipa::new(self.config.ipa.raw() + self.bytes())
    }

    pub(crate) fn contains(&self, ipa: Ipa) -> bool {
        ipa.offset_from(self.config.ipa)
            .is_some_and(|offset| offset < self.bytes())
    }

    /// Whether pages `[from, to)` are a range that bits can be taken of.
    ///
    /// # Errors
    ///
    /// [`Error::BadRange`]: empty, outside the slot, or not of whole bitmap words.
    pub(crate) fn check_range(&self, from: u64, to: u64) -> Result<(), Error> {
        let aligned =
            from.is_multiple_of(WORD_PAGES) && (to.is_multiple_of(WORD_PAGES) || to == self.pages);
        if from < to && to <= self.pages && aligned {
            return Ok(());
        }
        Err(Error::BadRange(
            self.ipa_of(from.min(self.pages)),
            to.saturating_sub(from).saturating_mul(PAGE_BYTES),
        ))
    }

    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        self.config.ipa < other.end() && other.config.ipa < self.end()
    }

    /// The page number of `ipa` within the slot.
    #[inline]
    pub(crate) fn page_of(&self, ipa: Ipa) -> u64 {
        ipa.page().wrapping_sub(self.config.ipa.page())
    }

    /// Regions of 2 MiB that the slot touches.
    pub(crate) fn regions(&self) -> u64 {
        self.region_of(Ipa::new(self.end().raw() - 1)) + 1
    }

    /// The number, among those, of the region around `ipa`.
    pub(crate) fn region_of(&self, ipa: Ipa) -> u64 {
        let region = |ipa: Ipa| ipa.raw() / Level::L2.span_bytes();
        region(ipa).wrapping_sub(region(self.config.ipa))
    }

    /// The guest address of page `page` of the slot.
    pub(crate) fn ipa_of(&self, page: u64) -> Ipa {
        Ipa::new(self.config.ipa.raw() + page * PAGE_BYTES)
    }

    /// The host address behind `ipa`, and how many contiguous bytes follow it.
    pub(crate) fn backing_of(&self, ipa: Ipa) -> Option<(Pa, u64)> {
        let mut offset = ipa.offset_from(self.config.ipa)?;
        for extent in &self.config.backing {
            if offset < extent.bytes {
                return Some((extent.pa.checked_add(offset)?, extent.bytes - offset));
            }
            offset -= extent.bytes;
        }
        None
    }

    /// The largest level, no larger than `limit` and the slot's own, whose leaf around `ipa` lies inside the slot and
    /// inside one aligned piece of host memory.
    #[inline]
    pub(crate) fn level_at(&self, ipa: Ipa, limit: Level) -> Level {
        let mut level = self.config.max_leaf.max(limit);
        while let Some(deeper) = level.deeper() {
            if self.leaf_base(ipa, level).is_some() {
                return level;
            }
            level = deeper;
        }
        level
    }

    /// The host address of the aligned leaf of `level` around `ipa`, if there is one.
    #[inline]
    fn leaf_base(&self, ipa: Ipa, level: Level) -> Option<Pa> {
        let base = ipa.align_down(level.span_bytes());
        let (pa, left) = self.backing_of(base)?;
        (pa.is_aligned(level.span_bytes()) && left >= level.span_bytes()).then_some(pa)
    }

    /// The leaf of `level` around `ipa`, which [`MemorySlot::level_at`] or a finer level allows.
    #[inline]
    pub(crate) fn leaf(&self, ipa: Ipa, level: Level, tag: Tag, write: bool) -> Option<Leaf> {
        Some(Leaf {
            to: self.leaf_base(ipa, level)?,
            memory: self.config.memory,
            read: true,
            write,
            young: true,
            frozen: false,
            tag,
        })
    }
}

/// A slot as faults see it.
#[derive(Clone, Debug)]
pub(crate) struct SlotView {
    pub(crate) slot: Arc<MemorySlot>,
    /// Where writes are recorded, while they are.
    pub(crate) log: Option<Arc<Bitmap>>,
    /// The bitmap of the epoch before, as long as it says which leaves may still be writable (engine `lazy`).
    pub(crate) closed: Option<Arc<Bitmap>>,
    /// Where regions of 2 MiB are recorded in which something is mapped (engine `swap`).
    pub(crate) mapped: Option<Arc<Bitmap>>,
    /// What the permission bits of its leaves mean.
    pub(crate) rights: Rights,
}

/// Everything a fault handler needs, as one snapshot, used to its end (rule 3).
#[derive(Clone, Debug)]
pub(crate) struct Context {
    /// What the VM runs under.
    pub(crate) tree: Tree,
    /// Counts the changes of what CPUs hold in registers: `tree` and `s2pir`.
    pub(crate) generation: u64,
    /// S2PIR_EL2, with indirect permissions.
    pub(crate) s2pir: u64,
    /// Whether empty slots may be filled; not while a root is about to be replaced.
    pub(crate) mapping: bool,
    pub(crate) slots: [Option<SlotView>; TAGS],
}

impl Context {
    /// The slot that holds `ipa`.
    #[inline]
    pub(crate) fn slot_of(&self, ipa: Ipa) -> Option<(Tag, &SlotView)> {
        self.slots.iter().enumerate().find_map(|(index, view)| {
            let view = view.as_ref()?;
            if view.slot.contains(ipa) {
                Some((Tag::new(index)?, view))
            } else {
                None
            }
        })
    }

    /// The slot that a leaf with `tag` belongs to.
    #[inline]
    pub(crate) fn tagged(&self, tag: Tag) -> Option<&SlotView> {
        self.slots.get(tag.index())?.as_ref()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::vec;
    use std::vec::Vec;

    use super::{Contents, Extent, MemorySlot, SlotConfig};
    use crate::addr::{Ipa, Pa};
    use crate::mmu::descriptor::Memory;
    use crate::mmu::error::Error;
    use crate::mmu::geometry::{Level, Shape};

    fn config(ipa: u64, backing: Vec<Extent>) -> SlotConfig {
        SlotConfig {
            ipa: Ipa::new(ipa),
            backing,
            max_leaf: Level::L1,
            memory: Memory::Normal,
            writable: true,
            contents: Contents::Keep,
        }
    }

    fn slot(ipa: u64, backing: Vec<Extent>) -> Result<MemorySlot, Error> {
        MemorySlot::new(config(ipa, backing), Shape::new(40).unwrap())
    }

    #[test]
    fn a_leaf_never_leaves_its_slot_or_its_extent() {
        let slot = slot(
            0x8000_0000,
            vec![
                Extent {
                    pa: Pa::new(0x1_0000_0000),
                    bytes: 0x4000_0000,
                },
                Extent {
                    pa: Pa::new(0x3_0020_0000),
                    bytes: 0x40_0000,
                },
                Extent {
                    pa: Pa::new(0x5_0000_1000),
                    bytes: 0x1000,
                },
            ],
        )
        .unwrap();
        assert_eq!(slot.level_at(Ipa::new(0x8000_5000), Level::L1), Level::L1);
        assert_eq!(slot.level_at(Ipa::new(0x8000_5000), Level::L3), Level::L3);
        assert_eq!(slot.level_at(Ipa::new(0xc020_0000), Level::L1), Level::L2);
        assert_eq!(slot.level_at(Ipa::new(0xc040_0000), Level::L1), Level::L3);
        let leaf = slot
            .leaf(
                Ipa::new(0xc021_2345),
                Level::L2,
                super::Tag::new(3).unwrap(),
                false,
            )
            .unwrap();
        assert_eq!(leaf.to, Pa::new(0x3_0040_0000));
    }

    #[test]
    fn a_slot_outside_the_guest_is_refused() {
        for (ipa, pa, bytes) in [
            (0x1001, 0, 0x1000),
            (0, 1, 0x1000),
            (0, 0, 0x800),
            (0xff_ffff_f000, 0, 0x2000),
        ] {
            assert!(
                slot(
                    ipa,
                    vec![Extent {
                        pa: Pa::new(pa),
                        bytes
                    }]
                )
                .is_err(),
                "{ipa:#x} {pa:#x} {bytes:#x}"
            );
        }
        assert!(slot(0, vec![]).is_err());
    }
}
