//! UEFI for QEMU's `virt` board: EDK2 as Debian builds it, fetched once into `target/firmware`.

use std::path::PathBuf;

use anyhow::{Result, bail};

use super::debian::Packages;
use crate::paths;

const RELEASE: &str = "bookworm";
const PACKAGE: &str = "qemu-efi-aarch64";

/// The flash image, fetched first if it is not there.
pub(crate) fn uefi() -> Result<PathBuf> {
    let path = paths::target("firmware").join("QEMU_EFI.fd");
    if path.is_file() {
        return Ok(path);
    }
    let partial = paths::target(&format!("firmware/partial-{}", std::process::id()));
    let what = "Debian's UEFI for QEMU into target/firmware (about 15 MB)";
    let packages = Packages::of(RELEASE, partial, what)?;
    packages.download(&[PACKAGE])?;
    let flash = packages.file(PACKAGE, "*/QEMU_EFI.fd")?;
    if !flash.windows(4).take(64).any(|it| it == b"_FVH") {
        bail!("package {PACKAGE} has no UEFI firmware volume");
    }
    paths::write(&path, flash)?;
    Ok(path)
}
