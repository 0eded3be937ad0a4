//! One stage-2 descriptor: 64 bits in memory, an enum in software.
//!
//! ```text
//!  63    59 58    57  55 54  53    51    48 47            12 11 10 9  8 7   6 5     2 1  0
//! +--------+------+-----+---+---------------+----------------+--+--+----+---+-+-------+--+-+
//! |   0    |frozen| tag | XN|       0       | output address | 0|AF| SH | W |R|MemAttr|t |v|
//! +--------+------+-----+---+---------------+----------------+--+--+----+---+-+-------+--+-+
//! ```
//!
//! VMSAv8-64 stage 2, 4 KiB granule (DDI 0487 issue K.a, D8.3), drawn with direct permissions. Bits 58:55 are software's:
//! `tag` names the memory slot that a leaf belongs to, so that a fault needs no look-up but the walk. Table descriptors
//! carry an address and nothing else: stage 2 has no hierarchical permissions. An invalid descriptor is all zero
//! ([`View::Empty`]), [`View::Busy`]: some CPU is between break and make, and whoever meets it retries; or
//! [`View::Deferred`]: a table that no walk reaches until it has been made read-only (engine `lazy`).
//!
//! With indirect permissions (FEAT_S2PIE, D8.4.2) bits {54:53, 51, 6} are an index into S2PIR_EL2 and bit 7 is always 1.
//! What the bits of a permission mean to one slot at one time is [`Rights`](super::rights::Rights)'.
//!
//! `encode` and `decode` are inverse on every descriptor that Vellum writes, with what hardware may change in it (AF, W).

use core::fmt;

use crate::addr::Pa;
use crate::mmu::geometry::Level;

/// Memory slots per VM that a descriptor can name.
pub const TAGS: usize = 8;

/// Which memory slot a leaf belongs to: 0 to 7.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Tag(u8);

impl Tag {
    /// Tag `index`, or `None` when it does not fit the descriptor.
    pub const fn new(index: usize) -> Option<Self> {
        match index {
            #[expect(clippy::cast_possible_truncation, reason = "below eight")]
            0..TAGS => Some(Self(index as u8)),
            _ => None,
        }
    }

    /// The slot's position, below [`TAGS`].
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// How the guest's accesses reach memory.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Memory {
    /// Normal write-back cacheable, inner shareable; the guest's stage 1 may weaken it (without FEAT_S2FWB).
    Normal,
    /// Device-nGnRE, never executable.
    Device,
}

/// How a VM's descriptors are encoded.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Format {
    /// Memory types as with FEAT_S2FWB (HCR_EL2.FWB = 1).
    pub forced_write_back: bool,
    /// What the permission bits are.
    pub permissions: Permissions,
}

/// What the permission bits of a leaf are.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Permissions {
    /// Permissions: S2AP and XN.
    Direct,
    /// An index into S2PIR_EL2 (VTCR_EL2.S2PIE = 1).
    Indirect,
}

/// A translation.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Leaf {
    /// Where it leads; aligned to the level's span.
    pub to: Pa,
    /// Memory type.
    pub memory: Memory,
    /// Whether loads and fetches are permitted. Guest RAM is always executable at stage 2.
    pub read: bool,
    /// Whether stores are permitted; with indirect permissions, whether they are at some time.
    pub write: bool,
    /// Accessed since the flag was last cleared (AF).
    pub young: bool,
    /// Held still by software for a structural change.
    pub frozen: bool,
    /// The memory slot.
    pub tag: Tag,
}

/// What a slot can hold.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum View {
    /// No translation.
    Empty,
    /// No translation for a moment: a CPU is between break and make.
    Busy,
    /// No translation until the table at this address has been looked through.
    Deferred(Pa),
    /// The address of the next table.
    Table(Pa),
    /// A translation.
    Leaf(Leaf),
}

/// A descriptor as it sits in memory.
#[derive(Clone, Copy, Eq, PartialEq)]
#[repr(transparent)]
pub struct Descriptor(u64);

