//! Device trees that are QEMU's own but for one thing that is wrong with them, and what is said of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use super::cases::{Case, Expect, Table};
use super::checks::Verdict;
use crate::machine::Machine;
use crate::paths;
use crate::process;
use crate::qemu::Qemu;
use crate::uart::Transcript;

/// Which device tree a machine boots with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tree {
    /// The one QEMU makes.
    Own,
    /// No interrupt controller in it is known.
    NoGic,
    /// It lists CPUs that are not there, as many as the word says.
    MoreCpus(u32),
}

impl Tree {
    /// A file to be given to QEMU, unless it is to use its own.
    pub(super) fn file(self, qemu: &Qemu, machine: &Machine) -> Result<Option<PathBuf>> {
        let name = match self {
            Self::Own => return Ok(machine.dtb.clone()),
            Self::NoGic => "without-gic",
            Self::MoreCpus(_) => "more-cpus",
        };
        let mut machine = machine.clone();
        if let Self::MoreCpus(more) = self {
            machine.cpus += more;
        }
        let path = paths::target(&format!("test/{name}-gicv{}.dtb", machine.gic));
        fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
        process::output(Command::new(qemu.program()).args(machine.dump_device_tree(&path)))?;
        if self == Self::NoGic {
            let tree = fs::read(&path)?;
            let tree = renamed(&tree, b"arm,gic-v3\0", b"none,no-ic\0");
            fs::write(&path, tree.context("no GICv3 in QEMU's device tree")?)?;
        }
        Ok(Some(path))
    }
}

impl Table<'_> {
    /// CPUs that firmware cannot start: with a GICv2 firmware refuses them, with a GICv3 they have no redistributor either.
    pub(super) fn left_out(&self) -> Vec<Case> {
        let case = |gic| {
            let machine = self.machine(|machine| (machine.gic, machine.cpus) = (gic, 3));
            let name = format!("CPUs that do not come up are left out, GICv{gic}");
            let expect = Expect::Good(two_are_left_out);
            let mut case = self.case(name, machine, "suite=selftest vcpus=2", expect);
            case.boots
                .iter_mut()
                .for_each(|boot| boot.tree = Tree::MoreCpus(2));
            case
        };
        [2, 3].map(case).into()
    }
}

/// Each CPU that is not there is named, with a reason, and the others do their work.
fn two_are_left_out(runs: &[Transcript]) -> Verdict {
    for run in runs {
        let named = |cpu: &str| {
            let words = format!("CPU {cpu} is left out: ");
            run.text.iter().any(|line| line.contains(&words))
        };
        if !named("0x3") || !named("0x4") || named("0x2") {
            return Err("not exactly CPUs 3 and 4 are left out".into());
        }
        if !run.text.iter().any(|line| line.contains("3 of 5 CPUs")) {
            return Err("it does not say how many CPUs there are".into());
        }
    }
    super::checks::guest_is_content(runs)
}

/// `from` replaced by `to`, which is as long; nothing if it is not there.
fn renamed(bytes: &[u8], from: &[u8], to: &[u8]) -> Option<Vec<u8>> {
    let at = bytes
        .windows(from.len())
        .position(|window| window == from)?;
    let mut changed = bytes.to_vec();
    changed.splice(at..at + from.len(), to.iter().copied());
    Some(changed)
}

#[cfg(test)]
mod tests {
    use super::renamed;

    #[test]
    fn renaming_keeps_every_other_byte() {
        assert_eq!(
            renamed(b"xxabcyy", b"abc", b"def").as_deref(),
            Some(&b"xxdefyy"[..])
        );
        assert_eq!(renamed(b"xx", b"abc", b"def"), None);
    }
}
