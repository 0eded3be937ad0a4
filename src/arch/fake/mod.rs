//! The host's stand-in for the machine, one per thread.
//!
//! A [`Machine`] is several CPUs with their VTTBR_EL2 and TLBs. Software above `arch` runs on it unchanged, one CPU at a
//! time ([`Machine::on`]); the instructions of [`instructions`] act on the CPU it runs on. Its TLBs keep whatever the
//! architecture lets them keep, for as long as it lets them, and each guest access chooses among what may still be
//! there. An *oracle* watches every descriptor written, every barrier and every invalidation, and collects what is wrong
//! ([`Machine::violations`]).
//!
//! Without a machine on the thread the instructions do nothing, which is how protocols are model-checked: loom explores
//! the interleavings, and the test itself models what it needs of hardware through [`observe`].
//!
//! | file | what |
//! |---|---|
//! | `descriptor` | what hardware makes of 64 bits, written independently of `mmu::descriptor` |
//! | `memory` | tables, their descriptors and where they hang |
//! | `tlb` | what may still be cached although memory says otherwise |
//! | `rights` | what permission indices mean, and meant |
//! | `marks` | what hardware itself writes into descriptors |
//! | `walkers` | what software may still look at although it hangs nowhere |
//! | `state` | what barriers, invalidations and stores do to all that |
//! | `guest` | what may come of a guest's access |
//! | `oracle`, `judge` | what is a violation |
//!
//! Not modelled: caches and their maintenance, VMs whose permissions are of different kinds, conflict aborts, several guests' stage-1
//! tables, stores reordered before the program's own (loom's part).

extern crate std;

use core::cell::{Cell, RefCell};
use std::boxed::Box;
use std::rc::Rc;
use std::vec::Vec;

use crate::addr::{Ipa, Pa};

mod descriptor;
mod guest;
pub mod host;
pub mod instructions;
#[cfg(loom)]
pub mod interleaved;
mod judge;
mod marks;
mod memory;
mod oracle;
mod random;
mod rights;
mod state;
mod tlb;
mod walkers;
pub mod world;

pub use guest::{Abort, Access, FaultKind, Outcome, STAGE1_OFFSET, ipa_of, va_of};
pub use oracle::{Change, Violation};
pub use random::Random;
pub use tlb::Cause;

use guest::Possible;
use state::State;

/// Most CPUs of a machine.
pub const MAX_CPUS: usize = 64;

/// What a machine's CPUs have.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Features {
    /// FEAT_BBM level.
    pub bbm: u8,
    /// Level of the initial tables, as VTCR_EL2 says.
    pub initial_level: u8,
    /// Number of concatenated initial tables.
    pub initial_tables: u64,
    /// Whether HPFAR_EL2 is valid on permission faults, too.
    pub hpfar_on_permission: bool,
    /// Whether permissions are indirect (FEAT_S2PIE, VTCR_EL2.S2PIE = 1), for every guest.
    pub indirection: bool,
    /// Whether hardware manages access flags and dirty state (FEAT_HAFDBS, VTCR_EL2.{HA, HD} = 1), for every guest.
    pub dirty_state: bool,
}

impl Default for Features {
    /// The least there is, with a 39-bit guest address space.
    fn default() -> Self {
        Self {
            bbm: 0,
            initial_level: 1,
            initial_tables: 1,
            hpfar_on_permission: false,
            indirection: false,
            dirty_state: false,
        }
    }
}

/// What a CPU did that somebody outside of it can notice.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Event {
    /// `DSB ISHST`.
    DsbIshst,
    /// `DSB ISH`.
    DsbIsh,
    /// `DSB NSHST`.
    DsbNshst,
    /// `DSB NSH`.
    DsbNsh,
    /// `DSB LD`.
    DsbLd,
    /// `TLBI IPAS2E1IS`.
    TlbiIpas2e1is(Ipa),
    /// `TLBI IPAS2E1`.
    TlbiIpas2e1(Ipa),
    /// `TLBI RIPAS2E1IS`, with its pages.
    TlbiRipas2e1is(Ipa, u64),
    /// `TLBI VMALLE1IS`.
    TlbiVmalle1is,
    /// `TLBI VMALLE1`.
    TlbiVmalle1,
    /// `TLBI VMALLS12E1IS`.
    TlbiVmalls12e1is,
    /// `TLBI VMALLS12E1`.
    TlbiVmalls12e1,
    /// `TLBI VAAE1`.
    TlbiVaae1(crate::addr::Va),
    /// `TLBI ALLE1IS`.
    TlbiAlle1is,
    /// EL2 showed a guest what it wrote: from where, and how many bytes.
    ShowToGuest(Pa, u64),
    /// `IC IALLUIS`.
    ForgetInstructions,
    /// A CPU polls for another.
    Yield,
    /// VTTBR_EL2 was loaded.
    Vttbr(u64),
    /// S2PIR_EL2 was written.
    S2pir(u64),
    /// A page became a table or ceased to be one.
    Table(Pa, bool),
    /// A descriptor changed.
    Descriptor {
        /// Where.
        slot: Pa,
        /// From.
        old: u64,
        /// To.
        new: u64,
    },
}

