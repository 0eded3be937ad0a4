//! Invalidation as a debt: what an entry point leaves stale, somebody must make unreachable.
//!
//! A `Debt` is opened *before* the first descriptor is changed, collects what was changed, and is paid once; dropping
//! it pays it too, because a forgotten debt is a guest that writes unseen. While it is open, whoever finds its own work
//! already done must not believe that it is effective: it joins (`Debt::join`, rule 11).
//!
//! ```text
//!   A: open (unpaid += 1)   CAS RW -> RO            ...            invalidate   unpaid -= 1
//!   B:                              finds RO, reads unpaid > 0: adds the page to its own debt
//! ```
//!
//! B's acquire load of A's descriptor makes A's increment visible, so B reads zero only once A's invalidation is over.
//!
//! # Order of an invalidation
//!
//! `DSB ISHST`, stage-2 operations, `DSB ISH`, `TLBI VMALLE1IS`, `DSB ISH` (DDI 0487 issue K.a, D8.17): stage-2 operations
//! need not reach entries that combine both stages, and the reverse order lets a combined entry be refilled from a stale
//! stage-2 one. `VMALLS12E1IS` does both at once. No level hint is given, so that entries of every level go (rule 18).

use crate::addr::{Ipa, PAGE_BYTES, Va};
use crate::arch;
use crate::arch::atomic::{AtomicU64, Ordering};
use crate::mmu::geometry::Level;
use crate::mmu::stage2::Stage2;
use crate::sync::percpu;
use crate::sync::quiescence::CpuId;
use crate::trace::Event;

/// Single addresses worth naming one by one; more become ranges or a whole VMID.
///
/// Counted in instructions a broadcast of one address costs its issuer 2 (operand, `TLBI`) and every CPU the refill of
/// one entry; the whole VMID costs its issuer 1 and every CPU the refill of all. Eight keeps the issuer's part below
/// that of a single descriptor's protection.
const SINGLE_ADDRESSES: usize = 8;
/// Pages that one FEAT_TLBIRANGE operand can name.
const RANGE_PAGES: u64 = 1 << 21;
/// Ranges worth naming before the whole VMID is cheaper for the issuer.
const RANGES: u64 = 4;

/// What FEAT_TLBI* this machine has.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct TlbFeatures {
    /// FEAT_TLBIRANGE on every CPU.
    pub range: bool,
}

/// Number of a VM's debts that are open.
#[derive(Debug, Default)]
pub struct OpenDebts(AtomicU64);

impl OpenDebts {
    /// One more: before the first descriptor is changed.
    pub fn open(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    /// One less: after the invalidation is complete.
    pub fn settle(&self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }

    /// Whether an invalidation of something that the caller has already seen changed may be outstanding.
    pub fn any(&self) -> bool {
        self.0.load(Ordering::SeqCst) != 0
    }
}

/// Invalidation owed by one VM's tables, under its VMID.
#[must_use = "stale translations let the guest write unseen: call `pay`"]
pub(crate) struct Debt<'m> {
    stage2: &'m Stage2,
    cpu: CpuId,
    owed: Owed,
    blocks: Blocks,
}

/// What becomes of blocks in a debt.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Blocks {
    /// They are owed like any leaf.
    Owed,
    /// Whoever opened the debt breaks them before it is paid, which invalidates them: none is in it yet.
    Deferred,
    /// As above, and there was one.
    Outstanding,
}

/// What is to be invalidated. A value of fixed size: it is collected under the MMU lock, where nothing is allocated.
#[derive(Clone, Copy)]
pub(crate) enum Owed {
    /// No entry.
    Nothing,
    /// Those of a few leaves, by an address of each, and the end of the last.
    Addresses {
        list: [Ipa; SINGLE_ADDRESSES],
        count: usize,
        to: Ipa,
    },
    /// Those of a range.
    Range { from: Ipa, to: Ipa },
    /// All of the VM's, walk caches included.
    Everything,
}