const VALID: u64 = 1 << 0;
const TABLE_OR_PAGE: u64 = 1 << 1;
const MEMATTR_SHIFT: u32 = 2;
const MEMATTR: u64 = 0b1111 << MEMATTR_SHIFT;
const READ: u64 = 1 << 6;
const WRITE: u64 = 1 << 7;
const INNER_SHAREABLE: u64 = 0b11 << 8;
const YOUNG: u64 = 1 << 10;
const ADDRESS: u64 = 0x0000_ffff_ffff_f000;
const EXECUTE_NEVER: u64 = 1 << 54;
const TAG_SHIFT: u32 = 55;
const TAG: u64 = 0b111 << TAG_SHIFT;
const FROZEN: u64 = 1 << 58;
const BUSY: u64 = 1 << 2;
const DEFERRED: u64 = 1 << 3;

/// Bits {54:53, 51, 6}: an index into S2PIR_EL2.
pub(super) const INDEX: u64 = 0b11 << 53 | 1 << 51 | 1 << 6;

/// Permission index 0 to 15 as a descriptor holds it.
pub(super) const fn index_bits(index: u32) -> u64 {
    ((index & 1) as u64) << 6 | ((index >> 1 & 1) as u64) << 51 | ((index >> 2 & 3) as u64) << 53
}

/// What S2PIR_EL2 permits by each index that Vellum uses, as far as it is always the same.
pub(super) mod index {
    /// Nothing.
    pub(in super::super) const NONE: u32 = 0;
    /// RAM, read-only.
    pub(in super::super) const READ: u32 = 1;
    /// RAM, writable at all times.
    pub(in super::super) const WRITE: u32 = 2;
    /// A device, read-only.
    pub(in super::super) const DEVICE_READ: u32 = 3;
    /// A device, writable.
    pub(in super::super) const DEVICE_WRITE: u32 = 4;
    /// RAM that became writable in an epoch: as many from here on as the ring has.
    pub(in super::super) const RING: u32 = 5;
}

const DEVICE_NGNRE: u64 = 0b0001;
const NORMAL_WRITE_BACK: u64 = 0b1111;
const NORMAL_FORCED_WRITE_BACK: u64 = 0b0110;

const _: () = assert!(
    (BUSY | DEFERRED) & VALID == 0 && BUSY != 0 && BUSY & DEFERRED == 0,
    "a busy or deferred slot translates nothing, and is neither empty nor the other"
);
const _: () = assert!(
    INDEX & (TAG | FROZEN | ADDRESS | YOUNG | MEMATTR | WRITE) == 0,
    "a permission index is nothing else"
);

impl Descriptor {
    /// No translation.
    pub const EMPTY: Self = Self(0);
    /// The marker that a CPU leaves between break and make.
    pub const BUSY: Self = Self(BUSY);

    /// Wraps bits found in memory.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The bits for memory.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// A descriptor for the table at `table`.
    pub const fn table(table: Pa) -> Self {
        Self(table.raw() & ADDRESS | TABLE_OR_PAGE | VALID)
    }

    /// Encodes `leaf` for a slot at `level`.
    #[inline]
    pub const fn leaf(leaf: &Leaf, level: Level, format: Format) -> Self {
        let mut bits = leaf.to.raw() & ADDRESS | VALID | (leaf.tag.0 as u64) << TAG_SHIFT;
        if matches!(level, Level::L3) {
            bits |= TABLE_OR_PAGE;
        }
        bits |= match (leaf.memory, format.forced_write_back) {
            (Memory::Device, _) => DEVICE_NGNRE << MEMATTR_SHIFT,
            (Memory::Normal, false) => NORMAL_WRITE_BACK << MEMATTR_SHIFT | INNER_SHAREABLE,
            (Memory::Normal, true) => NORMAL_FORCED_WRITE_BACK << MEMATTR_SHIFT | INNER_SHAREABLE,
        };
        bits |= match format.permissions {
            Permissions::Direct => Self::direct(leaf),
            Permissions::Indirect => Self::indirect(leaf),
        };
        if leaf.young {
            bits |= YOUNG;
        }
        if leaf.frozen {
            bits |= FROZEN;
        }
        Self(bits)
    }

