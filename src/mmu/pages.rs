//! A set of pages as a value: what `get` and `clear` report.

use alloc::vec::Vec;

/// Pages of one slot, in ascending order of their words. Its size is proportional to the pages in it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct PageSet {
    words: Vec<(u64, u64)>,
}

impl PageSet {
    /// Adds the pages `bits` of the word that begins at `first_page`, a multiple of 64 not below any added before.
    pub fn push(&mut self, first_page: u64, bits: u64) {
        if bits == 0 {
            return;
        }
        match self.words.last_mut() {
            Some((last, word)) if *last == first_page => *word |= bits,
            _ => self.words.push((first_page, bits)),
        }
    }

    /// Number of pages.
    pub fn len(&self) -> u64 {
        self.words
            .iter()
            .map(|(_, bits)| u64::from(bits.count_ones()))
            .sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// The nonempty words: first page and bits.
    pub fn words(&self) -> impl Iterator<Item = (u64, u64)> {
        self.words.iter().copied()
    }

    /// The pages, ascending.
    pub fn pages(&self) -> impl Iterator<Item = u64> {
        self.words().flat_map(|(first, bits)| {
            (0..64)
                .filter(move |bit| bits & (1 << bit) != 0)
                .map(move |bit| first + bit)
        })
    }

    /// Forgets all pages and keeps the memory.
    pub fn forget(&mut self) {
        self.words.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::PageSet;

    #[test]
    fn pages_come_out_in_order() {
        let mut set = PageSet::default();
        set.push(0, 0b101);
        set.push(64, 1 << 63);
        set.push(64, 1);
        set.push(128, 0);
        assert_eq!(set.pages().collect::<Vec<_>>(), [0, 2, 64, 127]);
        assert_eq!(set.len(), 4);
        set.forget();
        assert!(set.is_empty());
    }
}