impl Owed {
    /// Adds the leaf of `level` at `ipa`.
    #[inline]
    pub(crate) fn add(&mut self, ipa: Ipa, level: Level) {
        if !matches!(self, Self::Everything) {
            self.add_place(ipa, level);
        }
    }

    fn add_place(&mut self, ipa: Ipa, level: Level) {
        let from = ipa.align_down(level.span_bytes());
        let to = Ipa::new(from.raw().saturating_add(level.span_bytes()));
        *self = match *self {
            Self::Nothing => Self::Addresses {
                list: [from; SINGLE_ADDRESSES],
                count: 1,
                to,
            },
            Self::Addresses {
                mut list,
                count,
                to: high,
            } => match list.get_mut(count) {
                Some(free) => {
                    *free = from;
                    Self::Addresses {
                        list,
                        count: count + 1,
                        to: high.max(to),
                    }
                }
                None => Self::Range {
                    from: list.iter().copied().fold(from, Ipa::min),
                    to: high.max(to),
                },
            },
            Self::Range {
                from: low,
                to: high,
            } => Self::Range {
                from: low.min(from),
                to: high.max(to),
            },
            Self::Everything => Self::Everything,
        };
    }
}

impl<'m> Debt<'m> {
    /// Opens a debt of `stage2`, to be paid on `cpu`, the calling CPU. Nothing is owed yet.
    pub(crate) fn open(stage2: &'m Stage2, cpu: CpuId) -> Self {
        stage2.debts().open();
        Self {
            stage2,
            cpu,
            owed: Owed::Nothing,
            blocks: Blocks::Owed,
        }
    }

    /// As [`Debt::open`], for a caller that splits at level 0 every block it adds before it pays: breaking a block
    /// invalidates it, so that naming it here would do it twice. [`Debt::blocks_are_broken`] says that it has.
    pub(crate) fn open_deferring_blocks(stage2: &'m Stage2, cpu: CpuId) -> Self {
        let mut debt = Self::open(stage2, cpu);
        debt.blocks = Blocks::Deferred;
        debt
    }

    /// Every block that was added has been broken since, by somebody (`all`), or some have not. In a level-0 VM whoever
    /// found it a block and replaced it invalidated it before the next thing was made there. A block that was unmapped
    /// instead is in another debt: while there is one, everything is owed here too.
    pub(crate) fn blocks_are_broken(&mut self, all: bool) {
        let outstanding = core::mem::replace(&mut self.blocks, Blocks::Owed) == Blocks::Outstanding;
        if outstanding && (!all || self.stage2.debts().others_than_one()) {
            self.add_everything();
        }
    }

    /// The leaf at `ipa`, of `level`, was changed.
    pub(crate) fn add(&mut self, ipa: Ipa, level: Level) {
        if level != Level::L3 && self.blocks != Blocks::Owed {
            self.blocks = Blocks::Outstanding;
        } else {
            self.owed.add(ipa, level);
        }
    }

    /// The leaf at `ipa` was found as this caller would have left it: if another debt of this VM is open, it may be that
    /// one's, and is owed here too.
    pub(crate) fn join(&mut self, ipa: Ipa, level: Level) {
        if self.stage2.debts().others_than_one() {
            self.add(ipa, level);
        }
    }

    /// Tables were unlinked, or so much was changed that naming it is not worth it.
    pub(crate) fn add_everything(&mut self) {
        self.owed = Owed::Everything;
    }

    /// Makes everything owed unreachable on all CPUs, complete on return.
    pub(crate) fn pay(self) {
        drop(self);
    }

    fn settle(&mut self) {
        // A caller that says nothing has broken nothing.
        self.blocks_are_broken(false);
        let owed = core::mem::replace(&mut self.owed, Owed::Nothing);
        self.stage2.invalidate(self.cpu, &owed);
        self.stage2.debts().settle();
    }
}

