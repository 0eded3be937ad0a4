//! The private interrupts of one vCPU (16 SGIs, 16 PPIs): a distributor's view of them, as a pure model.
//!
//! The model is the truth while no interrupt is listed. Listing ([`Private::offer`], [`Private::remove`]) hands interrupts
//! to the virtual CPU interface; taking back ([`Private::take_back`]) reads what the guest made of them. Both happen on the
//! vCPU's own CPU and only when something changed, so a vCPU without interrupts in flight costs nothing.
//!
//! # While interrupts are listed
//!
//! The vCPU itself takes everything back before it looks at pending or active bits. Others that look at them while some
//! are listed ask ([`Private::ask`]), make the vCPU take them back, and read what it then found. What others write is
//! recorded for when the interrupt comes back.
//!
//! # Kinds
//!
//! PPIs are level-sensitive, and ICFGR1 says so: pending while the device asserts its line, or from a write to ISPENDR
//! until the guest takes it. A listed one asks for maintenance when the guest ends it, so that a line that is still
//! asserted makes it pending again. The one that is linked to hardware is pending when EL2 has taken its physical twin, and
//! not while it is active, whatever its line does: that twin comes again.
//!
//! On GICv2 an SGI is pending once for each sender. A list register names one sender, and a number may be listed once
//! (IHI 0048B, 5.2.3), so the senders take turns: the next is listed when the guest has ended the one before.
//!
//! # The interrupt that is linked to hardware
//!
//! The virtual timer's physical interrupt stays active from the moment EL2 takes it until the guest deactivates its
//! virtual twin, which hardware then does for both. `Private::held` records that. Undelivered and no longer asserted
//! it is given back ([`Private::release`]), so the physical active state never leaks. Nobody is told when the line drops:
//! its vCPU looks at it whenever it lists, and before it reads what is pending; another that reads has it look.

use super::listing::Listing;
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
    /// SGIs that were sent and PPIs that a write made pending, and that were not taken since.
    pub(super) pending: u32,
    /// PPIs whose devices assert their lines.
    pub(super) line: u32,
    /// Taken and not deactivated.
    pub(super) active: u32,
    pub(super) priority: [u8; PRIVATE as usize],
    /// Per SGI, the senders (GICv2) or bit 0 (GICv3) for which it is pending.
    pub(super) senders: [u8; SGIS as usize],
    /// Per SGI, the sender of the one that is active, or was last.
    pub(super) sender: [u8; SGIS as usize],
    /// The PPI whose physical twin EL2 has taken and nobody has deactivated.
    pub(super) held: u32,
    /// It was taken anew before the model learnt that its guest had deactivated it.
    pub(super) taken_anew: bool,
    /// Behind the interrupt that the guest took last: the next of its priority to be listed.
    pub(super) turn: u16,
    /// In list registers.
    pub(super) listed: u32,
    /// Of those listed, what is to become of them when they come back.
    later: Later,
    /// Somebody waits for what comes back.
    asked: bool,
    /// What was there when somebody had asked, and how often that was.
    answer: Answer,
    /// GICR_WAKER.ProcessorSleep. Whether an interrupt is delivered does not depend on it.
    pub(super) sleeps: bool,
}

/// What others wrote to bits of listed interrupts.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Later {
    /// Not pending any more from what they were then.
    pub(super) unpend: u32,
    /// Pending, even if the guest has taken them in between.
    pub(super) pend: u32,
    /// Active.
    pub(super) activate: u32,
    /// Not active any more.
    pub(super) deactivate: u32,
}

impl Later {
    /// Nothing.
    pub(super) const NONE: Self = Self {
        unpend: 0,
        pend: 0,
        activate: 0,
        deactivate: 0,
    };

    /// What becomes of `it`, which comes back pending and active as given: the same, and whether it is to be made pending.
    pub(super) fn apply(&mut self, it: u32, pending: bool, active: bool) -> (bool, bool, bool) {
        let Self {
            unpend,
            pend,
            activate,
            deactivate,
        } = *self;
        *self = Self {
            unpend: unpend & !it,
            pend: pend & !it,
            activate: activate & !it,
            deactivate: deactivate & !it,
        };
        let active = active || activate & it != 0;
        (
            pending && unpend & it == 0,
            active && deactivate & it == 0,
            pend & it != 0,
        )
    }

