//! What the permission bits of a leaf mean: to one slot, at one time.
//!
//! | slot | writable | read-only |
//! |---|---|---|
//! | any, direct permissions | W = 1 | W = 0 |
//! | logged, `--tracking dbm`, page | dirty: DBM = 1, W = 1 | clean: DBM = 1, W = 0: hardware makes it dirty |
//! | logged, `--tracking dbm`, block | as a page | DBM = 0, W = 0: the first write faults and splits |
//! | not logged, indirect permissions | the index for writable RAM | the one for read-only RAM |
//! | logged, indirect permissions | the *current* epoch's index | any other: another epoch's, or the one for read-only RAM |
//!
//! All are masks, so that the fault path asks and changes by a few logical instructions whatever the format is.
//! S2PIR_EL2 says the same to hardware ([`s2pir`]).

use crate::mmu::descriptor::{Descriptor, Format, INDEX, Memory, Permissions, index, index_bits};
use crate::mmu::epoch::{Epoch, Tracking};
use crate::mmu::geometry::Level;

const VALID: u64 = 1 << 0;
const WRITE: u64 = 1 << 7;
/// Dirty bit modifier (FEAT_HAFDBS): hardware may set W.
const DBM: u64 = 1 << 51;

/// Epochs whose leaves are told apart: the current one, the closed one that is being harvested, and the one before, whose
/// leaves were relabelled before the last call's invalidation (rule 32).
pub const RING: u64 = 3;

/// The meaning of permission bits.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Rights {
    /// The bits that are looked at.
    mask: u64,
    /// Their value in what permits stores.
    write: u64,
    /// Their value in a page that does not.
    page: u64,
    /// Their value in a block that does not.
    block: u64,
}

impl Rights {
    /// For a slot with memory of type `memory` in a VM of this `format` and `tracking`; `logged` as of `epoch`, if it is.
    pub const fn new(
        format: Format,
        memory: Memory,
        tracking: Tracking,
        logged: Option<Epoch>,
    ) -> Self {
        match (format.permissions, tracking, logged) {
            (Permissions::Direct, Tracking::Fault, _) => Self::direct(WRITE, WRITE, 0),
            (Permissions::Direct, Tracking::Dbm, None) => Self::direct(WRITE | DBM, WRITE, 0),
            (Permissions::Direct, Tracking::Dbm, Some(_)) => {
                Self::direct(WRITE | DBM, WRITE | DBM, DBM)
            }
            (Permissions::Indirect, _, logged) => {
                let (read, write) = match (memory, logged) {
                    (Memory::Device, _) => (index::DEVICE_READ, index::DEVICE_WRITE),
                    (Memory::Normal, None) => (index::READ, index::WRITE),
                    (Memory::Normal, Some(epoch)) => (index::READ, ring_index(epoch)),
                };
                Self {
                    mask: INDEX,
                    write: index_bits(write),
                    page: index_bits(read),
                    block: index_bits(read),
                }
            }
        }
    }

    const fn direct(mask: u64, write: u64, page: u64) -> Self {
        Self {
            mask,
            write,
            page,
            block: 0,
        }
    }

    /// Whether `leaf` is a leaf that permits stores.
    #[inline]
    pub const fn permits(self, leaf: Descriptor) -> bool {
        leaf.bits() & (VALID | self.mask) == VALID | self.write
    }

    /// Whether hardware has marked the leaf `leaf` as written.
    #[inline]
    pub const fn is_marked(self, leaf: Descriptor) -> bool {
        self.write & DBM != 0 && self.permits(leaf) && self.mask & WRITE != 0
    }

    /// Whether `leaf`, of `level`, is as [`Rights::revoke`] leaves it. One that merely does not permit stores now need not be:
    /// it may carry another epoch's index.
    #[inline]
    pub const fn is_revoked(self, leaf: Descriptor, level: Level) -> bool {
        leaf.bits() & self.mask == self.read_only(level)
    }

    /// The same leaf, permitting stores.
    #[inline]
    pub const fn grant(self, leaf: Descriptor) -> Descriptor {
        Descriptor::from_bits(leaf.bits() & !self.mask | self.write)
    }

    /// The same leaf, of `level`, not permitting stores.
    #[inline]
    pub const fn revoke(self, leaf: Descriptor, level: Level) -> Descriptor {
        Descriptor::from_bits(leaf.bits() & !self.mask | self.read_only(level))
    }

    /// What a leaf of `deeper` says that replaces a part of the block `block`, of `level`: the same. A block that is not as
    /// [`Rights::revoke`] leaves it keeps its bits: it may be cached as writable whatever it permits now, and a leaf that looks
    /// revoked is believed to owe nothing.
    #[inline]
    pub const fn inherit(self, block: Descriptor, level: Level, deeper: Level) -> Descriptor {
        if self.is_revoked(block, level) {
            self.revoke(block, deeper)
        } else {
            block
        }
    }

    /// `leaf`, of `level`, with stores permitted or not.
    pub const fn set(self, leaf: Descriptor, level: Level, write: bool) -> Descriptor {
        if write {
            self.grant(leaf)
        } else {
            self.revoke(leaf, level)
        }
    }

