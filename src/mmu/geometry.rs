//! The shape of a stage-2 tree: levels, spans, indices, and where the walk begins.
//!
//! 4 KiB granule throughout. The initial level is the deepest that the IPA size allows with at most 16 concatenated
//! tables (DDI 0487 issue K.a, D8.2.2 "Concatenated translation tables"), so that a walk is as short as it can be.

use crate::addr::{Ipa, PAGE_BYTES, PAGE_SHIFT};

/// log2 of the descriptors in a table.
pub const INDEX_BITS: u32 = 9;
/// Descriptors in a table.
pub const ENTRIES: usize = 1 << INDEX_BITS;
/// Largest supported IPA size, in bits: what a descriptor's output address field can also hold without FEAT_LPA2.
pub const MAX_IPA_BITS: u32 = 48;
/// Smallest supported IPA size, in bits.
pub const MIN_IPA_BITS: u32 = 32;
const MAX_CONCATENATION_LOG2: u32 = 4;

/// Depth of a table, numbered as the Arm ARM numbers it.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
#[repr(u8)]
pub enum Level {
    /// 512 GiB per descriptor; never a leaf here.
    L0,
    /// 1 GiB per descriptor.
    L1,
    /// 2 MiB per descriptor.
    L2,
    /// 4 KiB per descriptor.
    L3,
}

impl Level {
    /// log2 of the bytes that one descriptor translates.
    pub const fn shift(self) -> u32 {
        PAGE_SHIFT + INDEX_BITS * (3 - self as u32)
    }

    /// Bytes that one descriptor translates.
    pub const fn span_bytes(self) -> u64 {
        1 << self.shift()
    }

    /// Pages that one descriptor translates.
    pub const fn span_pages(self) -> u64 {
        self.span_bytes() / PAGE_BYTES
    }

    /// Which of a table's 512 descriptors translates `ipa`.
    #[expect(clippy::cast_possible_truncation, reason = "masked to nine bits")]
    pub const fn index_of(self, ipa: Ipa) -> usize {
        ((ipa.raw() >> self.shift()) & (ENTRIES as u64 - 1)) as usize
    }

    /// The next level down, or `None` below level 3.
    pub const fn deeper(self) -> Option<Self> {
        match self {
            Self::L0 => Some(Self::L1),
            Self::L1 => Some(Self::L2),
            Self::L2 => Some(Self::L3),
            Self::L3 => None,
        }
    }

    /// Whether a descriptor at this level may translate by itself.
    pub const fn can_be_leaf(self) -> bool {
        !matches!(self, Self::L0)
    }
}

const _: () = {
    assert!(Level::L3.span_bytes() == 4 << 10);
    assert!(Level::L2.span_bytes() == 2 << 20);
    assert!(Level::L1.span_bytes() == 1 << 30);
    assert!(Level::L0.index_of(Ipa::new((1 << 48) - 1)) == ENTRIES - 1);
};

/// The shape of one VM's tree. Equal for every VM of a machine, because the weakest CPU decides.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Shape {
    ipa_bits: u32,
    start: Level,
    concatenation_log2: u32,
}

impl Shape {
    /// The shape for `ipa_bits` of guest address space, [`MIN_IPA_BITS`] to [`MAX_IPA_BITS`]; `None` outside.
    pub const fn new(ipa_bits: u32) -> Option<Self> {
        if ipa_bits < MIN_IPA_BITS || ipa_bits > MAX_IPA_BITS {
            return None;
        }
        let mut start = Level::L2;
        loop {
            let table_bits = start.shift() + INDEX_BITS;
            if ipa_bits <= table_bits + MAX_CONCATENATION_LOG2 {
                let concatenation_log2 = ipa_bits.saturating_sub(table_bits);
                return Some(Self {
                    ipa_bits,
                    start,
                    concatenation_log2,
                });
            }
            start = match start {
                Level::L2 => Level::L1,
                _ => Level::L0,
            };
        }
    }

    /// Bits of guest address space.
    pub const fn ipa_bits(self) -> u32 {
        self.ipa_bits
    }

    /// Level of the initial tables.
    pub const fn start(self) -> Level {
        self.start
    }

    /// Pages of the initial tables, which are contiguous and aligned to their whole size.
    pub const fn root_pages(self) -> usize {
        1 << self.concatenation_log2
    }

    /// Descriptors in the initial tables.
    pub const fn root_entries(self) -> usize {
        ENTRIES << self.concatenation_log2
    }

    /// Whether `bytes` from `ipa` lie inside the guest's address space.
    pub const fn contains(self, ipa: Ipa, bytes: u64) -> bool {
        match ipa.checked_add(bytes) {
            Some(end) => end.raw() <= 1 << self.ipa_bits,
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{ENTRIES, Level, Shape};
    use crate::addr::Ipa;

    #[test]
    fn the_walk_starts_as_deep_as_concatenation_allows() {
        for (bits, start, pages) in [
            (32, Level::L2, 4),
            (34, Level::L2, 16),
            (35, Level::L1, 1),
            (39, Level::L1, 1),
            (40, Level::L1, 2),
        ] {
            let shape = Shape::new(bits).unwrap();
            assert_eq!(
                (shape.start(), shape.root_pages()),
                (start, pages),
                "{bits} bits"
            );
        }
        assert_eq!(Shape::new(43).unwrap().root_entries(), ENTRIES * 16);
        assert_eq!(Shape::new(44).unwrap().start(), Level::L0);
    }

    #[test]
    fn an_address_space_that_does_not_exist_is_refused() {
        assert_eq!(Shape::new(31), None);
        assert_eq!(Shape::new(49), None);
    }

    #[test]
    fn the_end_of_the_address_space_is_exact() {
        let shape = Shape::new(40).unwrap();
        assert!(shape.contains(Ipa::new((1 << 40) - 4096), 4096));
        assert!(!shape.contains(Ipa::new((1 << 40) - 4096), 4097));
        assert!(!shape.contains(Ipa::new(u64::MAX), 1));
    }
}
