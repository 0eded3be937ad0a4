//! The private interrupts of one vCPU (16 SGIs, 16 PPIs): a distributor's view of them, as a pure model.
//!
//! The model is the truth while no interrupt is listed. Listing ([`Private::list`]) hands interrupts to the virtual CPU
//! interface; taking back ([`Private::take_back`]) reads what the guest made of them. Both happen on the vCPU's own CPU
//! and only when something changed, so a vCPU without interrupts in flight costs nothing.
//!
//! # The interrupt that is linked to hardware
//!
//! The virtual timer's physical interrupt stays active from the moment EL2 takes it until the guest deactivates its
//! virtual twin, which hardware then does for both. `Private::held` records that. Undelivered and no longer asserted
//! it is given back ([`Listing::release`]), so the physical active state never leaks.

use super::lists::{Entry, State};

/// Number of SGIs.
pub const SGIS: u8 = 16;
/// Number of private interrupts.
pub const PRIVATE: u8 = 32;
pub(super) const SGI_BITS: u32 = 0xffff;

/// The private interrupts of one vCPU.
#[derive(Clone, Debug)]
pub struct Private {
    pub(super) enabled: u32,
    pub(super) group1: u32,
    /// PPIs that are edge-triggered; SGIs always are.
    pub(super) edge: u32,
    /// PPIs that are latched pending.
    pub(super) pending: u32,
    /// PPIs that were taken and not deactivated.
    pub(super) active: u32,
    pub(super) priority: [u8; PRIVATE as usize],
    /// Per SGI, the senders (GICv2) or bit 0 (GICv3) for which it is pending.
    pub(super) sgi_pending: [u8; SGIS as usize],
    /// As `sgi_pending`, for taken and not deactivated.
    pub(super) sgi_active: [u8; SGIS as usize],
    /// The PPI whose physical twin EL2 has taken and nobody has deactivated.
    pub(super) held: u32,
    /// It was taken anew before the model learnt that its guest had deactivated it.
    taken_anew: bool,
}

/// What is to be done with the virtual CPU interface.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Listing {
    /// What to list, first come most urgent; `None` from some place on.
    pub entries: [Option<Entry>; MOST_LISTS],
    /// More is in flight than could be listed: ask for a maintenance interrupt.
    pub overflow: bool,
    /// The physical twin has to be deactivated.
    pub release: bool,
}

impl Listing {
    /// Whether something is listed that the guest is to take.
    pub fn has_pending(&self) -> bool {
        self.entries
            .iter()
            .flatten()
            .any(|entry| entry.state.is_pending())
    }
}

/// Most list registers there can be.
pub const MOST_LISTS: usize = 16;

/// What a vCPU's interrupts depend on beside their own state.
#[derive(Clone, Copy, Debug)]
pub struct Wiring {
    /// The distributor forwards group 0.
    pub group0_enabled: bool,
    /// The distributor forwards group 1.
    pub group1_enabled: bool,
    /// The PPI that is linked to hardware: virtual and physical number.
    pub linked: (u8, u16),
    /// Whether the device behind that PPI asserts its line now.
    pub asserted: bool,
    /// Number of list registers.
    pub lists: usize,
}

impl Private {
    /// The state out of reset. On GICv3 everything begins in group 1, on GICv2 in group 0.
    pub const fn new(group1: bool) -> Self {
        Self {
            enabled: 0,
            group1: if group1 { u32::MAX } else { 0 },
            edge: SGI_BITS,
            pending: 0,
            active: 0,
            priority: [0; PRIVATE as usize],
            sgi_pending: [0; SGIS as usize],
            sgi_active: [0; SGIS as usize],
            held: 0,
            taken_anew: false,
        }
    }

    /// An SGI arrives; several for one receiver and sender merge.
    pub fn send(&mut self, intid: u8, source: u8) {
        if let Some(senders) = self.sgi_pending.get_mut(usize::from(intid)) {
            *senders |= 1 << (source & 7);
        }
    }

    /// EL2 has taken the physical twin of `intid`, which stays active.
    pub fn hold(&mut self, intid: u8) {
        self.taken_anew = self.held & bit(intid) != 0;
        self.held |= bit(intid);
    }

    /// Whether `intid` is enabled.
    pub fn is_enabled(&self, intid: u8) -> bool {
        self.enabled & bit(intid) != 0
    }

    /// Whether EL2 holds the physical twin of an interrupt.
    pub fn holds(&self) -> bool {
        self.held != 0
    }

    /// Whether the guest has taken `intid` and not deactivated it.
    pub fn handles(&self, intid: u8) -> bool {
        self.active & bit(intid) != 0
    }

