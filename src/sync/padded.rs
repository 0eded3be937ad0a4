//! What is written often, apart from what is read often.
//!
//! The linker places statics side by side. One that every exit reads and one that every allocation writes must not share a line,
//! or readers wait for writers that do not concern them.

use core::ops::Deref;

/// A value on lines of its own: two of 64 bytes, because CPUs fetch neighbours together.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Padded<T>(T);

impl<T> Padded<T> {
    /// `value`, with nothing beside it.
    pub const fn new(value: T) -> Self {
        Self(value)
    }
}

impl<T> Deref for Padded<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

const _: () = assert!(size_of::<Padded<u8>>() == 128 && align_of::<Padded<u8>>() == 128);
