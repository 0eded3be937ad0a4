//! ACPI tables as bytes: RSDP to XSDT to table, each checked, and fields that may lie beyond the end.

use alloc::string::String;

use super::{Error, Why};
use crate::addr::Pa;

/// Bytes of the root pointer of ACPI 2.0 and later.
const RSDP_BYTES: usize = 36;
/// Bytes of the header that every other table begins with.
pub const HEADER_BYTES: usize = 36;
/// A table longer than this is none.
const MOST_BYTES: u32 = 1 << 20;
/// More tables than this are not a machine's.
const MOST_TABLES: usize = 1024;

/// Physical memory in which tables are.
pub trait Memory {
    /// The `bytes` bytes at `at`, if they can be read.
    fn read(&self, at: Pa, bytes: usize) -> Option<&[u8]>;
}

/// One table whose length and checksum are right.
#[derive(Clone, Copy, Debug)]
pub struct Table<'m> {
    signature: [u8; 4],
    bytes: &'m [u8],
}

impl<'m> Table<'m> {
    /// Bytes, header included.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Never: a table has a header.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// What is wrong at `offset`.
    pub fn error(&self, offset: usize, why: Why) -> Error {
        Error {
            table: self.signature,
            offset,
            why,
        }
    }

    fn array<const N: usize>(&self, offset: usize) -> Result<[u8; N], Error> {
        self.bytes
            .get(offset..)
            .and_then(|it| it.first_chunk())
            .copied()
            .ok_or_else(|| self.error(offset, Why::Length))
    }

    /// The byte at `offset`.
    ///
    /// # Errors
    ///
    /// [`Why::Length`] when the table ends before it.
    pub fn u8(&self, offset: usize) -> Result<u8, Error> {
        self.array(offset).map(|[byte]| byte)
    }

    /// The little-endian number at `offset`; errors as [`Table::u8`].
    ///
    /// # Errors
    ///
    /// [`Why::Length`].
    pub fn u16(&self, offset: usize) -> Result<u16, Error> {
        self.array(offset).map(u16::from_le_bytes)
    }

    /// The little-endian number at `offset`; errors as [`Table::u8`].
    ///
    /// # Errors
    ///
    /// [`Why::Length`].
    pub fn u32(&self, offset: usize) -> Result<u32, Error> {
        self.array(offset).map(u32::from_le_bytes)
    }

    /// The little-endian number at `offset`; errors as [`Table::u8`].
    ///
    /// # Errors
    ///
    /// [`Why::Length`].
    pub fn u64(&self, offset: usize) -> Result<u64, Error> {
        self.array(offset).map(u64::from_le_bytes)
    }

    /// The entries of type and length that stand behind one another from `first` on. One that is shorter than its own
    /// head, or longer than the table, is an error, and the last.
    pub fn entries(
        &self,
        first: usize,
    ) -> impl Iterator<Item = Result<Entry<'m>, Error>> + use<'m> {
        let table = *self;
        let mut at = first;
        core::iter::from_fn(move || {
            (at < table.len()).then(|| {
                let entry = table.entry(at);
                at = entry
                    .as_ref()
                    .map_or(table.len(), |it| at + it.fields.len());
                entry
            })
        })
    }

    fn entry(&self, at: usize) -> Result<Entry<'m>, Error> {
        let (kind, length) = (self.u8(at)?, usize::from(self.u8(at + 1)?));
        let bytes = self.bytes.get(at..at + length);
        let Some(bytes) = bytes.filter(|it| it.len() >= 2) else {
            return Err(self.error(at, Why::Length));
        };
        let signature = self.signature;
        let fields = Table { signature, bytes };
        Ok(Entry { kind, at, fields })
    }
}

/// One entry of a table.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'m> {
    /// Its type.
    pub kind: u8,
    /// Where in the table it begins.
    pub at: usize,
    fields: Table<'m>,
}

impl Entry<'_> {
    /// The number at `offset` of the entry.
    ///
    /// # Errors
    ///
    /// [`Why::Length`] when the entry ends before it; the error counts from the start of the table.
    pub fn u8(&self, offset: usize) -> Result<u8, Error> {
        self.fields.u8(offset).map_err(|it| self.in_table(it))
    }

    /// As [`Entry::u8`].
    ///
    /// # Errors
    ///
    /// [`Why::Length`].
    pub fn u32(&self, offset: usize) -> Result<u32, Error> {
        self.fields.u32(offset).map_err(|it| self.in_table(it))
    }

    /// As [`Entry::u8`].
    ///
    /// # Errors
    ///
    /// [`Why::Length`].
    pub fn u64(&self, offset: usize) -> Result<u64, Error> {
        self.fields.u64(offset).map_err(|it| self.in_table(it))
    }

    fn in_table(&self, error: Error) -> Error {
        Error {
            offset: self.at + error.offset,
            ..error
        }
    }
}