    /// Forgets that a physical interrupt is held: somebody else has deactivated it.
    pub fn let_go(&mut self) {
        self.held = 0;
    }

    /// Whether an SGI is in group 1.
    pub fn is_group1(&self, intid: u8) -> bool {
        self.group1 & bit(intid) != 0
    }

    /// Whether an enabled interrupt is pending, which ends a sleep.
    pub fn wakes(&self) -> bool {
        (self.pending | self.held & !self.active | sgi_bits(&self.sgi_pending)) & self.enabled != 0
    }

    /// Takes back what was `listed`, in the state the guest left it (`None`: deactivated).
    pub fn take_back(&mut self, listed: &Entry, state: Option<State>) {
        let (pending, active) = state.map_or((false, false), |state| {
            (state.is_pending(), state.is_active())
        });
        let index = usize::from(listed.intid);
        if listed.intid < SGIS {
            let sender = 1 << (listed.source & 7);
            if let Some(senders) = self.sgi_pending.get_mut(index) {
                *senders |= if pending { sender } else { 0 };
            }
            if let Some(senders) = self.sgi_active.get_mut(index) {
                *senders |= if active { sender } else { 0 };
            }
            return;
        }
        let it = bit(listed.intid);
        self.active |= if active { it } else { 0 };
        if listed.hardware.is_none() {
            self.pending |= if pending { it } else { 0 };
        } else if state.is_none() && !core::mem::take(&mut self.taken_anew) {
            self.held &= !it;
        }
    }

    /// `count` interrupts that were active and not listed have been ended: the most urgent ones.
    pub fn end_unlisted(&mut self, count: u32) {
        for _ in 0..count {
            let most_urgent = (0..PRIVATE)
                .filter(|it| self.is_active(*it))
                .min_by_key(|it| self.priority_of(*it));
            let Some(intid) = most_urgent else { return };
            self.active &= !bit(intid);
            if let Some(senders) = self.sgi_active.get_mut(usize::from(intid)) {
                *senders &= senders.wrapping_sub(1);
            }
        }
    }

    /// Decides what to list and takes it out of the model.
    pub fn list(&mut self, wiring: &Wiring) -> Listing {
        let linked = bit(wiring.linked.0);
        // A held interrupt that the guest is not handling follows its line.
        let release = self.held & linked != 0 && self.active & linked == 0 && !wiring.asserted;
        if release {
            self.held &= !linked;
        }
        let mut listing = Listing {
            entries: [None; MOST_LISTS],
            overflow: false,
            release,
        };
        let most = wiring.lists.min(MOST_LISTS);
        self.for_each_in_flight(wiring, |entry| insert(&mut listing, most, entry));
        for entry in listing.entries.iter().flatten() {
            self.remove(entry);
        }
        listing
    }

    fn for_each_in_flight(&self, wiring: &Wiring, mut visit: impl FnMut(Entry)) {
        let forwarded = (if wiring.group1_enabled {
            self.group1
        } else {
            0
        }) | (if wiring.group0_enabled {
            !self.group1
        } else {
            0
        });
        let deliver = forwarded & self.enabled;
        let entry = |intid: u8, state, source, hardware| Entry {
            intid,
            source,
            priority: self.priority_of(intid),
            group1: self.is_group1(intid),
            state,
            hardware,
        };
        for (intid, (pending, active)) in
            (0..SGIS).zip(self.sgi_pending.iter().zip(&self.sgi_active))
        {
            let pending = if deliver & bit(intid) != 0 {
                *pending
            } else {
                0
            };
            let mut senders = pending | active;
            while let Some(source) = lowest(senders) {
                senders &= !(1 << source);
                if let Some(state) = state(pending >> source & 1 != 0, active >> source & 1 != 0) {
                    visit(entry(intid, state, source, None));
                }
            }
        }
        let pending = (self.pending | self.held) & deliver;
        for intid in (SGIS..PRIVATE).filter(|intid| (pending | self.active) & bit(*intid) != 0) {
            let linked = (intid == wiring.linked.0 && self.held & bit(intid) != 0)
                .then_some(wiring.linked.1);
            match state(pending & bit(intid) != 0, self.active & bit(intid) != 0) {
                // Hardware cannot hold both for a linked interrupt; its line makes it pending again after deactivation.
                Some(State::PendingAndActive) if linked.is_some() => {
                    visit(entry(intid, State::Active, 0, linked))
                }
                Some(state) => visit(entry(intid, state, 0, linked)),
                None => {}
            }
        }
    }

