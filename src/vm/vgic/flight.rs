//! Interrupts in flight of one vCPU: between its private interrupts, its VM's shared ones and its list registers.

use super::interface::Returned;
use super::listing::Listing;
use super::private::{Private, Wiring};
use super::shared::{FIRST, Shared, Target};

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

impl Iterator for SpiSet {
    type Item = u16;

    fn next(&mut self) -> Option<u16> {
        let intid = self.0.trailing_zeros();
        self.0 &= self.0.checked_sub(1)?;
        u16::try_from(intid).ok()
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

    /// The guest has ended an interrupt that is not listed. In EOImode 0, where alone it does so unseen, that is the most
    /// urgent of those that are active.
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

    /// Decides what to list and takes it out of the models. `is_home` knows which targets mean this vCPU. Also returns
    /// whether any shared interrupt is in flight for it.
    pub fn list(&mut self, wiring: &Wiring, is_home: impl Fn(Target) -> bool) -> (Listing, bool) {
        let mut listing = Listing::new(wiring.lists, self.private.turn);
        listing.release = self.private.release(wiring);
        self.private.offer(wiring, &mut listing);
        let shared = self.shared.as_deref();
        let any = shared.is_some_and(|shared| shared.offer(wiring, is_home, &mut listing));
        listing.close();
        for entry in listing.listed() {
            match self.shared.as_deref_mut().filter(|_| entry.intid >= FIRST) {
                Some(shared) => shared.remove(entry, self.home),
                None => self.private.remove(entry),
            }
        }
        (listing, any)
    }
}
