//! EL2's own translation: an identity map, so that a physical address is a pointer.
//!
//! Format: 4 KiB granule, 48-bit addresses, 4 levels (Arm ARM D8.3); one range, no ASID. RAM is writable and never
//! executable; the image's code is executable and never writable; a page below every stack is not mapped. The map is
//! built once, before it is used, so no break-before-make happens here.

use core::ops::Range;

use crate::addr::{PAGE_BYTES, Pa, to_usize};

/// TCR_EL2.T0SZ: 48 bits.
pub const T0SZ: u64 = 64 - 48;
/// End of what the map can hold.
const SPACE_END: u64 = 1 << 48;

const VALID: u64 = 1;
const TABLE_OR_PAGE: u64 = 1 << 1;
const DEVICE: u64 = 1 << 2;
/// AP\[1\]: RES1 in the EL2 regime.
const EL2_RES1: u64 = 1 << 6;
const READ_ONLY: u64 = 1 << 7;
const INNER_SHAREABLE: u64 = 0b11 << 8;
const ACCESSED: u64 = 1 << 10;
const NEVER_EXECUTE: u64 = 1 << 54;
const ADDRESS: u64 = 0x0000_ffff_ffff_f000;

/// A 2 MiB block of the image before the final map exists: everything allowed.
pub const BLOCK_IMAGE: u64 = VALID | EL2_RES1 | INNER_SHAREABLE | ACCESSED;
/// The same for EL1, where AP\[1\] would give the block to EL0.
pub const BLOCK_IMAGE_EL1: u64 = VALID | INNER_SHAREABLE | ACCESSED;
/// A 2 MiB block of the device tree.
pub const BLOCK_TREE: u64 =
    VALID | EL2_RES1 | READ_ONLY | INNER_SHAREABLE | ACCESSED | NEVER_EXECUTE;
/// A 2 MiB block of RAM.
pub const BLOCK_RAM: u64 = VALID | EL2_RES1 | INNER_SHAREABLE | ACCESSED | NEVER_EXECUTE;
/// A 2 MiB block of device registers.
pub const BLOCK_DEVICE: u64 = VALID | EL2_RES1 | DEVICE | ACCESSED | NEVER_EXECUTE;

/// What may be done with a region.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// Normal memory, read and written.
    Data,
    /// Normal memory, read.
    Constants,
    /// Normal memory, read and executed.
    Code,
    /// Device registers (nGnRE).
    Device,
}

impl Kind {
    const fn attributes(self) -> u64 {
        let common = VALID | EL2_RES1 | ACCESSED;
        match self {
            Self::Data => common | INNER_SHAREABLE | NEVER_EXECUTE,
            Self::Constants => common | INNER_SHAREABLE | NEVER_EXECUTE | READ_ONLY,
            Self::Code => common | INNER_SHAREABLE | READ_ONLY,
            Self::Device => common | DEVICE | NEVER_EXECUTE,
        }
    }
}

/// Why a region cannot be mapped.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Error {
    /// No page for a table.
    OutOfMemory,
    /// The region lies beyond 48 bits or is not made of pages.
    BadRegion,
}

/// The tables under construction, owned until [`Map::into_root`].
#[derive(Debug)]
pub struct Map<F> {
    root: Pa,
    new_table: F,
}

impl<F: FnMut() -> Option<Pa>> Map<F> {
    /// An empty map whose tables come from `new_table`.
    ///
    /// # Safety
    ///
    /// `new_table` returns zeroed pages that are reachable at their physical address and belong to the map for ever.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`].
    pub unsafe fn new(mut new_table: F) -> Result<Self, Error> {
        Ok(Self {
            root: new_table().ok_or(Error::OutOfMemory)?,
            new_table,
        })
    }

