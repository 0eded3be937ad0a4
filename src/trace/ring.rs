//! The last things a CPU did, for an epitaph.
//!
//! Typed marks in a small ring that only the owning CPU writes. Recording is four plain stores; nothing is formatted
//! before somebody has to read it.

use core::fmt;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::arch;

/// Marks kept.
const SLOTS: usize = 16;

/// What happened. The comment of each says what its two values are.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u64)]
pub enum Mark {
    /// Nothing yet.
    None = 0,
    /// The CPU came up (index, affinity).
    Online,
    /// A guest was left (syndrome, preferred return address).
    Exit,
    /// A stage-2 fault (syndrome, intermediate physical address).
    Fault,
    /// A vCPU's state was loaded or put away (vCPU, 1 = loaded).
    Switch,
    /// An interrupt was taken (INTID, 0).
    Interrupt,
    /// Another CPU was interrupted (CPU, INTID).
    Kick,
    /// A controller's command (operation, first argument).
    Command,
    /// A VM was created or destroyed (VMID, 1 = created).
    Vm,
}

const MARKS: [Mark; 9] = [
    Mark::None,
    Mark::Online,
    Mark::Exit,
    Mark::Fault,
    Mark::Switch,
    Mark::Interrupt,
    Mark::Kick,
    Mark::Command,
    Mark::Vm,
];

const _: () = {
    let mut at = 0;
    while at < MARKS.len() {
        assert!(MARKS[at] as usize == at);
        at += 1;
    }
};

#[derive(Debug, Default)]
struct Slot {
    when: AtomicU64,
    mark: AtomicU64,
    values: [AtomicU64; 2],
}

/// The ring of one CPU. All-zero bytes are an empty ring.
#[derive(Debug, Default)]
pub struct Ring {
    next: AtomicU32,
    slots: [Slot; SLOTS],
}

/// One recorded mark.
#[derive(Clone, Copy, Debug)]
pub struct Recorded {
    when: u64,
    mark: Mark,
    values: [u64; 2],
}

impl Ring {
    /// Records `mark`. May be called by the owning CPU only; another caller may garble a mark, nothing else.
    pub fn record(&self, mark: Mark, values: [u64; 2]) {
        let next = self.next.load(Ordering::Relaxed);
        let slot = &self.slots[next as usize % SLOTS];
        slot.when.store(arch::counter(), Ordering::Relaxed);
        slot.mark.store(mark as u64, Ordering::Relaxed);
        slot.values[0].store(values[0], Ordering::Relaxed);
        slot.values[1].store(values[1], Ordering::Relaxed);
        self.next.store(next.wrapping_add(1), Ordering::Relaxed);
    }

    /// What was recorded, oldest first.
    pub fn latest(&self) -> impl Iterator<Item = Recorded> {
        let next = self.next.load(Ordering::Relaxed) as usize;
        (0..SLOTS).filter_map(move |age| {
            let slot = &self.slots[(next + age) % SLOTS];
            let mark = usize::try_from(slot.mark.load(Ordering::Relaxed)).ok()?;
            let mark = *MARKS.get(mark).filter(|&&it| it != Mark::None)?;
            let values = [0, 1].map(|it: usize| slot.values[it].load(Ordering::Relaxed));
            Some(Recorded {
                when: slot.when.load(Ordering::Relaxed),
                mark,
                values,
            })
        })
    }
}

impl fmt::Display for Recorded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [first, second] = self.values;
        write!(
            f,
            "at tick {}: {:?} {first:#x} {second:#x}",
            self.when, self.mark
        )
    }
}

#[cfg(test)]
mod tests {
    use super::{Mark, Ring, SLOTS};

    #[test]
    fn the_last_marks_are_kept_in_order() {
        let ring = Ring::default();
        assert_eq!(ring.latest().count(), 0);
        for number in 0..SLOTS as u64 + 3 {
            ring.record(Mark::Exit, [number, 0]);
        }
        let kept: Vec<_> = ring.latest().map(|it| it.values[0]).collect();
        assert_eq!(kept, (3..SLOTS as u64 + 3).collect::<Vec<_>>());
    }
}
