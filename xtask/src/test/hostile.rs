//! The image behind a boot loader that leaves garbage wherever the boot protocol lets it: in RAM, in the image's own BSS,
//! and in every EL2 register.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result};

use super::cases::{Case, Expect, Table};
use super::checks;
use crate::image::{self, Image};
use crate::loaders;
use crate::paths;

/// Where the image is put, above the loader and below the device tree of QEMU's `virt` board.
pub(crate) const PLACE: u64 = 0x4400_0000;
/// Where RAM begins there.
const RAM: u64 = 0x4000_0000;
/// Offsets of the words that the loader reads, behind its header.
const WORDS: usize = 64;
/// What the image's own memory is filled with.
const GARBAGE: u8 = 0xa5;

impl Table<'_> {
    /// A run behind the hostile boot loader.
    pub(super) fn hostile(&self) -> Vec<Case> {
        let mut case = self.case(
            "a hostile boot loader leaves garbage everywhere",
            self.machine(|machine| machine.cpus = 4),
            "suite=selftest vcpus=1,3",
            Expect::Good(checks::guest_is_content),
        );
        for boot in &mut case.boots {
            boot.hostile = true;
        }
        vec![case]
    }
}

/// What QEMU is given: the loader as the kernel, and the image to be put at [`PLACE`].
pub(super) fn files(image: &Image, memory_mib: u64) -> Result<[PathBuf; 2]> {
    let folder = paths::target("test");
    let spoiled = spoil(image)?;
    let end = PLACE + spoiled.len() as u64;
    let mut stub = loaders::build("hostile")?;
    for (index, word) in [PLACE, end, RAM + (memory_mib << 20)]
        .into_iter()
        .enumerate()
    {
        let at = WORDS + 8 * index;
        stub.get_mut(at..at + 8)
            .context("the hostile loader has no header")?
            .copy_from_slice(&word.to_le_bytes());
    }
    let paths = [folder.join("hostile.img"), folder.join("spoiled.img")];
    paths::write(&paths[0], stub)?;
    paths::write(&paths[1], spoiled)?;
    Ok(paths)
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
