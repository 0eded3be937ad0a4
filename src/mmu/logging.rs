//! Dirty logging: from here on, tell me every page that is written.
//!
//! ```text
//!   enable ── publish the log ── grace period ── protect everything ── invalidate
//!   fault  ── leaf writable ── set the page's bit                              (any CPU, any time)
//!   get    ── read the bits
//!   clear  ── take the bits ── protect those leaves ── invalidate ── return: now the caller may copy
//!   next_epoch, harvest: all of it at once, see `epoch`
//!   disable ─ publish without the log ── grace period ── collapse ── make writable
//! ```
//!
//! The invariant: *while a slot is logged, a page whose leaf is writable, or may be cached as writable, has its bit set, or
//! has it set before the CPU that made it writable is next quiescent.* Hence what is copied after `clear` returns misses
//! nothing that was written before, and what is written later sets a bit again.
//!
//! Each slot has two bitmaps: the current one, which faults fill, and the one of the epoch before. All state changes are
//! serialized by the VM's configuration lock; `get` and `clear` take it for a moment only and then run concurrently with
//! everything.

use alloc::sync::Arc;

use core::ops::Range;

use crate::addr::{Ipa, PAGE_BYTES, to_index};
use crate::arch;
use crate::mmu::bitmap::{Bitmap, GROUP_PAGES, WORD_PAGES};
use crate::mmu::collapse::Collapse;
use crate::mmu::descriptor::Memory;
use crate::mmu::eager::{Chosen, Split};
use crate::mmu::epoch::{Epoch, Tracking};
use crate::mmu::error::Error;
use crate::mmu::geometry::Level;
use crate::mmu::map::record;
use crate::mmu::pages::PageSet;
use crate::mmu::protect::{Busy, Looked, protect_slot, record_pages};
use crate::mmu::slot::{Contents, MemorySlot, SlotId, SlotView};
use crate::mmu::splitting::{Bbm, Policy};
use crate::mmu::stage2::Stage2;
use crate::mmu::table::Slot;
use crate::mmu::tlb::Debt;
use crate::mmu::walk::table_of;
use crate::sync::quiescence::CpuId;

/// The two bitmaps of a logged slot.
#[derive(Debug)]
pub(crate) struct SlotLog {
    epochs: [Arc<Bitmap>; 2],
    current: usize,
    /// The epoch in which logging was enabled.
    began: Epoch,
    /// The closed epoch whose pages have not all been handed over.
    due: Option<Epoch>,
    /// Somebody is taking them.
    going: bool,
    /// The slot still has leaves that are writable at all times: logging was enabled with everything set.
    pub(crate) unprotected: bool,
}

impl SlotLog {
    fn new(pages: u64, cpus: usize, began: Epoch) -> Self {
        Self {
            epochs: core::array::from_fn(|_| Arc::new(Bitmap::new(pages, cpus))),
            current: 0,
            began,
            due: None,
            going: false,
            unprotected: false,
        }
    }

    /// The bitmap that faults fill.
    pub(crate) fn current(&self) -> &Arc<Bitmap> {
        let [first, second] = &self.epochs;
        if self.current == 0 { first } else { second }
    }

    /// The bitmap of the epoch before.
    pub(crate) fn closed(&self) -> &Arc<Bitmap> {
        let [first, second] = &self.epochs;
        if self.current == 0 { second } else { first }
    }

    /// Makes the other bitmap current; the one that was is that of `closed`, to be harvested.
    pub(crate) fn flip(&mut self, closed: Epoch) {
        self.current ^= 1;
        self.due = Some(closed);
    }

    /// Whether a closed epoch is still to be harvested.
    pub(crate) fn is_unharvested(&self) -> bool {
        self.due.is_some()
    }

    /// The bitmap of the closed `epoch`, for whoever asks first. `now` is the current epoch.
    pub(crate) fn begin_harvest(&mut self, epoch: Epoch, now: Epoch) -> Result<Arc<Bitmap>, Error> {
        if self.due == Some(epoch) && !self.going {
            self.going = true;
            return Ok(self.closed().clone());
        }
        Err(if epoch >= self.began && epoch < now {
            Error::AlreadyHarvested(epoch)
        } else {
            Error::NoSuchEpoch(epoch)
        })
    }

    /// All pages of `bitmap` have been handed over; unless logging was enabled anew meanwhile, it is this log's.
    pub(crate) fn end_harvest(&mut self, bitmap: &Arc<Bitmap>) {
        if Arc::ptr_eq(self.closed(), bitmap) {
            self.going = false;
            self.due = None;
        }
    }
}

