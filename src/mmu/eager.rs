//! Splitting blocks before the guest writes to them: when logging is enabled, as logs are cleared, or on request.
//!
//! In chunks with pauses, each chunk in batches. A batch is prepared off-line (frames reserved outside locks and sections,
//! tables filled outside the lock) and put in place under the shared lock:
//!
//! ```text
//!   level 0   break all ── invalidate each, then one VMALLE1IS ── make all
//!   level 2   one compare-and-swap each ── (one invalidation at the end of the chunk)
//! ```
//!
//! A 1 GiB block is replaced by a whole subtree in one store if everything in it is wanted and the frames are there. When
//! frames run out the rest stays whole, is reported, and is split by faults. What stale entries can do meanwhile is in
//! `split`.

use crate::addr::{Ipa, to_index};
use crate::arch;
use crate::mmu::bbm::{Broken, MOST_BATCH, Together};
use crate::mmu::descriptor::Descriptor;
use crate::mmu::error::Error;
use crate::mmu::geometry::{ENTRIES, Level};
use crate::mmu::pool::{SpareTable, Spares};
use crate::mmu::slot::{Context, SlotId};
use crate::mmu::splitting::Bbm;
use crate::mmu::stage2::Stage2;
use crate::mmu::table::Slot;
use crate::mmu::tlb::Owed;
use crate::mmu::walk::Position;
use crate::sync::percpu;
use crate::sync::quiescence::{Active, CpuId};
use crate::trace::Event;

/// What an eager split did.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Split {
    /// Blocks replaced by tables; a 1 GiB block and what is below it count once if they were replaced in one store.
    pub blocks: u64,
    /// Blocks left whole for want of frames: faults will split them.
    pub left: u64,
}

impl core::ops::AddAssign for Split {
    fn add_assign(&mut self, other: Self) {
        self.blocks += other.blocks;
        self.left += other.left;
    }
}

/// Which blocks of one chunk are to be split.
pub(crate) struct Chosen<'f> {
    /// The chunk's end.
    pub(crate) to: Ipa,
    /// Everything is, so that a 1 GiB block may be replaced by a whole subtree.
    pub(crate) whole: bool,
    /// The first address at or after the given one that belongs to one of them; anything past the end if none does.
    pub(crate) next: &'f dyn Fn(Ipa) -> Ipa,
}

/// What is carried from batch to batch of a chunk.
struct Work<'f> {
    spares: Spares<'f>,
    /// Old entries of what was replaced in one step.
    stale: Owed,
    done: Split,
}

/// A block and the table that is to replace it.
struct Prepared<'t> {
    slot: &'t Slot,
    found: Descriptor,
    ipa: Ipa,
    level: Level,
    table: SpareTable,
}

/// What comes next in a range.
enum Next<'t> {
    Block(Ipa, Position<'t>),
    /// A structural change is going on here.
    Held(Ipa),
    Nothing,
}

/// Tables below a 1 GiB block, its own included.
const SUBTREE_TABLES: usize = ENTRIES + 1;

impl Stage2 {
    /// Splits every block that pages `[from, to)` of the slot are part of, all the way down, whether or not the slot is
    /// logged. Permissions and what is recorded stay as they are.
    ///
    /// Rounding: out to the blocks; `from` and `to` are multiples of 64 pages, or `to` is the slot's end. Races: faults,
    /// clears, splits and collapses; a block that another CPU is replacing is waited for, outside the lock. TLB: nothing owed
    /// on return. Cost: per block one table filled and one descriptor (two at level 0); invalidations per batch at level 0,
    /// per chunk at level 2.
    ///
    /// # Errors
    ///
    /// [`Error::NoSlot`], [`Error::BadRange`]; nothing is split then.
    pub fn split(&self, cpu: CpuId, id: SlotId, from: u64, to: u64) -> Result<Split, Error> {
        let _operation = self.begin_operation();
        let slot = self.admin.lock().slot(id)?.slot.clone();
        slot.check_range(from, to)?;
        Ok(self.split_span(cpu, slot.ipa_of(from), slot.ipa_of(to)))
    }

    /// Splits the blocks of `[from, to)`, chunk by chunk.
    pub(crate) fn split_span(&self, cpu: CpuId, from: Ipa, to: Ipa) -> Split {
        let mut done = Split::default();
        let bytes = self.splitting.chunk_bytes;
        self.by_chunk(bytes, from.raw(), to.raw(), |from, to| {
            let all = Chosen {
                to: Ipa::new(to),
                whole: bytes == Level::L1.span_bytes(),
                next: &|at| at,
            };
            done += self.split_chunk(cpu, Ipa::new(from), &all);
        });
        done
    }