type Observer = Rc<dyn Fn(Event)>;

std::thread_local! {
    static MACHINE: RefCell<Option<Rc<Inner>>> = const { RefCell::new(None) };
    static OBSERVER: RefCell<Option<Observer>> = const { RefCell::new(None) };
}

#[derive(Debug)]
struct Inner {
    state: RefCell<State>,
    blocks: Box<[usize]>,
    log: RefCell<Option<Vec<Event>>>,
    random: Cell<Random>,
}

/// A fake machine: the one of this thread until it is dropped.
#[derive(Debug)]
pub struct Machine(Rc<Inner>);

/// Calls `observer` after each event on this thread, with or without a machine; `None` ends that.
pub fn observe(observer: Option<Observer>) {
    OBSERVER.with_borrow_mut(|slot| *slot = observer);
}

impl Machine {
    /// A machine of `cpus` CPUs (up to [`MAX_CPUS`]), which replaces this thread's machine. It runs on CPU 0.
    pub fn new(cpus: usize, features: Features) -> Self {
        assert!((1..=MAX_CPUS).contains(&cpus), "1 to {MAX_CPUS} CPUs");
        let inner = Rc::new(Inner {
            state: RefCell::new(State::new(cpus, features)),
            blocks: (0..cpus).map(|_| new_block()).collect(),
            log: RefCell::new(None),
            random: Cell::new(Random::new(1)),
        });
        MACHINE.set(Some(Rc::clone(&inner)));
        Self(inner)
    }

    /// Seeds the choice among what may come of an access.
    pub fn seed(&self, seed: u64) {
        self.0.random.set(Random::new(seed));
    }

    /// Runs `work` as software of `cpu`. Nests: what a CPU does in the middle of another's work.
    pub fn on<R>(&self, cpu: usize, work: impl FnOnce() -> R) -> R {
        let before = core::mem::replace(&mut self.0.state.borrow_mut().current, cpu);
        let _back = Back(&self.0, before);
        work()
    }

    /// The CPU whose software runs.
    pub fn current(&self) -> usize {
        self.0.state.borrow().current
    }

    /// Loads VTTBR_EL2 on `cpu`, as entering a guest does.
    pub fn load_vttbr(&self, cpu: usize, vttbr: u64) {
        self.on(cpu, || instructions::set_vttbr(vttbr));
    }

    /// Everything that may come of an access by the guest on `cpu`: the fresh walk's outcome first. Empty when the CPU
    /// holds no guest.
    pub fn outcomes(&self, cpu: usize, ipa: Ipa, access: Access) -> Vec<Outcome> {
        let possible = self.0.state.borrow().possible(cpu, ipa, access);
        let mut unique = Vec::new();
        for Possible { outcome, .. } in possible {
            if !unique.contains(&outcome) {
                unique.push(outcome);
            }
        }
        unique
    }

    /// The guest on `cpu` runs from here on: it may cache whatever its registers lead to.
    pub fn enter_guest(&self, cpu: usize) {
        self.0.state.borrow_mut().enter(cpu);
    }

    /// The CPU is at EL2 and stays there until it enters a guest again, whatever its registers say.
    pub fn leave_guest(&self, cpu: usize) {
        if let Some(cpu) = self.0.state.borrow_mut().cpus.get_mut(cpu) {
            cpu.outside = true;
        }
    }

    /// Hardware that marks a leaf writes the mark into the memory at the leaf's address, too.
    ///
    /// # Safety
    ///
    /// Every table that the machine is told of is memory of this process until it is told that the table ends, and is
    /// accessed atomically.
    pub unsafe fn tables_are_memory(&self) {
        self.0.state.borrow_mut().tables_are_memory = true;
    }

    /// One of [`Machine::outcomes`], by the machine's seed; `None` when the CPU holds no guest.
    pub fn guest_access(&self, cpu: usize, ipa: Ipa, access: Access) -> Option<Outcome> {
        self.enter_guest(cpu);
        let mut state = self.0.state.borrow_mut();
        let possible = state.possible(cpu, ipa, access);
        let mut random = self.0.random.get();
        let choice = random.below(possible.len().max(1));
        self.0.random.set(random);
        let chosen = possible.get(choice)?;
        if let Some(mark) = chosen.mark {
            state.mark(mark);
        }
        Some(chosen.outcome)
    }

