//! The header of an arm64 Linux `Image` (Linux, `Documentation/arch/arm64/booting.rst`).

use core::fmt;

/// `ARM\x64`.
const MAGIC: [u8; 4] = *b"ARMd";
const TEXT_OFFSET_AT: usize = 0x08;
const IMAGE_SIZE_AT: usize = 0x10;
const FLAGS_AT: usize = 0x18;
const MAGIC_AT: usize = 0x38;
/// The kernel runs big-endian.
const BIG_ENDIAN: u64 = 1 << 0;
/// Images are placed this far above an address that is aligned to it, plus an offset below it.
pub const ALIGN_BYTES: u64 = 2 << 20;
/// gzip's first bytes.
const GZIP: [u8; 2] = [0x1f, 0x8b];

/// What a kernel asks for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Header {
    /// From an address aligned to [`ALIGN_BYTES`] to the kernel.
    pub text_offset: u64,
    /// Bytes that the kernel needs from its start on; more than its file has.
    pub image_bytes: u64,
}

/// Why a file is no kernel that can be started.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Error {
    /// It is compressed.
    Compressed,
    /// It is no arm64 Image at all.
    NotAnImage,
    /// It runs big-endian.
    BigEndian,
    /// It does not say how much memory it needs, as kernels before 3.17 do not.
    NoSize,
    /// The offset that it wants to be loaded at is not one of whole pages below [`ALIGN_BYTES`].
    BadOffset(u64),
    /// It needs less memory than its file has bytes.
    BadSize(u64),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Compressed => write!(f, "it is compressed: give the uncompressed Image"),
            Self::NotAnImage => write!(f, "it is no arm64 Linux Image"),
            Self::BigEndian => write!(f, "it runs big-endian, which no guest may"),
            Self::NoSize => write!(f, "it does not say how much memory it needs"),
            Self::BadOffset(offset) => write!(f, "it wants to be at offset {offset:#x}"),
            Self::BadSize(bytes) => {
                write!(f, "it needs {bytes} bytes of memory, fewer than it has")
            }
        }
    }
}

impl Header {
    /// Reads and checks the header of `image`.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub fn new(image: &[u8]) -> Result<Self, Error> {
        if image.starts_with(&GZIP) {
            return Err(Error::Compressed);
        }
        if image.get(MAGIC_AT..).and_then(<[u8]>::first_chunk) != Some(&MAGIC) {
            return Err(Error::NotAnImage);
        }
        let word = |at: usize| {
            let bytes = image.get(at..).and_then(<[u8]>::first_chunk);
            bytes
                .copied()
                .map(u64::from_le_bytes)
                .ok_or(Error::NotAnImage)
        };
        let text_offset = word(TEXT_OFFSET_AT)?;
        let image_bytes = word(IMAGE_SIZE_AT)?;
        if word(FLAGS_AT)? & BIG_ENDIAN != 0 {
            return Err(Error::BigEndian);
        }
        if text_offset >= ALIGN_BYTES || !text_offset.is_multiple_of(crate::addr::PAGE_BYTES) {
            return Err(Error::BadOffset(text_offset));
        }
        match image_bytes {
            0 => Err(Error::NoSize),
            bytes if bytes < image.len() as u64 => Err(Error::BadSize(bytes)),
            _ => Ok(Self {
                text_offset,
                image_bytes,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::vec;
    use std::vec::Vec;

    use super::{Error, Header};

    fn image(text_offset: u64, image_bytes: u64, flags: u64) -> Vec<u8> {
        let mut image = vec![0; 4096];
        image[0x08..0x10].copy_from_slice(&text_offset.to_le_bytes());
        image[0x10..0x18].copy_from_slice(&image_bytes.to_le_bytes());
        image[0x18..0x20].copy_from_slice(&flags.to_le_bytes());
        image[0x38..0x3c].copy_from_slice(b"ARMd");
        image
    }

    #[test]
    fn a_good_header_is_read() {
        let expected = Header {
            text_offset: 0x8_0000,
            image_bytes: 0x20_0000,
        };
        assert_eq!(Header::new(&image(0x8_0000, 0x20_0000, 0xa)), Ok(expected));
        assert!(Header::new(&image(0, 4096, 0)).is_ok());
    }

    #[test]
    fn what_cannot_be_started_is_refused() {
        for (text_offset, bytes, flags, error) in [
            (0, 0x20_0000, 0xb, Error::BigEndian),
            (0, 0, 0xa, Error::NoSize),
            (0, 4095, 0xa, Error::BadSize(4095)),
            (0x20_0000, 0x20_0000, 0xa, Error::BadOffset(0x20_0000)),
            (0x8_0800, 0x20_0000, 0xa, Error::BadOffset(0x8_0800)),
            (u64::MAX, u64::MAX, 0xa, Error::BadOffset(u64::MAX)),
        ] {
            assert_eq!(Header::new(&image(text_offset, bytes, flags)), Err(error));
        }
        assert_eq!(Header::new(&[0x1f, 0x8b, 8, 0]), Err(Error::Compressed));
        assert_eq!(Header::new(b"\x7fELF"), Err(Error::NotAnImage));
        let whole = image(0, 4096, 0);
        for bytes in 0..0x3c {
            assert_eq!(Header::new(&whole[..bytes]), Err(Error::NotAnImage));
        }
    }
}