    fn remove(&mut self, entry: &Entry) {
        let it = bit(entry.intid);
        if entry.intid < SGIS {
            let sender = 1 << (entry.source & 7);
            let index = usize::from(entry.intid);
            if let Some(senders) = self
                .sgi_pending
                .get_mut(index)
                .filter(|_| entry.state.is_pending())
            {
                *senders &= !sender;
            }
            if let Some(senders) = self.sgi_active.get_mut(index) {
                *senders &= !sender;
            }
            return;
        }
        self.active &= !it;
        if entry.state.is_pending() {
            self.pending &= !it;
        }
    }

    fn senders(&self, of: &[u8; SGIS as usize], intid: u8) -> u8 {
        of.get(usize::from(intid)).copied().unwrap_or(0)
    }

    fn priority_of(&self, intid: u8) -> u8 {
        self.priority.get(usize::from(intid)).copied().unwrap_or(0)
    }

    fn is_active(&self, intid: u8) -> bool {
        self.active & bit(intid) != 0 || self.senders(&self.sgi_active, intid) != 0
    }
}

/// Puts `entry` where its urgency belongs: by priority, active before pending, lower number first.
fn insert(listing: &mut Listing, most: usize, entry: Entry) {
    let urgency = |entry: &Entry| {
        (
            entry.priority,
            entry.state == State::Pending,
            entry.intid,
            entry.source,
        )
    };
    let mut next = Some(entry);
    for place in listing.entries.iter_mut().take(most) {
        let Some(inserted) = next else { return };
        match place {
            Some(there) if urgency(there) <= urgency(&inserted) => {}
            _ => next = place.replace(inserted),
        }
    }
    listing.overflow |= next.is_some();
}

fn state(pending: bool, active: bool) -> Option<State> {
    match (pending, active) {
        (true, true) => Some(State::PendingAndActive),
        (true, false) => Some(State::Pending),
        (false, true) => Some(State::Active),
        (false, false) => None,
    }
}

/// The SGIs that have a sender.
pub(super) fn sgi_bits(senders: &[u8; SGIS as usize]) -> u32 {
    (0..SGIS)
        .zip(senders)
        .filter(|(_, senders)| **senders != 0)
        .fold(0, |bits, (intid, _)| bits | bit(intid))
}

/// The lowest set bit's position.
fn lowest(bits: u8) -> Option<u8> {
    (0..8).find(|position| bits >> position & 1 != 0)
}

pub(super) const fn bit(intid: u8) -> u32 {
    1_u32.unbounded_shl(intid as u32)
}

#[cfg(test)]
mod tests {
    use super::{Entry, Listing, Private, State, Wiring};
    use crate::vm::vgic::registers::{ICENABLER, IPRIORITYR, ISACTIVER, ISENABLER, ISPENDR};

    const WIRING: Wiring = Wiring {
        group0_enabled: false,
        group1_enabled: true,
        linked: (27, 27),
        asserted: true,
        lists: 4,
    };

    fn enabled() -> Private {
        let mut private = Private::new(true);
        private.write(ISENABLER, u32::MAX, u32::MAX);
        private
    }

    fn listed(listing: &Listing) -> Vec<(u8, State)> {
        listing
            .entries
            .iter()
            .flatten()
            .map(|entry| (entry.intid, entry.state))
            .collect()
    }

    fn only(listing: &Listing) -> Entry {
        assert_eq!(listing.entries.iter().flatten().count(), 1);
        listing.entries[0].unwrap()
    }

    #[test]
    fn an_sgi_is_delivered_once_and_merges_while_pending() {
        let mut private = enabled();
        private.send(3, 0);
        private.send(3, 0);
        let entry = only(&private.list(&WIRING));
        assert_eq!(
            (entry.intid, entry.state, entry.hardware),
            (3, State::Pending, None)
        );
        private.take_back(&entry, None);
        assert_eq!(listed(&private.list(&WIRING)), []);
    }

    #[test]
    fn an_sgi_sent_while_its_handler_runs_is_pending_again() {
        let mut private = enabled();
        private.send(3, 0);
        let entry = only(&private.list(&WIRING));
        private.take_back(&entry, Some(State::Active));
        private.send(3, 0);
        assert_eq!(
            listed(&private.list(&WIRING)),
            [(3, State::PendingAndActive)]
        );
    }

    #[test]
    fn gicv2_keeps_senders_apart() {
        let mut private = enabled();
        private.send(3, 0);
        private.send(3, 5);
        let listing = private.list(&WIRING);
        let senders: Vec<u8> = listing
            .entries
            .iter()
            .flatten()
            .map(|entry| entry.source)
            .collect();
        assert_eq!(senders, [0, 5]);
    }