    /// A write made `bits` pending, or ended that.
    pub(super) fn set_pending(&mut self, bits: u32, pending: bool) {
        if pending {
            self.pend |= bits;
        } else {
            self.pend &= !bits;
            self.unpend |= bits;
        }
    }

    /// A write made `bits` active, or ended that.
    pub(super) fn set_active(&mut self, bits: u32, active: bool) {
        if active {
            self.activate |= bits;
            self.deactivate &= !bits;
        } else {
            self.deactivate |= bits;
            self.activate &= !bits;
        }
    }
}

/// The pending and active bits of a vCPU that were read when nothing was listed.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Answer {
    /// How many answers there were.
    pub number: u32,
    /// What ISPENDR reads.
    pub pending: u32,
    /// What ISACTIVER reads.
    pub active: u32,
}

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

impl Wiring {
    /// Of a word of interrupts, those in groups that are forwarded.
    pub(super) fn forwarded(&self, group1: u32) -> u32 {
        let of = |enabled, group| if enabled { group } else { 0 };
        of(self.group1_enabled, group1) | of(self.group0_enabled, !group1)
    }
}

impl Private {
    /// The state out of reset. On GICv3 everything begins in group 1, on GICv2 in group 0.
    pub const fn new(group1: bool) -> Self {
        Self {
            enabled: 0,
            group1: if group1 { u32::MAX } else { 0 },
            pending: 0,
            line: 0,
            active: 0,
            priority: [0; PRIVATE as usize],
            senders: [0; SGIS as usize],
            sender: [0; SGIS as usize],
            held: 0,
            taken_anew: false,
            turn: 0,
            listed: 0,
            later: Later::NONE,
            asked: false,
            answer: Answer {
                number: 0,
                pending: 0,
                active: 0,
            },
            sleeps: true,
        }
    }

    /// An SGI arrives; several for one receiver and sender merge.
    pub fn send(&mut self, intid: u8, source: u8) {
        if let Some(senders) = self.senders.get_mut(usize::from(intid)) {
            *senders |= 1 << (source & 7);
            self.pending |= bit(intid);
        }
    }