impl Stage2 {
    /// Makes the entries `owed` unreachable on all CPUs, complete on return. `cpu` is the calling CPU.
    pub(crate) fn invalidate(&self, cpu: CpuId, owed: &Owed) {
        if !matches!(owed, Owed::Nothing) {
            arch::dsb_ishst();
            self.under_vmid(cpu, self.tree(), || invalidate(owed, self.tlb_features()));
        }
    }
}

impl OpenDebts {
    fn others_than_one(&self) -> bool {
        self.0.load(Ordering::SeqCst) > 1
    }
}

impl Drop for Debt<'_> {
    fn drop(&mut self) {
        self.settle();
    }
}

fn invalidate(owed: &Owed, features: TlbFeatures) {
    match owed {
        Owed::Nothing => {}
        Owed::Addresses { list, count, .. } => {
            for ipa in list.iter().take(*count) {
                arch::tlbi_ipas2e1is(*ipa);
            }
            percpu::count_many(Event::TlbiBroadcast, *count as u64);
            percpu::count_many(Event::TlbiIpa, *count as u64);
            combined();
        }
        Owed::Range { from, to } => invalidate_range(*from, *to, features),
        Owed::Everything => everything(),
    }
}

fn invalidate_range(from: Ipa, to: Ipa, features: TlbFeatures) {
    let pages = to.offset_from(from).unwrap_or(0) / PAGE_BYTES;
    if !features.range || pages > RANGES * RANGE_PAGES {
        return everything();
    }
    let mut done = 0;
    while done < pages {
        let step = (pages - done).min(RANGE_PAGES);
        arch::tlbi_ripas2e1is(Ipa::new(from.raw() + done * PAGE_BYTES), step);
        percpu::count(Event::TlbiBroadcast);
        percpu::count(Event::TlbiRange);
        done += step;
    }
    combined();
}

/// Ends stage-2 operations and drops what combines both stages.
fn combined() {
    arch::dsb_ish();
    arch::tlbi_vmalle1is();
    percpu::count(Event::TlbiBroadcast);
    percpu::count(Event::TlbiStage1);
    arch::dsb_ish();
}

/// Invalidates on all CPUs whatever the VMID's tables translated, walk caches included; complete on return. What the
/// caller changed is visible to walkers already (`DSB ISHST`).
pub(crate) fn everything() {
    arch::tlbi_vmalls12e1is();
    percpu::count(Event::TlbiBroadcast);
    percpu::count(Event::TlbiVmid);
    arch::dsb_ish();
}

/// Invalidates on all CPUs what one broken slot translated, on a CPU that runs under the VM's VMID or holds it by
/// [`Stage2::under_vmid`]; complete on return.
pub(crate) fn broadcast_one(ipa: Ipa) {
    arch::dsb_ishst();
    broadcast_each(core::iter::once(ipa));
}

/// Invalidates on all CPUs what the leaves around `ipas` translated, under one `VMALLE1IS`; complete on return. What the
/// caller changed is visible to walkers already (`DSB ISHST`).
pub(crate) fn broadcast_each(ipas: impl Iterator<Item = Ipa>) {
    for ipa in ipas {
        arch::tlbi_ipas2e1is(ipa);
        percpu::count(Event::TlbiBroadcast);
        percpu::count(Event::TlbiIpa);
    }
    combined();
}

/// Invalidates one page on this CPU after its leaf was relaxed: the guest's own address `va` and the page `ipa`, for
/// the loaded VMID. Other CPUs that hold a stale entry take one spurious fault (rule 5).
#[inline]
pub(crate) fn local_one(ipa: Ipa, va: Va) {
    arch::dsb_nshst();
    arch::tlbi_ipas2e1(ipa);
    arch::dsb_nsh();
    arch::tlbi_vaae1(va);
    arch::dsb_nsh();
    percpu::count(Event::TlbiLocal);
}