    /// Maps `region` at its own address, by the largest blocks that fit, replacing what was there.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub fn identity(&mut self, region: Range<Pa>, kind: Kind) -> Result<(), Error> {
        self.write(region, Some(kind))
    }

    /// Leaves the page at `page` unmapped.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub fn guard(&mut self, page: Pa) -> Result<(), Error> {
        let end = page.checked_add(PAGE_BYTES).ok_or(Error::BadRegion)?;
        self.write(page..end, None)
    }

    /// The finished map's root table.
    pub fn into_root(self) -> Pa {
        self.root
    }

    fn write(&mut self, region: Range<Pa>, kind: Option<Kind>) -> Result<(), Error> {
        let (mut at, end) = (region.start.raw(), region.end.raw());
        if end > SPACE_END
            || !region.start.is_aligned(PAGE_BYTES)
            || !region.end.is_aligned(PAGE_BYTES)
        {
            return Err(Error::BadRegion);
        }
        while at < end {
            let level = [1, 2, 3]
                .into_iter()
                .find(|&level| at.is_multiple_of(span(level)) && end - at >= span(level))
                .ok_or(Error::BadRegion)?;
            let descriptor = match kind {
                Some(kind) if level == 3 => at | kind.attributes() | TABLE_OR_PAGE,
                Some(kind) => at | kind.attributes(),
                None => 0,
            };
            *self.slot(at, level)? = descriptor;
            at += span(level);
        }
        Ok(())
    }

    /// The slot at `level` that translates `address`, making tables (and splitting blocks) on the way.
    fn slot(&mut self, address: u64, level: u32) -> Result<&mut u64, Error> {
        let mut table = self.root;
        for above in 0..level {
            let slot = entry(table, address, above);
            // SAFETY: `table` is a table of this map, exclusively borrowed with it.
            let slot = unsafe { &mut *slot };
            if *slot & VALID == 0 {
                *slot = (self.new_table)().ok_or(Error::OutOfMemory)?.raw() | VALID | TABLE_OR_PAGE;
            } else if *slot & TABLE_OR_PAGE == 0 {
                *slot = self.split(*slot, above + 1)?;
            }
            table = Pa::new(*slot & ADDRESS);
        }
        // SAFETY: as above.
        Ok(unsafe { &mut *entry(table, address, level) })
    }

    /// A table of `level` that maps what `block`, one level above, maps.
    fn split(&mut self, block: u64, level: u32) -> Result<u64, Error> {
        let table = (self.new_table)().ok_or(Error::OutOfMemory)?;
        let kind_of_leaf = if level == 3 { TABLE_OR_PAGE } else { 0 };
        for index in 0..512 {
            let slot = entry(table, index * span(level), level);
            // SAFETY: the table is new and this map's.
            unsafe { slot.write((block | kind_of_leaf) + index * span(level)) };
        }
        Ok(table.raw() | VALID | TABLE_OR_PAGE)
    }
}

/// Bytes that a slot of `level` translates.
const fn span(level: u32) -> u64 {
    1 << (39 - 9 * level)
}

fn entry(table: Pa, address: u64, level: u32) -> *mut u64 {
    let index = to_usize(address / span(level) % 512);
    core::ptr::with_exposed_provenance_mut::<u64>(to_usize(table.raw())).wrapping_add(index)
}

#[cfg(test)]
mod tests {
    use super::{
        ADDRESS, DEVICE, Error, Kind, Map, NEVER_EXECUTE, READ_ONLY, TABLE_OR_PAGE, VALID, entry,
    };
    use crate::addr::Pa;

    fn page() -> Option<Pa> {
        let table = Box::leak(Box::new(Table([0; 512])));
        Some(Pa::new((&raw mut *table).expose_provenance() as u64))
    }

