//! Boot loaders that stand between an emulated machine and the image: those of the tests, built from `tests/loaders`, and
//! Trusted Firmware for the Raspberry Pi 4.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::image;
use crate::paths;
use crate::process;
use crate::setup::{TARGET, firmware};

/// Where the firmware of a Raspberry Pi 4 puts tree and image; itself it is at 0.
pub(crate) const PI_TREE: u32 = 0x0800_0000;
pub(crate) const PI_IMAGE: u32 = 0x0020_0000;
/// Where it tells a program at 0 about them.
const PI_WORDS: usize = 0xf0;

/// `tests/loaders/<name>.rs` as a flat file.
pub(crate) fn build(name: &str) -> Result<Vec<u8>> {
    let folder = paths::target("test");
    fs::create_dir_all(&folder)?;
    let source = paths::root().join("tests/loaders");
    let linked = folder.join(format!("{name}-{}.elf", std::process::id()));
    let mut rustc = Command::new("rustc");
    rustc.current_dir(paths::root());
    rustc
        .args(["--edition", "2024", "--target", TARGET])
        .args(["-Cpanic=abort", "-Copt-level=1"])
        .arg(format!("-Clink-arg=-T{}", source.join("link.ld").display()))
        .arg("-o")
        .arg(&linked)
        .arg(source.join(format!("{name}.rs")));
    let built = process::output(&mut rustc).and_then(|_| Ok(fs::read(&linked)?));
    fs::remove_file(&linked).unwrap_or_default();
    image::flatten(&built?)
}

/// The program at address 0 of a Raspberry Pi 4, told where tree and image are: Trusted Firmware, or else one that
/// behaves like the Pi's own.
pub(crate) fn raspberry(trusted: bool, folder: &Path) -> Result<PathBuf> {
    let mut bytes = if trusted {
        fs::read(firmware::trusted()?)?
    } else {
        build("raspberry")?
    };
    let words = bytes
        .get_mut(PI_WORDS..PI_WORDS + 16)
        .context("the program at address 0 is too short")?;
    let told = [0, 0, PI_TREE, PI_IMAGE].map(u32::to_le_bytes);
    words.copy_from_slice(told.as_flattened());
    let path = folder.join("stub.img");
    paths::write(&path, bytes)?;
    Ok(path)
}
