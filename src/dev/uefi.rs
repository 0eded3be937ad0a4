//! What UEFI (2.10) hands over, as bytes: the memory map and the load options.
//!
//! Pure, like [`super::acpi`]: the calls that produce these bytes are boot's.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

use crate::addr::{PAGE_BYTES, Pa};
use crate::mem::ram;

/// Bytes of a descriptor as version 1 has it; firmware may make them longer.
const DESCRIPTOR_BYTES: usize = 40;
/// Memory types that are free once boot services are left: loader code and data, boot services code and data,
/// conventional, and ACPI tables, which have been read by then.
const FREE_TYPES: [u32; 6] = [1, 2, 3, 4, 7, 9];
/// Attribute: cacheable, written back.
const WRITE_BACK: u64 = 1 << 3;
/// Attributes of memory that is not for everybody: special purpose, runtime services.
const KEPT: u64 = 1 << 18 | 1 << 63;
/// EL2 addresses 48 bits.
const SPACE_END: u64 = 1 << 48;

/// Why a memory map cannot be read.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Error {
    /// Bytes from its start.
    pub offset: usize,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the UEFI memory map at offset {} is malformed",
            self.offset
        )
    }
}

/// RAM that is free in `map`, whose descriptors are `descriptor_bytes` apart, sorted.
///
/// # Errors
///
/// See [`Error`].
pub fn free_memory(map: &[u8], descriptor_bytes: usize) -> Result<Vec<Range<Pa>>, Error> {
    let mut free = Vec::new();
    for descriptor in descriptors(map, descriptor_bytes)? {
        let Descriptor {
            kind,
            range,
            attributes,
        } = descriptor?;
        let cacheable = attributes & WRITE_BACK != 0 && attributes & KEPT == 0;
        if FREE_TYPES.contains(&kind) && cacheable {
            free.push(range.start..range.end.min(Pa::new(SPACE_END)));
        }
    }
    free.retain(|it: &Range<Pa>| it.start < it.end);
    ram::sort(&mut free);
    Ok(free)
}

/// Everything in `map` that is memory, whoever has it, sorted: what firmware maps and tables may be in.
///
/// # Errors
///
/// See [`Error`].
pub fn described_memory(map: &[u8], descriptor_bytes: usize) -> Result<Vec<Range<Pa>>, Error> {
    /// Unusable, memory-mapped I/O and its ports, unaccepted.
    const NO_MEMORY: [u32; 4] = [8, 11, 12, 15];
    let mut all = Vec::new();
    for descriptor in descriptors(map, descriptor_bytes)? {
        let Descriptor { kind, range, .. } = descriptor?;
        if !NO_MEMORY.contains(&kind) && range.start < range.end {
            all.push(range);
        }
    }
    ram::sort(&mut all);
    Ok(all)
}

fn descriptors(
    map: &[u8],
    descriptor_bytes: usize,
) -> Result<impl Iterator<Item = Result<Descriptor, Error>>, Error> {
    if descriptor_bytes < DESCRIPTOR_BYTES || !map.len().is_multiple_of(descriptor_bytes) {
        return Err(Error { offset: 0 });
    }
    let rows = map.chunks_exact(descriptor_bytes).enumerate();
    Ok(rows.map(move |(index, row)| {
        read(row).ok_or(Error {
            offset: index * descriptor_bytes,
        })
    }))
}

struct Descriptor {
    kind: u32,
    range: Range<Pa>,
    attributes: u64,
}

fn read(descriptor: &[u8]) -> Option<Descriptor> {
    let word = |offset: usize| {
        Some(u64::from_le_bytes(
            *descriptor.get(offset..)?.first_chunk()?,
        ))
    };
    let start = Pa::new(word(8)?);
    let end = start.checked_add(word(24)?.checked_mul(PAGE_BYTES)?)?;
    start.is_aligned(PAGE_BYTES).then_some(Descriptor {
        kind: u32::from_le_bytes(*descriptor.first_chunk()?),
        range: start..end,
        attributes: word(32)?,
    })
}

