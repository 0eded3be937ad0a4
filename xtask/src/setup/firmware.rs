//! Firmware for emulated machines as Debian builds it, fetched once into `target/firmware`: EDK2 for QEMU's `virt` board,
//! Trusted Firmware for the Raspberry Pi 4; and GRUB, as a program for UEFI.

use std::path::{Path, PathBuf};
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
        is_flash,
    )
}

/// Whether a firmware volume is in it: its mark is not at the start, where the vectors are.
fn is_flash(bytes: &[u8]) -> bool {
    const MARK: &[u8] = b"_FVH";
    const FAR: usize = 64 << 10;
    bytes
        .windows(MARK.len())
        .take(FAR)
        .any(|place| place == MARK)
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

/// One file of a package.
fn fetched(name: &str, package: &str, file: &str, sound: fn(&[u8]) -> bool) -> Result<PathBuf> {
    let path = paths::target("firmware").join(name);
    once(&path, || {
        let partial = format!("firmware/partial-{name}-{}", std::process::id());
        let what = format!("Debian's {package} into target/firmware");
        let packages = Packages::of(RELEASE, paths::target(&partial), &what)?;
        packages.download(&[package])?;
        let bytes = packages.file(package, file)?;
        if !sound(&bytes) {
            bail!("package {package} has no usable {name}");
        }
        Ok(bytes)
    })?;
    Ok(path)
}

/// Makes the file if it is not there, once however many cases want it at the same time.
fn once(path: &Path, fetch: impl FnOnce() -> Result<Vec<u8>>) -> Result<()> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    if path.is_file() {
        return Ok(());
    }
    paths::write(path, fetch()?)
}

#[cfg(test)]
mod tests {
    use super::{is_flash, once};
    use anyhow::bail;
    use std::fs;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::thread;
    use std::time::Duration;

    #[test]
    fn a_firmware_volume_is_found_behind_its_vectors_and_not_in_a_page_of_an_error() {
        for at in [40, 0x1028, 0xfffc] {
            let mut flash = vec![0; 1 << 20];
            flash[at..at + 4].copy_from_slice(b"_FVH");
            assert!(is_flash(&flash), "{at:#x}");
        }
        assert!(!is_flash(&vec![0; 1 << 20]));
        assert!(!is_flash(b"<html>not found</html>"));
        assert!(!is_flash(b""));
    }

    #[test]
    fn what_several_want_at_once_is_fetched_once_and_again_only_after_a_failure() {
        let folder = std::env::temp_dir().join(format!("vellum-once-{}", std::process::id()));
        let (path, fetched) = (folder.join("file"), AtomicU32::new(0));
        assert!(once(&path, || bail!("no network")).is_err());
        assert!(!path.exists());
        let want = || {
            once(&path, || {
                fetched.fetch_add(1, Ordering::Relaxed);
                thread::sleep(Duration::from_millis(20));
                Ok(b"bytes".to_vec())
            })
            .expect("fetched");
            assert_eq!(fs::read(&path).expect("there"), b"bytes");
        };
        thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(want))));
        assert_eq!(fetched.load(Ordering::Relaxed), 1);
        fs::remove_dir_all(&folder).expect("removed");
    }
}
