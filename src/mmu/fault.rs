//! Stage-2 faults: the hot path.
//!
//! ```text
//!   fault -> section -> snapshot -> walk -> judge what the slot holds NOW
//!     leaf, permits the access and is young ... a stale TLB entry here: local invalidation
//!     leaf, old ............................... set the access flag
//!     leaf, read-only, write .................. page: make writable, then record it; block while logging: split
//!     empty ................................... map, from the slot's backing
//!     deferred ................................ look through the table, then walk on
//!     busy, or a leaf that is frozen .......... back to the guest, which retries
//! ```
//!
//! A fault acts on what is published, which may be newer than what its CPU runs under (root or S2PIR_EL2, of an epoch that is
//! just being opened): a leaf made writable there makes no difference to the guest until the kick that is on its way has
//! been served. A fault that finds nothing to do, or is to change the size of something, catches up at once.
//!
//! What the hardware reported decides only which access is judged, never what is done: between the fault and the walk
//! any CPU may have changed the slot (rule 4). A relaxed page costs one compare-and-swap of its leaf and one atomic OR of
//! its bitmap word, takes no lock in lockless mode, allocates nothing and looks nothing up but the walk: the leaf's tag
//! names the slot.
//!
//! # Leaf first, then the bit (rule 1)
//!
//! If the bit came first, `clear` could take it, find the leaf read-only and report the page; the page would be copied,
//! then become writable with no bit set. With the leaf first, whoever clears the bit finds the leaf writable and protects
//! it; and whoever waits for a grace period finds the bit. `tests/loom` checks both orders.

use crate::addr::{Ipa, Va};
use crate::arch;
use crate::mmu::descriptor::Descriptor;
use crate::mmu::geometry::Level;
use crate::mmu::slot::{Context, SlotView};
use crate::mmu::stage2::Stage2;
use crate::mmu::table::Slot;
use crate::mmu::tlb;
use crate::mmu::walk::Position;
use crate::sync::percpu;
use crate::sync::quiescence::{Active, CpuId};
use crate::trace::Event;

/// What the guest tried.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Access {
    /// A load, or a walk of the guest's own tables.
    Read,
    /// A store, or anything that must be permitted to write.
    Write,
    /// An instruction fetch.
    Execute,
}

/// Which kind of fault hardware reported; for counting.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum FaultKind {
    /// No translation.
    Translation,
    /// Access flag clear.
    AccessFlag,
    /// Not permitted.
    Permission,
}

/// A stage-2 fault, decoded.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// The guest address that was not translated; the offset within the page is not looked at.
    pub ipa: Ipa,
    /// FAR_EL2: the address whose stale translation is dropped on this CPU.
    pub va: Va,
    /// What hardware reported.
    pub kind: FaultKind,
    /// What the guest tried.
    pub access: Access,
}

/// What to do with the vCPU.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Resolution {
    /// Resume it at the same instruction.
    Resume,
    /// The stash ran dry: [`Stage2::top_up`] outside all locks, then ask again.
    TopUp,
    /// No memory is there: a device of the machine model, or nothing.
    NoSlot,
    /// The memory there does not permit it.
    Denied,
}

/// How one attempt at a fault ended.
pub(crate) enum Attempt {
    /// Done; nothing is cached that forbids the access.
    Done,
    /// Done, but this CPU may still hold the old, stricter translation.
    Stale,
    /// The slot changed meanwhile: look again.
    Again,
    /// Hand this to the caller.
    Give(Resolution),
}

/// Attempts before the guest is let back in: its next try starts from its own walk.
const ATTEMPTS: u32 = 8;

impl Stage2 {
    /// Resolves `fault` of a vCPU that runs on `cpu`, the calling CPU.
    ///
    /// Rounding: to the page; when mapping, to the slot's largest leaf. Races: everything; nothing is waited for. TLB: on
    /// `Resume` nothing is owed; what this CPU may have held is invalidated here. Cost: one walk, one compare-and-swap, one
    /// atomic OR; mapping and splitting cost a table or more.
    #[inline(always)]
    pub fn fault(&self, cpu: CpuId, fault: &Fault) -> Resolution {
        percpu::count(match fault.kind {
            FaultKind::Permission => Event::FaultsPermission,
            FaultKind::Translation => Event::FaultsTranslation,
            FaultKind::AccessFlag => Event::FaultsAccess,
        });
        let attempt = {
            let active = self.services.quiescence.enter(cpu);
            let context = self.context.load(&active);
            self.attempt(cpu, context, fault, &active)
        };
        match attempt {
            Attempt::Stale => {
                tlb::local_one(fault.ipa, fault.va);
                Resolution::Resume
            }
            Attempt::Done | Attempt::Again => Resolution::Resume,
            Attempt::Give(resolution) => resolution,
        }
    }

