//! Page frames: a buddy allocator over all usable RAM of each NUMA node, and a stash of single frames for each CPU.
//!
//! Those who fault memory in want tables, a frame at a time, all at once. The buddies' lock and lists would be what they wait for,
//! so a CPU takes frames from its own stash and fills it by a whole block: when it is empty, and before the CPU sleeps
//! ([`refill`]). What is released one by one goes there, too. A stash holds `STASHED` frames at most, and whoever finds the
//! buddies without what it wants takes all stashes back first, and looks once more.
//!
//! Frames are of the node of the CPU that asks, or of a node that is named, as long as that has any, then of others. A stash takes
//! no frame back that is another node's.
//!
//! Nobody holds a stash's lock together with the buddies' or another stash's.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ops::Range;
use core::sync::atomic::{AtomicUsize, Ordering};

use spin::{Mutex, Once};

use super::TableFrames;
use super::nodes::{Nodes, Parts, node_of, nodes_from};
use crate::addr::{PAGE_BYTES, PAGE_SHIFT, Pa, to_usize};
use crate::sync::padded::Padded;
use crate::sync::percpu;

/// Frames of a stash, at most.
const STASHED: usize = 32;
/// Frames that it is filled with at a time: one block.
const BLOCK: usize = 16;
/// So few are too few to sleep on.
const FEW: usize = 8;

const _: () = assert!(BLOCK.is_power_of_two() && FEW + BLOCK <= STASHED);

static FRAMES: Frames = Frames::new();

/// A piece of contiguous memory, made of whole pages.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Extent {
    /// Its first byte.
    pub pa: Pa,
    /// Its bytes.
    pub bytes: u64,
}

/// Frames that nobody owns: those of the buddies, and those of the stashes.
struct Frames {
    buddies: Padded<Mutex<Nodes>>,
    /// Which RAM is whose node's, where there are several.
    parts: Once<Parts>,
    /// The buddies' pages; behind the truth for a moment.
    free: Padded<AtomicUsize>,
    stashes: Once<Box<[Stash]>>,
}

/// The frames of one CPU. Others only take them all. The vector never grows beyond what it has room for.
#[derive(Debug)]
#[repr(align(128))]
struct Stash(Mutex<Vec<Pa>>);

/// Says which RAM is whose node's: the first part that holds it counts, and what none holds is node 0's. Called once, by boot,
/// before any is added, and only where something is said of nodes.
pub fn set_nodes(parts: Parts) {
    FRAMES.parts.call_once(|| parts);
}

/// The node that `pa` belongs to.
pub fn node(pa: Pa) -> usize {
    node_of(FRAMES.parts(), pa)
}

/// Whether some RAM is said to be node `node`'s.
pub fn has_node(node: usize) -> bool {
    FRAMES.parts().iter().any(|&(_, it)| it == node)
}

/// Adds RAM that nobody owns.
///
/// # Safety
///
/// `range` is RAM, whole pages, mapped at its own address, referenced by nobody and never added before.
pub unsafe fn add(range: Range<Pa>) {
    FRAMES.add(range);
}

/// Gives each of `cpus` CPUs a stash, once CPUs have their numbers. Called once, by boot.
pub fn prepare(cpus: usize) {
    FRAMES.prepare(cpus);
}

/// Fills the stash of this CPU if it holds few frames; for a CPU that has nothing else to do.
pub fn refill() {
    FRAMES.refill(this_cpu());
}

/// Pages that nobody owns.
pub fn free_pages() -> usize {
    FRAMES.free_pages()
}

/// One page. Its content is what its last owner left.
pub fn allocate() -> Option<Pa> {
    FRAMES.page(this_cpu())
}

/// One page, of `node` if that has one.
pub fn allocate_near(node: usize) -> Option<Pa> {
    let taken = FRAMES.buddies.lock().near(node, PAGE_BYTES, PAGE_BYTES);
    Some(FRAMES.counted(taken)?.pa)
}

/// `bytes` bytes, rounded up to pages, at a multiple of `align_bytes`, a power of two.
pub fn contiguous(bytes: u64, align_bytes: u64) -> Option<Extent> {
    FRAMES.contiguous(bytes, align_bytes)
}

/// As [`contiguous`], or `None` when another CPU (or this one) is allocating. Stashes stay as they are.
pub(super) fn contiguous_at_once(bytes: u64, align_bytes: u64) -> Option<Extent> {
    let mut buddies = FRAMES.buddies.try_lock()?;
    let taken = buddies.near(FRAMES.node_here(), bytes, align_bytes);
    drop(buddies);
    FRAMES.counted(taken)
}

