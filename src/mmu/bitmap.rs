//! Which pages were written: an atomic bitmap that costs O(written) to scan, and no shared line to write.
//!
//! One bit a page; a *group* is 512 pages, whose bits fill one cache line. Above it each CPU has its own two-level
//! summary (a *shard*): a bit per group, and a bit per 64 of those. Setting a page's bit writes the group's line and,
//! once per group and epoch, the setter's own shard: no line that another CPU's setter writes unless both write the same
//! 2 MiB.
//!
//! # Protocol (rules 2 and 13)
//!
//! ```text
//!   setter                                    taker
//!   word |= bit           (always an RMW)     summary &= !group   (all shards, top down)
//!   fence(SeqCst)                 \  /        fence(SeqCst)
//!   if !(summary & group)          \/         take the words
//!       summary |= group           /\
//! ```
//!
//! If the setter reads its summary bit still set, the taker's clear comes later and so do its reads of the words, which
//! then see the bit. If it reads it clear it sets it again: the page is found next time at the latest. Test-then-set of
//! the word would lose a page (`bad_test_then_set_loses_a_write`), and so would taking the words first
//! (`bad_taking_words_before_the_summary_hides_a_page`), both in `tests/loom`.

use alloc::boxed::Box;

use crate::addr::to_index;
use crate::arch;
use crate::arch::atomic::{AtomicU64, Ordering, fence};

/// Pages per word.
pub const WORD_PAGES: u64 = 64;
/// Pages per group: what one summary bit stands for, and what a level-3 table translates.
pub const GROUP_PAGES: u64 = 512;
const GROUP_WORDS: usize = (GROUP_PAGES / WORD_PAGES) as usize;

/// One CPU's summary. Its setter is that CPU; takers are any.
#[derive(Debug)]
#[repr(align(128))]
struct Shard {
    /// Bit `n` of word `m`: group `64 m + n` may have pages.
    groups: Box<[AtomicU64]>,
    /// Bit `n` of word `m`: `groups[64 m + n]` may be nonzero.
    top: Box<[AtomicU64]>,
}

/// An atomic set of pages.
#[derive(Debug)]
pub struct Bitmap {
    words: Box<[AtomicU64]>,
    shards: Box<[Shard]>,
    pages: u64,
}

fn zeroed(count: usize) -> Box<[AtomicU64]> {
    (0..count).map(|_| AtomicU64::new(0)).collect()
}

impl Bitmap {
    /// An empty set over pages 0 to `pages - 1`, summarized for `cpus` CPUs.
    pub fn new(pages: u64, cpus: usize) -> Self {
        let groups = to_index(pages.div_ceil(GROUP_PAGES));
        let group_words = groups.div_ceil(64);
        // Shards of one CPU do not share a line with another's: 16 words is the largest line pair in use.
        let padded = if cfg!(loom) {
            group_words
        } else {
            group_words.next_multiple_of(16)
        };
        let tops = if cfg!(loom) {
            group_words.div_ceil(64)
        } else {
            group_words.div_ceil(64).next_multiple_of(16)
        };
        Self {
            words: zeroed(if cfg!(loom) {
                to_index(pages.div_ceil(64))
            } else {
                groups * GROUP_WORDS
            }),
            shards: (0..cpus)
                .map(|_| Shard {
                    groups: zeroed(padded),
                    top: zeroed(tops),
                })
                .collect(),
            pages,
        }
    }

    /// Number of pages the set is over.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Adds `page`; returns whether a summary word was written as well, which happens once per group and epoch. `cpu`
    /// is the calling CPU's position. Pages and CPUs out of range are ignored.
    ///
    /// Orders: a leaf made writable before this call is writable for whoever takes the bit.
    #[inline]
    pub fn set(&self, page: u64, cpu: usize) -> bool {
        let Some(word) = self.words.get(to_index(page / WORD_PAGES)) else {
            return false;
        };
        arch::fetch_or(word, 1 << (page % WORD_PAGES));
        fence(Ordering::SeqCst);
        let group = to_index(page / GROUP_PAGES);
        let Some(shard) = self.shards.get(cpu) else {
            return false;
        };
        let Some(summary) = shard.groups.get(group / 64) else {
            return false;
        };
        if summary.load(Ordering::Relaxed) & (1 << (group % 64)) != 0 {
            return false;
        }
        shard.announce(group);
        true
    }

    /// Adds every page of the set.
    pub fn set_all(&self, cpu: usize) {
        for page in (0..self.pages).step_by(to_index(WORD_PAGES)) {
            self.set_word(page, self.valid_bits(page), cpu);
        }
    }

    /// Adds the pages `bits` of the word that begins at `first_page`, a multiple of 64: how bits are handed back.
    pub fn set_word(&self, first_page: u64, bits: u64, cpu: usize) {
        let Some(word) = self.words.get(to_index(first_page / WORD_PAGES)) else {
            return;
        };
        arch::fetch_or(word, bits & self.valid_bits(first_page));
        fence(Ordering::SeqCst);
        if let Some(shard) = self.shards.get(cpu) {
            shard.announce(to_index(first_page / GROUP_PAGES));
        }
    }

