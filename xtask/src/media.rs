//! What a board boots from: a tree of files, to be copied to a volume that its firmware reads.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

use crate::paths;

/// Where UEFI looks for a program on a volume that no boot entry names.
pub(crate) const UEFI_PROGRAM: &str = "EFI/BOOT/BOOTAA64.EFI";
/// What the image reads beside itself: boot arguments, and the initial RAM disk.
pub(crate) const UEFI_ARGUMENTS: &str = "vellum/cmdline.txt";
pub(crate) const UEFI_BUNDLE: &str = "vellum/bundle.cpio";

/// Makes `folder` the tree of an EFI system partition.
pub(crate) fn esp(
    folder: &Path,
    image: &Path,
    bundle: Option<&Path>,
    arguments: &str,
) -> Result<()> {
    copy(image, &folder.join(UEFI_PROGRAM))?;
    if let Some(bundle) = bundle {
        copy(bundle, &folder.join(UEFI_BUNDLE))?;
    }
    paths::write(&folder.join(UEFI_ARGUMENTS), format!("{arguments}\n"))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let bytes = fs::read(from).with_context(|| from.display().to_string())?;
    paths::write(to, bytes)
}

#[cfg(test)]
mod tests {
    use super::esp;
    use std::fs;

    #[test]
    fn an_efi_partition_has_the_image_where_firmware_looks() {
        let folder = std::env::temp_dir().join(format!("vellum-esp-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("made");
        let image = folder.join("image");
        fs::write(&image, "MZ").expect("written");
        esp(&folder.join("esp"), &image, Some(&image), "suite=none").expect("made");
        let read = |path: &str| fs::read_to_string(folder.join("esp").join(path)).expect(path);
        assert_eq!(read("EFI/BOOT/BOOTAA64.EFI"), "MZ");
        assert_eq!(read("vellum/bundle.cpio"), "MZ");
        assert_eq!(read("vellum/cmdline.txt"), "suite=none\n");
        fs::remove_dir_all(&folder).expect("removed");
    }
}