/// `bytes` bytes in as few pieces as there are, each at and of a multiple of `align_bytes`, a power of two; what is
/// left of `bytes` after those is rounded up. They are of `node` as far as it has such pieces, however small.
pub fn scattered(bytes: u64, align_bytes: u64, node: usize) -> Option<Vec<Extent>> {
    FRAMES.scattered(bytes, align_bytes, node)
}

/// Takes memory back.
pub fn release(extent: Extent) {
    FRAMES.release(this_cpu(), extent);
}

/// The stash that is this CPU's, if there are any.
fn this_cpu() -> Option<usize> {
    FRAMES.stashes.get().map(|_| percpu::index())
}

impl Frames {
    const fn new() -> Self {
        Self {
            buddies: Padded::new(Mutex::new(Nodes::new())),
            parts: Once::new(),
            free: Padded::new(AtomicUsize::new(0)),
            stashes: Once::new(),
        }
    }

    fn add(&self, range: Range<Pa>) {
        let pages = to_usize(range.start.page())..to_usize(range.end.page());
        self.free.fetch_add(pages.len(), Ordering::Relaxed);
        self.buddies.lock().insert(range, self.parts());
    }

    fn parts(&self) -> &[(Range<Pa>, usize)] {
        self.parts.get().map_or(&[], |parts| parts)
    }

    /// The node of the CPU this runs on. Where nothing is said of nodes a CPU need not have its block yet.
    fn node_here(&self) -> usize {
        match self.parts() {
            [] => 0,
            _ => percpu::node(),
        }
    }

    fn prepare(&self, cpus: usize) {
        let empty = |_| Stash(Mutex::new(Vec::with_capacity(STASHED)));
        self.stashes.call_once(|| (0..cpus).map(empty).collect());
    }

    fn stashes(&self) -> &[Stash] {
        self.stashes.get().map_or(&[], |stashes| stashes)
    }

    fn stash(&self, cpu: Option<usize>) -> Option<&Stash> {
        self.stashes().get(cpu?)
    }

    fn free_pages(&self) -> usize {
        let stashed = self.stashes().iter().map(|stash| stash.0.lock().len());
        self.free.load(Ordering::Relaxed) + stashed.sum::<usize>()
    }

    fn page(&self, cpu: Option<usize>) -> Option<Pa> {
        if let Some(stash) = self.stash(cpu) {
            if let Some(page) = stash.0.lock().pop() {
                return Some(page);
            }
            if let Some(page) = self.fill(stash) {
                return Some(page);
            }
        }
        Some(self.contiguous(PAGE_BYTES, PAGE_BYTES)?.pa)
    }

    /// Adds a block to a stash, but for its first frame, which the caller gets.
    fn fill(&self, stash: &Stash) -> Option<Pa> {
        let bytes = (BLOCK as u64) << PAGE_SHIFT;
        let block = self.contiguous_from_buddies(bytes, bytes)?;
        let (first, others) = (block.pa, 1..BLOCK as u64);
        let mut frames = stash.0.lock();
        let room = (STASHED - frames.len()) as u64;
        let kept = others.start..others.end.min(1 + room);
        let page = |number: u64| Pa::new(first.raw() + number * PAGE_BYTES);
        // From the end, so that they leave in order.
        frames.extend(kept.clone().rev().map(page));
        drop(frames);
        if kept.end < others.end {
            self.give_back(Extent {
                pa: page(kept.end),
                bytes: (others.end - kept.end) << PAGE_SHIFT,
            });
        }
        Some(first)
    }

    fn refill(&self, cpu: Option<usize>) {
        let few = |stash: &&Stash| stash.0.lock().len() < FEW;
        if let Some(stash) = self.stash(cpu).filter(few)
            && let Some(page) = self.fill(stash)
        {
            self.release(
                cpu,
                Extent {
                    pa: page,
                    bytes: PAGE_BYTES,
                },
            );
        }
    }

    fn contiguous(&self, bytes: u64, align_bytes: u64) -> Option<Extent> {
        let mut taken = self.contiguous_from_buddies(bytes, align_bytes);
        if taken.is_none() && self.empty_stashes() {
            taken = self.contiguous_from_buddies(bytes, align_bytes);
        }
        taken
    }

    fn contiguous_from_buddies(&self, bytes: u64, align_bytes: u64) -> Option<Extent> {
        let node = self.node_here();
        let taken = self.buddies.lock().near(node, bytes, align_bytes);
        self.counted(taken)
    }

    fn counted(&self, taken: Option<Extent>) -> Option<Extent> {
        if let Some(extent) = &taken {
            let pages = to_usize(extent.bytes >> PAGE_SHIFT);
            self.free.fetch_sub(pages, Ordering::Relaxed);
        }
        taken
    }