/// A logged slot, and the bitmap that was current when somebody asked.
struct Logged {
    id: SlotId,
    slot: Arc<MemorySlot>,
    bitmap: Arc<Bitmap>,
}

impl Logged {
    /// Whether faults that see `view` fill this bitmap.
    fn is_current(&self, view: &SlotView) -> bool {
        let same = |log: &Arc<Bitmap>| Arc::ptr_eq(log, &self.bitmap);
        view.log.as_ref().is_some_and(same)
    }
}

impl Stage2 {
    /// From the return of this call on, every page of the slot that is written is recorded. With `initially_all_set`
    /// nothing is protected: every page counts as written until it is first cleared.
    ///
    /// With policy `enable` every block of the slot is split then; the answer says which were not, for want of frames.
    ///
    /// Rounding: none. Races: faults, which record from some moment during the call on. TLB: nothing owed on return. Cost: a
    /// grace period; without `initially_all_set` one visit of every leaf and one invalidation of the VMID; the splitting.
    ///
    /// # Errors
    ///
    /// [`Error::NoSlot`], [`Error::NotLoggable`], [`Error::AlreadyLogging`], [`Error::MustKeep`].
    pub fn enable_logging(
        &self,
        cpu: CpuId,
        id: SlotId,
        initially_all_set: bool,
    ) -> Result<Split, Error> {
        let _operation = self.begin_operation();
        self.outdate_spare(cpu);
        let mut admin = self.admin.lock();
        let began = admin.epoch;
        let entry = admin.slot(id)?;
        if entry.log.is_some() {
            return Err(Error::AlreadyLogging);
        }
        if entry.slot.config.memory != Memory::Normal || !entry.slot.config.writable {
            return Err(Error::NotLoggable);
        }
        if self.splitting.policy == Policy::FaultEmpty
            && entry.slot.config.contents == Contents::Zero
        {
            return Err(Error::MustKeep);
        }
        let slot = entry.slot.clone();
        let mut log = SlotLog::new(slot.pages, self.services.quiescence.cpus(), began);
        if initially_all_set {
            log.current().set_all(cpu.0);
        }
        log.unprotected = initially_all_set;
        let current = log.current().clone();
        entry.log = Some(log);
        // A fault that began before this grace period may map writable without recording; the protection comes after.
        self.publish(&admin);
        if !initially_all_set {
            let mut debt = Debt::open(self, cpu);
            self.protect_into(cpu, id, &slot, &current, &mut debt);
            debt.pay();
        }
        drop(admin);
        Ok(match self.splitting.policy {
            Policy::Enable => self.split_span(cpu, slot.config.ipa, slot.end()),
            _ => Split::default(),
        })
    }

    /// Stops recording, and leaves the slot as it was before: tables that translate a whole block become blocks again,
    /// what was read-only becomes writable. What was recorded and not taken is forgotten.
    ///
    /// Rounding: none. Races: faults; none records any more once the grace period is over. TLB: nothing owed. Cost: a grace
    /// period, then every leaf once; see [`Stage2::collapse`].
    ///
    /// # Errors
    ///
    /// [`Error::NoSlot`], [`Error::NotLogging`].
    pub fn disable_logging(&self, cpu: CpuId, id: SlotId) -> Result<Collapse, Error> {
        let _operation = self.begin_operation();
        self.outdate_spare(cpu);
        let slot = {
            let mut admin = self.admin.lock();
            let entry = admin.slot(id)?;
            entry.log.take().ok_or(Error::NotLogging)?;
            let slot = entry.slot.clone();
            self.publish(&admin);
            slot
        };
        let done = self.collapse_span(cpu, id, &slot, slot.config.ipa, slot.end());
        self.relax_all(cpu, id, &slot);
        Ok(done)
    }

    /// Adds the pages recorded in the current epoch to `into` and takes nothing. `cpu` is the calling CPU.
    ///
    /// Rounding: none. Races: a page recorded meanwhile may be reported or not. TLB: nothing owed. Cost: the pages
    /// recorded, and one load per 4096 groups of the slot and CPU; with tracking `dbm` a visit of every leaf.
    ///
    /// # Errors
    ///
    /// [`Error::NoSlot`], [`Error::NotLogging`].
    pub fn dirty(&self, cpu: CpuId, id: SlotId, into: &mut PageSet) -> Result<(), Error> {
        let _operation = self.begin_operation();
        let Logged { slot, bitmap, .. } = self.logged(id)?;
        self.read_marks(cpu, id, &slot, &bitmap);
        bitmap.read(0, slot.pages, |first, bits| into.push(first, bits));
        Ok(())
    }

