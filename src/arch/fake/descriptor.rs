//! The fake machine's own reading of a stage-2 descriptor.
//!
//! Written from the Arm ARM (DDI 0487 issue K.a, D8.3), not from `mmu::descriptor`: an encoder that is wrong there is
//! not excused by a decoder that is wrong in the same way. 4 KiB granule; direct permissions, or indirect ones (D8.4.2),
//! which S2PIR_EL2 resolves (`rights`). A software convention is known beside them: a *deferred* table, which is invalid and
//! keeps the table's address.

/// log2 of the slots in a table.
const INDEX_BITS: u32 = 9;
const PAGE_BITS: u32 = 12;
/// Bits 47:12.
const ADDRESS: u64 = 0x0000_ffff_ffff_f000;
/// MemAttr (5:2), SH (9:8) and Contiguous (52): what break-before-make protects beside the address.
const ATTRIBUTES: u64 = 0b1111 << 2 | 0b11 << 8 | 1 << 52;
const VALID: u64 = 1 << 0;
const NOT_BLOCK: u64 = 1 << 1;
const DEFERRED: u64 = 1 << 3;
const S2AP_READ: u64 = 1 << 6;
const S2AP_WRITE: u64 = 1 << 7;
const AF: u64 = 1 << 10;
const DBM: u64 = 1 << 51;
const XN: u64 = 1 << 54;

/// Bytes that one descriptor at `level` translates.
pub(super) const fn span_bytes(level: u8) -> u64 {
    1 << (PAGE_BITS + INDEX_BITS * (3 - level as u32))
}

/// The level whose descriptors translate `bytes` bytes.
pub(super) const fn level_of_span(bytes: u64) -> u8 {
    match bytes {
        0x1000 => 3,
        0x20_0000 => 2,
        _ => 1,
    }
}

/// A translation as hardware understands it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Leaf {
    pub(super) to: u64,
    pub(super) bytes: u64,
    pub(super) access: Access,
    /// The access flag; without it nothing is cached.
    pub(super) young: bool,
    pub(super) attributes: u64,
}

/// What a leaf says of permissions.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Access {
    /// S2AP and XN.
    Direct {
        read: bool,
        write: bool,
        execute: bool,
        /// Hardware may set the write permission itself, where it manages dirty state.
        dbm: bool,
    },
    /// An index into S2PIR_EL2, and the dirty bit, without which nothing is written.
    Index { index: u64, dirty: bool },
}

impl Leaf {
    /// Whether this page-sized or larger translation and `other`, found at their addresses, agree where both apply.
    pub(super) fn agrees(&self, ipa: u64, other: &Self, other_ipa: u64) -> bool {
        self.to.wrapping_sub(ipa) == other.to.wrapping_sub(other_ipa)
            && self.attributes == other.attributes
    }
}

/// What a walk makes of a descriptor.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Meaning {
    Nothing,
    Table(u64),
    Leaf(Leaf),
}

impl Meaning {
    /// Whether a TLB may keep anything of this.
    pub(super) fn is_cacheable(&self) -> bool {
        match self {
            Self::Nothing => false,
            Self::Table(_) => true,
            Self::Leaf(leaf) => leaf.young,
        }
    }
}

/// Bits {54:53, 51, 6}.
const fn index_of(raw: u64) -> u64 {
    raw >> 6 & 1 | (raw >> 51 & 1) << 1 | (raw >> 53 & 3) << 2
}

const fn access(raw: u64, indirect: bool) -> Access {
    if indirect {
        return Access::Index {
            index: index_of(raw),
            dirty: raw & S2AP_WRITE != 0,
        };
    }
    Access::Direct {
        read: raw & S2AP_READ != 0,
        write: raw & S2AP_WRITE != 0,
        execute: raw & (XN | S2AP_READ) == S2AP_READ,
        dbm: raw & DBM != 0,
    }
}

/// What hardware that manages access flags and dirty state makes of the leaf `raw` for a store or another access.
pub(super) const fn marked(raw: u64, write: bool) -> u64 {
    let dirty = if write && raw & DBM != 0 {
        S2AP_WRITE
    } else {
        0
    };
    raw | AF | dirty
}

/// The table that a deferred descriptor keeps.
pub(super) fn deferred(raw: u64) -> Option<u64> {
    (raw & (VALID | DEFERRED) == DEFERRED).then_some(raw & ADDRESS)
}

/// Reads `raw`, found at `level`, with direct permissions or with `indirect` ones.
pub(super) fn decode(raw: u64, level: u8, indirect: bool) -> Meaning {
    if raw & VALID == 0 {
        return Meaning::Nothing;
    }
    match (level, raw & NOT_BLOCK != 0) {
        (0..=2, true) => Meaning::Table(raw & ADDRESS),
        // Reserved encodings translate nothing.
        (0, false) | (3, false) => Meaning::Nothing,
        _ => Meaning::Leaf(Leaf {
            to: raw & ADDRESS & !(span_bytes(level) - 1),
            bytes: span_bytes(level),
            access: access(raw, indirect),
            young: raw & AF != 0,
            attributes: raw & ATTRIBUTES,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::{Meaning, decode, level_of_span, span_bytes};

    #[test]
    fn reserved_encodings_translate_nothing() {
        for (raw, level) in [(0b01, 0), (0b01, 3), (0b10, 1), (0, 2)] {
            assert_eq!(
                decode(raw, level, false),
                Meaning::Nothing,
                "{raw:#b} at {level}"
            );
        }
    }

    #[test]
    fn spans_and_levels_are_inverse() {
        for level in 1..=3 {
            assert_eq!(level_of_span(span_bytes(level)), level);
        }
    }
}