    fn scattered(&self, bytes: u64, align_bytes: u64, node: usize) -> Option<Vec<Extent>> {
        let mut extents = Vec::new();
        let mut left = bytes.next_multiple_of(align_bytes);
        for node in nodes_from(node) {
            left = self.pieces(node, left, align_bytes, &mut extents);
        }
        if left > 0 && self.empty_stashes() {
            for node in nodes_from(node) {
                left = self.pieces(node, left, align_bytes, &mut extents);
            }
        }
        if left > 0 {
            extents.into_iter().for_each(|it| self.give_back(it));
            return None;
        }
        Some(extents)
    }

    /// Up to `left` bytes of `node`'s alone, in pieces that get smaller; how many are missing then. Stashes stay as they are.
    fn pieces(
        &self,
        node: usize,
        mut left: u64,
        align_bytes: u64,
        extents: &mut Vec<Extent>,
    ) -> u64 {
        let mut piece = left;
        while left > 0 {
            let taken = self.buddies.lock().of(node, piece.min(left), align_bytes);
            match self.counted(taken) {
                Some(extent) => {
                    left -= extent.bytes;
                    extents.push(extent);
                }
                None if piece > align_bytes => {
                    piece = (piece / 2).next_power_of_two().max(align_bytes);
                }
                None => return left,
            }
        }
        left
    }

    fn release(&self, cpu: Option<usize>, extent: Extent) {
        let near = || node_of(self.parts(), extent.pa) == self.node_here();
        let stash = self.stash(cpu);
        let stash = stash.filter(|_| extent.bytes == PAGE_BYTES && near());
        let kept = stash.is_some_and(|stash| {
            let mut frames = stash.0.lock();
            let room = frames.len() < STASHED;
            if room {
                frames.push(extent.pa);
            }
            room
        });
        if !kept {
            self.give_back(extent);
        }
    }

    fn give_back(&self, extent: Extent) {
        let first = to_usize(extent.pa.page());
        let pages = first..first + to_usize(extent.bytes >> PAGE_SHIFT);
        self.free.fetch_add(pages.len(), Ordering::Relaxed);
        let node = node_of(self.parts(), extent.pa);
        self.buddies.lock().give_back(node, pages);
    }

    /// Takes all stashes back; whether there was anything in them.
    fn empty_stashes(&self) -> bool {
        let mut found = false;
        for stash in self.stashes() {
            let mut pages = [Pa::new(0); STASHED];
            let mut count = 0;
            for (place, page) in pages.iter_mut().zip(stash.0.lock().drain(..)) {
                *place = page;
                count += 1;
            }
            found |= count > 0;
            for pa in pages.into_iter().take(count) {
                self.give_back(Extent {
                    pa,
                    bytes: PAGE_BYTES,
                });
            }
        }
        found
    }
}

/// All of RAM as the MMU's source of tables.
#[derive(Clone, Copy, Debug)]
pub struct System;

impl TableFrames for System {
    fn allocate(&self, pages: usize) -> Option<Pa> {
        let bytes = (pages as u64) << PAGE_SHIFT;
        match pages {
            1 => allocate(),
            _ => Some(contiguous(bytes, bytes)?.pa),
        }
    }

