//! The archive that images arrive in: `newc`, the cpio format that Linux takes as an initial RAM disk (Linux,
//! `Documentation/driver-api/early-userspace/buffer-format.rst`).
//!
//! An entry is a header of 110 bytes, the name with a zero behind it, and the data; name and data end at a multiple of four.
//! All numbers are eight hexadecimal digits. Nothing here allocates or trusts a length.

use core::fmt;

/// Bytes of a header.
const HEADER_BYTES: usize = 110;
/// With and without a checksum, which is not looked at.
const MAGICS: [&[u8]; 2] = [b"070701", b"070702"];
/// Positions among the numbers of a header.
const FILE_BYTES: usize = 6;
const NAME_BYTES: usize = 11;
/// The name of the entry that ends an archive.
const TRAILER: &[u8] = b"TRAILER!!!";

/// Why an archive cannot be read.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Error {
    /// No header at this offset.
    NotAHeader(usize),
    /// The entry at this offset is longer than the archive.
    Truncated(usize),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAHeader(0) => write!(f, "it is no cpio archive in format newc"),
            Self::NotAHeader(at) => write!(f, "there is no header at byte {at}"),
            Self::Truncated(at) => write!(f, "the entry at byte {at} is cut off"),
        }
    }
}

/// The data of the entry `name` of `archive`, or `None` when it has no such entry.
///
/// # Errors
///
/// The archive is damaged before such an entry is reached.
pub fn find<'a>(archive: &'a [u8], name: &str) -> Result<Option<&'a [u8]>, Error> {
    let mut at = 0;
    loop {
        let entry = entry(archive, at)?;
        if entry.name == TRAILER {
            return Ok(None);
        }
        if entry.name == name.as_bytes() {
            return Ok(Some(entry.data));
        }
        at = entry.end;
    }
}

struct Entry<'a> {
    name: &'a [u8],
    data: &'a [u8],
    /// Where the next one begins.
    end: usize,
}

fn entry(archive: &[u8], at: usize) -> Result<Entry<'_>, Error> {
    let header = at
        .checked_add(HEADER_BYTES)
        .and_then(|end| archive.get(at..end))
        .ok_or(Error::Truncated(at))?;
    let (magic, numbers) = header.split_at(MAGICS[0].len());
    if !MAGICS.contains(&magic) {
        return Err(Error::NotAHeader(at));
    }
    let number = |position: usize| {
        let digits = numbers.chunks_exact(8).nth(position)?;
        usize::from_str_radix(core::str::from_utf8(digits).ok()?, 16).ok()
    };
    let (Some(name_bytes), Some(file_bytes)) = (number(NAME_BYTES), number(FILE_BYTES)) else {
        return Err(Error::NotAHeader(at));
    };
    let part = |start: usize, bytes: usize| {
        let end = start.checked_add(bytes).ok_or(Error::Truncated(at))?;
        let part = archive.get(start..end).ok_or(Error::Truncated(at))?;
        Ok((part, end.next_multiple_of(4)))
    };
    let (name, data_at) = part(at + HEADER_BYTES, name_bytes)?;
    let (data, end) = part(data_at, file_bytes)?;
    Ok(Entry {
        name: name.strip_suffix(b"\0").unwrap_or(name),
        data,
        end,
    })
}

#[cfg(test)]
mod tests {
    use std::format;
    use std::vec::Vec;

    use super::{Error, find};

    fn add(archive: &mut Vec<u8>, name: &str, data: &[u8]) {
        let numbers = [
            0,
            0o100_644,
            0,
            0,
            1,
            0,
            data.len(),
            0,
            0,
            0,
            0,
            name.len() + 1,
            0,
        ];
        archive.extend(b"070701");
        for number in numbers {
            archive.extend(format!("{number:08x}").bytes());
        }
        archive.extend(name.bytes().chain([0]));
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend(data);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }

    fn archive() -> Vec<u8> {
        let mut archive = Vec::new();
        add(&mut archive, "Image", b"abcde");
        add(&mut archive, "empty", b"");
        add(&mut archive, "initramfs", &[7; 1000]);
        add(&mut archive, "TRAILER!!!", b"");
        archive
    }

    #[test]
    fn entries_are_found_by_name() {
        let archive = archive();
        assert_eq!(find(&archive, "Image"), Ok(Some(&b"abcde"[..])));
        assert_eq!(find(&archive, "empty"), Ok(Some(&[][..])));
        assert_eq!(find(&archive, "initramfs"), Ok(Some(&[7; 1000][..])));
        assert_eq!(find(&archive, "Imag"), Ok(None));
    }

    #[test]
    fn what_stands_behind_the_trailer_does_not_matter() {
        let mut archive = archive();
        archive.extend([0xff; 5000]);
        assert_eq!(find(&archive, "nothing"), Ok(None));
    }

    #[test]
    fn a_damaged_archive_is_refused_with_the_place() {
        assert_eq!(find(b"", "a"), Err(Error::Truncated(0)));
        assert_eq!(find(&[0; 200], "a"), Err(Error::NotAHeader(0)));
        let whole = archive();
        assert_eq!(find(&whole[..200], "a"), Err(Error::Truncated(124)));
        let mut huge = whole.clone();
        huge[54..62].copy_from_slice(b"ffffffff");
        assert_eq!(find(&huge, "Image"), Err(Error::Truncated(0)));
        let mut words = whole;
        words[94..102].copy_from_slice(b"sixteen!");
        assert_eq!(find(&words, "Image"), Err(Error::NotAHeader(0)));
    }

    fn answered(archive: &[u8]) {
        if let Ok(Some(data)) = find(archive, "initramfs") {
            assert!(archive.as_ptr_range().contains(&data.as_ptr()) || data.is_empty());
        }
    }

    /// Every single byte changed to anything, and any length: an answer, whatever it is.
    #[test]
    fn whatever_the_bytes_are_there_is_an_answer() {
        let whole = archive();
        for at in 0..whole.len().min(400) {
            for value in [0, b'0', b'8', b'f', b'+', 0xff] {
                let mut changed = whole.clone();
                changed[at] = value;
                answered(&changed);
            }
            answered(&whole[..at]);
        }
        let mut random = 1_u64;
        for _ in 0..2000 {
            let mut changed = whole.clone();
            for _ in 0..8 {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let at = usize::try_from(random % 400).unwrap();
                changed[at] = random.to_le_bytes()[7];
            }
            answered(&changed);
        }
    }
}
