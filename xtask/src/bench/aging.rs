//! Options of suites about aging, and their translation to boot arguments.

/// Which memory is looked at, how, and how often.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Aging {
    /// Who sets access flags: auto (the CPU where it can), hardware, software [default: auto; suite age: each on max]
    #[arg(long, value_parser = ["auto", "hardware", "software"], value_name = "WHO")]
    pub(crate) access_flag: Option<String>,
    /// Measure passes without the invalidation at their end, too
    #[arg(long)]
    pub(crate) imprecise: bool,
    /// Microseconds from the beginning of one pass in the background to that of the next
    #[arg(long, default_value_t = 5000, value_name = "US", value_parser = clap::value_parser!(u64).range(1..=3_600_000_000))]
    pub(crate) period: u64,
    /// Percent of a CPU that passes in the background may take
    #[arg(long, default_value_t = 100, value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) budget: u32,
    /// Passes in the background
    #[arg(long, default_value_t = 32, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_048_576))]
    pub(crate) passes: u32,
    /// Percent of its memory that the guest of suite heat uses all the time, and now and then
    #[arg(long, default_value = "10,20", value_name = "HOT,WARM", value_parser = pattern)]
    pub(crate) pattern: String,
    /// Guest memory of each vCPU in suite heat
    #[arg(long, default_value_t = 64, value_name = "MIB", value_parser = clap::value_parser!(u64).range(2..))]
    pub(crate) heat_mib: u64,
}

/// Two percentages, hot from 1 and warm from 0, of 100 together at most.
fn pattern(words: &str) -> Result<String, String> {
    let shares: Vec<u32> = words.split(',').flat_map(str::parse).collect();
    match shares[..] {
        [hot, warm] if hot > 0 && hot <= 100 && warm <= 100 - hot => Ok(format!("{hot},{warm}")),
        _ => Err("not two percentages, hot from 1 and warm from 0, of 100 together at most".into()),
    }
}

impl Aging {
    /// Boot arguments.
    pub(crate) fn append(&self) -> String {
        let precision = if self.imprecise {
            "imprecise"
        } else {
            "precise"
        };
        let mut words = format!(
            "precision={precision} period-us={} budget={} passes={} pattern={}",
            self.period, self.budget, self.passes, self.pattern
        );
        if let Some(who) = &self.access_flag {
            words += &format!(" access-flag={who}");
        }
        words
    }
}

#[cfg(test)]
mod tests {
    use crate::bench::options::tests::options;

    #[test]
    fn what_is_asked_for_reaches_the_boot_arguments() {
        let words = [
            "--access-flag",
            "software",
            "--imprecise",
            "--period",
            "7",
            "--budget",
            "5",
            "--passes",
            "3",
            "--pattern",
            "1,99",
        ];
        let options = options(&words).expect("good options");
        assert_eq!(
            options.aging.append(),
            "precision=imprecise period-us=7 budget=5 passes=3 pattern=1,99 access-flag=software"
        );
    }

    #[test]
    fn what_is_out_of_bounds_is_refused() {
        for words in [
            ["--access-flag", "firmware"],
            ["--period", "0"],
            ["--period", "3600000001"],
            ["--budget", "0"],
            ["--budget", "101"],
            ["--passes", "0"],
            ["--pattern", "10"],
            ["--pattern", "0,20"],
            ["--pattern", "60,50"],
            ["--heat-mib", "1"],
        ] {
            assert!(options(&words).is_err(), "{words:?}");
        }
    }
}
