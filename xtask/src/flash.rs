//! `cargo xtask flash`: builds what a board boots from and copies it to a mounted volume, which is read back.
//!
//! Only a FAT volume's own root is written to, so that a wrong path does no harm; nothing on it is deleted, and a volume from
//! which something else boots is left alone unless that is asked for.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};

use crate::board::{Board, Media};
use crate::image::{self, Profile};
use crate::linux::{self, Series};
use crate::media;
use crate::process;

/// Options of the task.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The board
    #[arg(long, value_name = "NAME")]
    board: String,
    /// Where the SD card's boot partition or the EFI system partition is mounted
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
    /// Write to the volume although something else boots from it, which does not afterwards
    #[arg(long)]
    replace: bool,
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
    if let Some(file) = foreign(&board, &to).filter(|_| !args.replace) {
        bail!(
            "{} is not Vellum's: something else boots from this volume; --replace overwrites it",
            to.join(file).display()
        );
    }
    let image = image::build(Profile::Release)?;
    let bundle = args.linux.map(linux::bundle).transpose()?;
    let arguments = args.append.as_deref().unwrap_or(&board.boot.arguments);
    let tree = media::tree(&board, &image.flat, bundle.as_deref(), arguments)?;
    let files = copy(&tree, &to)?;
    verify(&tree, &to, &files)?;
    for file in files {
        println!("{}", to.join(file).display());
    }
    println!("image sha256 {}", image::sha256(&image.flat)?);
    print!("{}", to_be_added(&board, &to));
    println!("written and read back; unmount the volume before you take it out");
    Ok(ExitCode::SUCCESS)
}

/// What the user has to add to `folder`, in words; nothing where nothing is missing.
pub(crate) fn to_be_added(board: &Board, folder: &Path) -> String {
    let missing = missing(board, folder);
    if missing.is_empty() {
        return String::new();
    }
    format!(
        "add these files of the board's maker, which are not part of this project (boards/README.md says where they are): {}\n",
        missing.join(", ")
    )
}

/// What firmware would read first, if the volume has it already and it is not of this project.
fn foreign(board: &Board, to: &Path) -> Option<&'static str> {
    const NAME: &[u8] = b"Vellum";
    let first = match board.boot.media {
        Media::Image => return None,
        Media::Esp => media::UEFI_PROGRAM,
        Media::Sd => media::SD_CONFIGURATION,
    };
    let bytes = fs::read(to.join(first)).ok()?;
    let ours = bytes.windows(NAME.len()).any(|it| it == NAME);
    (!ours).then_some(first)
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

/// Copies every file, and returns which there are.
fn copy(from: &Path, to: &Path) -> Result<Vec<PathBuf>> {
    let files = media::files(from)?;
    for file in &files {
        let target = to.join(file);
        let name = || target.display().to_string();
        fs::create_dir_all(target.parent().unwrap_or(to)).with_context(name)?;
        fs::write(&target, fs::read(from.join(file))?).with_context(name)?;
        fs::File::open(&target)
            .and_then(|it| it.sync_all())
            .with_context(name)?;
        forget(&target);
    }
    Ok(files)
}

/// Has the kernel forget what it has cached of a file, so that it is read from the volume. Where that cannot be done, the
/// cache is what is verified.
fn forget(file: &Path) {
    let mut name = OsString::from("if=");
    name.push(file);
    let mut dd = Command::new("dd");
    dd.arg(name)
        .args(["iflag=nocache", "count=0", "status=none"]);
    drop(process::output(&mut dd));
}

/// Every file of the volume is what it was copied from.
fn verify(from: &Path, to: &Path, files: &[PathBuf]) -> Result<()> {
    for file in files {
        let (wanted, target) = (fs::read(from.join(file))?, to.join(file));
        let found = fs::read(&target).with_context(|| target.display().to_string())?;
        if found == wanted {
            continue;
        }
        let same = wanted.iter().zip(&found).take_while(|(a, b)| a == b);
        bail!(
            "{} is not what was written: it differs from byte {} on; is the volume full or worn out?",
            target.display(),
            same.count()
        );
    }
    Ok(())
}