    #[inline(always)]
    fn attempt(
        &self,
        cpu: CpuId,
        context: &Context,
        fault: &Fault,
        active: &Active<'_>,
    ) -> Attempt {
        for _ in 0..ATTEMPTS {
            let guard = self.lock.share();
            let Some(at) = context.tree.root.walk_to(fault.ipa, Level::L3, active) else {
                return Attempt::Give(Resolution::NoSlot);
            };
            let attempt = if at.found.is_leaf(at.level) {
                self.judge(cpu, context, fault, &at, active)
            } else {
                drop(guard);
                self.on_invalid(cpu, context, fault, &at, active)
            };
            if !matches!(attempt, Attempt::Again) {
                return attempt;
            }
        }
        Attempt::Again
    }

    /// The slot translates: may the access proceed?
    #[inline(always)]
    fn judge(
        &self,
        cpu: CpuId,
        context: &Context,
        fault: &Fault,
        at: &Position<'_>,
        active: &Active<'_>,
    ) -> Attempt {
        if fault.access != Access::Write {
            return self.judge_read(cpu, context, fault, at);
        }
        let Some(view) = context.tagged(at.found.tag()) else {
            return Attempt::Give(Resolution::Denied);
        };
        if view.rights.permits(at.found) {
            return self.allow(cpu, context, fault, at);
        }
        self.make_writable(cpu, context, view, fault, at, active)
    }

    #[cold]
    fn judge_read(
        &self,
        cpu: CpuId,
        context: &Context,
        fault: &Fault,
        at: &Position<'_>,
    ) -> Attempt {
        let permitted = match fault.access {
            Access::Execute => at.found.is_executable(self.format()),
            _ => at.found.is_readable(self.format()),
        };
        if permitted {
            self.allow(cpu, context, fault, at)
        } else {
            Attempt::Give(Resolution::Denied)
        }
    }

    /// What the slot holds permits the access: what faulted is a stale entry, an older context, or the access flag.
    #[cold]
    fn allow(&self, cpu: CpuId, context: &Context, fault: &Fault, at: &Position<'_>) -> Attempt {
        if at.found.is_young() {
            self.catch_up(cpu, context);
            return Attempt::Stale;
        }
        if at.found.is_frozen() {
            return retry();
        }
        let attempt = set_leaf(at.slot, at.found, at.found.young());
        if matches!(attempt, Attempt::Stale) && fault.kind == FaultKind::AccessFlag {
            // What has no access flag is not cached: the walker only has to see it (I_WZCBG).
            arch::dsb_ishst();
            return Attempt::Done;
        }
        attempt
    }

    #[inline(always)]
    fn make_writable(
        &self,
        cpu: CpuId,
        context: &Context,
        view: &SlotView,
        fault: &Fault,
        at: &Position<'_>,
        active: &Active<'_>,
    ) -> Attempt {
        if at.found.is_frozen() {
            return retry();
        }
        if !view.slot.config.writable {
            return Attempt::Give(Resolution::Denied);
        }
        let Some(log) = &view.log else {
            return set_leaf(at.slot, at.found, view.rights.grant(at.found).young());
        };
        if at.level != Level::L3 {
            return self.write_to_block(cpu, context, view, fault, at, active);
        }
        let attempt = set_leaf(at.slot, at.found, view.rights.grant(at.found).young());
        if matches!(attempt, Attempt::Stale) {
            log.set(view.slot.page_of(fault.ipa), cpu.0);
        }
        attempt
    }

    #[cold]
    fn write_to_block(
        &self,
        cpu: CpuId,
        context: &Context,
        view: &SlotView,
        fault: &Fault,
        at: &Position<'_>,
        active: &Active<'_>,
    ) -> Attempt {
        self.catch_up(cpu, context);
        self.split_for_write(cpu, view, fault.ipa, at, active)
    }

    #[cold]
    fn on_invalid(
        &self,
        cpu: CpuId,
        context: &Context,
        fault: &Fault,
        at: &Position<'_>,
        active: &Active<'_>,
    ) -> Attempt {
        if at.found == Descriptor::BUSY {
            return retry();
        }
        if at.found.is_deferred() {
            let _guard = self.lock.share();
            return match self.walk(context, fault.ipa, active) {
                Some(at) if at.found == Descriptor::BUSY => retry(),
                _ => Attempt::Again,
            };
        }
        let attempt = self.map_at(cpu, context, fault.ipa, fault.access, active);
        if matches!(attempt, Attempt::Done) {
            // Invalid to valid owes no invalidation, only that walkers see it before the guest runs on (I_WZCBG).
            arch::dsb_ishst();
        }
        attempt
    }
}

/// The slot is being replaced (rules 9 and 27): back to the guest, whose next try finds what came of it.
#[cold]
pub(crate) fn retry() -> Attempt {
    percpu::count(Event::BusyRetries);
    Attempt::Done
}

/// Changes a leaf that only becomes more permissive, or young.
#[inline(always)]
fn set_leaf(slot: &Slot, old: Descriptor, new: Descriptor) -> Attempt {
    match slot.compare_and_swap(old, new) {
        Ok(()) => Attempt::Stale,
        Err(_) => Attempt::Again,
    }
}
