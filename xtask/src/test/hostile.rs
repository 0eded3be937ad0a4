//! The image behind a boot loader that leaves garbage wherever the boot protocol lets it: in RAM, in the image's own BSS,
//! and in every EL2 register. `cargo xtask test --hostile` runs every case that way that QEMU itself starts.

use std::fs;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result};

use super::cases::{Boot, Case, Expect, Table};
use super::ways;
use crate::image::{self, Image};
use crate::loaders;
use crate::machine::{Firmware, Model, Timing};
use crate::paths;
use crate::qemu::Scratch;

/// Where the image is put, above the loader and below the device tree of QEMU's `virt` board.
pub(crate) const PLACE: u64 = 0x4400_0000;
/// Where RAM begins there.
const RAM: u64 = 0x4000_0000;
/// Where QEMU puts an initial RAM disk, on a machine with 256 MiB or more.
const RAM_DISK: u64 = 0x4800_0000;
/// RAM that is filled at most: what an emulator writes, its host must have.
const MOST_MIB: u64 = 2048;
/// Offsets of the words that the loader reads, behind its header.
const WORDS: usize = 64;
/// What the image's own memory is filled with.
const GARBAGE: u8 = 0xa5;

/// Every suite that needs no time of its own and no other guest.
const SUITES: [&str; 19] = [
    "selftest",
    "dirty",
    "verify",
    "get",
    "starve",
    "split",
    "churn",
    "protect",
    "checkpoint",
    "epochs",
    "age",
    "heat",
    "ages",
    "exit",
    "ipi",
    "share",
    "moves",
    "storm",
    "lives",
];
/// Each in its quick form.
const QUICK: &str = "vcpus=3 locking=lockless mib=2 slot-mib=64 backing=2m iterations=1 rounds=10 runs=64 epochs=10 epoch-us=1000 seconds=1";

impl Table<'_> {
    /// Every suite in one boot behind the hostile boot loader.
    pub(super) fn hostile(&self) -> Vec<Case> {
        let words = format!("suite={} {QUICK}", SUITES.join(","));
        let cases = [("max", 3), ("cortex-a72", 2)].map(|(model, gic)| {
            let machine = self.machine(|machine| {
                (machine.cpu, machine.gic, machine.cpus) = (model.to_owned(), gic, 4);
            });
            let name =
                format!("every suite, and a hostile boot loader before it, {model} GICv{gic}");
            let expect = Expect::Good(|runs| ways::measured(&SUITES, runs));
            self.case(name, machine, &words, expect)
        });
        cases.into_iter().filter(all_can_be).map(spoiled).collect()
    }
}

/// The case with each boot behind the loader; nothing where something else than QEMU starts one, or time is not its own.
pub(super) fn behind(case: Case) -> Option<Case> {
    let already = case.boots.iter().any(|boot| boot.hostile);
    (!already && all_can_be(&case)).then(|| {
        let case = spoiled(case);
        Case {
            name: format!("{}, behind a hostile boot loader", case.name),
            seconds: 2 * case.seconds,
            ..case
        }
    })
}

fn all_can_be(case: &Case) -> bool {
    case.boots.iter().all(can_be)
}

/// The loader needs EL2, and that RAM and device tree are where QEMU puts them for a kernel of `virt`.
fn can_be(boot: &Boot) -> bool {
    let machine = &boot.machine;
    machine.model == Model::Virt
        && machine.firmware == Firmware::None
        && machine.virtualization
        && machine.timing != Timing::Parallel
        && machine.memory_mib >= 256
}

fn spoiled(mut case: Case) -> Case {
    case.boots.iter_mut().for_each(|boot| boot.hostile = true);
    case
}

/// What QEMU is given: the loader as the kernel, and the image to be put at [`PLACE`]. They go with this.
pub(super) struct Files {
    pub(super) loader: PathBuf,
    pub(super) spoiled: PathBuf,
    _folder: Scratch,
}

/// The files for a machine with or without an initial RAM disk, which is left as it is.
pub(super) fn files(image: &Image, memory_mib: u64, ram_disk: bool) -> Result<Files> {
    let spoiled = spoil(image)?;
    let end = PLACE + spoiled.len() as u64;
    let ram_end = RAM + (memory_mib.min(MOST_MIB) << 20);
    let keep = if ram_disk { RAM_DISK } else { u64::MAX };
    let mut loader = program()?;
    for (index, word) in [PLACE, end, ram_end, keep].into_iter().enumerate() {
        let at = WORDS + 8 * index;
        loader
            .get_mut(at..at + 8)
            .context("the hostile loader has no header")?
            .copy_from_slice(&word.to_le_bytes());
    }
    let folder = Scratch::new();
    let files = Files {
        loader: folder.0.join("loader.img"),
        spoiled: folder.0.join("spoiled.img"),
        _folder: folder,
    };
    paths::write(&files.loader, loader)?;
    paths::write(&files.spoiled, spoiled)?;
    Ok(files)
}

/// The loader, compiled once.
fn program() -> Result<Vec<u8>> {
    static BUILT: Mutex<Vec<u8>> = Mutex::new(Vec::new());
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    if built.is_empty() {
        *built = loaders::build("hostile")?;
    }
    Ok(built.clone())
}

/// The image with garbage in what it has to clear itself.
fn spoil(image: &Image) -> Result<Vec<u8>> {
    let mut flat = fs::read(&image.flat)?;
    let kept = image::file_bytes(&fs::read(&image.symbols)?)?;
    flat.get_mut(kept..)
        .context("the image is shorter than its program")?
        .fill(GARBAGE);
    Ok(flat)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::behind;
    use crate::board::Board;
    use crate::machine::{Firmware, Model};
    use crate::paths;
    use crate::test::cases::all;

    #[test]
    fn every_register_that_the_image_writes_is_spoiled_before() {
        let read = |path: &str| fs::read_to_string(paths::root().join(path)).expect(path);
        let loader = read("tests/loaders/hostile.S");
        let control = read("src/arch/hw/control.rs");
        let boot = read("src/arch/boot.S");
        let table = control.lines().filter_map(|line| {
            let (name, _) = line.trim().strip_prefix('"')?.split_once("\" = ")?;
            Some(name.to_owned())
        });
        let entry = boot.lines().filter_map(|line| {
            let (name, _) = line.trim().strip_prefix("msr ")?.split_once(',')?;
            Some(name.trim().to_owned())
        });
        let spoiled = |name: &str| {
            loader
                .split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
                .any(|word| word == name)
        };
        let written: Vec<_> = table
            .chain(entry)
            .filter(|name| name != "daifset")
            .collect();
        assert!(written.len() > 50, "{written:?}");
        for name in written {
            assert!(spoiled(&name), "{name} keeps what it was");
        }
    }

    #[test]
    fn what_qemu_starts_can_be_started_by_a_hostile_loader_and_nothing_else() {
        let board = Board::qemu_virt().expect("the board file is read");
        let cases = all(&board, false);
        let (before, all) = (cases.len(), cases.into_iter().filter_map(behind));
        let behind: Vec<_> = all.collect();
        assert!(behind.len() > before / 2, "{} of {before}", behind.len());
        for boot in behind.iter().flat_map(|case| &case.boots) {
            assert!(boot.hostile && boot.machine.firmware == Firmware::None);
            assert!(boot.machine.model == Model::Virt && boot.machine.virtualization);
        }
    }
}