    /// Calls `visit(first_page, bits)` for every nonempty word of `[from, to)`, both multiples of 64 or the end. Takes
    /// nothing: a page that is added meanwhile may be seen or not.
    pub fn read(&self, from: u64, to: u64, mut visit: impl FnMut(u64, u64)) {
        self.for_each_group(from, to, |group| {
            for first_page in group_words(group, from, to) {
                let bits = self
                    .words
                    .get(to_index(first_page / WORD_PAGES))
                    .map_or(0, |w| w.load(Ordering::Acquire));
                if bits != 0 {
                    visit(first_page, bits);
                }
            }
        });
    }

    /// The first group at or after page `from` and before `to` that may have pages, as its first page.
    pub fn next_group(&self, from: u64, to: u64) -> Option<u64> {
        let mut found = None;
        self.scan_groups(from, to, |group| {
            found = Some(group * GROUP_PAGES);
            false
        });
        found
    }

    /// Takes the pages of `[from, to)` out of the set, within one group: `visit(first_page, bits)` for every nonempty
    /// word. `from` and `to` are multiples of 64 or the end.
    ///
    /// Orders: whoever added a taken page has its leaf visible to the taker (acquire).
    pub fn take_group(&self, from: u64, to: u64, mut visit: impl FnMut(u64, u64)) {
        let group = from / GROUP_PAGES;
        let whole =
            from.is_multiple_of(GROUP_PAGES) && to >= self.pages.min((group + 1) * GROUP_PAGES);
        if whole {
            self.retract(to_index(group));
        }
        for first_page in group_words(group, from, to) {
            let Some(word) = self.words.get(to_index(first_page / WORD_PAGES)) else {
                return;
            };
            if word.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let bits = arch::swap(word, 0);
            if bits != 0 {
                visit(first_page, bits);
            }
        }
    }

    /// Clears the summary bits of `group` in all shards, before its words are taken.
    fn retract(&self, group: usize) {
        for shard in &self.shards {
            let Some(summary) = shard.groups.get(group / 64) else {
                continue;
            };
            if summary.load(Ordering::Relaxed) & (1 << (group % 64)) == 0 {
                continue;
            }
            let left = arch::fetch_clear(summary, 1 << (group % 64)) & !(1 << (group % 64));
            if left == 0 {
                shard.retract_top(group / 64);
            }
        }
        fence(Ordering::SeqCst);
    }

    fn for_each_group(&self, from: u64, to: u64, mut visit: impl FnMut(u64)) {
        self.scan_groups(from, to, |group| {
            visit(group);
            true
        });
    }

    /// Visits in ascending order the groups of `[from, to)` that any shard names, until `visit` returns false.
    fn scan_groups(&self, from: u64, to: u64, mut visit: impl FnMut(u64) -> bool) {
        let to = to.min(self.pages);
        if from >= to {
            return;
        }
        let (first, last) = (from / GROUP_PAGES, (to - 1) / GROUP_PAGES);
        for top in (first / 4096)..=(last / 4096) {
            let words = places(top * 64, first / 64, last / 64);
            let mut named = self.union(|shard| shard.top.get(to_index(top))) & words;
            while named != 0 {
                let word = top * 64 + u64::from(named.trailing_zeros());
                named &= named - 1;
                let wanted = places(word * 64, first, last);
                let mut groups = self.union(|shard| shard.groups.get(to_index(word))) & wanted;
                while groups != 0 {
                    let group = word * 64 + u64::from(groups.trailing_zeros());
                    groups &= groups - 1;
                    if !visit(group) {
                        return;
                    }
                }
            }
        }
    }

    fn union<'a>(&'a self, pick: impl Fn(&'a Shard) -> Option<&'a AtomicU64>) -> u64 {
        self.shards
            .iter()
            .filter_map(pick)
            .fold(0, |bits, word| bits | word.load(Ordering::Acquire))
    }

    fn valid_bits(&self, first_page: u64) -> u64 {
        match self.pages.saturating_sub(first_page) {
            0 => 0,
            left @ 1..WORD_PAGES => (1 << left) - 1,
            _ => u64::MAX,
        }
    }
}

/// Which of the 64 places from `base` lie in `first..=last`, which has some of them.
fn places(base: u64, first: u64, last: u64) -> u64 {
    let below = first.saturating_sub(base).min(63);
    let above = 63_u64.saturating_sub(last.saturating_sub(base));
    u64::MAX << below & u64::MAX >> above
}