    const fn direct(leaf: &Leaf) -> u64 {
        let read = if leaf.read { READ } else { 0 };
        let write = if leaf.write { WRITE } else { 0 };
        let never = match leaf.memory {
            Memory::Device => EXECUTE_NEVER,
            Memory::Normal => 0,
        };
        read | write | never
    }

    /// Bit 7 says that the leaf is dirty, which keeps hardware from wanting to say so (R_XXBLY).
    const fn indirect(leaf: &Leaf) -> u64 {
        let index = match (leaf.memory, leaf.read, leaf.write) {
            (_, false, _) => index::NONE,
            (Memory::Normal, true, false) => index::READ,
            (Memory::Normal, true, true) => index::WRITE,
            (Memory::Device, true, false) => index::DEVICE_READ,
            (Memory::Device, true, true) => index::DEVICE_WRITE,
        };
        index_bits(index) | WRITE
    }

    /// Decodes what a slot at `level` holds.
    pub const fn view(self, level: Level, format: Format) -> View {
        if self.0 & VALID == 0 {
            return match self.0 {
                BUSY => View::Busy,
                bits if bits & DEFERRED != 0 => View::Deferred(self.address()),
                _ => View::Empty,
            };
        }
        if self.is_table(level) {
            return View::Table(self.address());
        }
        let device = (self.0 & MEMATTR) >> MEMATTR_SHIFT == DEVICE_NGNRE;
        View::Leaf(Leaf {
            to: self.address(),
            memory: if device {
                Memory::Device
            } else {
                Memory::Normal
            },
            read: self.is_readable(format),
            write: self.may_write(format),
            young: self.0 & YOUNG != 0,
            frozen: self.0 & FROZEN != 0,
            tag: self.tag(),
        })
    }

    const fn has_index(self, index: u32) -> bool {
        self.0 & INDEX == index_bits(index)
    }

    const fn may_write(self, format: Format) -> bool {
        match format.permissions {
            Permissions::Direct => self.0 & WRITE != 0,
            Permissions::Indirect => {
                !self.has_index(index::NONE)
                    && !self.has_index(index::READ)
                    && !self.has_index(index::DEVICE_READ)
            }
        }
    }

    /// The deferred form of the table descriptor `self`: no walk goes through it until somebody has looked below.
    #[inline]
    pub const fn deferred(self) -> Self {
        Self(self.0 & ADDRESS | DEFERRED)
    }

    /// The deferred form of this, found above level 3, if it is a table descriptor: [`Descriptor::deferred`] in the fewest
    /// instructions, as a table descriptor is its address and two bits.
    #[inline]
    pub(crate) const fn deferred_table(self) -> Option<Self> {
        let bits = self.0 ^ (VALID | TABLE_OR_PAGE | DEFERRED);
        if bits & (VALID | TABLE_OR_PAGE) == 0 {
            Some(Self(bits))
        } else {
            None
        }
    }

    /// Whether this is the deferred form of a table descriptor.
    #[inline]
    pub const fn is_deferred(self) -> bool {
        self.0 & (VALID | DEFERRED) == DEFERRED
    }

    /// The leaf of `level` that translates what this one, of another level, begins with.
    #[inline]
    pub const fn of_level(self, level: Level) -> Self {
        match level {
            Level::L3 => Self(self.0 | TABLE_OR_PAGE),
            _ => Self(self.0 & !TABLE_OR_PAGE),
        }
    }

    /// Whether a walk goes on from here, found at `level`.
    #[inline]
    pub const fn is_table(self, level: Level) -> bool {
        self.0 & (VALID | TABLE_OR_PAGE) == VALID | TABLE_OR_PAGE && !matches!(level, Level::L3)
    }

    /// Whether a walk that found this at `level` ends with a translation.
    #[inline]
    pub const fn is_leaf(self, level: Level) -> bool {
        self.0 & VALID != 0 && !self.is_table(level)
    }