    /// Splits the blocks that `chosen` names, from `from` on.
    pub(crate) fn split_chunk(&self, cpu: CpuId, from: Ipa, chosen: &Chosen<'_>) -> Split {
        let mut work = Work {
            spares: Spares::new(&*self.services.frames),
            stale: Owed::Nothing,
            done: Split::default(),
        };
        let mut at = (chosen.next)(from);
        while at < chosen.to {
            work.spares.reserve(self.tables_wanted(cpu, at, chosen));
            match self.split_batch(cpu, at, chosen, &mut work) {
                Some(next) => at = (chosen.next)(next),
                None => arch::yield_now(),
            }
        }
        self.invalidate(cpu, &work.stale);
        work.done
    }

    /// Calls `work` with each aligned chunk of `size` of `[from, to)`, and pauses in between as the VM was told to.
    pub(crate) fn by_chunk(&self, size: u64, from: u64, to: u64, mut work: impl FnMut(u64, u64)) {
        let mut at = from;
        while at < to {
            let end = (at / size).saturating_add(1).saturating_mul(size).min(to);
            work(at, end);
            at = end;
            if at < to && self.splitting.pause_ticks != 0 {
                let begun = arch::counter();
                while arch::counter().wrapping_sub(begun) < self.splitting.pause_ticks {
                    arch::yield_now();
                }
            }
        }
    }

    /// Frames that the next batch at `at` can use.
    fn tables_wanted(&self, cpu: CpuId, at: Ipa, chosen: &Chosen<'_>) -> usize {
        let active = self.services.quiescence.enter(cpu);
        let context = self.context.load(&active);
        let large = chosen.whole
            && self
                .walk(context, at, &active)
                .is_some_and(|at| at.level == Level::L1 && at.found.is_leaf(Level::L1));
        if large {
            return SUBTREE_TABLES;
        }
        let left = chosen.to.raw().saturating_sub(at.raw());
        let blocks = left.div_ceil(Level::L2.span_bytes()) + 1;
        self.splitting.batch.min(to_index(blocks))
    }

    /// Splits up to a batch of blocks from `at` on and returns where to go on; `None` when another CPU is replacing what is
    /// at `at`.
    fn split_batch(
        &self,
        cpu: CpuId,
        at: Ipa,
        chosen: &Chosen<'_>,
        work: &mut Work<'_>,
    ) -> Option<Ipa> {
        let active = self.services.quiescence.enter(cpu);
        let context = self.context.load(&active);
        let mut prepared: Together<Prepared<'_>> = [const { None }; MOST_BATCH];
        let next = self.prepare_batch(context, at, chosen, work, &mut prepared, &active)?;
        let again = match self.splitting.bbm {
            Bbm::Zero => self.replace_at_level_0(cpu, prepared, work, &active),
            Bbm::Two => self.replace_at_level_2(prepared, work, &active),
        };
        Some(again.map_or(next, |ipa| ipa.max(at)))
    }