    fn release(&self, frames: Pa, pages: usize) {
        release(Extent {
            pa: frames,
            bytes: (pages as u64) << PAGE_SHIFT,
        });
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use super::{BLOCK, Extent, Frames, PAGE_BYTES, Pa, STASHED};

    const CPUS: usize = 4;

    /// All frames of `pages`, with a stash for each of some CPUs.
    fn frames(pages: u64) -> Frames {
        let frames = Frames::new();
        frames.prepare(CPUS);
        frames.add(Pa::new(0x40_0000)..Pa::new(0x40_0000 + pages * PAGE_BYTES));
        frames
    }

    /// As many single frames as a CPU gets.
    fn all(frames: &Frames, cpu: usize) -> Vec<Pa> {
        core::iter::from_fn(|| frames.page(Some(cpu))).collect()
    }

    fn one(pa: Pa) -> Extent {
        let bytes = PAGE_BYTES;
        Extent { pa, bytes }
    }

    #[test]
    fn good_one_cpu_gets_what_the_stashes_of_others_hold() {
        let frames = frames(256);
        for cpu in 0..CPUS {
            frames.refill(Some(cpu));
            let page = frames.page(Some(cpu)).expect("there is enough");
            frames.release(Some(cpu), one(page));
        }
        assert_eq!(frames.free_pages(), 256);
        assert!(
            frames
                .stashes()
                .iter()
                .all(|stash| stash.0.lock().len() == BLOCK)
        );
        let mut found = all(&frames, 0);
        found.sort_unstable_by_key(|pa| pa.raw());
        found.dedup();
        assert_eq!(found.len(), 256);
        assert_eq!(frames.free_pages(), 0);
        assert_eq!(frames.page(None), None);
    }

    #[test]
    fn good_what_is_whole_is_found_though_stashes_hold_parts_of_it() {
        let frames = frames(64);
        let taken = all(&frames, 1);
        // Two of each four, so that no stash has a whole block.
        for (number, pa) in taken.iter().enumerate() {
            frames.release(Some(number % CPUS), one(*pa));
        }
        assert_eq!(frames.free_pages(), 64);
        let bytes = 64 * PAGE_BYTES;
        assert_eq!(
            frames.contiguous(bytes, PAGE_BYTES).map(|it| it.bytes),
            Some(bytes)
        );
        assert_eq!((frames.free_pages(), frames.page(Some(2))), (0, None));
    }

    #[test]
    fn a_stash_is_filled_by_one_block_and_holds_no_more_than_it_may() {
        let frames = frames(256);
        let first = frames.page(Some(0)).expect("there is enough");
        assert_eq!(frames.stashes()[0].0.lock().len(), BLOCK - 1);
        frames.refill(Some(0));
        assert_eq!(frames.stashes()[0].0.lock().len(), BLOCK - 1, "not few");
        let mut mine: Vec<Pa> = (0..100).map_while(|_| frames.page(Some(0))).collect();
        mine.push(first);
        mine.into_iter()
            .for_each(|pa| frames.release(Some(0), one(pa)));
        assert_eq!(frames.stashes()[0].0.lock().len(), STASHED);
        assert_eq!(frames.free_pages(), 256);
        // A block does not fit any more.
        let page = frames.fill(&frames.stashes()[0]).expect("there is enough");
        assert_eq!(frames.stashes()[0].0.lock().len(), STASHED);
        frames.release(Some(0), one(page));
        assert_eq!(frames.free_pages(), 256);
    }

    #[test]
    fn the_last_frames_are_had_one_by_one_and_pieces_by_pieces() {
        let frames = frames(BLOCK as u64 - 1);
        assert_eq!(all(&frames, 3).len(), BLOCK - 1);
        let frames = self::frames(40);
        frames.refill(Some(0));
        frames.refill(Some(1));
        let pieces = frames
            .scattered(40 * PAGE_BYTES, PAGE_BYTES, 0)
            .expect("it is there");
        assert_eq!(
            pieces.iter().map(|it| it.bytes).sum::<u64>(),
            40 * PAGE_BYTES
        );
        assert!(frames.scattered(PAGE_BYTES, PAGE_BYTES, 0).is_none());
        pieces
            .into_iter()
            .for_each(|it| frames.release(Some(0), it));
        assert!(frames.scattered(41 * PAGE_BYTES, PAGE_BYTES, 0).is_none());
        assert_eq!(frames.free_pages(), 40);
    }

    #[test]
    fn a_guest_gets_memory_of_its_node_first_and_stashes_keep_their_own() {
        let range = |first, last| {
            let page = |number: u64| Pa::new(0x40_0000 + number * PAGE_BYTES);
            page(first)..page(last)
        };
        let frames = Frames::new();
        frames.prepare(CPUS);
        // Node 2 has room in small pieces only.
        let parts = [range(0, 8), range(16, 24), range(32, 40)].map(|it| (it, 2));
        frames.parts.call_once(|| parts.to_vec());
        frames.add(range(0, 64));
        let pieces = frames
            .scattered(30 * PAGE_BYTES, PAGE_BYTES, 2)
            .expect("it is there");
        let of = |node| {
            let here = pieces
                .iter()
                .filter(|it| super::node_of(frames.parts(), it.pa) == node);
            here.map(|it| it.bytes / PAGE_BYTES).sum::<u64>()
        };
        assert_eq!((of(2), of(0)), (24, 6));
        assert_eq!(frames.scattered(35 * PAGE_BYTES, PAGE_BYTES, 0), None);
        assert_eq!(frames.free_pages(), 34);
        // This CPU is of node 0.
        for (pages, kept) in [(range(0, 1), 0), (range(8, 9), 1)] {
            frames.release(Some(1), one(pages.start));
            assert_eq!(frames.stashes()[1].0.lock().len(), kept);
        }
    }

    #[test]
    fn cpus_that_allocate_and_release_at_once_lose_nothing() {
        let frames = frames(128);
        std::thread::scope(|scope| {
            for cpu in 0..CPUS {
                let frames = &frames;
                scope.spawn(move || {
                    for round in 0..200 {
                        let some: Vec<Pa> = (0..20 + round % 30)
                            .map_while(|_| frames.page(Some(cpu)))
                            .collect();
                        frames.refill(Some(cpu));
                        some.into_iter()
                            .for_each(|pa| frames.release(Some(cpu), one(pa)));
                    }
                });
            }
        });
        assert_eq!(frames.free_pages(), 128);
        assert_eq!(all(&frames, 0).len(), 128);
    }
}