/// Files of the board's maker that the volume does not have.
pub(crate) fn missing<'a>(board: &'a Board, to: &Path) -> Vec<&'a str> {
    let absent = |it: &&String| !to.join(it.as_str()).exists();
    let add = board.boot.add.iter().filter(absent);
    add.map(String::as_str).collect()
}

#[cfg(test)]
mod tests {
    use super::{check, copy, foreign, missing, to_be_added, verify};
    use crate::board::Board;
    use std::fs;
    use std::path::{Path, PathBuf};

    /// A folder of this test's own, and what to remove at its end.
    fn folder(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("vellum-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).expect("made");
        path
    }

    #[test]
    fn what_is_read_back_is_compared_to_the_last_byte() {
        let base = folder("verify");
        let (from, to) = (base.join("from"), base.join("to"));
        fs::create_dir_all(from.join("EFI")).expect("made");
        fs::create_dir_all(&to).expect("made");
        fs::write(from.join("EFI/image"), [7; 5000]).expect("written");
        fs::write(from.join("cmdline.txt"), "a=b").expect("written");
        let files = copy(&from, &to).expect("copied");
        assert!(verify(&from, &to, &files).is_ok());
        let bad: [(usize, Vec<u8>); 4] = [
            (4999, [vec![7; 4999], vec![8]].concat()),
            (0, [vec![0], vec![7; 4999]].concat()),
            (4096, vec![7; 4096]),
            (5000, vec![7; 5001]),
        ];
        for (at, bytes) in bad {
            fs::write(to.join("EFI/image"), bytes).expect("written");
            let error = verify(&from, &to, &files).map_err(|it| it.to_string());
            let error = error.expect_err("it differs");
            assert!(error.contains(&format!("from byte {at} on")), "{error}");
            assert!(error.contains("EFI/image"), "{error}");
        }
        fs::remove_file(to.join("EFI/image")).expect("removed");
        assert!(verify(&from, &to, &files).is_err());
        fs::remove_dir_all(&base).expect("removed");
    }

    #[test]
    fn a_volume_from_which_something_else_boots_is_known() {
        let base = folder("foreign");
        let (pi, altra) = (Board::load("rpi4"), Board::load("ampere-altra"));
        let (pi, altra) = (pi.expect("read"), altra.expect("read"));
        assert_eq!((foreign(&pi, &base), foreign(&altra, &base)), (None, None));
        fs::create_dir_all(base.join("EFI/BOOT")).expect("made");
        fs::write(base.join("EFI/BOOT/BOOTAA64.EFI"), "MZ shim").expect("written");
        fs::write(base.join("config.txt"), "dtparam=audio=on\n").expect("written");
        assert_eq!(foreign(&pi, &base), Some("config.txt"));
        assert_eq!(foreign(&altra, &base), Some("EFI/BOOT/BOOTAA64.EFI"));
        // What the board's own template and every image say of themselves.
        let config = crate::paths::root().join("boards/rpi4/config.txt");
        fs::copy(config, base.join("config.txt")).expect("copied");
        fs::write(base.join("EFI/BOOT/BOOTAA64.EFI"), "MZ\0Vellum \0").expect("written");
        assert_eq!((foreign(&pi, &base), foreign(&altra, &base)), (None, None));
        fs::remove_dir_all(&base).expect("removed");
    }

    #[test]
    fn the_user_is_told_which_files_to_add() {
        let base = folder("added");
        let told = |board: &str| to_be_added(&Board::load(board).expect("read"), &base);
        for board in ["qemu-virt", "qemu-virt-uefi", "ampere-altra"] {
            assert_eq!(told(board), "");
        }
        for file in ["start4.elf", "overlays/disable-bt.dtbo"] {
            assert!(told("rpi4").contains(file), "{}", told("rpi4"));
        }
        fs::write(base.join("start4.elf"), "").expect("written");
        assert!(!told("rpi4").contains("start4.elf"));
        fs::remove_dir_all(&base).expect("removed");
    }

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