    #[test]
    fn a_disabled_interrupt_waits_in_the_model() {
        let mut private = enabled();
        private.write(ICENABLER, 1 << 3, u32::MAX);
        private.send(3, 0);
        assert_eq!(listed(&private.list(&WIRING)), []);
        assert_eq!(private.read(ISPENDR), 1 << 3);
        private.write(ISENABLER, 1 << 3, u32::MAX);
        assert_eq!(listed(&private.list(&WIRING)), [(3, State::Pending)]);
    }

    #[test]
    fn groups_that_the_distributor_does_not_forward_wait() {
        let mut private = enabled();
        private.send(1, 0);
        assert_eq!(
            listed(&private.list(&Wiring {
                group1_enabled: false,
                ..WIRING
            })),
            []
        );
        assert_eq!(listed(&private.list(&WIRING)), [(1, State::Pending)]);
    }

    #[test]
    fn the_timer_is_linked_until_the_guest_deactivates_it() {
        let mut private = enabled();
        private.hold(27);
        let entry = only(&private.list(&WIRING));
        assert_eq!((entry.state, entry.hardware), (State::Pending, Some(27)));
        private.take_back(&entry, Some(State::Active));
        assert!(private.holds());
        let entry = only(&private.list(&Wiring {
            asserted: false,
            ..WIRING
        }));
        assert_eq!((entry.state, entry.hardware), (State::Active, Some(27)));
        private.take_back(&entry, None);
        assert!(!private.holds());
        assert_eq!(listed(&private.list(&WIRING)), []);
    }

    #[test]
    fn a_timer_that_fires_again_before_the_model_saw_its_end_is_delivered_again() {
        let mut private = enabled();
        private.hold(27);
        let entry = only(&private.list(&WIRING));
        private.hold(27);
        private.take_back(&entry, None);
        let entry = only(&private.list(&WIRING));
        assert_eq!((entry.state, entry.hardware), (State::Pending, Some(27)));
        private.take_back(&entry, None);
        assert!(!private.holds());
    }

    #[test]
    fn a_timer_that_is_disabled_while_pending_is_not_leaked() {
        let mut private = enabled();
        private.hold(27);
        let entry = only(&private.list(&WIRING));
        private.take_back(&entry, Some(State::Pending));
        private.write(ICENABLER, 1 << 27, u32::MAX);
        let listing = private.list(&WIRING);
        assert!(!listing.release && listed(&listing).is_empty() && private.holds());
        let listing = private.list(&Wiring {
            asserted: false,
            ..WIRING
        });
        assert!(listing.release && !private.holds());
    }

    #[test]
    fn a_timer_that_stays_disabled_is_delivered_when_it_is_enabled() {
        let mut private = enabled();
        private.write(ICENABLER, 1 << 27, u32::MAX);
        private.hold(27);
        assert!(listed(&private.list(&WIRING)).is_empty());
        assert_eq!(private.read(ISPENDR), 1 << 27);
        private.write(ISENABLER, 1 << 27, u32::MAX);
        assert_eq!(only(&private.list(&WIRING)).hardware, Some(27));
    }

    #[test]
    fn the_most_urgent_are_listed_and_the_rest_asks_for_maintenance() {
        let mut private = enabled();
        for intid in 0..6 {
            private.send(intid, 0);
            private.write(
                IPRIORITYR + u64::from(intid & !3),
                u32::from(0xa0 - 8 * intid) << (8 * (intid & 3)),
                0xff << (8 * (intid & 3)),
            );
        }
        let listing = private.list(&WIRING);
        assert!(listing.overflow);
        assert_eq!(
            listed(&listing).iter().map(|it| it.0).collect::<Vec<_>>(),
            [5, 4, 3, 2]
        );
        for entry in listing.entries.iter().flatten() {
            private.take_back(entry, None);
        }
        let listing = private.list(&WIRING);
        assert!(!listing.overflow);
        assert_eq!(listed(&listing), [(1, State::Pending), (0, State::Pending)]);
    }

    #[test]
    fn an_active_interrupt_without_a_list_register_can_be_ended() {
        let mut private = enabled();
        private.write_v3(ISACTIVER, 1 << 2 | 1 << 20, u32::MAX);
        assert_eq!(private.read(ISACTIVER), 1 << 2 | 1 << 20);
        private.end_unlisted(1);
        assert_eq!(private.read(ISACTIVER), 1 << 20);
        private.end_unlisted(5);
        assert_eq!(private.read(ISACTIVER), 0);
    }
}
