//! Break-before-make, as a path through types.
//!
//! ```text
//!   Slot --break_leaf()--> Broken --invalidate()--> Clean --make()--> Slot
//!   Slot --break_table()-----^         ^
//!   Slot --claim()---------------------+-----------^        (an empty slot has nothing to invalidate)
//!                                      |
//!              several at once: `Stage2::invalidate_together`, one pair of invalidations for all
//! ```
//!
//! Required when a live translation changes size, output address or memory type (DDI 0487 issue K.a, R_WHZWS); never for
//! permissions and access flags. While broken the slot holds the busy marker: a fault that meets it goes back to the
//! guest and retries, any other walker waits outside its lock. Between break and make nothing may block; interrupts are
//! masked at EL2 always.
//!
//! A `Broken` or `Clean` that is dropped leaves the slot busy for ever, which stops that VM and nothing else; both are
//! `#[must_use]`, and every path through this module's callers ends in [`Clean::make`].

use crate::addr::Ipa;
use crate::arch;
use crate::mmu::descriptor::Descriptor;
use crate::mmu::stage2::Stage2;
use crate::mmu::table::Slot;
use crate::mmu::tlb;
use crate::sync::percpu;
use crate::sync::quiescence::CpuId;
use crate::trace::Event;

/// Most slots that are broken under one pair of invalidations.
pub const MOST_BATCH: usize = 64;

/// Up to [`MOST_BATCH`] of something: of fixed size, because it is collected under the MMU lock.
pub(crate) type Together<T> = [Option<T>; MOST_BATCH];

/// A busy slot whose old translation may still be cached.
#[derive(Debug)]
#[must_use = "hardware may still use the old translation: call `invalidate`"]
pub struct Broken<'t> {
    slot: &'t Slot,
    ipa: Ipa,
    /// Walk caches may lead to a table that was here, so no invalidation by address reaches all of it.
    table: bool,
}

/// A busy slot that no observer can still be using.
#[derive(Debug)]
#[must_use = "the slot is busy until `make`"]
pub struct Clean<'t>(&'t Slot);

impl Slot {
    /// Takes the leaf `expected`, which translates `ipa`, away.
    ///
    /// # Errors
    ///
    /// What the slot holds instead: another CPU got there first.
    pub fn break_leaf(&self, expected: Descriptor, ipa: Ipa) -> Result<Broken<'_>, Descriptor> {
        self.break_any(expected, ipa, false)
    }

    /// Takes the table descriptor `expected`, which leads to what translates around `ipa`, away.
    ///
    /// # Errors
    ///
    /// What the slot holds instead.
    pub fn break_table(&self, expected: Descriptor, ipa: Ipa) -> Result<Broken<'_>, Descriptor> {
        self.break_any(expected, ipa, true)
    }

    fn break_any(
        &self,
        expected: Descriptor,
        ipa: Ipa,
        table: bool,
    ) -> Result<Broken<'_>, Descriptor> {
        self.compare_and_swap(expected, Descriptor::BUSY)?;
        percpu::count(Event::BbmWindows);
        Ok(Broken {
            slot: self,
            ipa,
            table,
        })
    }

    /// Reserves an empty slot, so that only the caller can fill it.
    ///
    /// # Errors
    ///
    /// What the slot holds instead.
    pub fn claim(&self) -> Result<Clean<'_>, Descriptor> {
        self.compare_and_swap(Descriptor::EMPTY, Descriptor::BUSY)?;
        Ok(Clean(self))
    }
}

impl<'t> Broken<'t> {
    /// Makes the old translation unreachable on every CPU. The calling CPU runs under the VM's VMID.
    pub fn invalidate(self) -> Clean<'t> {
        arch::dsb_ishst();
        if self.table {
            tlb::everything();
        } else {
            tlb::broadcast_each(core::iter::once(self.ipa));
        }
        Clean(self.slot)
    }
}

impl Stage2 {
    /// Makes what all of `broken` translated unreachable on every CPU: each leaf by its address, then one `VMALLE1IS`;
    /// tables by one `VMALLS12E1IS`. `cpu` is the calling CPU, which may run this VM or none.
    pub(crate) fn invalidate_together<'t>(
        &self,
        cpu: CpuId,
        broken: Together<Broken<'t>>,
    ) -> Together<Clean<'t>> {
        let mut all = broken.iter().flatten();
        if all.clone().next().is_some() {
            arch::dsb_ishst();
            self.under_vmid(cpu, self.tree(), || {
                if all.any(|broken| broken.table) {
                    tlb::everything();
                } else {
                    tlb::broadcast_each(broken.iter().flatten().map(|broken| broken.ipa));
                }
            });
        }
        broken.map(|broken| broken.map(|broken| Clean(broken.slot)))
    }
}

impl Clean<'_> {
    /// Installs `descriptor`; what it leads to is visible before it is (release). No invalidation is owed.
    pub fn make(self, descriptor: Descriptor) {
        self.0.replace_busy(descriptor);
    }
}