    /// Output address: of the next table or of memory.
    #[inline]
    pub const fn address(self) -> Pa {
        Pa::new(self.0 & ADDRESS)
    }

    /// The memory slot of a leaf.
    #[inline]
    pub const fn tag(self) -> Tag {
        Tag(((self.0 & TAG) >> TAG_SHIFT) as u8)
    }

    /// Whether this is a leaf that permits stores, by direct permissions.
    #[inline]
    pub const fn is_writable(self) -> bool {
        self.0 & (VALID | WRITE) == VALID | WRITE
    }

    /// Whether a leaf permits loads.
    #[inline]
    pub const fn is_readable(self, format: Format) -> bool {
        match format.permissions {
            Permissions::Direct => self.0 & (VALID | READ) == VALID | READ,
            Permissions::Indirect => self.0 & VALID != 0 && !self.has_index(index::NONE),
        }
    }

    /// Whether a leaf permits instruction fetches.
    #[inline]
    pub const fn is_executable(self, format: Format) -> bool {
        match format.permissions {
            Permissions::Direct => self.0 & (VALID | READ | EXECUTE_NEVER) == VALID | READ,
            Permissions::Indirect => {
                self.is_readable(format)
                    && !self.has_index(index::DEVICE_READ)
                    && !self.has_index(index::DEVICE_WRITE)
            }
        }
    }

    /// Whether a leaf's access flag is set.
    #[inline]
    pub const fn is_young(self) -> bool {
        self.0 & YOUNG != 0
    }

    /// Whether software holds this leaf still.
    #[inline]
    pub const fn is_frozen(self) -> bool {
        self.0 & FROZEN != 0
    }

    /// The same leaf, permitting stores, by direct permissions.
    #[inline]
    pub const fn writable(self) -> Self {
        Self(self.0 | WRITE)
    }

    /// The same leaf, not permitting stores, by direct permissions.
    #[inline]
    pub const fn read_only(self) -> Self {
        Self(self.0 & !WRITE)
    }

    /// The same leaf with its access flag set.
    #[inline]
    pub const fn young(self) -> Self {
        Self(self.0 | YOUNG)
    }

    /// The same leaf with its access flag clear.
    #[inline]
    pub const fn old(self) -> Self {
        Self(self.0 & !YOUNG)
    }

    /// The same leaf, leading `bytes` further: the next one of a table whose leaves are contiguous.
    #[inline]
    pub const fn further(self, bytes: u64) -> Self {
        Self(self.0 + bytes)
    }

    /// The same leaf, held still by software: hardware translates by it as before, other software waits.
    #[inline]
    pub const fn frozen(self) -> Self {
        Self(self.0 | FROZEN)
    }

    /// The same leaf, no longer held still.
    #[inline]
    pub const fn thawed(self) -> Self {
        Self(self.0 & !FROZEN)
    }

    /// Whether nobody may act on what is here now but who has it: it is being replaced (rules 9 and 27), or waits to be looked
    /// through (`lazy`). Whoever meets this looks again later; taken for a hole, it hides leaves that are writable.
    #[inline]
    pub const fn is_held(self) -> bool {
        if self.0 & VALID == 0 {
            self.0 != 0
        } else {
            self.0 & FROZEN != 0
        }
    }
}

