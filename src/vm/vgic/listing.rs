//! Which interrupts in flight get a list register, when there may be more interrupts than list registers.
//!
//! - Active interrupts come first: the guest's end of an interrupt that is listed says which one it was.
//! - The most urgent pending interrupt is always listed, even if an active one loses its place for it; so it can preempt.
//! - Pending interrupts are listed by priority, and within one priority in turn: the turn begins behind the interrupt
//!   that the guest took last, so none of the same priority is passed over for ever.
//!
//! - Pending interrupts of a group that the guest keeps its CPU interface from signalling come last: as long as it does, they
//!   cannot be taken, whatever their priority.
//!
//! What does not fit needs maintenance interrupts. *Pending* interrupts are left out: one when no listed interrupt is
//! pending any more (`NPIE`), which is when one that was left out may be next. The other choice, `UIE` (at most one list
//! register in use), would never come while the guest keeps interrupts active. *Active* interrupts are left out: one when
//! the guest has ended an interrupt that is not listed (`LRENPIE`), because its line may make it pending again. And in
//! either case one when the guest lets another choice of groups be signalled (`VGrp<n>EIE`, `VGrp<n>DIE`).

use super::lists::{Entry, State};

/// Most list registers there can be.
pub const MOST_LISTS: usize = 16;

/// Numbers among which turns are taken.
const TURNS: u16 = 1024;

/// The groups that a guest lets its CPU interface signal.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Groups {
    /// Group 0.
    pub group0: bool,
    /// Group 1.
    pub group1: bool,
}

impl Groups {
    /// Both.
    pub const BOTH: Self = Self {
        group0: true,
        group1: true,
    };
}

/// What is to be done with the virtual CPU interface.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Listing {
    /// What to list; `None` from some place on.
    pub entries: [Option<Entry>; MOST_LISTS],
    /// Pending interrupts are left out.
    pub pending_left: bool,
    /// Active interrupts are left out.
    pub active_left: bool,
    /// The physical twin has to be deactivated.
    pub release: bool,
    groups: Groups,
    most: usize,
    turn: u16,
    most_urgent: Option<Entry>,
    pending: usize,
    left: bool,
}

impl Listing {
    /// Nothing, for `lists` list registers; among equals, `turn` comes first. `groups` are signalled.
    pub fn new(lists: usize, turn: u16, groups: Groups) -> Self {
        Self {
            entries: [None; MOST_LISTS],
            pending_left: false,
            active_left: false,
            release: false,
            groups,
            most: lists.clamp(1, MOST_LISTS),
            turn,
            most_urgent: None,
            pending: 0,
            left: false,
        }
    }

    /// Takes `entry` in, or leaves it or another out.
    pub fn offer(&mut self, entry: Entry) {
        let Groups { group0, group1 } = self.groups;
        let is_signalled = |entry: &Entry| if entry.group1 { group1 } else { group0 };
        let rank = |entry: &Entry| {
            let turn = entry.intid.wrapping_sub(self.turn) % TURNS;
            let class = match entry.state {
                State::Pending if is_signalled(entry) => 1,
                State::Pending => 2,
                _ => 0,
            };
            (class, entry.priority, turn)
        };
        if entry.state == State::Pending && is_signalled(&entry) {
            self.pending += 1;
            let urgent = |other| rank(&entry) < rank(&other);
            if self.most_urgent.is_none_or(urgent) {
                self.most_urgent = Some(entry);
            }
        }
        let mut next = Some(entry);
        for place in self.entries.iter_mut().take(self.most) {
            let Some(inserted) = next else { return };
            match place {
                Some(there) if rank(there) <= rank(&inserted) => {}
                _ => next = place.replace(inserted),
            }
        }
        self.left |= next.is_some();
    }

    /// Forgets what was offered; `groups` are signalled.
    #[cold]
    pub fn start_over(&mut self, groups: Groups) {
        let release = self.release;
        *self = Self::new(self.most, self.turn, groups);
        self.release = release;
    }

    /// Not everything that was offered fits.
    pub fn leaves_any(&self) -> bool {
        self.left
    }

    /// The groups that are signalled, if interrupts are left out for which that matters.
    pub fn groups(&self) -> Option<Groups> {
        self.left.then_some(self.groups)
    }

    /// Ends the offers.
    pub fn close(&mut self) {
        if !self.left {
            return;
        }
        let last = self.entries.get_mut(self.most - 1).and_then(Option::as_mut);
        if let (Some(last), Some(urgent)) = (last, self.most_urgent)
            && last.state != State::Pending
        {
            *last = urgent;
            self.active_left = true;
        }
        let is_pending = |entry: &&Entry| entry.state == State::Pending;
        let Groups { group0, group1 } = self.groups;
        let is_signalled = |entry: &&Entry| if entry.group1 { group1 } else { group0 };
        let listed = self.listed().filter(is_pending).count();
        let signalled = self.listed().filter(is_pending).filter(is_signalled);
        // If any is left out, those that are not signalled are, too: none of them keeps NPIE from coming.
        self.pending_left = signalled.count() < self.pending;
        self.active_left |= listed == 0;
        if !self.pending_left {
            return;
        }
        // What is active and pending could not be taken now, so it must not count as a pending one.
        for entry in self.entries.iter_mut().flatten() {
            if entry.state == State::PendingAndActive {
                entry.state = State::Active;
                entry.tell = true;
            }
        }
    }

