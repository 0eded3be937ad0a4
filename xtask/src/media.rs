//! What a board boots from: a tree of files, to be copied to a volume that its firmware reads.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::board::{Board, Media};
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

/// Where Debian's GRUB looks for what it is to do, and the image beside it.
const GRUB_COMMANDS: &str = "EFI/debian/grub.cfg";
const GRUB_IMAGE: &str = "vellum.efi";

/// Makes `folder` the tree of an EFI system partition from which GRUB, `program`, starts the image as UEFI would.
pub(crate) fn grub(
    folder: &Path,
    program: &Path,
    image: &Path,
    bundle: Option<&Path>,
    arguments: &str,
) -> Result<()> {
    copy(program, &folder.join(UEFI_PROGRAM))?;
    copy(image, &folder.join(GRUB_IMAGE))?;
    if let Some(bundle) = bundle {
        copy(bundle, &folder.join(UEFI_BUNDLE))?;
    }
    let commands = format!("chainloader /{GRUB_IMAGE} {arguments}\nboot\n");
    paths::write(&folder.join(GRUB_COMMANDS), commands)
}

/// The image on a Raspberry Pi's SD card, as the board's `config.txt` names it, and what stands beside it.
const SD_IMAGE: &str = "vellum.img";
const SD_ARGUMENTS: &str = "cmdline.txt";
/// What the Pi's firmware reads first.
pub(crate) const SD_CONFIGURATION: &str = "config.txt";
const SD_BUNDLE: &str = "bundle.cpio";

/// Makes what a board boots from below `target/boards`, anew, and returns where it is: a tree of files, or the image.
pub(crate) fn tree(
    board: &Board,
    image: &Path,
    bundle: Option<&Path>,
    arguments: &str,
) -> Result<PathBuf> {
    let folder = paths::target("boards").join(&board.name);
    tree_in(&folder, board, image, bundle, arguments)?;
    Ok(folder)
}

fn tree_in(
    folder: &Path,
    board: &Board,
    image: &Path,
    bundle: Option<&Path>,
    arguments: &str,
) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    match board.boot.media {
        Media::Image => copy(image, &folder.join("vellum.img"))?,
        Media::Esp => esp(folder, image, bundle, arguments)?,
        Media::Sd => {
            copy(image, &folder.join(SD_IMAGE))?;
            paths::write(&folder.join(SD_ARGUMENTS), format!("{arguments}\n"))?;
            if let Some(bundle) = bundle {
                copy(bundle, &folder.join(SD_BUNDLE))?;
            }
        }
    }
    for template in &board.boot.templates {
        let from = paths::root()
            .join("boards")
            .join(&board.name)
            .join(template);
        let mut text = fs::read_to_string(&from).with_context(|| from.display().to_string())?;
        if bundle.is_some() && template == SD_CONFIGURATION {
            text.push_str(&format!("initramfs {SD_BUNDLE} followkernel\n"));
        }
        paths::write(&folder.join(template), text)?;
    }
    Ok(())
}