    /// Takes the pages recorded in `[from, to)` of the slot into `into` and makes them read-only. When it returns, what
    /// was written to them before is in memory and what is written later is recorded again: the caller may copy them.
    /// With policy `clear` the blocks that these pages are part of are split; the answer says which were not, for want of
    /// frames.
    ///
    /// Rounding: none; `from` and `to` are multiples of 64 pages, or `to` is the slot's end. Races: faults, splits, and other
    /// clears, whose invalidation is joined. TLB: nothing owed on return. Cost: the pages recorded.
    ///
    /// # Errors
    ///
    /// [`Error::NoSlot`], [`Error::NotLogging`], [`Error::BadRange`]; nothing is taken then.
    pub fn clear(
        &self,
        cpu: CpuId,
        id: SlotId,
        from: u64,
        to: u64,
        into: &mut PageSet,
    ) -> Result<Split, Error> {
        let _operation = self.begin_operation();
        let logged = self.logged(id)?;
        let slot = &logged.slot;
        slot.check_range(from, to)?;
        if self.splitting.policy != Policy::Clear {
            let mut debt = Debt::open(self, cpu);
            self.clear_groups(cpu, &logged, from..to, into, &mut debt);
            debt.pay();
            return Ok(Split::default());
        }
        let mut done = Split::default();
        let chunk_pages = self.splitting.chunk_bytes / PAGE_BYTES;
        self.by_chunk(chunk_pages, from, to, |from, to| {
            let mut debt = match self.splitting.bbm {
                Bbm::Zero => Debt::open_deferring_blocks(self, cpu),
                Bbm::Two => Debt::open(self, cpu),
            };
            let touched = self.clear_groups(cpu, &logged, from..to, into, &mut debt);
            let chosen = Chosen {
                to: slot.ipa_of(to),
                whole: false,
                next: &|at| slot.ipa_of(touched.next(slot.page_of(at))),
            };
            let split = self.split_chunk(cpu, slot.ipa_of(from), &chosen);
            debt.blocks_are_broken(split.left == 0);
            debt.pay();
            done += split;
        });
        Ok(done)
    }

    /// Takes and protects the pages recorded in `pages`, and says in which groups there were any.
    fn clear_groups(
        &self,
        cpu: CpuId,
        logged: &Logged,
        pages: Range<u64>,
        into: &mut PageSet,
        debt: &mut Debt<'_>,
    ) -> Touched {
        let mut touched = Touched::of(pages.clone());
        if self.tracking() == Tracking::Dbm {
            let (slot, written) = (&logged.slot, &logged.bitmap);
            let span = slot.ipa_of(pages.start)..slot.ipa_of(pages.end);
            self.visit_slots(cpu, logged.id, span, |found, ipa, level, view, _| {
                if !logged.is_current(view) {
                    // Marks of the epoch that has been opened meanwhile are that one's.
                    return Ok(Looked::Stop);
                }
                let looked = protect_slot(found, ipa, level, view.rights, debt)?;
                if looked == Looked::Written {
                    record_pages(written, slot, ipa, level, cpu);
                }
                Ok(looked)
            });
        }
        let mut at = pages.start;
        while let Some(group) = logged.bitmap.next_group(at, pages.end) {
            let start = group.max(pages.start);
            let end = (group + GROUP_PAGES).min(pages.end);
            self.clear_group(cpu, logged, start..end, into, debt);
            touched.add(start);
            at = group + GROUP_PAGES;
        }
        touched
    }

    fn logged(&self, id: SlotId) -> Result<Logged, Error> {
        let mut admin = self.admin.lock();
        let entry = admin.slot(id)?;
        let log = entry.log.as_ref().ok_or(Error::NotLogging)?;
        Ok(Logged {
            id,
            slot: entry.slot.clone(),
            bitmap: log.current().clone(),
        })
    }