    /// What the oracle found so far.
    pub fn violations(&self) -> Vec<Violation> {
        self.0.state.borrow().violations.clone()
    }

    /// What the oracle found since the last call.
    pub fn take_violations(&self) -> Vec<Violation> {
        core::mem::take(&mut self.0.state.borrow_mut().violations)
    }

    /// Finds fault with any *stale* writable entry for `bytes` bytes from `ipa` under `vmid`, on any CPU: for use where
    /// an entry point promises that none is left. What memory says now is another question.
    pub fn assert_no_writable(&self, vmid: u16, ipa: Ipa, bytes: u64) {
        let mut state = self.0.state.borrow_mut();
        let stale = state.tlb.overlapping(vmid, ipa.raw(), bytes);
        let writable = stale
            .iter()
            .filter(|leaf| state.permits_writes(leaf) && state.is_stale(leaf));
        let found: Vec<_> = writable
            .map(|leaf| Violation::StaleWritable {
                ipa: Ipa::new(leaf.place.ipa),
                vmid,
                cause: leaf.cause(),
            })
            .collect();
        state.violations.extend(found);
    }

    /// Finds fault with any way, fresh or stale, in which a CPU may write to the page `memory` at `ipa` without a fault and
    /// without a mark of hardware's: for use where the page is not recorded as written.
    pub fn assert_unwritable(&self, ipa: Ipa, memory: Pa) {
        self.0.state.borrow_mut().judge_unwritable(ipa, memory);
    }

    /// Finds fault with any stale entry for `bytes` bytes from `ipa` under `vmid`, on any CPU.
    pub fn assert_no_stale(&self, vmid: u16, ipa: Ipa, bytes: u64) {
        let mut state = self.0.state.borrow_mut();
        let stale = state.tlb.overlapping(vmid, ipa.raw(), bytes);
        let found: Vec<_> = stale
            .iter()
            .filter(|leaf| state.is_stale(leaf))
            .map(|leaf| Violation::StaleTranslation {
                ipa: Ipa::new(leaf.place.ipa),
                vmid,
                cause: leaf.cause(),
            })
            .collect();
        state.violations.extend(found);
    }

    /// Finds fault with any entry, stale or current, that leads a guest to `bytes` bytes from `memory`: for use when
    /// guest memory is given back.
    pub fn assert_unreachable(&self, memory: Pa, bytes: u64) {
        let mut state = self.0.state.borrow_mut();
        let hit = |to: u64, span: u64| to < memory.raw() + bytes && memory.raw() < to + span;
        let mut found: Vec<_> = state
            .tlb
            .leaves()
            .filter(|leaf| hit(leaf.place.leaf.to, leaf.place.leaf.bytes))
            .map(|leaf| leaf.place.ipa)
            .collect();
        for place in state.current_leaves() {
            if hit(place.leaf.to, place.leaf.bytes) {
                found.push(place.ipa);
            }
        }
        for ipa in found {
            state.report(Violation::MemoryStillReachable { ipa: Ipa::new(ipa) });
        }
    }

    /// Starts to log events, or returns those since it started.
    pub fn take_log(&self) -> Vec<Event> {
        self.0
            .log
            .borrow_mut()
            .replace(Vec::new())
            .unwrap_or_default()
    }
}

/// Goes back to the CPU that ran before, also when the work in between ends in a panic.
struct Back<'m>(&'m Inner, usize);

impl Drop for Back<'_> {
    fn drop(&mut self) {
        self.0.state.borrow_mut().current = self.1;
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        MACHINE.with_borrow_mut(|slot| {
            if slot.as_ref().is_some_and(|now| Rc::ptr_eq(now, &self.0)) {
                *slot = None;
            }
        });
    }
}

/// Zeroed memory for a CPU's block, never freed, aligned as the block wants it.
fn new_block() -> usize {
    const BYTES: usize = 8192;
    const ALIGN: usize = 4096;
    let words = std::vec![0_u64; BYTES / 8].leak();
    words.as_ptr().expose_provenance().next_multiple_of(ALIGN)
}

fn machine() -> Option<Rc<Inner>> {
    MACHINE.with_borrow(Option::clone)
}

/// Lets `work` act on this thread's machine, logs `event` and tells the observer.
fn execute(event: Event, work: impl FnOnce(&mut State)) {
    if let Some(machine) = machine() {
        work(&mut machine.state.borrow_mut());
        if let Some(log) = machine.log.borrow_mut().as_mut() {
            log.push(event);
        }
    }
    if let Some(observer) = OBSERVER.with_borrow(Option::clone) {
        observer(event);
    }
}