    /// The device behind PPI `intid`, one that is not linked to hardware, asserts its line, or does not any more. Returns
    /// whether the list registers are to be brought up to date.
    pub fn set_line(&mut self, intid: u8, asserted: bool) -> bool {
        let it = bit(intid) & !SGI_BITS;
        let before = self.line;
        self.line = if asserted { before | it } else { before & !it };
        self.line != before
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

    /// Whether EL2 holds the physical twin of an interrupt that the guest is not handling. Its line may have dropped since: its
    /// vCPU finds that out when it next looks.
    pub fn holds_untaken(&self) -> bool {
        self.held & !self.active & !self.listed != 0
    }

    /// Gives `linked` back if it is held, the guest is not handling it and its line has dropped. True: its physical twin has to
    /// be deactivated.
    pub fn release(&mut self, linked: u8, asserted: bool) -> bool {
        let release = self.held & bit(linked) & !self.active & !self.listed != 0 && !asserted;
        if release {
            self.held &= !bit(linked);
        }
        release
    }

    /// Whether an SGI is in group 1.
    pub fn is_group1(&self, intid: u8) -> bool {
        self.group1 & bit(intid) != 0
    }

    /// What ISPENDR reads.
    pub(super) fn all_pending(&self) -> u32 {
        self.pending | self.line | self.held & !self.active
    }

    /// Takes back what was `listed`, in the state the guest left it (`None`: deactivated).
    pub fn take_back(&mut self, listed: &Entry, state: Option<State>) {
        let Ok(intid) = u8::try_from(listed.intid) else {
            return;
        };
        let (it, index) = (bit(intid), usize::from(intid));
        self.listed &= !it;
        let untaken = state.is_some_and(State::is_pending);
        let handled = state.is_some_and(State::is_active);
        let (pending, active, again) = self.later.apply(it, untaken, handled);
        if active {
            self.active |= it;
        }
        let taken = listed.state.is_pending() && !untaken;
        if (active || taken)
            && let Some(sender) = self.sender.get_mut(index)
        {
            *sender = listed.source;
        }
        if intid < SGIS {
            if pending {
                self.send(intid, listed.source);
            }
            return;
        }
        if taken {
            self.pending &= !it;
        }
        if again {
            self.pending |= it;
        }
        let ended = listed.hardware.is_some() && state.is_none();
        if ended && !core::mem::take(&mut self.taken_anew) {
            self.held &= !it;
        }
    }

    /// If the guest has taken `listed`, of any kind, the turn passes to the next.
    pub fn take_turn(&mut self, listed: &Entry, state: Option<State>) {
        if listed.state.is_pending() && !state.is_some_and(State::is_pending) {
            self.turn = listed.intid + 1;
        }
    }

    /// What the pending and active bits are; `None` while interrupts are listed.
    pub fn look(&self) -> Option<Answer> {
        (self.listed == 0).then(|| Answer {
            pending: self.all_pending(),
            active: self.active,
            number: self.answer.number,
        })
    }

    /// Asks for the next answer, which the vCPU gives when it takes its interrupts back. Returns the last one.
    pub fn ask(&mut self) -> Answer {
        self.asked = true;
        self.answer
    }

    /// The last answer.
    pub fn answer(&self) -> Answer {
        self.answer
    }

    /// Nothing is listed now: answers who asked.
    pub fn settle(&mut self) {
        if !core::mem::take(&mut self.asked) {
            return;
        }
        self.answer = Answer {
            number: self.answer.number.wrapping_add(1),
            pending: self.all_pending(),
            active: self.active,
        };
    }

    /// A write made interrupts active, or ended that.
    pub(super) fn set_active(&mut self, bits: u32, active: bool) {
        self.later.set_active(bits & self.listed, active);
        let here = bits & !self.listed;
        self.active = if active {
            self.active | here
        } else {
            self.active & !here
        };
    }

    /// A write made PPIs pending, or ended that.
    pub(super) fn set_pending(&mut self, bits: u32, pending: bool) {
        self.later.set_pending(bits & self.listed, pending);
        self.pending = if pending {
            self.pending | bits
        } else {
            self.pending & !bits
        };
    }

    /// Of the SGIs that are listed, `bits` are not to be pending when they come back.
    pub(super) fn unpend_listed(&mut self, bits: u32) {
        self.later.set_pending(bits & self.listed, false);
    }

    /// The most urgent active interrupt: its priority and its number.
    pub fn most_urgent_active(&self) -> Option<(u8, u16)> {
        Bits(self.active)
            .map(|intid| (self.priority_of(intid), u16::from(intid)))
            .min()
    }

    /// The guest has ended `intid`, which is not listed.
    pub fn deactivate(&mut self, intid: u8) {
        self.active &= !bit(intid);
    }

    /// Offers what is in flight to `listing`.
    pub fn offer(&self, wiring: &Wiring, listing: &mut Listing) {
        let deliver = wiring.forwarded(self.group1) & self.enabled;
        let pending = (self.pending | self.line | self.held) & deliver;
        for intid in Bits(pending | self.active) {
            let (pending, active) = (pending & bit(intid) != 0, self.active & bit(intid) != 0);
            let entry = if intid < SGIS {
                self.sgi(intid, pending, active)
            } else {
                self.ppi(intid, active, wiring)
            };
            listing.offer(entry);
        }
    }

    /// The only interrupt that is in flight, if that is an SGI that one sender has made pending. `control` is GICD_CTLR.
    #[inline]
    pub fn only_sgi(&self, control: u32) -> Option<Entry> {
        let of = |enabled: u32, group| if enabled != 0 { group } else { 0 };
        let forwarded = of(control & 1, !self.group1) | of(control & 2, self.group1);
        let pending = (self.pending | self.line) & forwarded & self.enabled;
        let intid = u8::try_from(pending.trailing_zeros()).ok()?;
        let only = pending & !SGI_BITS == 0 && pending.is_power_of_two();
        let one_sender = self.senders_of(intid).is_power_of_two();
        let plain = self.active | self.held == 0 && !self.asked && self.later == Later::NONE;
        (only && one_sender && plain).then(|| self.sgi(intid, true, false))
    }

    /// The guest has taken and ended a `listed` SGI, which was the only interrupt in flight, and [`Self::only_sgi`] has said
    /// that nobody waits for it.
    #[inline]
    pub fn sgi_ended(&mut self, listed: &Entry) {
        self.turn = listed.intid + 1;
        self.listed = 0;
        if let Some(sender) = self.sender.get_mut(usize::from(listed.intid)) {
            *sender = listed.source;
        }
    }

    fn sgi(&self, intid: u8, pending: bool, active: bool) -> Entry {
        let (senders, last) = (self.senders_of(intid), self.sender_of(intid));
        let source = if active { last } else { next(senders, last) };
        let others = pending && senders & !bit8(source) != 0;
        let again = pending && senders & bit8(source) != 0 && !others;
        Entry {
            intid: u16::from(intid),
            source,
            priority: self.priority_of(intid),
            group1: self.is_group1(intid),
            state: match (again, active) {
                (true, true) => State::PendingAndActive,
                (false, true) => State::Active,
                (_, false) => State::Pending,
            },
            hardware: None,
            tell: others,
        }
    }

    fn ppi(&self, intid: u8, active: bool, wiring: &Wiring) -> Entry {
        let linked = intid == wiring.linked.0 && self.held & bit(intid) != 0;
        Entry {
            intid: u16::from(intid),
            source: 0,
            priority: self.priority_of(intid),
            group1: self.is_group1(intid),
            // Whether it is pending again is known when it has been deactivated: by hardware if it is linked, by
            // maintenance if not.
            state: if active {
                State::Active
            } else {
                State::Pending
            },
            hardware: linked.then_some(wiring.linked.1),
            tell: !linked,
        }
    }

    /// Takes what is now listed out of the model.
    pub fn remove(&mut self, entry: &Entry) {
        let Ok(intid) = u8::try_from(entry.intid) else {
            return;
        };
        self.active &= !bit(intid);
        self.listed |= bit(intid);
        if let Some(senders) = self
            .senders
            .get_mut(usize::from(intid))
            .filter(|_| entry.state.is_pending())
        {
            *senders &= !bit8(entry.source);
            if *senders == 0 {
                self.pending &= !bit(intid);
            }
        }
    }

    pub(super) fn senders_of(&self, intid: u8) -> u8 {
        self.senders.get(usize::from(intid)).copied().unwrap_or(0)
    }

    fn sender_of(&self, intid: u8) -> u8 {
        self.sender.get(usize::from(intid)).copied().unwrap_or(0)
    }

    fn priority_of(&self, intid: u8) -> u8 {
        self.priority.get(usize::from(intid)).copied().unwrap_or(0)
    }
}

/// Of `senders`, the one behind `last`.
fn next(senders: u8, last: u8) -> u8 {
    let behind = (last + 1) & 7;
    let distance = senders.rotate_right(u32::from(behind)).trailing_zeros();
    u8::try_from(distance).map_or(0, |distance| (behind + distance) & 7)
}

/// The numbers of the bits that are set.
pub(super) struct Bits(pub(super) u32);

impl Iterator for Bits {
    type Item = u8;

