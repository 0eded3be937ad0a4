//! The shared interrupts (SPIs) of a VM, as a pure model.
//!
//! An SPI has one *home* at a time: the vCPU that has it listed or handles it, otherwise the one that its routing names.
//! Only the home lists it. Its state is here while it is not listed, and in its home's list registers while it is;
//! `listed` tells which. What devices and guests' registers do to it meanwhile is recorded here, and the home brings its
//! list registers up to date.
//!
//! An edge-triggered SPI is pending from the edge until it is taken; a level-sensitive one while its line is asserted, or
//! from a write to ISPENDR until it is taken.

use super::listing::Listing;
use super::lists::{Entry, State};
use super::private::{Bits, Later, Wiring};

/// The first SPI.
pub const FIRST: u16 = 32;
/// Number of SPIs.
pub const SPIS: u16 = 96;
/// Words of 32 SPIs.
pub(super) const WORDS: usize = SPIS as usize / 32;
const COUNT: usize = SPIS as usize;

/// How SPIs name the vCPU that gets them.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Routing {
    /// GICD_ITARGETSR: one bit for each of this many vCPUs.
    Targets(usize),
    /// GICD_IROUTER.
    Affinity,
}

impl Routing {
    /// How a VM of `vcpus` routes.
    pub const fn new(gicv3: bool, vcpus: usize) -> Self {
        if gicv3 {
            Self::Affinity
        } else {
            Self::Targets(vcpus)
        }
    }
}

/// Whom an SPI is for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Target {
    /// The vCPU with this affinity, if there is one.
    Affinity(u64),
    /// Any of the vCPUs whose bit is set.
    OneOf(u8),
    /// Any.
    Any,
    /// This vCPU has it.
    Home(usize),
}

/// The state of a word of SPIs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Seen {
    /// Of these, it is not known yet.
    pub asked: u32,
    /// Which question that is.
    number: u64,
    /// What ISPENDR reads.
    pub pending: u32,
    /// What ISACTIVER reads.
    pub active: u32,
}

/// IROUTER.Interrupt_Routing_Mode: any vCPU.
pub(super) const ANY: u32 = 1 << 31;
/// IROUTER.Aff2, Aff1 and Aff0; no vCPU has another Aff3 than 0, as GICD_TYPER.A3V says.
pub(super) const AFFINITY: u32 = 0xff_ffff;

/// The shared interrupts of a VM.
#[derive(Clone, Debug)]
pub struct Shared {
    pub(super) routing: Routing,
    pub(super) enabled: [u32; WORDS],
    pub(super) group1: [u32; WORDS],
    pub(super) edge: [u32; WORDS],
    /// Asserted lines.
    pub(super) line: [u32; WORDS],
    /// Made pending by an edge or a write, and not taken since.
    pub(super) pending: [u32; WORDS],
    /// Taken and not deactivated; not listed.
    pub(super) active: [u32; WORDS],
    /// In list registers of their home.
    pub(super) listed: [u32; WORDS],
    pub(super) priority: [u8; COUNT],
    /// IROUTER's lower word, or ITARGETSR's byte.
    pub(super) route: [u32; COUNT],
    /// The vCPU that has an SPI listed or handles it.
    pub(super) home: [u16; COUNT],
    /// Of those listed, what is to become of them when they come back.
    pub(super) later: [Later; WORDS],
    /// Somebody waits for these to come back.
    asked: [u32; WORDS],
    /// Of those that somebody waited for, which were pending and which active.
    found: [(u32, u32); WORDS],
    /// How many questions there were.
    questions: u64,
    /// Of each SPI that somebody waited for, how many there were when it last came back.
    answered: [u64; COUNT],
}

impl Shared {
    /// The state out of reset: disabled, level-sensitive, for the vCPU with affinity 0 or for nobody.
    pub const fn new(routing: Routing) -> Self {
        let group1 = matches!(routing, Routing::Affinity);
        Self {
            routing,
            enabled: [0; WORDS],
            group1: [if group1 { u32::MAX } else { 0 }; WORDS],
            edge: [0; WORDS],
            line: [0; WORDS],
            pending: [0; WORDS],
            active: [0; WORDS],
            listed: [0; WORDS],
            priority: [0; COUNT],
            route: [0; COUNT],
            home: [0; COUNT],
            later: [Later::NONE; WORDS],
            asked: [0; WORDS],
            found: [(0, 0); WORDS],
            questions: 0,
            answered: [0; COUNT],
        }
    }

