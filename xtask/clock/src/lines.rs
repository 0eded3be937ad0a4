//! What it costs to take a line of memory from another CPU.
//!
//! A line is 64 bytes. A CPU that stores to one that others have a copy of takes it from them; one that loads from a line
//! that was stored to since it last had it takes a copy. Both are transfers and take as long, and so does an upgrade, by which a CPU that
//! has a copy makes the others lose theirs; those of one line queue behind each other, and who takes it waits for those before. First touches cost nothing, and nothing is ever evicted: this is the
//! cost of sharing, not of caches.

/// Lines that are told apart; others push them out.
const PLACES: usize = 1 << 20;
/// No line.
const NONE: u64 = u64::MAX;

#[derive(Clone, Copy, Debug)]
struct Line {
    number: u64,
    /// CPUs with a copy.
    holders: u128,
    /// It was stored to: a copy comes from another CPU.
    written: bool,
    /// In which section it was last accessed by a CPU between its marks, and which such CPUs accessed it and stored to it then.
    section: u64,
    users: u128,
    writers: u128,
    /// When the last transfer was asked for, and when it ended.
    asked: u64,
    free_at: u64,
}

const EMPTY: Line = Line {
    number: NONE,
    holders: 0,
    written: false,
    section: 0,
    users: 0,
    writers: 0,
    asked: 0,
    free_at: 0,
};

/// A load or a store.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Use {
    pub(crate) cpu: usize,
    pub(crate) address: u64,
    pub(crate) stores: bool,
    /// On the CPU's clock.
    pub(crate) time: u64,
    /// The CPU is between its marks, in the section of this number.
    pub(crate) section: Option<u64>,
}

/// A line that comes from another CPU, or that others lose their copies of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Transfer {
    /// What it takes, and waiting for it.
    pub(crate) cost: u64,
    /// Another CPU between its marks has used it in the same section, in a way that makes a copy of it useless.
    pub(crate) among: bool,
    /// The CPU had a copy, and others lose theirs: nothing moves.
    pub(crate) upgrade: bool,
}

/// All lines.
pub(crate) struct Lines {
    places: Vec<Line>,
    cost: u64,
}

impl Lines {
    /// A transfer takes `cost` instructions.
    pub(crate) fn new(cost: u64) -> Self {
        Self {
            places: vec![EMPTY; PLACES],
            cost,
        }
    }

    /// Nobody has a copy of anything.
    pub(crate) fn forget(&mut self) {
        self.places.fill(EMPTY);
    }

    /// The transfer that an access needs, if it needs one.
    pub(crate) fn access(&mut self, it: Use) -> Option<Transfer> {
        let number = it.address >> 6;
        let place = usize::try_from(number ^ number >> 20).unwrap_or(0) % PLACES;
        let line = self.places.get_mut(place)?;
        let me = 1_u128 << it.cpu;
        if line.number != number {
            *line = Line { number, ..EMPTY };
        }
        let among = line.note(me, it);
        let (mine, others) = (line.holders & me != 0, line.holders & !me != 0);
        let needed = if it.stores {
            others
        } else {
            !mine && others && line.written
        };
        line.holders = if it.stores { me } else { line.holders | me };
        line.written |= it.stores;
        let (time, cost) = (it.time, self.cost);
        let of = |cost| Transfer {
            cost,
            among,
            upgrade: mine,
        };
        if !needed {
            return None;
        }
        // A transfer that was asked for in this CPU's future is after this one.
        if time < line.asked {
            return Some(of(cost));
        }
        line.asked = time;
        line.free_at = line.free_at.max(time) + cost;
        Some(of(line.free_at - time))
    }
}

impl Line {
    /// Keeps who uses it between marks; whether others have, so that this access takes it from one of them.
    fn note(&mut self, me: u128, it: Use) -> bool {
        let Some(section) = it.section else {
            return false;
        };
        if self.section != section {
            (self.section, self.users, self.writers) = (section, 0, 0);
        }
        let others = if it.stores { self.users } else { self.writers };
        self.users |= me;
        self.writers |= if it.stores { me } else { 0 };
        others & !me != 0
    }
}

#[cfg(test)]
mod tests {
    use super::{Lines, Use};

    /// What an access outside sections takes.
    fn access(lines: &mut Lines, cpu: usize, address: u64, stores: bool, time: u64) -> Option<u64> {
        let transfer = lines.access(Use {
            cpu,
            address,
            stores,
            time,
            section: None,
        });
        transfer.map(|it| it.cost)
    }

