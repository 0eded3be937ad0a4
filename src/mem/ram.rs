//! Arithmetic on ranges of memory.

use alloc::vec::Vec;
use core::ops::Range;

use crate::addr::{PAGE_BYTES, Pa};

/// The whole pages inside `bytes` bytes from `start`.
pub fn whole_pages(start: Pa, bytes: u64) -> Option<Range<Pa>> {
    let end = start.checked_add(bytes)?.align_down(PAGE_BYTES);
    let start = start.align_up(PAGE_BYTES)?;
    (start < end).then_some(start..end)
}

/// The pages that `range` touches.
pub fn covering_pages(range: Range<Pa>) -> Option<Range<Pa>> {
    let (start, end) = (
        range.start.align_down(PAGE_BYTES),
        range.end.align_up(PAGE_BYTES)?,
    );
    (start < end).then_some(start..end)
}

/// Sorts `ranges` and joins those that touch or overlap.
pub fn sort(ranges: &mut Vec<Range<Pa>>) {
    ranges.sort_by_key(|it| it.start);
    ranges.dedup_by(|next, kept| {
        let joins = next.start <= kept.end;
        if joins {
            kept.end = kept.end.max(next.end);
        }
        joins
    });
}

/// Bytes in all of `ranges`, which do not overlap.
pub fn bytes(ranges: &[Range<Pa>]) -> u64 {
    ranges
        .iter()
        .filter_map(|it| it.end.offset_from(it.start))
        .sum()
}

/// `ranges` without `hole`.
pub fn subtract(ranges: &[Range<Pa>], hole: &Range<Pa>) -> Vec<Range<Pa>> {
    ranges
        .iter()
        .flat_map(|it| {
            [
                it.start..it.end.min(hole.start),
                it.start.max(hole.end)..it.end,
            ]
        })
        .filter(|it| it.start < it.end)
        .collect()
}

/// `ranges` in pieces, each with what the first of `parts` that holds it says of it; sorted as `ranges` are.
pub fn divide<T: Copy>(
    ranges: &[Range<Pa>],
    parts: &[(Range<Pa>, T)],
) -> Vec<(Range<Pa>, Option<T>)> {
    let mut pieces = Vec::new();
    for range in ranges {
        let mut rest = Vec::from([range.clone()]);
        for (part, said) in parts {
            let inside = rest
                .iter()
                .map(|it| it.start.max(part.start)..it.end.min(part.end));
            pieces.extend(inside.map(|it| (it, Some(*said))));
            rest = subtract(&rest, part);
        }
        pieces.extend(rest.into_iter().map(|it| (it, None)));
    }
    pieces.retain(|(it, _)| it.start < it.end);
    pieces.sort_by_key(|(it, _)| it.start);
    pieces
}

/// Whether two ranges share a byte.
pub fn overlap(a: &Range<Pa>, b: &Range<Pa>) -> bool {
    a.start.max(b.start) < a.end.min(b.end)
}

#[cfg(test)]
mod tests {
    use super::{Pa, Range, bytes, covering_pages, divide, overlap, sort, subtract, whole_pages};

    fn range(start: u64, end: u64) -> Range<Pa> {
        Pa::new(start)..Pa::new(end)
    }

    #[test]
    fn a_hole_leaves_what_is_around_it() {
        let ram = [range(0x1000, 0x9000)];
        assert_eq!(
            subtract(&ram, &range(0x3000, 0x4000)),
            [range(0x1000, 0x3000), range(0x4000, 0x9000)]
        );
        assert_eq!(subtract(&ram, &range(0, 0x2000)), [range(0x2000, 0x9000)]);
        assert_eq!(subtract(&ram, &range(0, 0x9000)), []);
        assert_eq!(subtract(&ram, &range(0x9000, 0xa000)), ram);
        assert_eq!(subtract(&ram, &range(0x0, 0x1000)), ram);
    }

    #[test]
    fn ram_is_divided_by_the_first_part_that_holds_it() {
        let ram = [range(0x1000, 0x5000), range(0x8000, 0x9000)];
        let parts = [
            (range(0x2000, 0x3000), 'a'),
            (range(0x2000, 0x4000), 'b'),
            (range(0x4800, 0x8800), 'c'),
            (range(0, 0), 'd'),
        ];
        let pieces = [
            (range(0x1000, 0x2000), None),
            (range(0x2000, 0x3000), Some('a')),
            (range(0x3000, 0x4000), Some('b')),
            (range(0x4000, 0x4800), None),
            (range(0x4800, 0x5000), Some('c')),
            (range(0x8000, 0x8800), Some('c')),
            (range(0x8800, 0x9000), None),
        ];
        assert_eq!(divide(&ram, &parts), pieces);
        assert_eq!(divide::<()>(&ram, &[]), ram.map(|it| (it, None)));
    }

    #[test]
    fn ram_is_rounded_inwards_and_reservations_outwards() {
        assert_eq!(whole_pages(Pa::new(1), 0x2fff), Some(range(0x1000, 0x3000)));
        assert_eq!(whole_pages(Pa::new(1), 0x1000), None);
        assert_eq!(whole_pages(Pa::new(u64::MAX), 2), None);
        assert_eq!(
            covering_pages(range(0x1fff, 0x2001)),
            Some(range(0x1000, 0x3000))
        );
        assert_eq!(covering_pages(range(0, u64::MAX)), None);
    }

    #[test]
    fn sorting_joins_neighbours() {
        let mut ranges = std::vec![
            range(0x5000, 0x6000),
            range(0x1000, 0x2000),
            range(0x2000, 0x3000),
            range(0x1000, 0x1800)
        ];
        sort(&mut ranges);
        assert_eq!(ranges, [range(0x1000, 0x3000), range(0x5000, 0x6000)]);
        assert_eq!(bytes(&ranges), 0x3000);
        assert!(overlap(&ranges[0], &range(0x2fff, 0x4000)));
        assert!(!overlap(&ranges[0], &range(0x3000, 0x4000)));
    }
}