    /// How they name vCPUs.
    pub const fn routing(&self) -> Routing {
        self.routing
    }

    /// The device behind SPI `intid` asserts its line, or does not any more. An edge-triggered one becomes pending when it
    /// rises. Returns whether anything changed.
    pub fn set_line(&mut self, intid: u16, asserted: bool) -> bool {
        let Some(place) = Place::of(intid) else {
            return false;
        };
        let before = place.get(&self.line);
        place.set(&mut self.line, asserted);
        if asserted && !before && place.get(&self.edge) {
            place.set(&mut self.pending, true);
        }
        asserted != before
    }

    /// The device behind SPI `intid` sends an edge. One that is level-sensitive does not see it.
    pub fn pulse(&mut self, intid: u16) -> bool {
        let seen = Place::of(intid).filter(|place| place.get(&self.edge));
        if let Some(place) = seen {
            place.set(&mut self.pending, true);
        }
        seen.is_some()
    }

    /// Whom SPI `intid` concerns now: whoever has it listed, or should list it. `None`: nothing is in flight.
    pub fn concerned(&self, intid: u16) -> Option<Target> {
        let place = Place::of(intid)?;
        if place.get(&self.listed) || place.get(&self.active) {
            return Some(self.target(place));
        }
        let in_flight = place.get(&self.enabled) && self.is_pending(place);
        in_flight.then(|| self.target(place))
    }

    fn target(&self, place: Place) -> Target {
        if place.get(&self.listed) || place.get(&self.active) {
            return Target::Home(usize::from(place.of_each(&self.home)));
        }
        let route = place.of_each(&self.route);
        match self.routing {
            Routing::Affinity if route & ANY != 0 => Target::Any,
            Routing::Affinity => Target::Affinity(u64::from(route & AFFINITY)),
            // A single CPU has no target registers, and gets everything.
            Routing::Targets(1) => Target::OneOf(1),
            Routing::Targets(_) => Target::OneOf(route.to_le_bytes()[0]),
        }
    }

    fn is_pending(&self, place: Place) -> bool {
        place.get(&self.pending) || place.get(&self.line) && !place.get(&self.edge)
    }

    /// What ISPENDR reads of a word.
    pub(super) fn all_pending(&self, word: usize) -> u32 {
        let of = |words: &[u32; WORDS]| words.get(word).copied().unwrap_or(0);
        of(&self.pending) | of(&self.line) & !of(&self.edge)
    }

    /// Takes back what its home had `listed`, in the state the guest left it (`None`: deactivated).
    pub fn take_back(&mut self, listed: &Entry, state: Option<State>) {
        let Some(place) = Place::of(listed.intid) else {
            return;
        };
        let untaken = state.is_some_and(State::is_pending);
        let handled = state.is_some_and(State::is_active);
        let later = self.later.get_mut(place.word);
        let (pending, active, again) = later.map_or((untaken, handled, false), |later| {
            later.apply(place.mask(), untaken, handled)
        });
        place.set(&mut self.listed, false);
        place.set(&mut self.active, active);
        if place.get(&self.edge) {
            if pending {
                place.set(&mut self.pending, true);
            }
        } else if listed.state.is_pending() && !untaken {
            place.set(&mut self.pending, false);
        }
        if again {
            place.set(&mut self.pending, true);
        }
        self.answer(place);
    }

    fn answer(&mut self, place: Place) {
        if !place.get(&self.asked) {
            return;
        }
        place.set(&mut self.asked, false);
        if let Some(answered) = self.answered.get_mut(place.index()) {
            *answered = self.questions;
        }
        let (pending, active) = (self.is_pending(place), place.get(&self.active));
        if let Some(found) = self.found.get_mut(place.word) {
            let set =
                |bits: u32, it: bool| bits & !place.mask() | if it { place.mask() } else { 0 };
            *found = (set(found.0, pending), set(found.1, active));
        }
    }

    /// What is pending and active of a word. Those SPIs of it that are listed are asked for: their homes are to take them back,
    /// and [`Self::found`] then completes what was seen. It has come back once, however often others ask for it again.
    pub fn ask(&mut self, word: usize) -> Seen {
        self.questions += 1;
        let of = |words: &[u32; WORDS]| words.get(word).copied().unwrap_or(0);
        let seen = Seen {
            asked: of(&self.listed),
            number: self.questions,
            pending: self.all_pending(word),
            active: of(&self.active),
        };
        if let Some(asked) = self.asked.get_mut(word) {
            *asked |= seen.asked;
        }
        seen
    }

