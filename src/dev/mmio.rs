//! Device registers as words at offsets.

use crate::addr::{Pa, to_usize};

/// The registers of one device.
#[derive(Clone, Copy, Debug)]
pub struct Registers {
    base: Pa,
}

impl Registers {
    /// The registers at `base`.
    ///
    /// # Safety
    ///
    /// They are mapped as device memory for as long as this or a copy of it is used, and offsets that are read and
    /// written are registers whose effects touch no memory of the program.
    pub const unsafe fn new(base: Pa) -> Self {
        Self { base }
    }

    /// Where they are.
    pub const fn base(self) -> Pa {
        self.base
    }

    fn word(self, offset: usize) -> *mut u32 {
        core::ptr::with_exposed_provenance_mut(to_usize(self.base.raw()) + offset)
    }

    /// Reads the word at `offset`.
    #[inline]
    pub fn read(self, offset: usize) -> u32 {
        #[cfg(test)]
        if let Some(value) = super::posted::read(self.word(offset).addr()) {
            return value;
        }
        // SAFETY: `new`'s caller vouched for it.
        unsafe { self.word(offset).read_volatile() }
    }

    /// Writes the word at `offset`.
    #[inline]
    pub fn write(self, offset: usize, value: u32) {
        #[cfg(test)]
        if super::posted::write(self.word(offset).addr(), value) {
            return;
        }
        // SAFETY: `new`'s caller vouched for it.
        unsafe { self.word(offset).write_volatile(value) };
    }
}