    #[repr(align(4096))]
    struct Table(#[expect(dead_code, reason = "accessed as a translation table")] [u64; 512]);

    /// Level and descriptor that translate `address`.
    fn look_up(root: Pa, address: u64) -> Option<(u32, u64)> {
        let mut table = root;
        for level in 0..=3 {
            // SAFETY: tables of these tests are leaked boxes.
            let descriptor = unsafe { entry(table, address, level).read() };
            match (descriptor & VALID != 0, descriptor & TABLE_OR_PAGE != 0) {
                (false, _) => return None,
                (true, true) if level < 3 => table = Pa::new(descriptor & ADDRESS),
                _ => return Some((level, descriptor)),
            }
        }
        None
    }

    fn map(regions: &[(u64, u64, Kind)], guards: &[u64]) -> Pa {
        // SAFETY: pages are leaked, zeroed boxes.
        let mut map = unsafe { Map::new(page) }.unwrap();
        for &(start, end, kind) in regions {
            map.identity(Pa::new(start)..Pa::new(end), kind).unwrap();
        }
        for &guard in guards {
            map.guard(Pa::new(guard)).unwrap();
        }
        map.into_root()
    }

    #[test]
    fn ram_is_mapped_by_the_largest_blocks() {
        let root = map(&[(0x4000_0000, 0xc020_1000, Kind::Data)], &[]);
        assert_eq!(look_up(root, 0x4000_0000).unwrap().0, 1);
        assert_eq!(look_up(root, 0xc000_0000).unwrap().0, 2);
        assert_eq!(look_up(root, 0xc020_0fff).unwrap().0, 3);
        assert_eq!(look_up(root, 0xc020_1000), None);
        assert_eq!(look_up(root, 0x3fff_ffff), None);
    }

    #[test]
    fn carving_the_image_out_of_a_block_keeps_the_rest() {
        let regions = [
            (0x4000_0000, 0x8000_0000, Kind::Data),
            (0x4020_0000, 0x4020_3000, Kind::Code),
            (0x4020_3000, 0x4020_4000, Kind::Constants),
        ];
        let root = map(&regions, &[0x4020_5000]);
        let permission =
            |address| look_up(root, address).map(|(_, it)| it & (READ_ONLY | NEVER_EXECUTE));
        assert_eq!(permission(0x4020_2000), Some(READ_ONLY));
        assert_eq!(permission(0x4020_3000), Some(READ_ONLY | NEVER_EXECUTE));
        assert_eq!(permission(0x4020_4000), Some(NEVER_EXECUTE));
        assert_eq!(permission(0x4020_5000), None);
        assert_eq!(permission(0x4020_6000), Some(NEVER_EXECUTE));
        for address in (0x4000_0000..0x8000_0000)
            .step_by(0x1f_f000)
            .filter(|&it| it != 0x4020_5000)
        {
            let (level, descriptor) = look_up(root, address).unwrap();
            assert_eq!(
                descriptor & ADDRESS,
                address & !(super::span(level) - 1),
                "identity at {address:#x}"
            );
        }
    }

    #[test]
    fn nothing_is_writable_and_executable() {
        for kind in [Kind::Data, Kind::Constants, Kind::Code, Kind::Device] {
            assert_ne!(
                kind.attributes() & (READ_ONLY | NEVER_EXECUTE),
                0,
                "{kind:?}"
            );
        }
        assert_ne!(Kind::Device.attributes() & DEVICE, 0);
    }

    #[test]
    fn regions_beyond_the_space_are_refused() {
        // SAFETY: pages are leaked, zeroed boxes.
        let mut map = unsafe { Map::new(page) }.unwrap();
        let beyond = Pa::new(1 << 48)..Pa::new((1 << 48) + 4096);
        assert_eq!(map.identity(beyond, Kind::Data), Err(Error::BadRegion));
        assert_eq!(
            map.identity(Pa::new(1)..Pa::new(4096), Kind::Data),
            Err(Error::BadRegion)
        );
    }

    #[test]
    fn a_map_without_pages_for_tables_is_refused() {
        let mut pages = 1;
        let mut scarce = || {
            pages -= 1;
            if pages >= 0 { page() } else { None }
        };
        // SAFETY: pages are leaked, zeroed boxes.
        let mut map = unsafe { Map::new(&mut scarce) }.unwrap();
        assert_eq!(
            map.identity(Pa::new(0)..Pa::new(4096), Kind::Data),
            Err(Error::OutOfMemory)
        );
    }
}