    /// Completes what was `seen` of a word. `None`: not everything that was asked for has come back.
    pub fn found(&self, word: usize, seen: Seen) -> Option<Seen> {
        let found = self.found.get(word).copied().unwrap_or_default();
        let answered = |bit| Place { word, bit }.of_each(&self.answered) >= seen.number;
        let complete = |found: u32, seen_then: u32| found & seen.asked | seen_then & !seen.asked;
        Bits(seen.asked).all(answered).then(|| Seen {
            asked: 0,
            number: seen.number,
            pending: complete(found.0, seen.pending),
            active: complete(found.1, seen.active),
        })
    }

    /// A write makes SPIs of a word active: on the vCPU that they are for, unless another handles them.
    pub(super) fn activate(
        &mut self,
        word: usize,
        bits: u32,
        home: impl Fn(Target) -> Option<usize>,
    ) {
        for bit in Bits(bits) {
            let place = Place { word, bit };
            let handler = home(self.target(place)).and_then(|home| u16::try_from(home).ok());
            if let (Some(of), Some(handler)) = (self.home.get_mut(place.index()), handler) {
                *of = handler;
            }
        }
        self.set_active(word, bits, true);
    }

    /// A write made SPIs of a word pending, or ended that.
    pub(super) fn set_pending(&mut self, word: usize, bits: u32, pending: bool) {
        let listed = self.listed.get(word).copied().unwrap_or(0);
        if let Some(later) = self.later.get_mut(word) {
            later.set_pending(bits & listed, pending);
        }
        if let Some(word) = self.pending.get_mut(word) {
            *word = if pending { *word | bits } else { *word & !bits };
        }
    }

    /// A write made SPIs of a word active, or ended that.
    pub(super) fn set_active(&mut self, word: usize, bits: u32, active: bool) {
        let listed = self.listed.get(word).copied().unwrap_or(0);
        if let Some(later) = self.later.get_mut(word) {
            later.set_active(bits & listed, active);
        }
        let here = bits & !listed;
        if let Some(word) = self.active.get_mut(word) {
            *word = if active { *word | here } else { *word & !here };
        }
    }

    /// The most urgent active SPI of vCPU `home`: its priority and its number.
    pub fn most_urgent_active(&self, home: usize) -> Option<(u8, u16)> {
        places(&self.active)
            .filter(|place| usize::from(place.of_each(&self.home)) == home)
            .map(|place| (place.of_each(&self.priority), place.intid()))
            .min()
    }

    /// A guest has ended SPI `intid`; one that is listed is ended when it comes back.
    pub fn deactivate(&mut self, intid: u16) {
        if let Some(place) = Place::of(intid) {
            self.set_active(place.word, place.mask(), false);
        }
    }

    /// Offers to `listing` what is in flight for the vCPU of which `is_home` knows whether it is meant. Returns whether
    /// there was anything.
    pub fn offer(
        &self,
        wiring: &Wiring,
        is_home: impl Fn(Target) -> bool,
        listing: &mut Listing,
    ) -> bool {
        let mut any = false;
        for word in 0..WORDS {
            let of = |words: &[u32; WORDS]| words.get(word).copied().unwrap_or(0);
            let waiting = self.all_pending(word) & of(&self.enabled);
            let deliver = wiring.forwarded(of(&self.group1));
            let free = !of(&self.listed);
            for bit in Bits((waiting | of(&self.active)) & free) {
                let place = Place { word, bit };
                if !is_home(self.target(place)) {
                    continue;
                }
                any = true;
                if let Some(entry) = self.entry(place, waiting & deliver) {
                    listing.offer(entry);
                }
            }
        }
        any
    }

    fn entry(&self, place: Place, pending: u32) -> Option<Entry> {
        let (pending, active) = (pending & place.mask() != 0, place.get(&self.active));
        let edge = place.get(&self.edge);
        let state = match (pending, active) {
            (true, true) if edge => State::PendingAndActive,
            // Whether a level-sensitive one is pending again is known when it has been deactivated.
            (_, true) => State::Active,
            (true, false) => State::Pending,
            (false, false) => return None,
        };
        Some(Entry {
            intid: place.intid(),
            source: 0,
            priority: place.of_each(&self.priority),
            group1: place.get(&self.group1),
            state,
            hardware: None,
            tell: !edge,
        })
    }