/// Load options as boot arguments: printable ASCII in UTF-16, else nothing, for a boot manager may put anything there.
/// The name of the program that a shell puts first is left out, and so is `initrd=`, which is the loader's.
pub fn boot_arguments(options: &[u8]) -> Option<String> {
    let units = options.chunks_exact(2);
    if !units.remainder().is_empty() {
        return None;
    }
    let units = units.map(|it| u16::from_le_bytes([it[0], it[1]]));
    let printable = |unit: u16| {
        u8::try_from(unit)
            .ok()
            .filter(|it| (b' '..=b'~').contains(it))
    };
    let text = units
        .take_while(|&unit| unit != 0)
        .map(|unit| printable(unit).map(char::from))
        .collect::<Option<String>>()?;
    let program = |word: &str| word.to_ascii_lowercase().ends_with(".efi");
    let words: Vec<_> = text
        .split_whitespace()
        .filter(|word| !program(word) && !word.starts_with("initrd="))
        .collect();
    (!words.is_empty()).then(|| words.join(" "))
}

/// A file of boot arguments: lines that begin with `#` are remarks, the others follow one another.
pub fn argument_lines(file: &[u8]) -> String {
    let text = String::from_utf8_lossy(file);
    let lines = text.lines().map(str::trim);
    let lines: Vec<_> = lines
        .filter(|it| !it.is_empty() && !it.starts_with('#'))
        .collect();
    lines.join(" ")
}

#[cfg(test)]
mod tests {
    use super::{Error, Pa, Range, argument_lines, boot_arguments, described_memory, free_memory};
    use std::vec::Vec;

    fn map(rows: &[(u32, u64, u64, u64)], descriptor_bytes: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for &(kind, start, pages, attributes) in rows {
            let end = bytes.len() + descriptor_bytes;
            bytes.extend(u64::from(kind).to_le_bytes());
            for word in [start, 0, pages, attributes] {
                bytes.extend(word.to_le_bytes());
            }
            bytes.resize(end, 0xee);
        }
        bytes
    }

    #[test]
    fn what_is_free_after_boot_services_is_ram_and_nothing_else_is() {
        let all = 0xf;
        let rows = [
            (7, 0x8000_0000, 0x10, all),
            (3, 0x8001_0000, 0x10, all),
            (9, 0x8002_0000, 0x10, all),
            (10, 0x8003_0000, 0x10, all),        // ACPI NVS
            (0, 0x8004_0000, 0x10, all),         // reserved
            (5, 0x8005_0000, 0x10, all),         // runtime code
            (7, 0x8006_0000, 0x10, 0x7),         // not cacheable
            (7, 0x8007_0000, 0x10, 1 << 18 | 8), // special purpose
            (15, 0x8008_0000, 0x10, all),        // unaccepted
            (2, 0x8009_0000, 0x10, all),
            (7, (1 << 48) - 0x1000, 2, all), // half of it beyond 48 bits
            (7, 1 << 50, 2, all),
        ];
        let range = |start, end| Pa::new(start)..Pa::new(end);
        for descriptor_bytes in [40, 48] {
            assert_eq!(
                free_memory(&map(&rows, descriptor_bytes), descriptor_bytes),
                Ok(std::vec![
                    range(0x8000_0000, 0x8003_0000),
                    range(0x8009_0000, 0x800a_0000),
                    range((1 << 48) - 0x1000, 1 << 48)
                ])
            );
        }
    }

    #[test]
    fn a_malformed_map_is_refused_with_its_place() {
        let good = map(&[(7, 0x1000, 1, 8)], 48);
        assert!(free_memory(&good, 48).is_ok());
        assert_eq!(free_memory(&good[..47], 48), Err(Error { offset: 0 }));
        assert_eq!(free_memory(&good, 0), Err(Error { offset: 0 }));
        assert_eq!(free_memory(&good, 24), Err(Error { offset: 0 }));
        for bad in [
            (7, 0x1001, 1, 8),
            (7, 0x1000, u64::MAX, 8),
            (7, !0xfff, 2, 8),
        ] {
            let rows = [(7, 0x1000, 1, 8), bad];
            assert_eq!(free_memory(&map(&rows, 48), 48), Err(Error { offset: 48 }));
        }
    }

