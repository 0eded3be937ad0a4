//! Interrupts in flight of one vCPU: between its private interrupts, its VM's shared ones and its list registers.

use core::sync::atomic::{AtomicBool, Ordering};

use spin::Mutex;

use super::interface::{Interface, Returned};
use super::listing::{Groups, Listing};
use super::private::{Private, Wiring};
use super::shared::{FIRST, SPIS, Shared, Target};

/// A set of shared interrupts.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct SpiSet(u128);

impl SpiSet {
    /// Adds `intid`, if it is a shared interrupt.
    pub fn add(&mut self, intid: u16) {
        if intid >= FIRST {
            self.0 |= 1_u128.unbounded_shl(u32::from(intid));
        }
    }
}

impl SpiSet {
    /// All of them.
    pub fn all() -> Self {
        let mut all = Self::default();
        (FIRST..FIRST + SPIS).for_each(|intid| all.add(intid));
        all
    }
}

impl Iterator for SpiSet {
    type Item = u16;

    fn next(&mut self) -> Option<u16> {
        let intid = self.0.trailing_zeros();
        self.0 &= self.0.checked_sub(1)?;
        u16::try_from(intid).ok()
    }
}

/// A set of a VM's vCPUs; a GICv3 VM has at most 123.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct VcpuSet(u128);

impl VcpuSet {
    /// No vCPU has a higher number than below this.
    pub const MOST: usize = 128;

    /// Adds `vcpu`.
    pub fn add(&mut self, vcpu: usize) {
        self.0 |= 1_u128.unbounded_shl(u32::try_from(vcpu).unwrap_or(u32::MAX));
    }

    /// Takes `vcpu` out.
    pub fn remove(&mut self, vcpu: usize) {
        self.0 &= !1_u128.unbounded_shl(u32::try_from(vcpu).unwrap_or(u32::MAX));
    }
}

impl Iterator for VcpuSet {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        let vcpu = self.0.trailing_zeros();
        self.0 &= self.0.checked_sub(1)?;
        usize::try_from(vcpu).ok()
    }
}

/// Marks (`mark`) the vCPUs that the given shared interrupts are for, as `home` knows. They are to be alerted when the
/// lock of the shared interrupts has been let go.
pub fn concern(
    shared: &Shared,
    intids: impl Iterator<Item = u16>,
    home: impl Fn(Target) -> Option<usize>,
    mark: impl Fn(usize),
) -> VcpuSet {
    let mut set = VcpuSet::default();
    for target in intids.filter_map(|intid| shared.concerned(intid)) {
        if let Some(vcpu) = home(target) {
            mark(vcpu);
            set.add(vcpu);
        }
    }
    set
}

/// The vCPU that this CPU holds, as its list registers are filled and emptied.
#[derive(Clone, Copy, Debug)]
pub struct Holder<'a> {
    /// The vCPU's number.
    pub index: usize,
    /// Its private interrupts.
    pub private: &'a Mutex<Private>,
    /// Its VM's shared ones.
    pub shared: &'a Mutex<Shared>,
    /// Set whenever one of them may be in flight for it; then the lock of the shared interrupts is held.
    pub spis: &'a AtomicBool,
}

impl Holder<'_> {
    /// Empties the list registers into the models. Returns the vCPUs that shared interrupts are for now, which `mark` has
    /// marked; they are to be alerted.
    pub fn take_back(
        &self,
        interface: &mut Interface,
        home: impl Fn(Target) -> Option<usize>,
        mark: impl Fn(usize),
    ) -> VcpuSet {
        self.exchange(interface, &home, mark, |models, _| models.private.settle())
            .1
    }

    /// Brings the list registers up to date with the models. Returns what is listed, and vCPUs as above. `wiring` is asked under
    /// the locks: who disables a group writes that first, and then looks under them whether anything is still listed.
    pub fn relist(
        &self,
        interface: &mut Interface,
        wiring: impl FnOnce() -> Wiring,
        home: impl Fn(Target) -> Option<usize>,
        mark: impl Fn(usize),
    ) -> (Listing, VcpuSet) {
        let (listing, others) = self.exchange(interface, &home, mark, |models, interface| {
            let is_home = |target| home(target) == Some(self.index);
            let groups = || interface.groups_taken();
            let (listing, any) = models.list(&wiring(), is_home, groups);
            if models.shared.is_some() {
                // What is listed counts as in flight, so whoever takes it back looks at the shared ones.
                self.spis.store(any, Ordering::Relaxed);
            }
            listing
        });
        interface.list(&listing);
        (listing, others)
    }

    fn exchange<R>(
        &self,
        interface: &mut Interface,
        home: &impl Fn(Target) -> Option<usize>,
        mark: impl Fn(usize),
        work: impl FnOnce(&mut Models<'_>, &Interface) -> R,
    ) -> (R, VcpuSet) {
        let mut private = self.private.lock();
        let mut shared = self
            .spis
            .load(Ordering::Relaxed)
            .then(|| self.shared.lock());
        let mut models = Models {
            home: self.index,
            private: &mut private,
            shared: shared.as_deref_mut(),
        };
        let mut returned = SpiSet::default();
        interface.take_back(|what| models.take_back(what, &mut returned));
        let shared = models.shared.as_deref();
        let concern = |shared| concern(shared, returned, home, mark);
        let mut others = shared.map(concern).unwrap_or_default();
        others.remove(self.index);
        (work(&mut models, interface), others)
    }
}