    /// Takes what vCPU `home` now lists out of the model.
    pub fn remove(&mut self, entry: &Entry, home: usize) {
        let Some(place) = Place::of(entry.intid) else {
            return;
        };
        place.set(&mut self.listed, true);
        place.set(&mut self.active, false);
        if entry.state.is_pending() && place.get(&self.edge) {
            place.set(&mut self.pending, false);
        }
        if let Some(of) = self.home.get_mut(place.index()) {
            *of = u16::try_from(home).unwrap_or(u16::MAX);
        }
    }
}

/// Where an SPI's state is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    word: usize,
    bit: u8,
}

impl Place {
    pub(super) fn of(intid: u16) -> Option<Self> {
        let index = intid.checked_sub(FIRST).filter(|index| *index < SPIS)?;
        Some(Self {
            word: usize::from(index / 32),
            bit: u8::try_from(index % 32).ok()?,
        })
    }

    fn index(self) -> usize {
        32 * self.word + usize::from(self.bit)
    }

    pub(super) fn intid(self) -> u16 {
        u16::try_from(self.index()).unwrap_or(SPIS) + FIRST
    }

    const fn mask(self) -> u32 {
        1_u32.unbounded_shl(self.bit as u32)
    }

    pub(super) fn get(self, words: &[u32; WORDS]) -> bool {
        words
            .get(self.word)
            .is_some_and(|word| word & self.mask() != 0)
    }

    pub(super) fn set(self, words: &mut [u32; WORDS], it: bool) {
        if let Some(word) = words.get_mut(self.word) {
            *word = if it {
                *word | self.mask()
            } else {
                *word & !self.mask()
            };
        }
    }

    fn of_each<T: Copy + Default>(self, each: &[T; COUNT]) -> T {
        each.get(self.index()).copied().unwrap_or_default()
    }
}

/// The SPIs whose bits are set.
fn places(words: &[u32; WORDS]) -> impl Iterator<Item = Place> {
    words
        .iter()
        .enumerate()
        .flat_map(|(word, bits)| Bits(*bits).map(move |bit| Place { word, bit }))
}

#[cfg(test)]
mod tests {
    use super::{Routing, Shared, State, Target};
    use crate::vm::vgic::listing::{Groups, Listing};
    use crate::vm::vgic::lists::Entry;
    use crate::vm::vgic::private::Wiring;

    const WIRING: Wiring = Wiring {
        group0_enabled: false,
        group1_enabled: true,
        linked: (27, 27),
        asserted: false,
        lists: 4,
    };

    /// SPI 33 level-sensitive, SPI 40 edge-triggered, both enabled and for vCPU 0.
    fn enabled() -> Shared {
        let mut shared = Shared::new(Routing::Affinity);
        shared.write(0x104, 1 << 1 | 1 << 8, u32::MAX, |_| None);
        shared.write(0xc08, 0b10 << 16, u32::MAX, |_| None);
        shared
    }

    fn list(shared: &mut Shared, vcpu: u64) -> Vec<Entry> {
        let mut listing = Listing::new(4, 0, Groups::BOTH);
        let is_home = |target| match target {
            Target::Affinity(affinity) => affinity == vcpu,
            Target::Home(home) => home as u64 == vcpu,
            Target::OneOf(_) | Target::Any => vcpu == 0,
        };
        shared.offer(&WIRING, is_home, &mut listing);
        listing.close();
        let listed: Vec<Entry> = listing.listed().copied().collect();
        for entry in &listed {
            shared.remove(entry, usize::try_from(vcpu).unwrap());
        }
        listed
    }

    fn states(listed: &[Entry]) -> Vec<(u16, State)> {
        listed.iter().map(|it| (it.intid, it.state)).collect()
    }