/// The tables that the root pointer leads to.
pub struct Tables<'m> {
    memory: &'m dyn Memory,
    xsdt: Table<'m>,
}

impl core::fmt::Debug for Tables<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Tables({} bytes of XSDT)", self.xsdt.len())
    }
}

impl<'m> Tables<'m> {
    /// Checks the root pointer at `rsdp` and the XSDT it names.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub fn find(rsdp: Pa, memory: &'m dyn Memory) -> Result<Self, Error> {
        const SIGNATURE: [u8; 4] = *b"RSDP";
        const FIRST_BYTES: usize = 20;
        let fail = |offset, why| Error {
            table: SIGNATURE,
            offset,
            why,
        };
        let bytes = memory
            .read(rsdp, RSDP_BYTES)
            .ok_or(fail(0, Why::Unreadable))?;
        let root = Table {
            signature: SIGNATURE,
            bytes,
        };
        if !bytes.starts_with(b"RSD PTR ") {
            return Err(fail(0, Why::Signature));
        }
        if root.u8(15)? < 2 || !(36..=4096).contains(&root.u32(20)?) {
            return Err(fail(20, Why::Length));
        }
        let whole = usize::try_from(root.u32(20)?)
            .ok()
            .and_then(|it| memory.read(rsdp, it))
            .ok_or(fail(20, Why::Unreadable))?;
        let first = whole.get(..FIRST_BYTES).unwrap_or(whole);
        if sum(first) != 0 {
            return Err(fail(8, Why::Checksum));
        }
        if sum(whole) != 0 {
            return Err(fail(32, Why::Checksum));
        }
        let at = Pa::new(root.u64(24)?);
        let xsdt = open(memory, at, *b"XSDT")?;
        if !(xsdt.len() - HEADER_BYTES).is_multiple_of(8)
            || (xsdt.len() - HEADER_BYTES) / 8 > MOST_TABLES
        {
            return Err(xsdt.error(4, Why::Length));
        }
        Ok(Self { memory, xsdt })
    }

    /// The first table with this signature.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub fn table(&self, signature: [u8; 4]) -> Result<Table<'m>, Error> {
        for offset in (HEADER_BYTES..self.xsdt.len()).step_by(8) {
            let at = Pa::new(self.xsdt.u64(offset)?);
            let head = self.memory.read(at, HEADER_BYTES);
            if head.is_some_and(|it| it.starts_with(&signature)) {
                return open(self.memory, at, signature);
            }
        }
        Err(Error {
            table: signature,
            offset: 0,
            why: Why::Missing,
        })
    }

    /// `oem,table` of the XSDT in lower case, of letters, digits and dashes.
    pub fn name(&self) -> String {
        let word = |offset: usize, bytes: usize| {
            let field = self.xsdt.bytes.get(offset..offset + bytes);
            let text = field.unwrap_or_default().iter().map(|&it| char::from(it));
            let known = text.map(|it| if it.is_ascii_alphanumeric() { it } else { ' ' });
            let text: String = known.collect();
            text.trim().to_ascii_lowercase().replace(' ', "-")
        };
        [word(10, 6), word(16, 8)].join(",")
    }
}

/// The table at `at`, which must have this signature.
fn open(memory: &dyn Memory, at: Pa, signature: [u8; 4]) -> Result<Table<'_>, Error> {
    let fail = |offset, why| Error {
        table: signature,
        offset,
        why,
    };
    let head = memory
        .read(at, HEADER_BYTES)
        .ok_or(fail(0, Why::Unreadable))?;
    if !head.starts_with(&signature) {
        return Err(fail(0, Why::Signature));
    }
    let head = Table {
        signature,
        bytes: head,
    };
    let length = head.u32(4)?;
    if length > MOST_BYTES {
        return Err(fail(4, Why::Length));
    }
    let length = usize::try_from(length)
        .ok()
        .filter(|&it| it >= HEADER_BYTES);
    let length = length.ok_or(fail(4, Why::Length))?;
    let bytes = memory.read(at, length).ok_or(fail(4, Why::Unreadable))?;
    if sum(bytes) != 0 {
        return Err(fail(9, Why::Checksum));
    }
    Ok(Table { signature, bytes })
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, &byte| sum.wrapping_add(byte))
}
