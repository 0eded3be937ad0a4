//! Who takes lines of memory from others: how often, what it was charged, and by which instructions.
//!
//! What CPUs take between two marks of theirs is counted apart from the rest: a section, which is told when the program says so.
//! The rest is told at the end. Both are lines of JSON on standard error.

use std::collections::HashMap;

use crate::lines::{Lines, Use};

/// Places that are told, most transfers first.
const SITES: usize = 1000;

/// What was taken.
#[derive(Debug, Default)]
struct Account {
    transfers: u64,
    charged: u64,
    /// From another CPU between its marks.
    among: u64,
    /// Nothing moved, but other CPUs lost their copies; those between their marks.
    upgrades: u64,
    upgrades_among: u64,
    /// How often, by the instruction's address and the line's number.
    sites: HashMap<(u64, u64), u64>,
}

/// Lines of memory, and who took them.
pub(crate) struct Sharing {
    lines: Lines,
    /// Where they are taken is told.
    sites: bool,
    /// CPUs between their marks.
    within: u128,
    apart: Account,
    rest: Account,
    /// Sections that were told, and that were begun.
    told: u64,
    begun: u64,
}

impl Sharing {
    /// A transfer takes `cost` instructions; whether it is told where they are.
    pub(crate) fn new(cost: u64, sites: bool) -> Self {
        Self {
            lines: Lines::new(cost),
            sites,
            within: 0,
            apart: Account::default(),
            rest: Account::default(),
            told: 0,
            begun: 1,
        }
    }

    /// Nobody has a copy of anything.
    pub(crate) fn forget_lines(&mut self) {
        self.lines.forget();
    }

    /// What this CPU takes from now on is counted apart, or no longer.
    pub(crate) fn count_apart(&mut self, cpu: usize, apart: bool) {
        let me = 1 << cpu;
        self.within = if apart {
            self.within | me
        } else {
            self.within & !me
        };
    }

    /// The instruction at `site` loads or stores at `time`; what a transfer takes, if there is one.
    pub(crate) fn access(
        &mut self,
        cpu: usize,
        site: u64,
        address: u64,
        stores: bool,
        time: u64,
    ) -> Option<u64> {
        let within = self.within >> cpu & 1 == 1;
        let transfer = self.lines.access(Use {
            cpu,
            address,
            stores,
            time,
            section: within.then_some(self.begun),
        })?;
        let account = if within {
            &mut self.apart
        } else {
            &mut self.rest
        };
        let (all, among) = if transfer.upgrade {
            (&mut account.upgrades, &mut account.upgrades_among)
        } else {
            (&mut account.transfers, &mut account.among)
        };
        *all += 1;
        *among += u64::from(transfer.among);
        account.charged += transfer.cost;
        if self.sites {
            *account.sites.entry((site, address >> 6)).or_default() += 1;
        }
        Some(transfer.cost)
    }

    /// What was counted apart so far is forgotten.
    pub(crate) fn forget_apart(&mut self) {
        self.apart = Account::default();
        self.begun += 1;
    }

    /// Tells what was counted apart since it was last told or forgotten, and forgets it.
    pub(crate) fn tell_apart(&mut self) {
        self.apart.tell(&self.told.to_string());
        self.told += 1;
        self.forget_apart();
    }

    /// Tells all that was not.
    pub(crate) fn tell_rest(&self) {
        self.rest.tell("null");
    }
}

impl Account {
    fn tell(&self, section: &str) {
        for ((site, line), count) in self.worst() {
            eprintln!(
                r#"{{"site":{{"section":{section},"code":{site},"data":{},"transfers":{count}}}}}"#,
                line << 6
            );
        }
        eprintln!(
            r#"{{"lines":{{"section":{section},"transfers":{},"charged":{},"among":{},"upgrades":{},"upgrades_among":{}}}}}"#,
            self.transfers, self.charged, self.among, self.upgrades, self.upgrades_among
        );
    }

    /// Most transfers first.
    fn worst(&self) -> Vec<((u64, u64), u64)> {
        let mut sites: Vec<_> = self.sites.iter().map(|(at, count)| (*at, *count)).collect();
        sites.sort_by_key(|(at, count)| (u64::MAX - count, *at));
        sites.truncate(SITES);
        sites
    }
}

#[cfg(test)]
mod tests {
    use super::Sharing;

    #[test]
    fn what_is_taken_between_marks_is_counted_apart() {
        let mut sharing = Sharing::new(150, true);
        sharing.access(0, 0x40, 0x1000, true, 0);
        sharing.count_apart(1, true);
        assert_eq!(sharing.access(1, 0x44, 0x1008, true, 10), Some(150));
        assert_eq!(sharing.access(0, 0x40, 0x1000, true, 1000), Some(150));
        sharing.count_apart(1, false);
        assert_eq!(sharing.access(1, 0x44, 0x1008, true, 2000), Some(150));
        assert_eq!(sharing.apart.transfers, 1);
        assert_eq!(sharing.apart.worst(), [((0x44, 0x40), 1)]);
        assert_eq!((sharing.rest.transfers, sharing.rest.charged), (2, 300));
        sharing.tell_apart();
        assert_eq!((sharing.apart.transfers, sharing.told), (0, 1));
        sharing.count_apart(2, true);
        assert_eq!(sharing.access(2, 0x44, 0x1008, true, 3000), Some(150));
        sharing.forget_apart();
        assert_eq!((sharing.apart.transfers, sharing.told), (0, 1));
    }

    #[test]
    fn the_worst_place_comes_first_and_lines_may_cost_nothing() {
        let mut sharing = Sharing::new(0, true);
        for round in 0..3 {
            assert_eq!(
                sharing.access(round % 2, 0x44, 0x2000, true, 0).is_some(),
                round > 0
            );
        }
        sharing.access(0, 0x48, 0x3000, true, 0);
        sharing.access(1, 0x48, 0x3000, true, 0);
        let worst = sharing.rest.worst();
        assert_eq!(worst, [((0x44, 0x80), 2), ((0x48, 0xc0), 1)]);
        assert_eq!(sharing.rest.charged, 0);
    }
}
