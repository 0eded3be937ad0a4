//! What it costs to take a line of memory from another CPU.
//!
//! A line is 64 bytes. A CPU that stores to one that others have a copy of takes it from them; one that loads from a line
//! that was stored to since it last had it takes a copy. Both are transfers and take as long; those of one line queue behind
//! each other, and who takes it waits for those before. First touches cost nothing, and nothing is ever evicted: this is the
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
    /// When the last transfer was asked for, and when it ended.
    asked: u64,
    free_at: u64,
}

const EMPTY: Line = Line {
    number: NONE,
    holders: 0,
    written: false,
    asked: 0,
    free_at: 0,
};

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

    /// The CPU loads from or stores to `address` at `time`; what a transfer takes, and waiting for it, if there is one.
    pub(crate) fn access(
        &mut self,
        cpu: usize,
        address: u64,
        stores: bool,
        time: u64,
    ) -> Option<u64> {
        let number = address >> 6;
        let place = usize::try_from(number ^ number >> 20).unwrap_or(0) % PLACES;
        let line = self.places.get_mut(place)?;
        let me = 1_u128 << cpu;
        if line.number != number {
            *line = Line { number, ..EMPTY };
        }
        let (mine, others) = (line.holders & me != 0, line.holders & !me != 0);
        let transfer = if stores {
            others
        } else {
            !mine && others && line.written
        };
        line.holders = if stores { me } else { line.holders | me };
        line.written |= stores;
        if !transfer {
            return None;
        }
        // A transfer that was asked for in this CPU's future is after this one.
        if time < line.asked {
            return Some(self.cost);
        }
        line.asked = time;
        line.free_at = line.free_at.max(time) + self.cost;
        Some(line.free_at - time)
    }
}

#[cfg(test)]
mod tests {
    use super::Lines;

    #[test]
    fn a_line_of_ones_own_costs_nothing() {
        let mut lines = Lines::new(150);
        for time in 0..10 {
            assert_eq!(lines.access(0, 0x1000, time % 2 == 0, time), None);
        }
        assert_eq!(lines.access(1, 0x1040, true, 20), None);
    }

    #[test]
    fn a_store_takes_the_line_and_a_load_takes_a_copy_once() {
        let mut lines = Lines::new(150);
        assert_eq!(lines.access(0, 0x1000, true, 0), None);
        assert_eq!(lines.access(1, 0x1008, false, 1000), Some(150));
        assert_eq!(lines.access(1, 0x1008, false, 2000), None);
        assert_eq!(lines.access(0, 0x1000, true, 3000), Some(150));
        assert_eq!(lines.access(0, 0x1000, true, 3200), None);
    }

    #[test]
    fn what_nobody_stores_to_is_shared_for_nothing() {
        let mut lines = Lines::new(150);
        for cpu in 0..128 {
            assert_eq!(lines.access(cpu, 0x2000, false, 5), None);
        }
        assert_eq!(lines.access(3, 0x2000, true, 6), Some(150));
    }

    #[test]
    fn transfers_of_one_line_queue_and_those_of_others_do_not() {
        let mut lines = Lines::new(150);
        lines.access(0, 0x1000, true, 0);
        lines.access(0, 0x2000, true, 0);
        assert_eq!(lines.access(1, 0x1000, true, 10), Some(150));
        assert_eq!(lines.access(2, 0x1000, true, 10), Some(300));
        assert_eq!(lines.access(3, 0x1000, true, 20), Some(440));
        assert_eq!(lines.access(3, 0x2000, true, 20), Some(150));
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
            let cost = lines.access(cpu, 0x1000, true, clocks[cpu]);
            clocks[cpu] += 10 + cost.unwrap_or(0);
        }
        let each = clocks.iter().max().expect("eight") / rounds;
        assert!((143..=157).contains(&each), "{each}");
    }

    #[test]
    fn a_transfer_in_the_future_delays_nobody() {
        let mut lines = Lines::new(150);
        lines.access(0, 0x1000, true, 0);
        assert_eq!(lines.access(1, 0x1000, true, 900), Some(150));
        assert_eq!(lines.access(2, 0x1000, true, 100), Some(150));
    }
}
