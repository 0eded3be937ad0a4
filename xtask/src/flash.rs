//! `cargo xtask flash`: builds what a board boots from and copies it to a mounted volume, which is read back.
//!
//! Only a FAT volume's own root is written to, so that a wrong path does no harm; nothing on it is deleted.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};

use crate::board::{Board, Media};
use crate::image::{self, Profile};
use crate::linux::{self, Series};
use crate::media;

/// Options of the task.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The board
    #[arg(long, value_name = "NAME")]
    board: String,
    /// Where the SD card's boot partition or the EFI system partition is mounted
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
    /// Boot arguments [default: the board's own]
    #[arg(long, value_name = "TEXT")]
    append: Option<String>,
    /// Kernel and RAM disk of a Linux guest go with it: 6.1 or 6.12
    #[arg(long, value_name = "SERIES")]
    linux: Option<Series>,
}

/// Copies, verifies, and says what is missing.
pub(crate) fn main(args: &Args) -> Result<ExitCode> {
    let board = Board::load(&args.board)?;
    if board.boot.media == Media::Image {
        bail!("{} boots from no volume: use cargo xtask run", board.title);
    }
    let mounts = fs::read_to_string("/proc/mounts").context("the mounted volumes are unknown")?;
    let to = fs::canonicalize(&args.to).with_context(|| args.to.display().to_string())?;
    check(&mounts, &to)?;
    let image = image::build(Profile::Release)?;
    let bundle = args.linux.map(linux::bundle).transpose()?;
    let arguments = args.append.as_deref().unwrap_or(&board.boot.arguments);
    let tree = media::tree(&board, &image.flat, bundle.as_deref(), arguments)?;
    for file in copy(&tree, &to)? {
        println!("{}", to.join(file).display());
    }
    println!("image sha256 {}", image::sha256(&image.flat)?);
    let missing = missing(&board, &to);
    if !missing.is_empty() {
        println!(
            "add these files of the board's maker, which are not part of this project: {}",
            missing.join(", ")
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// Refuses everything but the root of a FAT volume.
fn check(mounts: &str, to: &Path) -> Result<()> {
    let volume = mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        let (place, kind) = (words.next()?, words.next()?);
        // The kernel writes a blank as an octal number.
        (Path::new(&place.replace("\\040", " ")) == to).then_some(kind)
    });
    match volume {
        Some("vfat" | "msdos") => Ok(()),
        Some(kind) => bail!(
            "{} is a volume of kind {kind}, and firmware reads FAT only",
            to.display()
        ),
        None => bail!(
            "{} is not where a volume is mounted; give the mount point of the SD card or EFI system partition",
            to.display()
        ),
    }
}

/// Copies every file and reads it back.
fn copy(from: &Path, to: &Path) -> Result<Vec<PathBuf>> {
    let files = media::files(from)?;
    for file in &files {
        let bytes = fs::read(from.join(file))?;
        let target = to.join(file);
        let name = || target.display().to_string();
        fs::create_dir_all(target.parent().unwrap_or(to)).with_context(name)?;
        fs::write(&target, &bytes).with_context(name)?;
        fs::File::open(&target)
            .and_then(|it| it.sync_all())
            .with_context(name)?;
        if fs::read(&target).with_context(name)? != bytes {
            bail!("{} is not what was written", target.display());
        }
    }
    Ok(files)
}

/// Files of the board's maker that the volume does not have.
pub(crate) fn missing<'a>(board: &'a Board, to: &Path) -> Vec<&'a str> {
    let absent = |it: &&String| !to.join(it.as_str()).exists();
    let add = board.boot.add.iter().filter(absent);
    add.map(String::as_str).collect()
}

#[cfg(test)]
mod tests {
    use super::{check, copy, missing};
    use crate::board::Board;
    use std::fs;
    use std::path::Path;

    #[test]
    fn only_the_root_of_a_fat_volume_is_written_to() {
        let mounts = "/dev/sda1 /media/a\\040card vfat rw 0 0\n/dev/sda2 / ext4 rw 0 0\n";
        let refusal = |path| {
            check(mounts, Path::new(path))
                .err()
                .map(|error| error.to_string())
                .unwrap_or_default()
        };
        assert_eq!(refusal("/media/a card"), "");
        assert!(refusal("/").contains("ext4"));
        assert!(refusal("/media/a card/boot").contains("not where a volume"));
        assert!(refusal("/home").contains("not where a volume"));
    }

    #[test]
    fn a_tree_is_copied_whole_and_what_was_there_stays() {
        let base = std::env::temp_dir().join(format!("vellum-flash-{}", std::process::id()));
        let (from, to) = (base.join("from"), base.join("to"));
        fs::create_dir_all(from.join("EFI/BOOT")).expect("made");
        fs::create_dir_all(&to).expect("made");
        fs::write(from.join("EFI/BOOT/BOOTAA64.EFI"), "new").expect("written");
        fs::write(from.join("cmdline.txt"), "a=b").expect("written");
        fs::write(to.join("start4.elf"), "kept").expect("written");
        assert_eq!(copy(&from, &to).expect("copied").len(), 2);
        assert_eq!(
            fs::read(to.join("EFI/BOOT/BOOTAA64.EFI")).expect("there"),
            b"new"
        );
        assert_eq!(fs::read(to.join("start4.elf")).expect("there"), b"kept");
        let board = Board::load("rpi4").expect("read");
        assert!(!missing(&board, &to).contains(&"start4.elf"));
        assert!(missing(&board, &to).contains(&"fixup4.dat"));
        fs::remove_dir_all(&base).expect("removed");
    }
}