    #[test]
    fn no_map_is_bad_enough_to_panic_and_what_is_free_was_described() {
        let mut seed = 0x2545_f491_4f6c_dd1d_u64;
        let mut next = |below: u64| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed % below
        };
        let (mut refused, mut understood) = (0, 0);
        for _ in 0..20_000 {
            let rows: Vec<_> = (0..next(12))
                .map(|_| {
                    let kind = u32::try_from(next(18)).unwrap();
                    (kind, next(64) << 12, next(64), next(16))
                })
                .collect();
            let stride = [40, 48, 64][usize::try_from(next(3)).unwrap()];
            let mut bytes = map(&rows, stride);
            for _ in 0..next(4) {
                let at = usize::try_from(next(bytes.len() as u64 + 1)).unwrap();
                match (next(3), bytes.get_mut(at)) {
                    (0, _) => bytes.truncate(at),
                    (1, Some(byte)) => *byte = 0xff,
                    (_, Some(byte)) => *byte = u8::try_from(next(256)).unwrap(),
                    (_, None) => {}
                }
            }
            let asked = [stride, stride, stride, 0, 1, 39, usize::MAX];
            let asked = asked[usize::try_from(next(7)).unwrap()];
            match (free_memory(&bytes, asked), described_memory(&bytes, asked)) {
                (Ok(free), Ok(described)) => {
                    understood += 1;
                    assert!(free.iter().all(|it| it.start < it.end));
                    assert!(free.windows(2).all(|it| it[0].end < it[1].start));
                    let inside = |it: &Range<Pa>| {
                        let around =
                            |other: &Range<Pa>| other.start <= it.start && it.end <= other.end;
                        described.iter().any(around)
                    };
                    assert!(free.iter().all(inside), "{free:?} in {described:?}");
                }
                (Err(one), Err(other)) => {
                    refused += 1;
                    assert_eq!(one, other);
                    assert!(one.offset <= bytes.len());
                }
                (free, described) => panic!("{free:?}, but {described:?}"),
            }
        }
        assert!(
            refused > 1000 && understood > 1000,
            "{refused}, {understood}"
        );
    }

    #[test]
    fn tables_may_be_in_memory_that_firmware_keeps_but_not_in_devices() {
        let rows = [
            (10, 0x2000, 1, 0xf),
            (0, 0x1000, 1, 0xf),
            (11, 0x9000, 1, 1),
        ];
        let range = Pa::new(0x1000)..Pa::new(0x3000);
        assert_eq!(described_memory(&map(&rows, 48), 48), Ok(std::vec![range]));
        assert_eq!(described_memory(&[0; 47], 48), Err(Error { offset: 0 }));
    }

    #[test]
    fn a_file_of_arguments_is_one_line_without_remarks() {
        assert_eq!(
            argument_lines(b"# what to run\r\nsuite=none\r\n\n  vcpus=1 \n"),
            "suite=none vcpus=1"
        );
        assert_eq!(argument_lines(b""), "");
    }

    #[test]
    fn load_options_are_text_or_nothing() {
        let utf16 = |text: &str| {
            text.encode_utf16()
                .flat_map(u16::to_le_bytes)
                .collect::<Vec<_>>()
        };
        let read = |text: &str| boot_arguments(&utf16(text));
        assert_eq!(
            read("suite=none vcpus=1\0").as_deref(),
            Some("suite=none vcpus=1")
        );
        assert_eq!(
            read("FS0:\\Vellum.EFI suite=none initrd=initrd").as_deref(),
            Some("suite=none")
        );
        assert_eq!(read("a=b\0\u{1}garbage").as_deref(), Some("a=b"));
        for nothing in ["", "\0", "vellum.efi", "a\u{7}", "\u{4e08}\u{b0f2}"] {
            assert_eq!(read(nothing), None, "{nothing:?}");
        }
        assert_eq!(boot_arguments(&utf16("suite=none")[..5]), None);
    }
}
