//! Acknowledgements: which CPUs have loaded what was published into their registers.
//!
//! A grace period says what CPUs' software no longer looks at. A register is another matter: a CPU in the guest is quiescent,
//! and translates by the VTTBR_EL2 and S2PIR_EL2 that it loaded before it entered. So what such a register means is given
//! a *generation*, each CPU says which one it runs under, and whoever publishes a new one waits until nobody runs under an
//! older one, kicking those that do.
//!
//! # Protocol
//!
//! ```text
//!   runner                                  caller
//!   seen := ENTERING                        publish
//!   fence(SeqCst)            \  /           current := generation
//!   load what is published    \/            fence(SeqCst)
//!   registers, ISB            /\            seen < generation: kick, poll
//!   seen := generation (release) ───────▶   (acquire)
//!   ... leaves: DSB, seen := AWAY ──────▶
//! ```
//!
//! Either the caller reads ENTERING or an older generation, and waits; or it read AWAY before the runner's store, and the
//! runner, behind its fence, loads what the caller published. A runner acknowledges only after its accesses under the older
//! registers are complete (`DSB ISH`, by its caller). `tests/loom` has the orders that go wrong.

use alloc::boxed::Box;

use crate::arch;
use crate::arch::atomic::{AtomicU64, Ordering, fence};

/// This CPU runs nothing under any generation.
const AWAY: u64 = u64::MAX;
/// This CPU is about to run under some generation: older than any.
const ENTERING: u64 = 0;

/// The generation that one CPU runs under. Written by its own CPU only.
#[derive(Debug)]
#[repr(align(128))]
struct Seen(AtomicU64);

/// The generations that all CPUs run under.
#[derive(Debug)]
pub struct Acks {
    seen: Box<[Seen]>,
    current: AtomicU64,
}

impl Acks {
    /// `cpus` CPUs, all away; no generation yet. They are counted from 1.
    pub fn new(cpus: usize) -> Self {
        Self {
            seen: (0..cpus).map(|_| Seen(AtomicU64::new(AWAY))).collect(),
            current: AtomicU64::new(0),
        }
    }

    /// `generation` has just been published. One caller at a time.
    pub fn announce(&self, generation: u64) {
        self.current.store(generation, Ordering::Release);
        fence(Ordering::SeqCst);
    }

    /// The last generation announced.
    #[inline]
    pub fn current(&self) -> u64 {
        self.current.load(Ordering::Acquire)
    }

    /// `cpu`, the calling CPU, is about to load what is published. CPUs out of range are ignored, as everywhere here.
    pub fn begin(&self, cpu: usize) {
        self.set(cpu, ENTERING);
        fence(Ordering::SeqCst);
    }

    /// `cpu`, the calling CPU, has `generation` in its registers, and what it did under an older one is complete.
    pub fn acknowledge(&self, cpu: usize, generation: u64) {
        self.set(cpu, generation);
    }

    /// `cpu`, the calling CPU, runs nothing any more, and what it did is complete.
    pub fn leave(&self, cpu: usize) {
        self.set(cpu, AWAY);
    }

    /// What `cpu` runs under; the largest number when it is away.
    #[inline]
    pub fn seen(&self, cpu: usize) -> u64 {
        self.seen
            .get(cpu)
            .map_or(AWAY, |seen| seen.0.load(Ordering::Acquire))
    }

    /// Whether `cpu` runs nothing.
    #[inline]
    pub fn is_away(&self, cpu: usize) -> bool {
        self.seen(cpu) == AWAY
    }

    /// Whether `cpu` runs under some generation: it has acknowledged one and has not left since.
    #[inline]
    pub fn is_running(&self, cpu: usize) -> bool {
        !matches!(self.seen(cpu), ENTERING | AWAY)
    }

    /// Whether `cpu`, the calling CPU, has something to load before it goes on.
    #[inline]
    pub fn is_behind(&self, cpu: usize) -> bool {
        self.seen(cpu) != self.current()
    }

    /// Waits until no CPU runs under anything older than `generation`, which has been announced, and returns how many were
    /// kicked for it. The caller is quiescent and holds nothing that a runner waits for.
    pub fn await_all(&self, generation: u64, mut kick: impl FnMut(usize)) -> u64 {
        let mut kicked = 0;
        for cpu in 0..self.seen.len() {
            if self.seen(cpu) < generation {
                kick(cpu);
                kicked += 1;
            }
        }
        for cpu in 0..self.seen.len() {
            while self.seen(cpu) < generation {
                arch::yield_now();
            }
        }
        kicked
    }

    fn set(&self, cpu: usize, value: u64) {
        if let Some(seen) = self.seen.get(cpu) {
            seen.0.store(value, Ordering::Release);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::vec::Vec;

    use super::Acks;

    #[test]
    fn a_cpu_that_is_away_needs_no_kick() {
        let acks = Acks::new(3);
        acks.announce(1);
        assert!(acks.is_away(0));
        assert!(!acks.is_running(0));
        assert_eq!(acks.await_all(1, |_| panic!("nobody is there")), 0);
    }

    #[test]
    fn only_those_who_are_behind_are_kicked() {
        let acks = Acks::new(4);
        acks.announce(1);
        for cpu in [1, 2, 3] {
            acks.begin(cpu);
            assert!(acks.is_behind(cpu) && !acks.is_running(cpu));
            acks.acknowledge(cpu, 1);
            assert!(!acks.is_behind(cpu) && acks.is_running(cpu));
        }
        acks.leave(3);
        acks.announce(2);
        acks.acknowledge(1, 2);
        let mut kicked = Vec::new();
        let count = acks.await_all(2, |cpu| {
            kicked.push(cpu);
            acks.acknowledge(cpu, 2);
        });
        assert_eq!((count, kicked), (1, std::vec![2]));
    }

    #[test]
    fn a_caller_waits_for_the_last() {
        let acks = Acks::new(2);
        acks.announce(1);
        acks.acknowledge(1, 1);
        acks.announce(2);
        std::thread::scope(|scope| {
            let caller = scope.spawn(|| acks.await_all(2, |_| {}));
            assert!(!caller.is_finished());
            acks.acknowledge(1, 2);
            caller.join().unwrap();
        });
    }
}
