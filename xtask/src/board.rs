//! Boards are data: `boards/<name>/board.toml`, the same keys in the same order for each.

use std::fs;

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

use crate::machine::Machine;
use crate::paths;

/// One `board.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Board {
    pub(crate) name: String,
    pub(crate) title: String,
    pub(crate) console: String,
    pub(crate) boot: Boot,
    pub(crate) status: Status,
    pub(crate) machine: Defaults,
    pub(crate) limits: Limits,
}

/// What the board boots from.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Boot {
    pub(crate) media: Media,
    /// Boot arguments that the tree of files gets.
    pub(crate) arguments: String,
    /// Files of the board's folder that go beside the image.
    pub(crate) templates: Vec<String>,
    /// Files of the board's maker that the user has to add.
    pub(crate) add: Vec<String>,
}

/// What a board's firmware reads.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Media {
    /// The image alone, given to the emulator.
    Image,
    /// An EFI system partition.
    Esp,
    /// The first, FAT, partition of an SD card.
    Sd,
}

/// How far a board is known to work.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Status {
    pub(crate) emulated: String,
    pub(crate) hardware: String,
}

/// The machine a task gets when its command line says nothing.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Defaults {
    pub(crate) cpu: String,
    pub(crate) gic_version: u32,
    pub(crate) cpus: u32,
    pub(crate) memory_mib: u64,
}

/// The machines that are supported.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Limits {
    pub(crate) cpu_models: Vec<String>,
    pub(crate) cpus_gicv2: u32,
    pub(crate) cpus_gicv3: u32,
    pub(crate) memory_mib_min: u64,
}

impl Board {
    /// The board that the emulator provides.
    pub(crate) fn qemu_virt() -> Result<Self> {
        Self::load("qemu-virt")
    }

    /// Reads `boards/<name>/board.toml`.
    pub(crate) fn load(name: &str) -> Result<Self> {
        let path = paths::root().join("boards").join(name).join("board.toml");
        let text = fs::read_to_string(&path).with_context(|| {
            format!("there is no board '{name}'; 'cargo xtask boards' lists them")
        })?;
        toml::from_str(&text).with_context(|| format!("boards/{name}/board.toml"))
    }

    /// Every board of the repository, by name.
    pub(crate) fn all() -> Result<Vec<Self>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(paths::root().join("boards")).context("boards")? {
            let entry = entry?;
            if entry.path().is_dir() {
                names.push(entry.file_name().to_string_lossy().into_owned());
            }
        }
        names.sort();
        names.iter().map(|name| Self::load(name)).collect()
    }

    /// Refuses a machine that Vellum or the board cannot be, before anything is started.
    pub(crate) fn accept(&self, machine: &Machine) -> Result<()> {
        let limits = &self.limits;
        if !limits.cpu_models.contains(&machine.cpu) {
            bail!(
                "unknown CPU model '{}'; known: {}",
                machine.cpu,
                limits.cpu_models.join(", ")
            );
        }
        let most = match machine.gic {
            2 => limits.cpus_gicv2,
            3 => limits.cpus_gicv3,
            other => bail!("unknown GIC version {other}; known: 2, 3"),
        };
        if machine.cpus == 0 || machine.cpus > most {
            bail!(
                "{} CPUs asked for; {} with GICv{} has 1 to {most}",
                machine.cpus,
                self.title,
                machine.gic
            );
        }
        if machine.memory_mib < limits.memory_mib_min {
            bail!(
                "{} MiB of RAM asked for; {} MiB is the least",
                machine.memory_mib,
                limits.memory_mib_min
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Board;
    use crate::machine::Machine;

    fn refusal(change: impl Fn(&mut Machine)) -> String {
        let board = Board::qemu_virt().expect("the board file is read");
        let mut machine = Machine::of(&board);
        change(&mut machine);
        board
            .accept(&machine)
            .err()
            .map(|error| error.to_string())
            .unwrap_or_default()
    }

    #[test]
    fn the_defaults_of_every_board_are_accepted_by_it() {
        for board in Board::all().expect("every board file is read") {
            assert!(board.accept(&Machine::of(&board)).is_ok(), "{}", board.name);
        }
    }

    #[test]
    fn every_board_is_named_as_its_folder_and_has_its_templates() {
        for board in Board::all().expect("every board file is read") {
            let folder = crate::paths::root().join("boards").join(&board.name);
            assert!(folder.join("board.toml").is_file(), "{}", board.name);
            for template in &board.boot.templates {
                assert!(folder.join(template).is_file(), "{template}");
            }
        }
    }

    #[test]
    fn an_unknown_board_is_refused() {
        assert!(Board::load("toaster").is_err());
    }

    #[test]
    fn the_largest_machine_is_accepted_and_the_next_refused() {
        for (gic, most) in [(2, 8), (3, 128)] {
            let with = |cpus| refusal(|machine| (machine.gic, machine.cpus) = (gic, cpus));
            assert_eq!(with(most), "");
            assert!(
                with(most + 1).contains(&format!("1 to {most}")),
                "{}",
                with(most + 1)
            );
        }
        assert!(refusal(|machine| machine.cpus = 0).contains("0 CPUs"));
    }

    #[test]
    fn a_machine_outside_the_limits_is_refused_with_the_reason() {
        assert!(refusal(|machine| machine.cpu = "z80".into()).contains("neoverse-n1"));
        assert!(refusal(|machine| machine.gic = 4).contains("GIC version 4"));
        assert!(refusal(|machine| machine.memory_mib = 255).contains("256 MiB"));
    }
}