    fn next(&mut self) -> Option<u8> {
        let position = u8::try_from(self.0.trailing_zeros())
            .ok()
            .filter(|it| *it < 32)?;
        self.0 &= self.0 - 1;
        Some(position)
    }
}

pub(super) const fn bit(intid: u8) -> u32 {
    1_u32.unbounded_shl(intid as u32)
}

const fn bit8(source: u8) -> u8 {
    1 << (source & 7)
}

#[cfg(test)]
mod tests {
    use super::{Entry, Listing, Private, State, Wiring};
    use crate::vm::vgic::flight::Models;
    use crate::vm::vgic::listing::Groups;
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

    fn list(private: &mut Private, wiring: &Wiring) -> Listing {
        let mut models = Models {
            home: 0,
            private,
            shared: None,
        };
        models.list(wiring, |_| false, || Groups::BOTH).0
    }

    fn listed(listing: &Listing) -> Vec<(u16, State)> {
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
    fn senders_take_turns_whether_the_end_is_seen_or_not() {
        for end in [Some(State::Active), None] {
            let mut private = Private::new(false);
            private.write(ISENABLER, u32::MAX, u32::MAX);
            let wiring = Wiring {
                group0_enabled: true,
                ..WIRING
            };
            private.send(3, 0);
            let mut sources = Vec::new();
            for _ in 0..4 {
                private.send(3, 5);
                private.send(3, 0);
                let entry = only(&list(&mut private, &wiring));
                sources.push(entry.source);
                private.take_back(&entry, end);
                private.deactivate(3);
            }
            assert_eq!(sources, [5, 0, 5, 0], "{end:?}");
        }
    }

    #[test]
    fn an_sgi_is_delivered_once_and_merges_while_pending() {
        let mut private = enabled();
        private.send(3, 0);
        private.send(3, 0);
        let entry = only(&list(&mut private, &WIRING));
        assert_eq!(
            (entry.intid, entry.state, entry.hardware),
            (3, State::Pending, None)
        );
        private.take_back(&entry, None);
        assert_eq!(listed(&list(&mut private, &WIRING)), []);
    }

    #[test]
    fn an_sgi_sent_while_its_handler_runs_is_pending_again() {
        let mut private = enabled();
        private.send(3, 0);
        let entry = only(&list(&mut private, &WIRING));
        private.take_back(&entry, Some(State::Active));
        private.send(3, 0);
        assert_eq!(
            listed(&list(&mut private, &WIRING)),
            [(3, State::PendingAndActive)]
        );
    }

    #[test]
    fn gicv2_keeps_senders_apart_and_lists_one_of_them_at_a_time() {
        let mut private = enabled();
        let mut served = Vec::new();
        private.send(3, 0);
        private.send(3, 5);
        for again in [true, true, false] {
            let entry = only(&list(&mut private, &WIRING));
            served.push((entry.source, entry.tell));
            if again {
                private.send(3, entry.source);
            }
            private.take_back(&entry, Some(State::Active));
            let entry = only(&list(&mut private, &WIRING));
            assert_eq!(entry.source, served.last().unwrap().0);
            assert!(entry.tell, "the other sender waits for the end");
            private.take_back(&entry, None);
        }
        assert_eq!(served, [(5, true), (0, true), (5, true)]);
    }

    #[test]
    fn a_line_is_pending_again_when_the_guest_has_ended_its_interrupt() {
        let mut private = enabled();
        assert!(private.set_line(30, true) && !private.set_line(30, true));
        let entry = only(&list(&mut private, &WIRING));
        assert_eq!(
            (entry.intid, entry.state, entry.tell),
            (30, State::Pending, true)
        );
        private.take_back(&entry, Some(State::Active));
        let entry = only(&list(&mut private, &WIRING));
        assert_eq!((entry.state, entry.tell), (State::Active, true));
        assert_eq!(private.read(ISPENDR), 1 << 30);
        private.take_back(&entry, None);
        assert_eq!(listed(&list(&mut private, &WIRING)), [(30, State::Pending)]);
        private.take_back(&entry, None);
        assert!(private.set_line(30, false));
        assert_eq!(listed(&list(&mut private, &WIRING)), []);
    }

    #[test]
    fn a_line_that_drops_before_the_guest_took_it_is_withdrawn() {
        let mut private = enabled();
        private.set_line(30, true);
        let entry = only(&list(&mut private, &WIRING));
        private.set_line(30, false);
        private.take_back(&entry, Some(State::Pending));
        assert_eq!(listed(&list(&mut private, &WIRING)), []);
    }

    #[test]
    fn a_ppi_made_pending_by_a_write_is_so_until_it_is_taken() {
        let mut private = enabled();
        private.write(ISPENDR, 1 << 20, u32::MAX);
        let entry = only(&list(&mut private, &WIRING));
        private.take_back(&entry, Some(State::Pending));
        let entry = only(&list(&mut private, &WIRING));
        private.take_back(&entry, Some(State::Active));
        private.write(ISPENDR, 1 << 20, u32::MAX);
        let entry = only(&list(&mut private, &WIRING));
        assert_eq!(entry.state, State::Active);
        private.take_back(&entry, None);
        let entry = only(&list(&mut private, &WIRING));
        assert_eq!(entry.state, State::Pending);
        private.take_back(&entry, None);
        assert_eq!(listed(&list(&mut private, &WIRING)), []);
    }

    #[test]
    fn lines_of_sgis_do_not_exist() {
        let mut private = enabled();
        for intid in (0..16).chain(32..=255) {
            assert!(!private.set_line(intid, true), "{intid}");
        }
        assert_eq!(listed(&list(&mut private, &WIRING)), []);
    }

    #[test]
    fn a_disabled_interrupt_waits_in_the_model() {
        let mut private = enabled();
        private.write(ICENABLER, 1 << 3, u32::MAX);
        private.send(3, 0);
        assert_eq!(listed(&list(&mut private, &WIRING)), []);
        assert_eq!(private.read(ISPENDR), 1 << 3);
        private.write(ISENABLER, 1 << 3, u32::MAX);
        assert_eq!(listed(&list(&mut private, &WIRING)), [(3, State::Pending)]);
    }

    #[test]
    fn groups_that_the_distributor_does_not_forward_wait() {
        let mut private = enabled();
        private.send(1, 0);
        assert_eq!(
            listed(&list(
                &mut private,
                &Wiring {
                    group1_enabled: false,
                    ..WIRING
                }
            )),
            []
        );
        assert_eq!(listed(&list(&mut private, &WIRING)), [(1, State::Pending)]);
    }

    #[test]
    fn the_timer_is_linked_until_the_guest_deactivates_it() {
        let mut private = enabled();
        private.hold(27);
        let entry = only(&list(&mut private, &WIRING));
        assert_eq!((entry.state, entry.hardware), (State::Pending, Some(27)));
        private.take_back(&entry, Some(State::Active));
        assert!(private.holds());
        let entry = only(&list(
            &mut private,
            &Wiring {
                asserted: false,
                ..WIRING
            },
        ));
        assert_eq!((entry.state, entry.hardware), (State::Active, Some(27)));
        private.take_back(&entry, None);
        assert!(!private.holds());
        assert_eq!(listed(&list(&mut private, &WIRING)), []);
    }

    #[test]
    fn a_timer_that_fires_again_before_the_model_saw_its_end_is_delivered_again() {
        let mut private = enabled();
        private.hold(27);
        let entry = only(&list(&mut private, &WIRING));
        private.hold(27);
        private.take_back(&entry, None);
        let entry = only(&list(&mut private, &WIRING));
        assert_eq!((entry.state, entry.hardware), (State::Pending, Some(27)));
        private.take_back(&entry, None);
        assert!(!private.holds());
    }

    #[test]
    fn a_timer_that_is_disabled_while_pending_is_not_leaked() {
        let mut private = enabled();
        private.hold(27);
        let entry = only(&list(&mut private, &WIRING));
        private.take_back(&entry, Some(State::Pending));
        private.write(ICENABLER, 1 << 27, u32::MAX);
        let listing = list(&mut private, &WIRING);
        assert!(!listing.release && listed(&listing).is_empty() && private.holds());
        let listing = list(
            &mut private,
            &Wiring {
                asserted: false,
                ..WIRING
            },
        );
        assert!(listing.release && !private.holds());
    }

    #[test]
    fn a_timer_that_stays_disabled_is_delivered_when_it_is_enabled() {
        let mut private = enabled();
        private.write(ICENABLER, 1 << 27, u32::MAX);
        private.hold(27);
        assert!(listed(&list(&mut private, &WIRING)).is_empty());
        assert_eq!(private.read(ISPENDR), 1 << 27);
        private.write(ISENABLER, 1 << 27, u32::MAX);
        assert_eq!(only(&list(&mut private, &WIRING)).hardware, Some(27));
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
        let listing = list(&mut private, &WIRING);
        assert!(listing.pending_left);
        assert_eq!(
            listed(&listing).iter().map(|it| it.0).collect::<Vec<_>>(),
            [5, 4, 3, 2]
        );
        for entry in listing.entries.iter().flatten() {
            private.take_back(entry, None);
        }
        let listing = list(&mut private, &WIRING);
        assert!(!listing.pending_left);
        assert_eq!(listed(&listing), [(1, State::Pending), (0, State::Pending)]);
    }

    #[test]
    fn an_active_interrupt_without_a_list_register_can_be_ended() {
        let mut private = enabled();
        private.write_v3(IPRIORITYR, 0x10 << 16, u32::MAX);
        private.write_v3(ISACTIVER, 1 << 2 | 1 << 20, u32::MAX);
        assert_eq!(private.read(ISACTIVER), 1 << 2 | 1 << 20);
        assert_eq!(private.most_urgent_active(), Some((0, 20)));
        private.deactivate(20);
        assert_eq!(private.most_urgent_active(), Some((0x10, 2)));
        private.deactivate(2);
        assert_eq!(private.most_urgent_active(), None);
    }
}
