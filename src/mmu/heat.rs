//! How long memory has been idle: the passes of `aging`, remembered.
//!
//! A map is one owner's, who feeds it the sightings of complete passes over one slot. Idle age is counted in passes: 0 was
//! accessed since the pass before, [`OLDEST`] that long ago or longer. It is kept per 2 MiB region of the slot while that is one
//! leaf, and per page once it is split; a page takes its region's age over, and a region the youngest of its pages.
//!
//! Everything is allocated when the map is made (a byte a page), because sightings arrive inside sections.

use alloc::boxed::Box;
use alloc::vec;

use crate::addr::{PAGE_BYTES, to_index};
use crate::mmu::aging::{Found, Sighting};

/// Idle ages saturate here.
pub const OLDEST: u8 = 254;
/// Not mapped.
const ABSENT: u8 = 255;
/// Pages of a region.
pub const REGION_PAGES: u64 = 512;

/// Idle ages of one slot's memory.
#[derive(Clone, Debug)]
pub struct IdleMap {
    pages: u64,
    /// By page; in a region that is one leaf only the first counts.
    ages: Box<[u8]>,
    /// By region: whether it was one leaf, or one hole, when last seen.
    whole: Box<[bool]>,
    passes: u64,
}

/// Bytes by idle age: place `n` has those of age `n`, the last place what is not mapped.
pub type Histogram = [u64; 256];

impl IdleMap {
    /// A map of `pages` pages, none of which has been seen.
    pub fn new(pages: u64) -> Self {
        Self {
            pages,
            ages: vec![ABSENT; to_index(pages)].into_boxed_slice(),
            whole: vec![true; to_index(pages.div_ceil(REGION_PAGES))].into_boxed_slice(),
            passes: 0,
        }
    }

    /// Passes that ended.
    pub fn passes(&self) -> u64 {
        self.passes
    }

    /// A pass ended: every page was told of.
    pub fn end_pass(&mut self) {
        self.passes += 1;
    }

    /// Takes in what a pass says of some pages. Pages past the end are ignored.
    pub fn see(&mut self, sighting: Sighting) {
        let end = sighting.page.saturating_add(sighting.pages).min(self.pages);
        let mut page = sighting.page;
        while page < end {
            let region = page / REGION_PAGES;
            let region_end = ((region + 1) * REGION_PAGES).min(self.pages);
            if page == region * REGION_PAGES && end >= region_end {
                self.see_region(region, sighting.found);
            } else {
                self.see_pages(region, page, end.min(region_end), sighting.found);
            }
            page = region_end;
        }
    }

    fn see_region(&mut self, region: u64, found: Found) {
        let before = self.region_age(region).unwrap_or(ABSENT);
        let first = to_index(region * REGION_PAGES);
        if let (Some(whole), Some(age)) = (
            self.whole.get_mut(to_index(region)),
            self.ages.get_mut(first),
        ) {
            *whole = true;
            *age = aged(before, found);
        }
    }

    fn see_pages(&mut self, region: u64, from: u64, to: u64, found: Found) {
        let first = to_index(region * REGION_PAGES);
        let end = to_index(((region + 1) * REGION_PAGES).min(self.pages));
        if let Some(whole) = self.whole.get_mut(to_index(region))
            && core::mem::replace(whole, false)
            && let Some(ages) = self.ages.get_mut(first..end)
        {
            // Split since: each page has been idle for as long as the whole.
            let age = ages.first().copied().unwrap_or(ABSENT);
            ages.fill(age);
        }
        for age in self
            .ages
            .get_mut(to_index(from)..to_index(to))
            .unwrap_or_default()
        {
            *age = aged(*age, found);
        }
    }

    /// Regions of the slot.
    pub fn regions(&self) -> u64 {
        self.whole.len() as u64
    }

    /// The idle age of a region: that of its youngest page; `None` when nothing is mapped there.
    pub fn region_age(&self, region: u64) -> Option<u8> {
        let first = to_index(region * REGION_PAGES);
        let end = to_index(((region + 1) * REGION_PAGES).min(self.pages));
        let ages = self.ages.get(first..end)?;
        let age = match self.whole.get(to_index(region)) {
            Some(true) => ages.first().copied(),
            _ => ages.iter().copied().min(),
        };
        age.filter(|age| *age != ABSENT)
    }

    /// The idle age of a page; `None` when it is not mapped.
    pub fn page_age(&self, page: u64) -> Option<u8> {
        let at = match self.whole.get(to_index(page / REGION_PAGES)) {
            Some(true) => page / REGION_PAGES * REGION_PAGES,
            _ => page,
        };
        let age = self.ages.get(to_index(at)).copied();
        age.filter(|age| *age != ABSENT && page < self.pages)
    }