    /// Takes and protects `pages`, which lie in one group. The order is rule 10's: first the bits,
    /// then the leaves.
    fn clear_group(
        &self,
        cpu: CpuId,
        logged: &Logged,
        pages: Range<u64>,
        into: &mut PageSet,
        debt: &mut Debt<'_>,
    ) {
        let mut taken = [(0, 0); (GROUP_PAGES / WORD_PAGES) as usize];
        let mut count = 0;
        let bitmap = &logged.bitmap;
        bitmap.take_group(pages.start, pages.end, |first, bits| {
            if let Some(entry) = taken.get_mut(count) {
                *entry = (first, bits);
                count += 1;
            }
        });
        for &(first, bits) in taken.iter().take(count) {
            into.push(first, bits);
            let mut left = bits;
            while let Err((rest, Busy)) = self.protect_word(cpu, logged, first, left, debt) {
                left = rest;
                arch::yield_now();
            }
        }
    }

    /// Protects the pages `bits` of the word at page `first`; on a busy slot returns those not yet done.
    fn protect_word(
        &self,
        cpu: CpuId,
        logged: &Logged,
        first: u64,
        bits: u64,
        debt: &mut Debt<'_>,
    ) -> Result<(), (u64, Busy)> {
        let active = self.services.quiescence.enter(cpu);
        let context = self.context.load(&active);
        let slot = &logged.slot;
        let Some(view) = context.tagged(logged.id.0) else {
            // The slot is being removed, and with it every leaf.
            return Ok(());
        };
        // A mark that is taken here and is of another epoch than the bits is kept for that one.
        let keeps = self.tracking() == Tracking::Dbm && !logged.is_current(view);
        let mut protect = |place: &Slot, ipa, level| {
            let looked = protect_slot(place, ipa, level, view.rights, debt)?;
            if keeps && looked == Looked::Written {
                record(view, ipa, level, cpu);
            }
            Ok(looked)
        };
        let _guard = self.lock.share();
        let mut left = bits;
        while left != 0 {
            let ipa = slot.ipa_of(first + u64::from(left.trailing_zeros()));
            let Some(at) = self.walk_to(context, ipa, Level::L2, &active) else {
                return Ok(());
            };
            if !at.found.is_table(at.level) {
                let looked = protect(at.slot, ipa, at.level).map_err(|busy| (left, busy))?;
                if looked != Looked::Deeper {
                    left &= !pages_below(ipa, at.level, slot, first);
                }
                continue;
            }
            let table = table_of(at.found, &active);
            let region = ipa.align_down(Level::L2.span_bytes());
            while left != 0 {
                let page = slot.ipa_of(first + u64::from(left.trailing_zeros()));
                if page.align_down(Level::L2.span_bytes()) != region {
                    break;
                }
                if let Some(leaf) = table.get(Level::L3.index_of(page)) {
                    let _page = protect(leaf, page, Level::L3).map_err(|busy| (left, busy))?;
                }
                left &= left - 1;
            }
        }
        Ok(())
    }
}

/// Groups of up to [`TOUCHED_GROUPS`] of which something was taken: of fixed size, whatever the range.
struct Touched {
    pages: Range<u64>,
    groups: [u64; TOUCHED_GROUPS / 64],
}

/// Groups of the largest chunk.
const TOUCHED_GROUPS: usize = to_index(Level::L1.span_pages() / GROUP_PAGES);

impl Touched {
    fn of(pages: Range<u64>) -> Self {
        Self {
            pages,
            groups: [0; TOUCHED_GROUPS / 64],
        }
    }

    fn place(&self, page: u64) -> (usize, u64) {
        let group = page / GROUP_PAGES - self.pages.start / GROUP_PAGES;
        (to_index(group / 64), 1 << (group % 64))
    }

    fn add(&mut self, page: u64) {
        let (word, bit) = self.place(page);
        if let Some(word) = self.groups.get_mut(word) {
            *word |= bit;
        }
    }

    fn has(&self, page: u64) -> bool {
        let (word, bit) = self.place(page);
        self.groups.get(word).is_some_and(|word| word & bit != 0)
    }

    /// The first page at or after `page` whose group was touched, or the end.
    fn next(&self, page: u64) -> u64 {
        let mut at = page;
        while at < self.pages.end && !self.has(at) {
            at = (at / GROUP_PAGES + 1) * GROUP_PAGES;
        }
        at.min(self.pages.end)
    }
}

/// The bits of the word at page `first` whose pages lie in the leaf of `level` around `ipa`.
fn pages_below(ipa: Ipa, level: Level, slot: &MemorySlot, first: u64) -> u64 {
    let base = ipa.align_down(level.span_bytes());
    (0..WORD_PAGES)
        .filter(|page| slot.ipa_of(first + page).align_down(level.span_bytes()) == base)
        .fold(0, |bits, page| bits | 1 << page)
}