impl Shard {
    /// Sets the bit of `group`, then, if need be, the bit above it, in the order that the taker clears them.
    #[cold]
    fn announce(&self, group: usize) {
        let Some(summary) = self.groups.get(group / 64) else {
            return;
        };
        arch::fetch_or(summary, 1 << (group % 64));
        fence(Ordering::SeqCst);
        let word = group / 64;
        if let Some(top) = self.top.get(word / 64)
            && top.load(Ordering::Relaxed) & (1 << (word % 64)) == 0
        {
            arch::fetch_or(top, 1 << (word % 64));
        }
    }

    /// Clears the top bit of a groups word that was seen empty, and sets it again if it no longer is.
    fn retract_top(&self, word: usize) {
        let (Some(top), Some(groups)) = (self.top.get(word / 64), self.groups.get(word)) else {
            return;
        };
        arch::fetch_clear(top, 1 << (word % 64));
        fence(Ordering::SeqCst);
        if groups.load(Ordering::Relaxed) != 0 {
            arch::fetch_or(top, 1 << (word % 64));
        }
    }
}

/// First pages of the words of `group` that lie in `[from, to)`.
fn group_words(group: u64, from: u64, to: u64) -> impl Iterator<Item = u64> {
    let start = (group * GROUP_PAGES).max(from);
    let end = ((group + 1) * GROUP_PAGES).min(to);
    (start..end).step_by(to_index(WORD_PAGES))
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::vec::Vec;

    use super::{Bitmap, places};

    fn taken(bitmap: &Bitmap, from: u64, to: u64) -> Vec<u64> {
        let mut pages = Vec::new();
        let mut at = from;
        while let Some(group) = bitmap.next_group(at, to) {
            let (start, end) = (group.max(from), (group + 512).min(to));
            bitmap.take_group(start, end, |first, bits| {
                pages.extend(
                    (0..64)
                        .filter(|bit| bits & (1 << bit) != 0)
                        .map(|bit| first + bit),
                );
            });
            at = group + 512;
        }
        pages
    }

    #[test]
    fn only_what_is_asked_for_is_looked_at() {
        for (base, first, last, expected) in [
            (0, 0, 0, 1),
            (0, 3, 5, 0b11_1000),
            (64, 3, 1000, u64::MAX),
            (64, 127, 1000, 1 << 63),
            (64, 3, 64, 1),
            (64, 64, 127, u64::MAX),
        ] {
            assert_eq!(places(base, first, last), expected, "{base} {first} {last}");
        }
    }

    #[test]
    fn a_set_page_is_taken_exactly_once() {
        let bitmap = Bitmap::new(1 << 22, 3);
        for (page, cpu) in [
            (0, 0),
            (63, 1),
            (64, 2),
            (511, 0),
            (512, 1),
            (40_000, 2),
            ((1 << 22) - 1, 0),
        ] {
            bitmap.set(page, cpu);
        }
        assert_eq!(
            taken(&bitmap, 0, 1 << 22),
            [0, 63, 64, 511, 512, 40_000, (1 << 22) - 1]
        );
        assert!(taken(&bitmap, 0, 1 << 22).is_empty());
    }

    #[test]
    fn reading_takes_nothing() {
        let bitmap = Bitmap::new(1000, 1);
        bitmap.set(999, 0);
        for _ in 0..2 {
            let mut seen = Vec::new();
            bitmap.read(0, 1000, |first, bits| seen.push((first, bits)));
            assert_eq!(seen, [(960, 1 << 39)]);
        }
        assert_eq!(taken(&bitmap, 0, 1000), [999]);
    }

    #[test]
    fn taking_part_of_a_group_leaves_the_rest_findable() {
        let bitmap = Bitmap::new(1024, 2);
        bitmap.set(10, 0);
        bitmap.set(200, 1);
        assert_eq!(taken(&bitmap, 0, 64), [10]);
        assert_eq!(taken(&bitmap, 64, 1024), [200]);
    }

    #[test]
    fn a_summary_is_written_once_per_group() {
        let bitmap = Bitmap::new(1024, 1);
        assert!(bitmap.set(1, 0));
        assert!(!bitmap.set(2, 0));
        assert!(bitmap.set(600, 0));
        assert_eq!(taken(&bitmap, 0, 1024), [1, 2, 600]);
        assert!(bitmap.set(1, 0));
    }

    #[test]
    fn all_pages_means_no_page_past_the_end() {
        let bitmap = Bitmap::new(70, 1);
        bitmap.set_all(0);
        assert_eq!(taken(&bitmap, 0, 70).len(), 70);
        bitmap.set(5000, 0);
        assert!(taken(&bitmap, 0, 70).is_empty());
    }

    #[test]
    fn bits_handed_back_are_found_again() {
        let bitmap = Bitmap::new(128, 1);
        bitmap.set(65, 0);
        assert_eq!(taken(&bitmap, 0, 128), [65]);
        bitmap.set_word(64, 0b10, 0);
        assert_eq!(taken(&bitmap, 0, 128), [65]);
    }
}
