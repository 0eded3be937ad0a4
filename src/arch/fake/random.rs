//! A small generator of repeatable choices (SplitMix64), for the machine's and the tests'.

/// A source of choices that a seed repeats.
#[derive(Clone, Copy, Debug)]
pub struct Random(u64);

impl Random {
    /// The source that `seed` names.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub const fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    /// A number below `end`, which is not zero.
    pub const fn below(&mut self, end: usize) -> usize {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "the remainder is below `end`"
        )]
        return (self.bits() % end as u64) as usize;
    }

    /// True once in `n` times.
    pub const fn once_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}