    const fn read_only(self, level: Level) -> u64 {
        match level {
            Level::L3 => self.page,
            _ => self.block,
        }
    }
}

/// Whether `leaf` carries the index of `epoch`: it became writable then.
pub const fn is_of(leaf: Descriptor, epoch: Epoch) -> bool {
    leaf.bits() & (VALID | INDEX) == VALID | index_bits(ring_index(epoch))
}

/// The permission index of what becomes writable in `epoch`.
const fn ring_index(epoch: Epoch) -> u32 {
    index::RING + (epoch.number() % RING) as u32
}

/// S2PIR_EL2 while `epoch` is current: of the ring, its index alone permits stores. Four bits an index (DDI 0487 issue K.a,
/// D24.2, S2PIR_EL2).
pub const fn s2pir(epoch: Epoch) -> u64 {
    const NOTHING: u64 = 0b0000;
    const READ: u64 = 0b1000;
    const READ_EXECUTE: u64 = 0b1011;
    const READ_WRITE: u64 = 0b1100;
    const ALL: u64 = 0b1111;
    let always = NOTHING << (4 * index::NONE)
        | READ_EXECUTE << (4 * index::READ)
        | ALL << (4 * index::WRITE)
        | READ << (4 * index::DEVICE_READ)
        | READ_WRITE << (4 * index::DEVICE_WRITE);
    let mut ring = 0;
    let mut place = 0;
    while place < RING {
        ring |= READ_EXECUTE << (4 * (index::RING as u64 + place));
        place += 1;
    }
    always | ring | ALL << (4 * ring_index(epoch))
}

#[cfg(test)]
mod tests {
    use super::{RING, Rights, is_of, s2pir};
    use crate::addr::Pa;
    use crate::mmu::descriptor::{Descriptor, Format, Leaf, Memory, Permissions, Tag};
    use crate::mmu::epoch::{Epoch, Tracking};
    use crate::mmu::geometry::Level;

    const DIRECT: Format = Format {
        forced_write_back: false,
        permissions: Permissions::Direct,
    };
    const INDIRECT: Format = Format {
        permissions: Permissions::Indirect,
        ..DIRECT
    };

    fn leaf(format: Format, write: bool) -> Descriptor {
        let leaf = Leaf {
            to: Pa::new(0x4000_0000),
            memory: Memory::Normal,
            read: true,
            write,
            young: true,
            frozen: false,
            tag: Tag::new(3).unwrap(),
        };
        Descriptor::leaf(&leaf, Level::L3, format)
    }

    #[test]
    fn what_is_granted_is_permitted_and_what_is_revoked_is_not() {
        for (format, tracking) in [
            (DIRECT, Tracking::Fault),
            (DIRECT, Tracking::Dbm),
            (INDIRECT, Tracking::Fault),
        ] {
            for logged in [None, Some(Epoch::new(1)), Some(Epoch::new(2))] {
                let rights = Rights::new(format, Memory::Normal, tracking, logged);
                for write in [false, true] {
                    let found = leaf(format, write);
                    for level in [Level::L2, Level::L3] {
                        let revoked = rights.revoke(found, level);
                        assert!(!rights.permits(revoked) && rights.is_revoked(revoked, level));
                        assert_eq!(rights.grant(revoked), rights.grant(found));
                    }
                    assert!(rights.permits(rights.grant(found)));
                    assert!(!rights.is_revoked(rights.grant(found), Level::L3));
                }
            }
        }
    }

    #[test]
    fn only_the_current_epoch_writes() {
        let found = leaf(INDIRECT, false);
        for number in 1..10 {
            let at = |number| {
                let epoch = Some(Epoch::new(number));
                Rights::new(INDIRECT, Memory::Normal, Tracking::Fault, epoch)
            };
            let written = at(number).grant(found);
            assert!(is_of(written, Epoch::new(number)));
            for later in 1..RING {
                assert!(!at(number + later).permits(written));
                assert!(!at(number + later).is_revoked(written, Level::L3));
                assert!(!is_of(written, Epoch::new(number + later)));
            }
            assert!(at(number + RING).permits(written), "the ring is a ring");
        }
    }

    #[test]
    fn the_register_says_to_hardware_what_the_rights_say_to_software() {
        let nibble = |value: u64, leaf: Descriptor| {
            let bits = leaf.bits();
            let index = bits >> 6 & 1 | (bits >> 51 & 1) << 1 | (bits >> 53 & 3) << 2;
            value >> (4 * index) & 0xf
        };
        for number in 1..7 {
            let epoch = Epoch::new(number);
            let value = s2pir(epoch);
            assert_eq!(nibble(value, leaf(INDIRECT, true)), 0b1111);
            assert_eq!(nibble(value, leaf(INDIRECT, false)), 0b1011);
            for other in number.saturating_sub(RING - 1).max(1)..=number {
                let at = Some(Epoch::new(other));
                let rights = Rights::new(INDIRECT, Memory::Normal, Tracking::Fault, at);
                let written = rights.grant(leaf(INDIRECT, false));
                let expected = if other == number { 0b1111 } else { 0b1011 };
                assert_eq!(nibble(value, written), expected);
            }
        }
    }
}