    #[test]
    fn a_level_follows_its_line() {
        let mut shared = enabled();
        assert!(shared.set_line(33, true) && !shared.set_line(33, true));
        let [entry] = list(&mut shared, 0)[..] else {
            panic!("one is pending")
        };
        assert_eq!(
            (entry.intid, entry.state, entry.tell),
            (33, State::Pending, true)
        );
        assert_eq!(list(&mut shared, 0), [], "it is listed");
        shared.take_back(&entry, Some(State::Active));
        let listed = list(&mut shared, 0);
        assert_eq!(states(&listed), [(33, State::Active)]);
        shared.take_back(&listed[0], None);
        assert_eq!(states(&list(&mut shared, 0)), [(33, State::Pending)]);
        shared.set_line(33, false);
        assert_eq!(
            shared.concerned(33),
            Some(Target::Home(0)),
            "to be withdrawn"
        );
        shared.take_back(&entry, Some(State::Pending));
        assert_eq!(shared.concerned(33), None);
    }

    #[test]
    fn an_edge_is_kept_until_it_is_taken() {
        let mut shared = enabled();
        assert!(!shared.pulse(33), "level-sensitive");
        assert!(shared.pulse(40));
        let entry = list(&mut shared, 0)[0];
        assert_eq!(
            (entry.intid, entry.state, entry.tell),
            (40, State::Pending, false)
        );
        assert!(shared.pulse(40));
        shared.take_back(&entry, Some(State::Pending));
        let entry = list(&mut shared, 0)[0];
        assert!(shared.pulse(40));
        shared.take_back(&entry, Some(State::Active));
        let entry = list(&mut shared, 0)[0];
        assert_eq!(entry.state, State::PendingAndActive);
        shared.take_back(&entry, None);
        assert_eq!(list(&mut shared, 0), []);
        shared.set_line(40, true);
        shared.set_line(40, false);
        assert_eq!(states(&list(&mut shared, 0)), [(40, State::Pending)]);
    }

    #[test]
    fn an_interrupt_is_listed_by_its_home_only() {
        let mut shared = enabled();
        shared.pulse(40);
        shared.write(0x6000 + 8 * 40, 5, u32::MAX, |_| None);
        assert_eq!(shared.concerned(40), Some(Target::Affinity(5)));
        assert_eq!(list(&mut shared, 0), []);
        let entry = list(&mut shared, 5)[0];
        shared.write(0x6000 + 8 * 40, 0, u32::MAX, |_| None);
        shared.pulse(40);
        assert_eq!(shared.concerned(40), Some(Target::Home(5)));
        assert_eq!(list(&mut shared, 0), [], "vCPU 5 has it");
        shared.take_back(&entry, Some(State::Active));
        assert_eq!(list(&mut shared, 0), [], "vCPU 5 handles it");
        let entry = list(&mut shared, 5)[0];
        shared.take_back(&entry, Some(State::Pending));
        assert_eq!(states(&list(&mut shared, 0)), [(40, State::Pending)]);
    }

    #[test]
    fn what_is_disabled_concerns_nobody() {
        let mut shared = enabled();
        shared.write(0x184, u32::MAX, u32::MAX, |_| None);
        assert!(shared.set_line(33, true) && shared.pulse(40));
        assert_eq!((shared.concerned(33), shared.concerned(40)), (None, None));
        assert_eq!(shared.read(0x204), 1 << 1 | 1 << 8);
        shared.write(0x284, u32::MAX, u32::MAX, |_| None);
        assert_eq!(shared.read(0x204), 1 << 1, "a level cannot be cleared");
    }

    #[test]
    fn who_asks_is_answered_however_often_others_ask_again() {
        let mut shared = enabled();
        shared.set_line(33, true);
        shared.pulse(40);
        let listed = list(&mut shared, 0);
        let first = shared.ask(0);
        assert_eq!(first.asked, 1 << 1 | 1 << 8);
        shared.take_back(&listed[0], Some(State::Active));
        assert_eq!(shared.found(0, first), None, "one is still listed");
        shared.take_back(&listed[1], Some(State::Pending));
        list(&mut shared, 0);
        let second = shared.ask(0);
        let found = shared.found(0, first).expect("all have come back");
        assert_eq!((found.pending, found.active), (1 << 1 | 1 << 8, 1 << 1));
        assert_eq!(shared.found(0, second), None, "none has come back since");
    }

    #[test]
    fn interrupts_that_do_not_exist_are_ignored() {
        let mut shared = enabled();
        for intid in (0..32).chain(128..=u16::MAX) {
            assert!(!shared.set_line(intid, true) && !shared.pulse(intid));
            assert_eq!(shared.concerned(intid), None);
        }
    }
}