    /// Whether something is listed that the guest is to take.
    pub fn has_pending(&self) -> bool {
        self.listed().any(|entry| entry.state.is_pending())
    }

    /// What is listed.
    pub fn listed(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter().map_while(Option::as_ref)
    }
}

#[cfg(test)]
mod tests {
    use super::{Groups, Listing};
    use crate::vm::vgic::lists::{Entry, State};

    fn entry(intid: u16, priority: u8, state: State) -> Entry {
        Entry {
            intid,
            source: 0,
            priority,
            group1: true,
            state,
            hardware: None,
            tell: false,
        }
    }

    fn of(lists: usize, turn: u16, offers: &[(u16, u8, State)]) -> Listing {
        let mut listing = Listing::new(lists, turn, Groups::BOTH);
        for (intid, priority, state) in offers {
            listing.offer(entry(*intid, *priority, *state));
        }
        listing.close();
        listing
    }

    fn intids(listing: &Listing) -> Vec<u16> {
        listing.listed().map(|entry| entry.intid).collect()
    }

    use State::{Active, Pending, PendingAndActive};

    #[test]
    fn pending_ones_are_listed_by_priority() {
        let listing = of(
            2,
            0,
            &[(1, 0x80, Pending), (40, 0x20, Pending), (3, 0x40, Pending)],
        );
        assert_eq!(intids(&listing), [40, 3]);
        assert!(listing.pending_left && !listing.active_left);
    }

    #[test]
    fn active_ones_are_listed_first() {
        let listing = of(2, 0, &[(1, 0x20, Pending), (2, 0xf8, Active)]);
        assert_eq!(intids(&listing), [2, 1]);
        assert!(!listing.pending_left && !listing.active_left);
    }

    #[test]
    fn the_most_urgent_pending_one_is_always_listed() {
        let listing = of(
            2,
            0,
            &[
                (1, 0x80, Active),
                (2, 0x88, PendingAndActive),
                (3, 0x90, Active),
                (4, 0xa0, Pending),
                (5, 0x98, Pending),
            ],
        );
        assert_eq!(intids(&listing), [1, 5]);
        assert!(listing.pending_left && listing.active_left);
        let alone = of(1, 0, &[(1, 0x80, Active), (4, 0xa0, Pending)]);
        assert_eq!(intids(&alone), [4]);
        assert!(alone.active_left && !alone.pending_left);
    }

    #[test]
    fn equals_take_turns() {
        let offers = [8, 9, 10, 60].map(|intid| (intid, 0x80, Pending));
        assert_eq!(intids(&of(2, 0, &offers)), [8, 9]);
        assert_eq!(intids(&of(2, 10, &offers)), [10, 60]);
        assert_eq!(intids(&of(2, 61, &offers)), [8, 9]);
    }

    #[test]
    fn what_cannot_be_signalled_takes_no_list_register_from_what_can() {
        let groups = Groups {
            group0: false,
            group1: true,
        };
        let listing = |lists| {
            let mut listing = Listing::new(lists, 0, groups);
            for intid in 1..5 {
                let silent = entry(intid, 0, Pending);
                listing.offer(Entry {
                    group1: false,
                    ..silent
                });
            }
            listing.offer(entry(27, 0xa0, Pending));
            listing.offer(entry(3, 0xf0, Active));
            listing.close();
            listing
        };
        assert_eq!(intids(&listing(4)), [3, 27, 1, 2]);
        assert!(!listing(4).pending_left && !listing(4).active_left);
        assert_eq!(listing(4).groups(), Some(groups));
        assert_eq!(intids(&listing(1)), [27]);
        assert!(!listing(1).pending_left && listing(1).active_left);
        assert_eq!(listing(6).groups(), None);
    }

    #[test]
    fn with_pending_ones_left_out_only_what_can_be_taken_is_listed_as_pending() {
        let offers = [
            (1, 0x80, PendingAndActive),
            (2, 0x80, Pending),
            (3, 0x80, Pending),
        ];
        let listing = of(2, 0, &offers);
        let first = listing.entries[0].unwrap();
        assert_eq!((first.state, first.tell), (Active, true));
        let fits = of(3, 0, &offers).entries[0].unwrap();
        assert_eq!((fits.state, fits.tell), (PendingAndActive, false));
    }
}