/// Every file below `folder`, as paths from there, sorted.
pub(crate) fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(below) = folders.pop() {
        let here = folder.join(&below);
        for entry in fs::read_dir(&here).with_context(|| here.display().to_string())? {
            let entry = entry?;
            let path = below.join(entry.file_name());
            if entry.path().is_dir() {
                folders.push(path);
            } else {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let bytes = fs::read(from).with_context(|| from.display().to_string())?;
    paths::write(to, bytes)
}

#[cfg(test)]
mod tests {
    use super::{esp, files, tree_in};
    use crate::board::Board;
    use crate::flash::missing;
    use std::fs;

    #[test]
    fn every_board_gets_what_it_boots_from() {
        let base = std::env::temp_dir().join(format!("vellum-boards-{}", std::process::id()));
        fs::create_dir_all(&base).expect("made");
        let (image, bundle) = (base.join("image"), base.join("bundle"));
        fs::write(&image, "MZ").expect("written");
        fs::write(&bundle, "070701").expect("written");
        let expected: [(&str, &[&str]); 4] = [
            (
                "ampere-altra",
                &[
                    "EFI/BOOT/BOOTAA64.EFI",
                    "vellum/bundle.cpio",
                    "vellum/cmdline.txt",
                ],
            ),
            ("qemu-virt", &["vellum.img"]),
            (
                "qemu-virt-uefi",
                &[
                    "EFI/BOOT/BOOTAA64.EFI",
                    "vellum/bundle.cpio",
                    "vellum/cmdline.txt",
                ],
            ),
            (
                "rpi4",
                &["bundle.cpio", "cmdline.txt", "config.txt", "vellum.img"],
            ),
        ];
        let boards = Board::all().expect("read");
        let names: Vec<&str> = boards.iter().map(|it| it.name.as_str()).collect();
        assert_eq!(names, expected.map(|(name, _)| name));
        for (board, (name, wanted)) in boards.iter().zip(expected) {
            let folder = base.join(name);
            // Twice: what was there before is replaced.
            for arguments in ["suite=exit", board.boot.arguments.as_str()] {
                tree_in(&folder, board, &image, Some(&bundle), arguments).expect("made");
            }
            let found = files(&folder).expect("listed");
            let found: Vec<_> = found.iter().map(|it| it.display().to_string()).collect();
            assert_eq!(found, wanted, "{name}");
            let hold = |text: &str| {
                let holds = |file: &String| {
                    fs::read(folder.join(file)).is_ok_and(|it| it == text.as_bytes())
                };
                found.iter().filter(|file| holds(file)).count()
            };
            assert_eq!(hold("MZ"), 1, "{name}: one image");
            let told = usize::from(name != "qemu-virt");
            assert_eq!(hold(&format!("{}\n", board.boot.arguments)), told, "{name}");
            assert_eq!(missing(board, &folder).len(), board.boot.add.len());
        }
        fs::remove_dir_all(&base).expect("removed");
    }

    /// The firmware of a Raspberry Pi 4 finds every file that its configuration names, and is told what it must be told.
    #[test]
    fn what_a_configuration_names_is_there() {
        let base = std::env::temp_dir().join(format!("vellum-config-{}", std::process::id()));
        fs::create_dir_all(&base).expect("made");
        let image = base.join("image");
        fs::write(&image, "MZ").expect("written");
        let board = Board::load("rpi4").expect("read");
        for bundle in [None, Some(image.as_path())] {
            let folder = base.join("tree");
            tree_in(&folder, &board, &image, bundle, "suite=exit").expect("made");
            let config = fs::read_to_string(folder.join("config.txt")).expect("read");
            let lines: Vec<&str> = config.lines().filter(|it| !it.starts_with('#')).collect();
            let value = |key: &str| lines.iter().find_map(|it| it.strip_prefix(key));
            let names = [value("kernel="), value("cmdline=")];
            for file in names {
                let file = file.expect("it is named");
                assert!(folder.join(file).is_file(), "{file}");
            }
            // Without an equals sign, as that key alone is written.
            let initramfs = value("initramfs ");
            assert_eq!(
                initramfs,
                bundle.map(|_| "bundle.cpio followkernel"),
                "{config}"
            );
            assert_eq!(folder.join("bundle.cpio").is_file(), bundle.is_some());
            let overlay = value("dtoverlay=").expect("it is named");
            assert!(board.boot.add.contains(&format!("overlays/{overlay}.dtbo")));
            for line in ["arm_64bit=1", "enable_gic=1", "enable_uart=1"] {
                assert!(lines.contains(&line), "{line}");
            }
            // What moves the peripherals, or loads a large image wrongly.
            for key in ["arm_peri_high", "kernel_old", "armstub"] {
                assert_eq!(value(key), None);
            }
            assert!(
                lines.iter().all(|it| it.len() < 98),
                "firmware reads lines of 98 bytes"
            );
            let arguments = fs::read_to_string(folder.join("cmdline.txt")).expect("read");
            assert_eq!(arguments, "suite=exit\n");
        }
        fs::remove_dir_all(&base).expect("removed");
    }

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
