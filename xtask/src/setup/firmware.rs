//! Firmware for emulated machines as Debian builds it, fetched once into `target/firmware`: EDK2 for QEMU's `virt` board,
//! Trusted Firmware for the Raspberry Pi 4; and GRUB, as a program for UEFI.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use anyhow::{Result, bail};

use super::debian::Packages;
use crate::paths;

const RELEASE: &str = "bookworm";
const PACKAGE: &str = "qemu-efi-aarch64";
const TRUSTED_PACKAGE: &str = "arm-trusted-firmware";
const GRUB_PACKAGE: &str = "grub-efi-arm64-bin";

/// The flash image, fetched first if it is not there.
pub(crate) fn uefi() -> Result<PathBuf> {
    fetched(
        "QEMU_EFI.fd",
        PACKAGE,
        "*/qemu-efi-aarch64/QEMU_EFI.fd",
        |it| it.windows(4).take(64 << 10).any(|it| it == b"_FVH"),
    )
}

/// EL3's part for the Raspberry Pi 4, fetched first if it is not there.
pub(crate) fn trusted() -> Result<PathBuf> {
    fetched("rpi4-bl31.bin", TRUSTED_PACKAGE, "*/rpi4/bl31.bin", |it| {
        it.len() > 4096
    })
}

/// GRUB with all its modules in one program, fetched first if it is not there.
pub(crate) fn grub() -> Result<PathBuf> {
    fetched(
        "grubaa64.efi",
        GRUB_PACKAGE,
        "*/arm64-efi/monolithic/grubaa64.efi",
        |it| it.starts_with(b"MZ"),
    )
}

/// One file of a package, fetched once however many cases want it at the same time.
fn fetched(name: &str, package: &str, file: &str, sound: fn(&[u8]) -> bool) -> Result<PathBuf> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let path = paths::target("firmware").join(name);
    if path.is_file() {
        return Ok(path);
    }
    let partial = format!("firmware/partial-{name}-{}", std::process::id());
    let what = format!("Debian's {package} into target/firmware (about 15 MB)");
    let packages = Packages::of(RELEASE, paths::target(&partial), &what)?;
    packages.download(&[package])?;
    let bytes = packages.file(package, file)?;
    if !sound(&bytes) {
        bail!("package {package} has no usable {name}");
    }
    paths::write(&path, bytes)?;
    Ok(path)
}
