//! Debian's kernels and its static busybox for arm64, out of its packages. What was fetched once stays below `target/linux`.

use std::fs;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result, bail};

use super::Series;
use crate::paths;
use crate::setup::debian::Packages;

/// The package that depends on the newest kernel of a release.
const NEWEST: &str = "linux-image-arm64";
/// The file in it that describes a Raspberry Pi 4.
const PI4_TREE: &str = "bcm2711-rpi-4-b.dtb";
/// The same with another console: what it says of it, and what instead.
const PI4_TREE_PL011: &str = "bcm2711-rpi-4-b-pl011.dtb";
const PI4_CONSOLES: [&[u8]; 2] = [b"serial1:115200n8\0", b"serial0:115200n8\0"];
/// The package of the programs.
const PROGRAMS: &str = "busybox-static";

/// The release of Debian that has a kernel of this series.
fn release(series: Series) -> &'static str {
    match series {
        Series::V6_1 => "bookworm",
        Series::V6_12 => "trixie",
    }
}

/// What is used of the packages.
#[derive(Debug)]
pub(super) struct Files {
    pub(super) kernel: PathBuf,
    pub(super) busybox: PathBuf,
    /// A board's device tree, which is built with the kernel.
    pub(super) pi4_tree: PathBuf,
    /// The same with the board's first UART as console.
    pub(super) pi4_tree_pl011: PathBuf,
}

/// The kernel and what goes with it, fetched first if they are not there.
pub(super) fn ready(series: Series) -> Result<Files> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = paths::target("linux").join(series.name());
    let files = Files {
        kernel: folder.join("Image"),
        busybox: folder.join("busybox"),
        pi4_tree: folder.join(PI4_TREE),
        pi4_tree_pl011: folder.join(PI4_TREE_PL011),
    };
    if [&files.kernel, &files.busybox, &files.pi4_tree]
        .iter()
        .all(|it| it.is_file())
    {
        if !files.pi4_tree_pl011.is_file() {
            let tree = fs::read(&files.pi4_tree)?;
            paths::write(&files.pi4_tree_pl011, with_first_uart(tree)?)?;
        }
        return Ok(files);
    }
    let partial = paths::target(&format!("linux/partial-{}", std::process::id()));
    let what = format!(
        "Debian's Linux {} and busybox for arm64 into target/linux (about 120 MB)",
        series.name()
    );
    let packages = Packages::of(release(series), partial, &what)?;
    let name = newest(&packages.show(NEWEST)?, series)
        .with_context(|| format!("{} has no Linux {}", release(series), series.name()))?;
    packages.download(&[&name, PROGRAMS])?;
    let version = name.trim_start_matches("linux-image-");
    let image = packages.file(&name, &format!("./boot/vmlinuz-{version}"))?;
    let programs = packages.file(PROGRAMS, "*bin/busybox")?;
    if image.get(0x38..0x3c) != Some(b"ARMd") {
        bail!("the kernel of package {name} is no uncompressed arm64 Image");
    }
    if !programs.starts_with(b"\x7fELF") {
        bail!("package {PROGRAMS} has no busybox");
    }
    let tree = packages.file(&name, &format!("*/broadcom/{PI4_TREE}"))?;
    if !tree.starts_with(&[0xd0, 0x0d, 0xfe, 0xed]) {
        bail!("package {name} has no device tree of a Raspberry Pi 4");
    }
    paths::write(&files.busybox, programs)?;
    paths::write(&files.pi4_tree, &tree)?;
    paths::write(&files.pi4_tree_pl011, with_first_uart(tree)?)?;
    paths::write(&folder.join("package"), format!("{name}\n"))?;
    paths::write(&files.kernel, image)?;
    Ok(files)
}

/// The tree with the board's first UART as console.
fn with_first_uart(mut tree: Vec<u8>) -> Result<Vec<u8>> {
    let [second, first] = PI4_CONSOLES;
    let mut places = tree.windows(second.len());
    let at = places
        .position(|it| it == second)
        .context("the device tree of a Raspberry Pi 4 has another console")?;
    tree.splice(at..at + second.len(), first.iter().copied());
    Ok(tree)
}

/// The package that the newest kernel of the series is in, from what `apt-cache show` says.
fn newest(said: &str, series: Series) -> Option<String> {
    let of_series = |stanza: &&str| {
        stanza
            .lines()
            .filter_map(|line| line.strip_prefix("Version: "))
            .any(|version| version.starts_with(&format!("{}.", series.name())))
    };
    let stanza = said.split("\n\n").find(of_series)?;
    let depends = stanza
        .lines()
        .find_map(|line| line.strip_prefix("Depends: "))?;
    let package = depends.split([' ', ',']).next()?;
    package
        .starts_with("linux-image-")
        .then(|| package.to_owned())
}

#[cfg(test)]
mod tests {
    use super::{newest, with_first_uart};
    use crate::linux::Series;

    const SAID: &str = "Package: linux-image-arm64\nVersion: 6.12.107-1\n\
        Depends: linux-image-6.12.107+deb13-arm64 (= 6.12.107-1)\nDescription: Linux\n\n\
        Package: linux-image-arm64\nVersion: 6.1.176-1\nDepends: linux-image-6.1.0-50-arm64 (= 6.1.176-1), x\n\n";

    #[test]
    fn the_first_uart_is_the_console_and_nothing_else_changes() {
        let tree = with_first_uart(b"..serial1:115200n8\0..".to_vec());
        assert_eq!(tree.expect("found"), b"..serial0:115200n8\0..");
        assert!(with_first_uart(b"serial0:115200n8\0".to_vec()).is_err());
    }

    #[test]
    fn the_kernel_is_the_one_of_the_series() {
        let name = |series| newest(SAID, series);
        assert_eq!(
            name(Series::V6_12).as_deref(),
            Some("linux-image-6.12.107+deb13-arm64")
        );
        assert_eq!(
            name(Series::V6_1).as_deref(),
            Some("linux-image-6.1.0-50-arm64")
        );
        assert_eq!(newest("", Series::V6_1), None);
        assert_eq!(
            newest("Version: 6.1.1\nDepends: perl\n", Series::V6_1),
            None
        );
    }
}
