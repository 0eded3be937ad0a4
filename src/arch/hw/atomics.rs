//! Read-modify-writes: one LSE instruction where every CPU has FEAT_LSE, an exclusive loop otherwise.
//!
//! The library is compiled for Armv8.0, so `core`'s methods are the exclusive loops. The choice is made once, before
//! the first guest exists, and costs a load of a line that nobody writes and a branch that is always predicted.

use core::arch::asm;
use core::sync::atomic::AtomicBool;

use crate::arch::atomic::{AtomicU64, Ordering};

static LSE: AtomicBool = AtomicBool::new(false);

/// Declares whether every CPU has FEAT_LSE. Called once, by boot.
pub fn set_lse(everywhere: bool) {
    LSE.store(everywhere, Ordering::Relaxed);
}

/// Whether atomics are single instructions.
#[inline]
pub fn use_lse() -> bool {
    LSE.load(Ordering::Relaxed)
}

macro_rules! lse {
    ($text:literal, $word:ident, $operand:expr) => {{
        let found;
        // SAFETY: boot found FEAT_LSE on every CPU; the operand is a live, aligned atomic.
        unsafe {
            asm!(".arch_extension lse", $text, value = in(reg) $operand, found = out(reg) found,
                word = in(reg) $word.as_ptr(), options(nostack, preserves_flags))
        };
        found
    }};
}

/// `CASAL`: replaces `old` by `new`, acquire and release.
///
/// # Errors
///
/// The value found, when it was not `old`; nothing is written then.
#[inline]
pub fn cas(word: &AtomicU64, old: u64, new: u64) -> Result<u64, u64> {
    if !use_lse() {
        return word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire);
    }
    let found: u64;
    // SAFETY: boot found FEAT_LSE on every CPU; the operand is a live, aligned atomic.
    unsafe {
        asm!(".arch_extension lse", "casal {found}, {new}, [{word}]", found = inout(reg) old => found,
            new = in(reg) new, word = in(reg) word.as_ptr(), options(nostack, preserves_flags))
    };
    if found == old { Ok(found) } else { Err(found) }
}

/// `LDSETAL`: sets `bits` and returns the word as it was, acquire and release.
#[inline]
pub fn fetch_or(word: &AtomicU64, bits: u64) -> u64 {
    if use_lse() {
        lse!("ldsetal {value}, {found}, [{word}]", word, bits)
    } else {
        word.fetch_or(bits, Ordering::AcqRel)
    }
}

/// `LDCLRAL`: clears `bits` and returns the word as it was, acquire and release.
#[inline]
pub fn fetch_clear(word: &AtomicU64, bits: u64) -> u64 {
    if use_lse() {
        lse!("ldclral {value}, {found}, [{word}]", word, bits)
    } else {
        word.fetch_and(!bits, Ordering::AcqRel)
    }
}

/// `SWPAL`: stores `new` and returns the word as it was, acquire and release.
#[inline]
pub fn swap(word: &AtomicU64, new: u64) -> u64 {
    if use_lse() {
        lse!("swpal {value}, {found}, [{word}]", word, new)
    } else {
        word.swap(new, Ordering::AcqRel)
    }
}
