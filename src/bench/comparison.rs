//! How a reported set of pages compares with what the guest says it wrote.

use alloc::vec;

use crate::addr::to_index;
use crate::mmu::PageSet;

/// How a reported set compares with what the guest says it wrote.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Comparison {
    /// Pages the guest wrote.
    pub(super) written: u64,
    /// Pages reported.
    pub(super) reported: u64,
    /// Pages written and not reported.
    pub(super) lost: u64,
    /// Pages reported and not written.
    pub(super) extra: u64,
}

impl Comparison {
    /// Adds what another comparison found.
    pub(super) fn add(&mut self, found: Self) {
        self.written += found.written;
        self.reported += found.reported;
        self.lost += found.lost;
        self.extra += found.extra;
    }

    /// Compares the pages of `reported` with the bits of `written`.
    pub(super) fn of(written: &[u64], reported: &PageSet) -> Self {
        let mut words = vec![0; written.len()];
        for (first, bits) in reported.words() {
            if let Some(word) = words.get_mut(to_index(first / 64)) {
                *word |= bits;
            }
        }
        let mut sums = Self::default();
        for (written, reported) in written.iter().zip(words) {
            sums.written += u64::from(written.count_ones());
            sums.reported += u64::from(reported.count_ones());
            sums.lost += u64::from((written & !reported).count_ones());
            sums.extra += u64::from((reported & !written).count_ones());
        }
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::Comparison;
    use crate::mmu::PageSet;

    #[test]
    fn lost_and_extra_pages_are_told_apart() {
        let mut reported = PageSet::default();
        reported.push(0, 0b110);
        reported.push(64, 1);
        let expected = Comparison {
            written: 2,
            reported: 3,
            lost: 1,
            extra: 2,
        };
        assert_eq!(Comparison::of(&[0b011, 0], &reported), expected);
    }
}
