//! Break-before-make, as a path through types.
//!
//! ```text
//!   Slot --break_leaf()--> Broken --invalidate()--> Clean --make()--> Slot
//!   Slot --claim()-----------------------------------^        (an empty slot has nothing to invalidate)
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
use crate::mmu::descriptor::Descriptor;
use crate::mmu::table::Slot;
use crate::mmu::tlb;
use crate::sync::percpu;
use crate::trace::Event;

/// A busy slot whose old translation may still be cached.
#[derive(Debug)]
#[must_use = "hardware may still use the old translation: call `invalidate`"]
pub struct Broken<'t> {
    slot: &'t Slot,
    ipa: Ipa,
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
        self.compare_and_swap(expected, Descriptor::BUSY)?;
        percpu::count(Event::BbmWindows);
        Ok(Broken { slot: self, ipa })
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
        tlb::broadcast_one(self.ipa);
        Clean(self.slot)
    }
}

impl Clean<'_> {
    /// Installs `descriptor`; what it leads to is visible before it is (release). No invalidation is owed.
    pub fn make(self, descriptor: Descriptor) {
        self.0.replace_busy(descriptor);
    }
}