    /// Bytes of each idle age.
    pub fn histogram(&self) -> Histogram {
        let mut bytes = [0; 256];
        for (region, whole) in (0_u64..).zip(&self.whole) {
            let first = region * REGION_PAGES;
            let end = (first + REGION_PAGES).min(self.pages);
            let ages = self
                .ages
                .get(to_index(first)..to_index(end))
                .unwrap_or_default();
            let (ages, pages) = if *whole {
                (ages.get(..1).unwrap_or_default(), end - first)
            } else {
                (ages, 1)
            };
            for age in ages {
                if let Some(sum) = bytes.get_mut(usize::from(*age)) {
                    *sum += pages * PAGE_BYTES;
                }
            }
        }
        bytes
    }

    /// Bytes accessed within the last `passes` passes: the working set over that time. None for 0.
    pub fn working_set_bytes(&self, passes: u8) -> u64 {
        let within = usize::from(passes.min(OLDEST));
        self.histogram().iter().take(within).sum()
    }
}

fn aged(before: u8, found: Found) -> u8 {
    match (found, before) {
        (Found::Absent, _) => ABSENT,
        (Found::Young, _) => 0,
        // Seen for the first time: nobody knows, and it is not claimed to be idle.
        (Found::Old, ABSENT) => 0,
        (Found::Old, before) => before.saturating_add(1).min(OLDEST),
    }
}

#[cfg(test)]
mod tests {
    use super::{IdleMap, OLDEST};
    use crate::mmu::aging::{Found, Sighting};

    fn see(map: &mut IdleMap, page: u64, pages: u64, found: Found) {
        map.see(Sighting { page, pages, found });
    }

    #[test]
    fn a_region_that_is_split_hands_its_age_to_its_pages() {
        let mut map = IdleMap::new(1024);
        see(&mut map, 0, 512, Found::Young);
        see(&mut map, 512, 512, Found::Young);
        for _ in 0..3 {
            see(&mut map, 0, 512, Found::Old);
        }
        assert_eq!(map.region_age(0), Some(3));
        for page in 0..512 {
            let found = if page == 7 { Found::Young } else { Found::Old };
            see(&mut map, page, 1, found);
        }
        assert_eq!((map.page_age(7), map.page_age(8)), (Some(0), Some(4)));
        assert_eq!(map.region_age(0), Some(0), "as young as its youngest page");
        see(&mut map, 0, 512, Found::Old);
        assert_eq!(map.page_age(8), Some(1), "one leaf again");
    }

    #[test]
    fn the_working_set_is_what_was_accessed_lately() {
        let mut map = IdleMap::new(1000);
        see(&mut map, 0, 512, Found::Young);
        for page in 512..1000 {
            see(&mut map, page, 1, Found::Young);
        }
        see(&mut map, 0, 512, Found::Old);
        for page in 512..1000 {
            see(
                &mut map,
                page,
                1,
                if page < 600 { Found::Young } else { Found::Old },
            );
        }
        assert_eq!(map.working_set_bytes(0), 0);
        assert_eq!(map.working_set_bytes(1), 88 * 4096);
        assert_eq!(map.working_set_bytes(2), 1000 * 4096);
        assert_eq!(map.histogram()[1], 912 * 4096);
    }

    #[test]
    fn ages_saturate_and_what_is_unmapped_has_none() {
        let mut map = IdleMap::new(512);
        assert_eq!(map.region_age(0), None);
        see(&mut map, 0, 512, Found::Old);
        assert_eq!(
            map.region_age(0),
            Some(0),
            "not claimed to be idle before it was watched"
        );
        for _ in 0..300 {
            see(&mut map, 0, 512, Found::Old);
        }
        assert_eq!(map.region_age(0), Some(OLDEST));
        see(&mut map, 0, 512, Found::Absent);
        assert_eq!(
            (map.region_age(0), map.histogram()[255]),
            (None, 512 * 4096)
        );
    }

    #[test]
    fn a_sighting_of_a_large_block_is_of_all_its_regions() {
        let mut map = IdleMap::new(512 * 4 + 100);
        see(&mut map, 0, 1 << 18, Found::Young);
        assert_eq!(map.working_set_bytes(1), (512 * 4 + 100) * 4096);
        assert_eq!(map.regions(), 5);
        assert_eq!(map.page_age(512 * 4 + 100), None);
    }
}
