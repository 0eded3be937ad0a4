//! Why an MMU entry point refused. Nothing has changed when one of these is returned.

use core::fmt;

use crate::addr::Ipa;
use crate::mmu::bbm::MOST_BATCH;
use crate::mmu::epoch::Epoch;
use crate::mmu::slot::SlotId;

/// A refusal of an MMU entry point.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Error {
    /// Frames ran out.
    NoMemory,
    /// A range is empty, unaligned or outside the guest's address space or the slot.
    BadRange(Ipa, u64),
    /// A range overlaps a slot.
    Overlap(Ipa),
    /// All slots are taken, or the slot does not exist.
    NoSlot,
    /// The slot's memory may not be logged: devices and read-only slots.
    NotLoggable,
    /// Logging is already enabled on the slot.
    AlreadyLogging,
    /// Logging is not enabled on the slot.
    NotLogging,
    /// A chunk of splitting that is not a block size.
    BadChunk(u64),
    /// A batch of splitting that is not 1 to [`MOST_BATCH`] blocks.
    BadBatch(usize),
    /// Policy `fault-empty` unmaps pages that are in use, so the slot must keep what its pages hold.
    MustKeep,
    /// Engine `pie` on a machine without FEAT_S2PIE.
    NoIndirection,
    /// Tracking `dbm` on a machine without hardware dirty state (FEAT_HAFDBS).
    NoDirtyState,
    /// Access flags are to be set by hardware on a machine that cannot, or by software with tracking `dbm`, which needs hardware
    /// to.
    NoAccessFlag,
    /// A period of a scan that is none, or longer than an hour.
    BadPeriod(u64),
    /// A share of a CPU that is not 1 to 100 percent.
    BadBudget(u64),
    /// Tracking `dbm` with another engine than `walk`.
    NotTogether,
    /// The epoch that was closed before is still to be harvested, of this slot.
    NotHarvested(SlotId),
    /// The epoch is not closed, or was before the slot was logged.
    NoSuchEpoch(Epoch),
    /// The epoch was harvested before, or is being.
    AlreadyHarvested(Epoch),
    /// No memory is mapped or mappable at the address.
    NotMemory(Ipa),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoMemory => f.write_str("out of memory"),
            Self::BadRange(ipa, bytes) => write!(
                f,
                "range {ipa} + {bytes:#x} bytes is unaligned or outside its slot"
            ),
            Self::Overlap(ipa) => write!(f, "range at {ipa} overlaps another slot"),
            Self::NoSlot => f.write_str("no such slot, or none left"),
            Self::NotLoggable => f.write_str("only writable memory can be logged"),
            Self::AlreadyLogging => f.write_str("logging is already enabled"),
            Self::NotLogging => f.write_str("logging is not enabled"),
            Self::BadChunk(bytes) => write!(
                f,
                "a chunk of {bytes:#x} bytes is not a block size: 2 MiB or 1 GiB"
            ),
            Self::BadBatch(blocks) => write!(
                f,
                "a batch of {blocks} blocks is not one of 1 to {MOST_BATCH}"
            ),
            Self::MustKeep => f.write_str(
                "policy fault-empty unmaps pages in use; it needs a slot that keeps their contents",
            ),
            Self::NoIndirection => f.write_str(
                "engine pie needs permission indirection at stage 2 (FEAT_S2PIE), which a CPU lacks",
            ),
            Self::NoDirtyState => f.write_str(
                "tracking dbm needs hardware dirty state (FEAT_HAFDBS), which a CPU lacks",
            ),
            Self::NoAccessFlag => f.write_str(
                "access flags set by hardware need FEAT_HAFDBS, which a CPU lacks; tracking dbm needs them",
            ),
            Self::BadPeriod(ticks) => {
                write!(f, "a period of {ticks} ticks is not one of up to an hour")
            }
            Self::BadBudget(percent) => {
                write!(f, "a budget of {percent} % is not one of 1 to 100 %")
            }
            Self::NotTogether => f.write_str(
                "tracking dbm works with engine walk only: the others take permissions that hardware would give back",
            ),
            Self::NotHarvested(slot) => write!(
                f,
                "slot {} still has a closed epoch to be harvested",
                slot.index()
            ),
            Self::NoSuchEpoch(epoch) => write!(f, "epoch {epoch} is not a closed one of this slot"),
            Self::AlreadyHarvested(epoch) => write!(f, "epoch {epoch} was harvested before"),
            Self::NotMemory(ipa) => write!(f, "no memory at {ipa}"),
        }
    }
}
