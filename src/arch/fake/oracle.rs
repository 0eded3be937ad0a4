//! What the oracle can find wrong, and the predicates it judges by.

extern crate std;

use core::fmt;

use super::descriptor::Meaning;
use super::tlb::Cause;
use crate::addr::{Ipa, Pa};

/// One broken rule of the architecture or of the protocol.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Violation {
    /// A valid descriptor was replaced by another that hardware may not meet together with it.
    BreakBeforeMake {
        /// Where.
        ipa: Ipa,
        /// What changed.
        changed: Change,
    },
    /// A descriptor was made while entries of an incompatible one may be cached.
    MadeOverStale {
        /// First address of the stale entry.
        ipa: Ipa,
        /// The VMID it is cached under.
        vmid: u16,
        /// Why it is still there.
        cause: Cause,
    },
    /// A writable entry may be cached where the caller was promised none.
    StaleWritable {
        /// First address of the stale entry.
        ipa: Ipa,
        /// The VMID it is cached under.
        vmid: u16,
        /// Why it is still there.
        cause: Cause,
    },
    /// Any entry may be cached where the caller was promised none.
    StaleTranslation {
        /// First address of the stale entry.
        ipa: Ipa,
        /// The VMID it is cached under.
        vmid: u16,
        /// Why it is still there.
        cause: Cause,
    },
    /// A table was given up while a hardware walker may still go through it.
    TableFreedWhileWalkable {
        /// The table.
        table: Pa,
    },
    /// A table was given up while software that walked to it before it was unlinked may still look at it.
    TableFreedInGracePeriod {
        /// The table.
        table: Pa,
    },
    /// A page became a table while a hardware walker may still take it for its former self.
    TableReusedWhileWalkable {
        /// The table.
        table: Pa,
    },
    /// A table began twice, or ended without having begun.
    TableLifeConfused {
        /// The table.
        table: Pa,
    },
    /// A root was given up while a VTTBR_EL2 names it or entries of it may be cached.
    RootFreedWhileLoaded {
        /// The root.
        root: Pa,
    },
    /// A VTTBR_EL2 was loaded whose root is no live table.
    RootIsNoTable {
        /// The root.
        root: Pa,
    },
    /// A table was given up although a deferred descriptor keeps it.
    TableFreedWhileDeferred {
        /// The table.
        table: Pa,
    },
    /// A table became reachable under one VMID while it may be cached under another.
    TableUnderTwoVmids {
        /// The table.
        table: Pa,
        /// The VMID it may still be cached under.
        vmid: u16,
    },
    /// A CPU may write to a page although the caller was promised that it cannot unrecorded.
    WritableUnrecorded {
        /// The page.
        ipa: Ipa,
        /// The VMID by which it is reached.
        vmid: u16,
        /// The CPU.
        cpu: usize,
    },
    /// A VMID was loaded with a root while entries of another root may be cached under it.
    VmidWithTwoRoots {
        /// The VMID.
        vmid: u16,
    },
    /// An invalidation was issued on a CPU whose VTTBR_EL2 names no guest.
    InvalidatedNoGuest,
    /// A descriptor was written outside of every live table.
    WrittenOutsideTables {
        /// The slot.
        slot: Pa,
    },
    /// A descriptor's former value is not what the last note left there.
    UnnotedStore {
        /// The slot.
        slot: Pa,
    },
    /// A descriptor leads to a page that is no live table.
    LinkedNoTable {
        /// The page.
        table: Pa,
    },
    /// Memory that was given back can still be reached by a guest.
    MemoryStillReachable {
        /// First address of the entry that reaches it.
        ipa: Ipa,
    },
}

/// What break-before-make would have been needed for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Change {
    /// The output address of a leaf.
    OutputAddress,
    /// Memory type, shareability or the contiguous hint.
    Attributes,
    /// The size of a translation.
    Size,
    /// The table that a descriptor leads to.
    TableAddress,
    /// A block and the table that replaces it, or the reverse, translate this address differently.
    Contents,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Why `old` may not be replaced by `new` in one step on a machine with FEAT_BBM level `bbm`.
pub(super) fn needs_break(old: &Meaning, new: &Meaning, bbm: u8) -> Option<Change> {
    if !old.is_cacheable() {
        return None;
    }
    match (old, new) {
        (Meaning::Nothing, _) | (_, Meaning::Nothing) => None,
        (Meaning::Leaf(a), Meaning::Leaf(b)) if a.to != b.to => Some(Change::OutputAddress),
        (Meaning::Leaf(a), Meaning::Leaf(b)) if a.attributes != b.attributes => {
            Some(Change::Attributes)
        }
        (Meaning::Leaf(_), Meaning::Leaf(_)) => None,
        (Meaning::Table(a), Meaning::Table(b)) => (a != b).then_some(Change::TableAddress),
        _ => (bbm < 2).then_some(Change::Size),
    }
}
