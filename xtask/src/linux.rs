//! The Linux guest: Debian's unmodified arm64 kernel and a RAM disk with a static busybox, in one bundle for the hypervisor.

mod cpio;
mod packages;

use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::Result;
use cpio::Archive;

use crate::paths;

/// A series of kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Series {
    /// Of Debian 12.
    V6_1,
    /// Of Debian 13.
    V6_12,
}

impl Series {
    /// Every one.
    pub(crate) const ALL: [Self; 2] = [Self::V6_1, Self::V6_12];

    /// The name on command lines and of its folder.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
        }
    }
}

impl FromStr for Series {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|series| series.name() == name)
            .ok_or_else(|| "known kernels: 6.1, 6.12".to_owned())
    }
}

/// The device tree of a Raspberry Pi 4: as it is built with the newest kernel, its console the mini-UART; or with the PL011
/// as console, as the board's `config.txt` has it.
pub(crate) fn pi4_tree(mini_uart: bool) -> Result<PathBuf> {
    let files = packages::ready(Series::V6_12)?;
    Ok(if mini_uart {
        files.pi4_tree
    } else {
        files.pi4_tree_pl011
    })
}

/// The bundle of `series`, made when its parts have changed.
pub(crate) fn bundle(series: Series) -> Result<PathBuf> {
    let packages::Files {
        kernel, busybox, ..
    } = packages::ready(series)?;
    let bytes = Archive::default()
        .file("Image", &fs::read(kernel)?)
        .file("initramfs", &initramfs(&busybox)?)
        .finish();
    let path = paths::target("linux")
        .join(series.name())
        .join("bundle.cpio");
    if !fs::read(&path).is_ok_and(|old| old == bytes) {
        paths::write(&path, bytes)?;
    }
    Ok(path)
}

/// The RAM disk: busybox, the first process's scripts, and what they need to begin.
fn initramfs(busybox: &Path) -> Result<Vec<u8>> {
    let folders = ["bin", "dev", "etc", "proc", "root", "sys", "tmp"];
    let archive = folders
        .into_iter()
        .fold(Archive::default(), Archive::folder);
    Ok(archive
        .device("dev/console", 5, 1)
        .program("bin/busybox", &fs::read(busybox)?)
        .program("init", include_bytes!("linux/init"))
        .file("test", include_bytes!("linux/test"))
        .file("etc/inittab", include_bytes!("linux/inittab"))
        .finish())
}

#[cfg(test)]
mod tests {
    use super::Series;

    #[test]
    fn series_names_parse_back() {
        for series in Series::ALL {
            assert_eq!(series.name().parse(), Ok(series));
        }
        assert!("5.10".parse::<Series>().is_err());
    }
}
