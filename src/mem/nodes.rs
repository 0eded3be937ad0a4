//! The free frames of each NUMA node, in buddies that join with no other node's.

use alloc::vec::Vec;
use core::ops::Range;

use buddy_system_allocator::FrameAllocator;

use super::{Extent, ram};
use crate::addr::{PAGE_BYTES, PAGE_SHIFT, Pa, to_usize};

/// Blocks of up to 2^32 pages.
const ORDERS: usize = 33;
/// NUMA nodes that are told apart.
pub const MOST_NODES: usize = 16;

/// Which RAM is whose node's: the first part that holds it counts, and what none holds is node 0's.
pub(super) type Parts = Vec<(Range<Pa>, usize)>;

/// The node that `pa` belongs to.
pub(super) fn node_of(parts: &[(Range<Pa>, usize)], pa: Pa) -> usize {
    let part = parts.iter().find(|(part, _)| part.contains(&pa));
    part.map_or(0, |&(_, node)| node.min(MOST_NODES - 1))
}

/// All nodes, `first` first.
pub(super) fn nodes_from(first: usize) -> impl Iterator<Item = usize> {
    let first = first.min(MOST_NODES - 1);
    (first..MOST_NODES).chain(0..first)
}

/// The buddies of all nodes.
pub(super) struct Nodes([FrameAllocator<ORDERS>; MOST_NODES]);

impl Nodes {
    pub(super) const fn new() -> Self {
        Self([const { FrameAllocator::new() }; MOST_NODES])
    }

    pub(super) fn insert(&mut self, range: Range<Pa>, parts: &[(Range<Pa>, usize)]) {
        for (piece, node) in ram::divide(&[range], parts) {
            let pages = to_usize(piece.start.page())..to_usize(piece.end.page());
            if let Some(buddies) = self.0.get_mut(node.unwrap_or(0).min(MOST_NODES - 1)) {
                buddies.insert(pages);
            }
        }
    }

    /// From `node` or, if that has no such piece, from the next that has one.
    pub(super) fn near(&mut self, node: usize, bytes: u64, align_bytes: u64) -> Option<Extent> {
        nodes_from(node).find_map(|it| self.of(it, bytes, align_bytes))
    }

    /// From `node` alone.
    pub(super) fn of(&mut self, node: usize, bytes: u64, align_bytes: u64) -> Option<Extent> {
        contiguous_from(self.0.get_mut(node)?, bytes, align_bytes)
    }

    /// Takes back what `node` gave. No extent is of two nodes.
    pub(super) fn give_back(&mut self, node: usize, pages: Range<usize>) {
        if let Some(buddies) = self.0.get_mut(node) {
            give_back(buddies, pages);
        }
    }
}

fn contiguous_from(
    frames: &mut FrameAllocator<ORDERS>,
    bytes: u64,
    align_bytes: u64,
) -> Option<Extent> {
    let pages = to_usize(bytes.div_ceil(PAGE_BYTES));
    let block = pages
        .checked_next_power_of_two()?
        .max(to_usize(align_bytes >> PAGE_SHIFT));
    let first = frames.alloc(block)?;
    give_back(frames, first + pages..first + block);
    Some(Extent {
        pa: Pa::new((first as u64) << PAGE_SHIFT),
        bytes: (pages as u64) << PAGE_SHIFT,
    })
}

/// Returns `pages` block by block, so that buddies join.
fn give_back(frames: &mut FrameAllocator<ORDERS>, pages: Range<usize>) {
    let mut at = pages.start;
    while at < pages.end {
        let order = at.trailing_zeros().min((pages.end - at).ilog2());
        frames.dealloc(at, 1 << order);
        at += 1 << order;
    }
}

#[cfg(test)]
mod tests {
    use super::{
        FrameAllocator, MOST_NODES, Nodes, ORDERS, Pa, Parts, Vec, contiguous_from, give_back,
        node_of,
    };

    #[test]
    fn what_is_not_needed_of_a_block_stays_free() {
        let mut frames = FrameAllocator::<ORDERS>::new();
        frames.insert(0x400..0x800);
        let extent = contiguous_from(&mut frames, 5 * 4096 - 1, 4096).unwrap();
        assert_eq!(extent.bytes, 5 * 4096);
        let rest = (0..)
            .map_while(|_| contiguous_from(&mut frames, 4096, 4096))
            .count();
        assert_eq!(rest, 0x400 - 5);
    }

    #[test]
    fn alignment_is_kept_and_buddies_join_again() {
        let mut frames = FrameAllocator::<ORDERS>::new();
        frames.insert(0x401..0x1000);
        let extent = contiguous_from(&mut frames, 4096, 2 << 20).unwrap();
        assert!(extent.pa.is_aligned(2 << 20));
        let first = usize::try_from(extent.pa.page()).unwrap();
        give_back(&mut frames, first..first + 1);
        assert!(contiguous_from(&mut frames, 8 << 20, 8 << 20).is_some());
        assert!(contiguous_from(&mut frames, 8 << 20, 8 << 20).is_none());
    }

    #[test]
    fn a_node_gives_until_it_is_empty_and_then_the_next_does() {
        let range = |start, end| Pa::new(start)..Pa::new(end);
        let last = MOST_NODES - 1;
        // The middle is nobody's, hence node 0's; the last two parts overlap.
        let parts = Parts::from([
            (range(0x10_0000, 0x10_4000), 3),
            (range(0x10_6000, 0x10_8000), usize::MAX),
            (range(0x10_6000, 0x10_a000), 1),
        ]);
        let mut nodes = Nodes::new();
        nodes.insert(range(0x10_0000, 0x10_9000), &parts);
        let pages = || nodes.near(3, 4096, 4096).map(|it| it.pa);
        let taken: Vec<Pa> = core::iter::from_fn(pages).collect();
        let order: Vec<_> = taken.iter().map(|&it| node_of(&parts, it)).collect();
        assert_eq!(order, [3, 3, 3, 3, last, last, 0, 0, 1]);
        let mut pages: Vec<_> = taken.iter().map(|it| it.page()).collect();
        pages.sort();
        assert_eq!(pages, (0x100..0x109).collect::<Vec<_>>());
    }

    #[test]
    fn a_piece_that_only_another_node_has_comes_from_there_and_goes_back() {
        let range = |start, end| Pa::new(start)..Pa::new(end);
        let parts = Parts::from([(range(0x40_0000, 0x80_0000), 1)]);
        let mut nodes = Nodes::new();
        // Neighbours of different nodes are no buddies.
        nodes.insert(range(0x20_0000, 0x60_0000), &parts);
        assert_eq!(nodes.near(0, 4 << 20, 4096), None);
        let extent = nodes.near(0, 1 << 20, 4096).unwrap();
        assert_eq!(node_of(&parts, extent.pa), 0);
        let extent = nodes.near(0, 2 << 20, 4096).unwrap();
        assert_eq!(node_of(&parts, extent.pa), 1);
        assert_eq!(nodes.of(1, 4096, 4096), None);
        nodes.give_back(1, 0x400..0x600);
        assert_eq!(nodes.of(0, 2 << 20, 4096), None);
        assert_eq!(nodes.near(usize::MAX, 2 << 20, 4096), Some(extent));
    }
}