    #[test]
    fn a_line_of_ones_own_costs_nothing() {
        let mut lines = Lines::new(150);
        for time in 0..10 {
            assert_eq!(access(&mut lines, 0, 0x1000, time % 2 == 0, time), None);
        }
        assert_eq!(access(&mut lines, 1, 0x1040, true, 20), None);
    }

    #[test]
    fn a_store_takes_the_line_and_a_load_takes_a_copy_once() {
        let mut lines = Lines::new(150);
        assert_eq!(access(&mut lines, 0, 0x1000, true, 0), None);
        assert_eq!(access(&mut lines, 1, 0x1008, false, 1000), Some(150));
        assert_eq!(access(&mut lines, 1, 0x1008, false, 2000), None);
        assert_eq!(access(&mut lines, 0, 0x1000, true, 3000), Some(150));
        assert_eq!(access(&mut lines, 0, 0x1000, true, 3200), None);
    }

    #[test]
    fn what_nobody_stores_to_is_shared_for_nothing() {
        let mut lines = Lines::new(150);
        for cpu in 0..128 {
            assert_eq!(access(&mut lines, cpu, 0x2000, false, 5), None);
        }
        assert_eq!(access(&mut lines, 3, 0x2000, true, 6), Some(150));
    }

    #[test]
    fn transfers_of_one_line_queue_and_those_of_others_do_not() {
        let mut lines = Lines::new(150);
        access(&mut lines, 0, 0x1000, true, 0);
        access(&mut lines, 0, 0x2000, true, 0);
        assert_eq!(access(&mut lines, 1, 0x1000, true, 10), Some(150));
        assert_eq!(access(&mut lines, 2, 0x1000, true, 10), Some(300));
        assert_eq!(access(&mut lines, 3, 0x1000, true, 20), Some(440));
        assert_eq!(access(&mut lines, 3, 0x2000, true, 20), Some(150));
    }

    #[test]
    fn a_contended_line_moves_once_in_what_a_transfer_costs() {
        const CPUS: usize = 8;
        let mut lines = Lines::new(150);
        let mut clocks = [0_u64; CPUS];
        let rounds = 10_000;
        for _ in 0..rounds {
            // In the order of the clocks, as the schedule has it.
            let cpu = (0..CPUS).min_by_key(|&cpu| clocks[cpu]).expect("eight");
            let cost = access(&mut lines, cpu, 0x1000, true, clocks[cpu]);
            clocks[cpu] += 10 + cost.unwrap_or(0);
        }
        let each = clocks.iter().max().expect("eight") / rounds;
        assert!((143..=157).contains(&each), "{each}");
    }

    #[test]
    fn what_was_forgotten_costs_nothing_again() {
        let mut lines = Lines::new(150);
        access(&mut lines, 0, 0x1000, true, 0);
        lines.forget();
        assert_eq!(access(&mut lines, 1, 0x1000, true, 10), None);
        assert_eq!(access(&mut lines, 0, 0x1000, true, 20), Some(150));
    }

    #[test]
    fn a_transfer_in_the_future_delays_nobody() {
        let mut lines = Lines::new(150);
        access(&mut lines, 0, 0x1000, true, 0);
        assert_eq!(access(&mut lines, 1, 0x1000, true, 900), Some(150));
        assert_eq!(access(&mut lines, 2, 0x1000, true, 100), Some(150));
    }

    #[test]
    fn what_comes_from_peers_is_told_from_what_others_left_behind() {
        let mut lines = Lines::new(150);
        let mut among = |cpu, address, stores, section| {
            let transfer = lines.access(Use {
                cpu,
                address,
                stores,
                time: 0,
                section,
            });
            transfer.map(|it| (it.among, it.upgrade))
        };
        // The controller leaves it behind, one takes a copy and then the line, another takes it from that one.
        assert_eq!(among(0, 0x1000, true, None), None);
        assert_eq!(among(1, 0x1000, false, Some(1)), Some((false, false)));
        assert_eq!(among(1, 0x1000, true, Some(1)), Some((false, true)));
        assert_eq!(among(2, 0x1000, false, Some(1)), Some((true, false)));
        // What all only read is nobody's.
        assert_eq!(among(0, 0x2000, true, None), None);
        assert_eq!(among(1, 0x2000, false, Some(1)), Some((false, false)));
        assert_eq!(among(2, 0x2000, false, Some(1)), Some((false, false)));
        assert_eq!(among(2, 0x2000, true, Some(1)), Some((true, true)));
        // Another section begins anew; the CPU still has its copy.
        assert_eq!(among(1, 0x1000, true, Some(2)), Some((false, true)));
    }
}