    /// Builds the tables of the next batch and returns where the one after it begins.
    fn prepare_batch<'a>(
        &self,
        context: &Context,
        at: Ipa,
        chosen: &Chosen<'_>,
        work: &mut Work<'_>,
        prepared: &mut Together<Prepared<'a>>,
        active: &'a Active<'_>,
    ) -> Option<Ipa> {
        let mut next = at;
        let mut count = 0;
        while count < self.splitting.batch {
            let (ipa, found) = match self.next_block(context, next, chosen, active) {
                Next::Nothing => return Some(chosen.to),
                Next::Held(ipa) => return (count != 0).then_some(ipa),
                Next::Block(ipa, found) => (ipa, found),
            };
            let span = found.level.span_bytes();
            let large = found.level == Level::L1;
            if large && count != 0 {
                // A batch of its own: its frames were reserved for it alone.
                return Some(ipa);
            }
            let base = ipa.align_down(span);
            next = Ipa::new(base.raw() + span);
            let built = build(context, found.found, found.level, &mut work.spares, active);
            let Some(table) = built else {
                if count != 0 {
                    // What is prepared goes first: it may have to be tried again, and this one is counted once.
                    return Some(ipa);
                }
                work.done.left += 1;
                continue;
            };
            if let Some(place) = prepared.get_mut(count) {
                *place = Some(Prepared {
                    slot: found.slot,
                    found: found.found,
                    ipa: base,
                    level: found.level,
                    table,
                });
            }
            count += 1;
            if large {
                // Once more, for blocks below that found no frame.
                return Some(ipa);
            }
        }
        Some(next)
    }

    /// The first chosen block at or after `at`.
    fn next_block<'a>(
        &self,
        context: &Context,
        mut at: Ipa,
        chosen: &Chosen<'_>,
        active: &'a Active<'_>,
    ) -> Next<'a> {
        loop {
            at = (chosen.next)(at);
            if at >= chosen.to {
                break;
            }
            let Some(found) = self.walk_to(context, at, Level::L2, active) else {
                break;
            };
            if found.found.is_held() {
                return Next::Held(at);
            }
            if found.found.is_leaf(found.level) {
                return Next::Block(at, found);
            }
            let span = found.level.span_bytes();
            at = Ipa::new(at.align_down(span).raw().saturating_add(span));
        }
        Next::Nothing
    }

    /// Break-before-make of all that is prepared, under one pair of invalidations. Returns the first that another CPU
    /// changed meanwhile.
    fn replace_at_level_0(
        &self,
        cpu: CpuId,
        prepared: Together<Prepared<'_>>,
        work: &mut Work<'_>,
        active: &Active<'_>,
    ) -> Option<Ipa> {
        let mut again = None;
        let mut broken: Together<Broken<'_>> = [const { None }; MOST_BATCH];
        let mut tables: Together<Descriptor> = [None; MOST_BATCH];
        let _guard = self.lock.share();
        for (block, (broken, table)) in prepared
            .into_iter()
            .flatten()
            .zip(broken.iter_mut().zip(&mut tables))
        {
            match block.slot.break_leaf(block.found, block.ipa) {
                Ok(taken) => {
                    *broken = Some(taken);
                    *table = Some(block.table.descriptor());
                }
                Err(_) => {
                    again.get_or_insert(block.ipa);
                    reclaim(block, &mut work.spares, active);
                }
            }
        }
        let clean = self.invalidate_together(cpu, broken);
        for (clean, table) in clean
            .into_iter()
            .flatten()
            .zip(tables.into_iter().flatten())
        {
            clean.make(table);
            percpu::count(Event::Splits);
            work.done.blocks += 1;
        }
        again
    }

    /// Each block becomes its table in one step; old entries go into `work.stale`.
    fn replace_at_level_2(
        &self,
        prepared: Together<Prepared<'_>>,
        work: &mut Work<'_>,
        active: &Active<'_>,
    ) -> Option<Ipa> {
        let mut again = None;
        let _guard = self.lock.share();
        for block in prepared.into_iter().flatten() {
            let table = block.table.descriptor();
            if block.slot.compare_and_swap(block.found, table).is_ok() {
                work.stale.add(block.ipa, block.level);
                percpu::count(Event::Splits);
                work.done.blocks += 1;
            } else {
                again.get_or_insert(block.ipa);
                reclaim(block, &mut work.spares, active);
            }
        }
        again
    }
}

/// The table that translates what the leaf `block` of `level` does, with as much below it as there are frames for.
fn build(
    context: &Context,
    block: Descriptor,
    level: Level,
    spares: &mut Spares<'_>,
    active: &Active<'_>,
) -> Option<SpareTable> {
    let above = level;
    let level = above.deeper()?;
    let table = spares.take()?;
    let first = match context.tagged(block.tag()) {
        Some(view) => view.rights.inherit(block, above, level),
        None => block,
    };
    let first = first.of_level(level);
    let leaf = |index| first.further(index as u64 * level.span_bytes());
    if level == Level::L3 {
        table.fill(active, leaf);
    } else {
        table.fill(active, |index| {
            let below = build(context, leaf(index), level, spares, active);
            below.map_or(leaf(index), |below| below.descriptor())
        });
    }
    Some(table)
}

/// Takes back what was built for `block`, which somebody else changed.
fn reclaim(block: Prepared<'_>, spares: &mut Spares<'_>, active: &Active<'_>) {
    if let Some(level) = block.level.deeper() {
        spares.reclaim(block.table, level, active);
    }
}