impl fmt::Debug for Descriptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "desc:{:#018x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::{Descriptor, Format, Leaf, Memory, Permissions, Tag, View};
    use crate::addr::Pa;
    use crate::mmu::geometry::Level;

    fn formats() -> Vec<Format> {
        let mut formats = Vec::new();
        for forced_write_back in [false, true] {
            for permissions in [Permissions::Direct, Permissions::Indirect] {
                formats.push(Format {
                    forced_write_back,
                    permissions,
                });
            }
        }
        formats
    }

    fn every_leaf() -> Vec<Leaf> {
        let mut leaves = Vec::new();
        for bits in 0..32_u8 {
            for tag in 0..8 {
                for to in [0, 0x4000_0000, 0xffff_c000_0000] {
                    leaves.push(Leaf {
                        to: Pa::new(to),
                        memory: if bits & 1 != 0 {
                            Memory::Device
                        } else {
                            Memory::Normal
                        },
                        read: bits & 2 != 0,
                        write: bits & 4 != 0,
                        young: bits & 8 != 0,
                        frozen: bits & 16 != 0,
                        tag: Tag::new(tag).unwrap(),
                    });
                }
            }
        }
        leaves
    }

    #[test]
    fn every_leaf_comes_back_unchanged() {
        for format in formats() {
            for level in [Level::L1, Level::L2, Level::L3] {
                for mut leaf in every_leaf() {
                    // There is no index for what may be written and not read.
                    leaf.write &= leaf.read || format.permissions == Permissions::Direct;
                    let descriptor = Descriptor::leaf(&leaf, level, format);
                    assert_eq!(
                        descriptor.view(level, format),
                        View::Leaf(leaf),
                        "{level:?} {descriptor:?}"
                    );
                    assert!(descriptor.is_leaf(level) && !descriptor.is_table(level));
                    assert_eq!(descriptor.tag(), leaf.tag);
                    assert_eq!(descriptor.is_readable(format), leaf.read);
                    if format.permissions == Permissions::Direct {
                        assert_eq!(descriptor.is_writable(), leaf.write);
                    }
                }
            }
        }
    }

    #[test]
    fn every_output_address_bit_comes_back_unchanged() {
        for bit in 12..48 {
            let table = Pa::new(1 << bit);
            for level in [Level::L0, Level::L1, Level::L2] {
                let format = formats()[0];
                let descriptor = Descriptor::table(table);
                assert_eq!(descriptor.view(level, format), View::Table(table));
                let deferred = descriptor.deferred();
                assert_eq!(deferred.view(level, format), View::Deferred(table));
                assert_eq!(descriptor.deferred_table(), Some(deferred));
                assert_eq!(deferred.deferred_table(), None);
                assert_eq!(Descriptor::table(deferred.address()), descriptor);
                assert!(deferred.is_deferred() && deferred.is_held());
            }
        }
    }

    #[test]
    fn what_translates_nothing_is_empty_or_busy_at_every_level() {
        for level in [Level::L0, Level::L1, Level::L2, Level::L3] {
            let format = formats()[0];
            assert_eq!(Descriptor::EMPTY.view(level, format), View::Empty);
            assert_eq!(Descriptor::BUSY.view(level, format), View::Busy);
            assert!(!Descriptor::BUSY.is_leaf(level) && !Descriptor::BUSY.is_writable());
            assert!(!Descriptor::BUSY.is_deferred() && !Descriptor::EMPTY.is_deferred());
            assert_eq!(Descriptor::BUSY.deferred_table(), None);
            assert_eq!(Descriptor::EMPTY.deferred_table(), None);
        }
    }

    #[test]
    fn permission_edits_touch_nothing_else() {
        for leaf in every_leaf() {
            let format = formats()[0];
            let level = Level::L3;
            let descriptor = Descriptor::leaf(&leaf, level, format);
            assert_eq!(
                descriptor.writable().view(level, format),
                View::Leaf(Leaf {
                    write: true,
                    ..leaf
                })
            );
            assert_eq!(
                descriptor.read_only().view(level, format),
                View::Leaf(Leaf {
                    write: false,
                    ..leaf
                })
            );
            assert_eq!(
                descriptor.young().view(level, format),
                View::Leaf(Leaf {
                    young: true,
                    ..leaf
                })
            );
            assert_eq!(
                descriptor.old().view(level, format),
                View::Leaf(Leaf {
                    young: false,
                    ..leaf
                })
            );
        }
    }

    #[test]
    fn device_memory_is_never_executable() {
        for leaf in every_leaf() {
            for format in formats() {
                let descriptor = Descriptor::leaf(&leaf, Level::L3, format);
                assert_eq!(
                    descriptor.is_executable(format),
                    leaf.read && leaf.memory == Memory::Normal
                );
            }
        }
    }
}