/// The models that a vCPU's list registers are filled from. Its shared interrupts are there whenever one of them may be in
/// flight for it.
#[derive(Debug)]
pub struct Models<'a> {
    /// The vCPU's number.
    pub home: usize,
    /// Its private interrupts.
    pub private: &'a mut Private,
    /// The VM's shared ones.
    pub shared: Option<&'a mut Shared>,
}

impl Models<'_> {
    /// Takes back what became of interrupts in flight. Shared ones that may have a new home now are added to `returned`.
    pub fn take_back(&mut self, what: Returned<'_>, returned: &mut SpiSet) {
        match what {
            Returned::Unlisted(count) => {
                for _ in 0..count {
                    self.end_most_urgent(returned);
                }
            }
            Returned::Listed(entry, state) => {
                self.private.take_turn(entry, state);
                match self.shared.as_deref_mut().filter(|_| entry.intid >= FIRST) {
                    Some(shared) => shared.take_back(entry, state),
                    None => self.private.take_back(entry, state),
                }
                returned.add(entry.intid);
            }
        }
    }

    /// The guest has ended an interrupt that is not listed. In EOImode 0 that is the most urgent of those that are active. In
    /// EOImode 1 it says which by ICC_DIR_EL1 or GICC_DIR, which trap, so nothing is counted; but where ICC_DIR_EL1 cannot trap
    /// by itself ([`access::deactivate`](super::access::deactivate)) this may end another interrupt than the guest named.
    fn end_most_urgent(&mut self, returned: &mut SpiSet) {
        let private = self.private.most_urgent_active();
        let shared = self.shared.as_deref();
        let shared = shared.and_then(|shared| shared.most_urgent_active(self.home));
        if let Some((_, intid)) = private.into_iter().chain(shared).min() {
            self.deactivate(intid);
            returned.add(intid);
        }
    }

    fn deactivate(&mut self, intid: u16) {
        match u8::try_from(intid) {
            Ok(private) if intid < FIRST => self.private.deactivate(private),
            _ => {
                if let Some(shared) = self.shared.as_deref_mut() {
                    shared.deactivate(intid);
                }
            }
        }
    }

    /// Answers who asked, decides what to list and takes it out of the models. `is_home` knows which targets mean this vCPU, `groups` which groups
    /// the guest lets its CPU interface signal; that is asked only if not everything fits. Also returns whether any shared
    /// interrupt is in flight for it.
    pub fn list(
        &mut self,
        wiring: &Wiring,
        is_home: impl Fn(Target) -> bool,
        groups: impl FnOnce() -> Groups,
    ) -> (Listing, bool) {
        // In one place: it is large, and each exit that changes what is listed comes here.
        let mut listing = Listing::new(wiring.lists, self.private.turn, Groups::BOTH);
        listing.release = self.private.release(wiring.linked.0, wiring.asserted);
        self.private.settle();
        let any = self.offer(wiring, &is_home, &mut listing);
        if listing.leaves_any() {
            listing.start_over(groups());
            self.offer(wiring, &is_home, &mut listing);
        }
        listing.close();
        for entry in listing.listed() {
            match self.shared.as_deref_mut().filter(|_| entry.intid >= FIRST) {
                Some(shared) => shared.remove(entry, self.home),
                None => self.private.remove(entry),
            }
        }
        (listing, any)
    }

    /// Offers everything. Whether any shared interrupt is in flight for this vCPU.
    #[inline]
    fn offer(
        &self,
        wiring: &Wiring,
        is_home: impl Fn(Target) -> bool,
        listing: &mut Listing,
    ) -> bool {
        self.private.offer(wiring, listing);
        let shared = self.shared.as_deref();
        shared.is_some_and(|shared| shared.offer(wiring, is_home, listing))
    }
}
