//! TLB invalidation. Each acts on the VMID in VTTBR_EL2; operands are described in the Arm ARM, D8.17 and C5.5.

use core::arch::asm;

use crate::addr::{Ipa, PAGE_SHIFT, Va};

macro_rules! invalidations {
    ($($(#[$doc:meta])* $name:ident($($argument:ident: $space:ty)?) => $text:literal;)*) => {$(
        $(#[$doc])*
        #[inline]
        pub fn $name($($argument: $space)?) {
            // SAFETY: invalidation can only cost time. Not `nomem`: stores to tables stay on their side of it.
            unsafe {
                asm!($text, $(in(reg) operand($argument.raw()),)? options(nostack, preserves_flags))
            };
        }
    )*};
}

/// Bits 43:0 of an address operand are bits 55:12 of the address; TTL (bits 47:44) stays zero: any level.
#[inline]
fn operand(address: u64) -> u64 {
    const PAGE_NUMBER: u64 = (1 << 44) - 1;
    (address >> PAGE_SHIFT) & PAGE_NUMBER
}

invalidations! {
    /// `TLBI IPAS2E1IS`: drops stage-2 entries for the page at `ipa`, current VMID, all CPUs, every level.
    tlbi_ipas2e1is(ipa: Ipa) => "tlbi ipas2e1is, {}";
    /// `TLBI IPAS2E1`: the same on this CPU only.
    tlbi_ipas2e1(ipa: Ipa) => "tlbi ipas2e1, {}";
    /// `TLBI VAAE1`: drops stage-1 and combined entries for the page at `va`, any ASID, current VMID, this CPU only.
    tlbi_vaae1(va: Va) => "tlbi vaae1, {}";
    /// `TLBI VMALLE1IS`: drops stage-1 and combined entries of the current VMID, all CPUs.
    tlbi_vmalle1is() => "tlbi vmalle1is";
    /// `TLBI VMALLE1`: the same on this CPU only.
    tlbi_vmalle1() => "tlbi vmalle1";
    /// `TLBI VMALLS12E1IS`: drops all entries of the current VMID, all CPUs.
    tlbi_vmalls12e1is() => "tlbi vmalls12e1is";
    /// `TLBI VMALLS12E1`: the same on this CPU only.
    tlbi_vmalls12e1() => "tlbi vmalls12e1";
    /// `TLBI ALLE1IS`: drops all EL1&0 entries of all VMIDs, all CPUs.
    tlbi_alle1is() => "tlbi alle1is";
}

/// `TLBI RIPAS2E1IS` (FEAT_TLBIRANGE): as [`tlbi_ipas2e1is`] for `pages` pages from `ipa`, 1 to 2^21 of them, rounded
/// up to what one operand can name.
#[inline]
pub fn tlbi_ripas2e1is(ipa: Ipa, pages: u64) {
    let operand = range_operand(ipa, pages);
    // SAFETY: invalidation can only cost time.
    unsafe {
        asm!(".arch_extension tlb-rmi", "tlbi ripas2e1is, {}", in(reg) operand, options(nostack, preserves_flags))
    };
}

/// TG (bits 47:46) = 4 KiB, SCALE (45:44), NUM (43:39), TTL (38:37) = any level, BaseADDR (36:0): the operand covers
/// (NUM + 1) << (5 * SCALE + 1) pages.
fn range_operand(ipa: Ipa, pages: u64) -> u64 {
    const GRANULE_4K: u64 = 1 << 46;
    const BASE: u64 = (1 << 37) - 1;
    const MOST: u64 = 32;
    let mut scale = 0;
    while scale < 3 && pages > MOST << (5 * scale + 1) {
        scale += 1;
    }
    let count = pages.max(1).div_ceil(1 << (5 * scale + 1)).min(MOST);
    GRANULE_4K | scale << 44 | (count - 1) << 39 | (ipa.page() & BASE)
}
