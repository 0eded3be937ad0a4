//! Addresses that cannot be mistaken for one another.
//!
//! Four spaces exist and each has its own type: what a guest believes to be physical ([`Ipa`], the input of
//! stage 2), what the machine decodes ([`Pa`], its output), what an exception level computes with ([`Va`]), and
//! nothing else. Raw integers appear in `arch` and in the descriptor format only. Arithmetic is checked: an
//! address that a guest supplied can be anything.

use core::{fmt, marker::PhantomData};

/// log2 of the bytes in a page; Vellum uses the 4 KiB granule in both stages.
pub const PAGE_SHIFT: u32 = 12;
/// Bytes in a page.
pub const PAGE_BYTES: u64 = 1 << PAGE_SHIFT;

const _: () = assert!(
    size_of::<usize>() == size_of::<u64>(),
    "addresses and sizes are 64 bits wide on both sides"
);

/// A 64-bit size or address as the language's own; they are equally wide.
#[expect(clippy::cast_possible_truncation, reason = "the assertion above")]
pub const fn to_usize(raw: u64) -> usize {
    raw as usize
}

/// An index or address as a `usize`: on a 64-bit machine, which is all that Vellum runs on, the identity.
#[inline]
pub const fn to_index(number: u64) -> usize {
    const { assert!(usize::BITS == u64::BITS) };
    #[expect(
        clippy::cast_possible_truncation,
        reason = "usize has 64 bits, checked above"
    )]
    return number as usize;
}

/// Names an address space at the type level.
pub trait Space: Copy + Eq + Ord {
    /// Prefix used when an address is printed.
    const TAG: &'static str;
}

/// The guest's view of physical memory: input of stage 2.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum GuestPhysical {}

/// The machine's view of physical memory: output of stage 2.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum HostPhysical {}

/// What an instruction computes with, at any exception level.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Virtual {}

impl Space for GuestPhysical {
    const TAG: &'static str = "ipa";
}
impl Space for HostPhysical {
    const TAG: &'static str = "pa";
}
impl Space for Virtual {
    const TAG: &'static str = "va";
}

/// A 64-bit address in space `S`.
#[derive(Clone, Copy, Eq, Ord, PartialEq, PartialOrd)]
#[repr(transparent)]
pub struct Addr<S: Space>(u64, PhantomData<S>);

/// An intermediate physical address.
pub type Ipa = Addr<GuestPhysical>;
/// A physical address.
pub type Pa = Addr<HostPhysical>;
/// A virtual address.
pub type Va = Addr<Virtual>;

impl<S: Space> Addr<S> {
    /// Wraps a raw address.
    pub const fn new(raw: u64) -> Self {
        Self(raw, PhantomData)
    }

    /// The raw address.
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// This address plus `bytes`, or `None` past the end of the space.
    pub const fn checked_add(self, bytes: u64) -> Option<Self> {
        match self.0.checked_add(bytes) {
            Some(raw) => Some(Self::new(raw)),
            None => None,
        }
    }

    /// Bytes from `base` up to this address, or `None` when this lies below `base`.
    pub const fn offset_from(self, base: Self) -> Option<u64> {
        self.0.checked_sub(base.0)
    }

    /// Rounded down to a multiple of `align_bytes`, a power of two.
    pub const fn align_down(self, align_bytes: u64) -> Self {
        debug_assert!(align_bytes.is_power_of_two());
        Self::new(self.0 & !(align_bytes - 1))
    }

    /// Rounded up to a multiple of `align_bytes`, a power of two, or `None` past the end of the space.
    pub const fn align_up(self, align_bytes: u64) -> Option<Self> {
        match self.checked_add(align_bytes - 1) {
            Some(sum) => Some(sum.align_down(align_bytes)),
            None => None,
        }
    }

    /// Whether this is a multiple of `align_bytes`, a power of two.
    pub const fn is_aligned(self, align_bytes: u64) -> bool {
        debug_assert!(align_bytes.is_power_of_two());
        self.0 & (align_bytes - 1) == 0
    }

    /// Number of the page that holds this address.
    pub const fn page(self) -> u64 {
        self.0 >> PAGE_SHIFT
    }
}

impl<S: Space> fmt::Debug for Addr<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{:#x}", S::TAG, self.0)
    }
}

impl<S: Space> fmt::Display for Addr<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::{Ipa, Pa, Va};

    #[test]
    fn arithmetic_stops_at_the_end_of_the_space() {
        assert_eq!(Ipa::new(u64::MAX).checked_add(1), None);
        assert_eq!(Ipa::new(u64::MAX).align_up(4096), None);
        assert_eq!(Ipa::new(5).offset_from(Ipa::new(6)), None);
    }

    #[test]
    fn alignment_rounds_to_both_sides() {
        let pa = Pa::new(0x4020_0001);
        assert_eq!(pa.align_down(0x20_0000), Pa::new(0x4020_0000));
        assert_eq!(pa.align_up(0x20_0000), Some(Pa::new(0x4040_0000)));
        assert!(Pa::new(0x4020_0000).is_aligned(0x20_0000));
    }

    #[test]
    fn a_printed_address_names_its_space() {
        assert_eq!(
            std::format!("{} {}", Ipa::new(0x1000), Va::new(0x2000)),
            "ipa:0x1000 va:0x2000"
        );
    }
}
