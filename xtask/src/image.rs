//! From source to one flat file: the built-in guest, then the hypervisor that contains it, then the bytes a boot loader
//! copies to memory.
//!
//! The hypervisor is position independent and relocates itself with a loop that knows one kind of relocation; any other
//! kind in the file is refused here, where it can still be explained.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, Result, bail};
use object::read::elf::{ElfFile64, FileHeader as _, ProgramHeader as _};
use object::{Endianness, Object as _, RelocationFlags, elf};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::board::{Board, Media};
use crate::flash;
use crate::linux::{self, Series};
use crate::media;
use crate::paths;
use crate::process;
use crate::setup::{self, TARGET};

/// Options of the task.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Build with debug assertions and counters that a measured build does not have
    #[arg(long)]
    debug: bool,
    /// Make what this board boots from, below target/boards
    #[arg(long, value_name = "NAME")]
    board: Option<String>,
    /// Boot arguments of that board [default: the board's own]
    #[arg(long, value_name = "TEXT", requires = "board")]
    append: Option<String>,
    /// Kernel and RAM disk of a Linux guest go with it: 6.1 or 6.12
    #[arg(long, value_name = "SERIES", requires = "board")]
    linux: Option<Series>,
}

/// How the image is compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Profile {
    /// What is measured and shipped.
    Release,
    /// With debug assertions: it also records the shared lines that the fault path writes.
    Debug,
}

impl Profile {
    /// Debug if asked for.
    pub(crate) fn of(debug: bool) -> Self {
        if debug { Self::Debug } else { Self::Release }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Release => "release",
            Self::Debug => "dev",
        }
    }

    fn file(self) -> &'static str {
        match self {
            Self::Release => "vellum",
            Self::Debug => "vellum-debug",
        }
    }
}

/// A built image.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    /// The flat file.
    pub(crate) flat: PathBuf,
    /// The same with symbols, for a debugger.
    pub(crate) symbols: PathBuf,
    /// The built-in guest with its symbols.
    pub(crate) guest: PathBuf,
}

/// The built-in guest.
#[derive(Clone, Debug)]
pub(crate) struct Guest {
    /// The flat file.
    pub(crate) flat: PathBuf,
    /// The same with symbols.
    symbols: PathBuf,
}

/// Builds and says where the file is.
pub(crate) fn main(args: &Args) -> Result<ExitCode> {
    let board = args.board.as_deref().map(Board::load).transpose()?;
    if let Some(board) = board.as_ref().filter(|it| it.boot.media == Media::Image)
        && (args.append.is_some() || args.linux.is_some())
    {
        bail!(
            "{} boots from a file alone: arguments and guests are given to cargo xtask run",
            board.title
        );
    }
    let image = build(Profile::of(args.debug))?;
    let Some(board) = board else {
        println!("{}", image.flat.display());
        return Ok(ExitCode::SUCCESS);
    };
    let bundle = args.linux.map(linux::bundle).transpose()?;
    let arguments = args.append.as_deref().unwrap_or(&board.boot.arguments);
    let tree = media::tree(&board, &image.flat, bundle.as_deref(), arguments)?;
    for file in media::files(&tree)? {
        println!("{}", tree.join(file).display());
    }
    println!("image sha256 {}", sha256(&image.flat)?);
    print!("{}", flash::to_be_added(&board, &tree));
    Ok(ExitCode::SUCCESS)
}

/// Builds guest and hypervisor and flattens both.
pub(crate) fn build(profile: Profile) -> Result<Image> {
    setup::rust_target()?;
    let guest = guest()?;
    let symbols = compile(cargo_rustc("vellum", profile).env("VELLUM_GUEST", guest.flat))?;
    let bytes = fs::read(&symbols)?;
    only_relative(&bytes).context("the hypervisor cannot relocate itself")?;
    let flat = write(&flatten(&bytes)?, &format!("{}.img", profile.file()))?;
    Ok(Image {
        flat,
        symbols,
        guest: guest.symbols,
    })
}

/// The built-in guest as a flat file. It is linked to a fixed address by a script of its own, hence with flags of its own,
/// which replace those of `.cargo/config.toml`; cargo keeps what is built with either apart.
pub(crate) fn guest() -> Result<Guest> {
    let script = paths::root().join("src/guest/guest.ld");
    let flags = [
        "-Crelocation-model=static".to_owned(),
        format!("-Clink-arg=-T{}", script.display()),
    ];
    let mut command = cargo_rustc("guest", Profile::Release);
    command.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"));
    let symbols = compile(&mut command)?;
    let flat = write(&flatten(&fs::read(&symbols)?)?, "guest.img")?;
    Ok(Guest { flat, symbols })
}

fn cargo_rustc(bin: &str, profile: Profile) -> Command {
    let mut command = process::cargo();
    command.args([
        "build",
        "--package",
        "vellum",
        "--bin",
        bin,
        "--target",
        TARGET,
        "--profile",
        profile.name(),
    ]);
    command.arg("--message-format=json-render-diagnostics");
    command
}

/// Runs cargo and returns the program it made.
fn compile(command: &mut Command) -> Result<PathBuf> {
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start cargo")?;
    if !output.status.success() {
        bail!("the build failed; the compiler's messages stand above");
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    executable(&messages).context("cargo does not say where the program is")
}

/// The last `executable` among cargo's messages.
fn executable(messages: &str) -> Option<PathBuf> {
    let path = |line: &str| {
        let message: Value = serde_json::from_str(line).ok()?;
        Some(PathBuf::from(message.get("executable")?.as_str()?))
    };
    messages.lines().rev().find_map(path)
}

/// The loadable segments as one run of bytes from the lowest address, padded to what they take in memory: nothing that a
/// loader places behind the file is overwritten when the image clears its own data.
pub(crate) fn flatten(file: &[u8]) -> Result<Vec<u8>> {
    let header = elf::FileHeader64::<Endianness>::parse(file)?;
    let endian = header.endian()?;
    let loads: Vec<_> = header
        .program_headers(endian, file)?
        .iter()
        .filter(|header| header.p_type(endian) == elf::PT_LOAD)
        .collect();
    let base = loads
        .iter()
        .map(|load| load.p_vaddr(endian))
        .min()
        .context("nothing to load")?;
    let end = loads
        .iter()
        .map(|load| load.p_vaddr(endian) + load.p_memsz(endian))
        .max()
        .unwrap_or(base);
    let mut flat = vec![0; usize::try_from(end - base)?];
    for load in loads {
        let Ok(bytes) = load.data(endian, file) else {
            bail!("a segment lies outside the file")
        };
        let start = usize::try_from(load.p_vaddr(endian) - base)?;
        flat.get_mut(start..start + bytes.len())
            .context("a segment is larger than its memory")?
            .copy_from_slice(bytes);
    }
    Ok(flat)
}

/// Bytes of the flat image that come from the file; the rest is memory that the program clears itself.
pub(crate) fn file_bytes(file: &[u8]) -> Result<usize> {
    let header = elf::FileHeader64::<Endianness>::parse(file)?;
    let endian = header.endian()?;
    let ends = header
        .program_headers(endian, file)?
        .iter()
        .filter(|header| header.p_type(endian) == elf::PT_LOAD)
        .map(|load| load.p_vaddr(endian) + load.p_filesz(endian));
    Ok(usize::try_from(ends.max().context("nothing to load")?)?)
}

/// Refuses every relocation but "add the load address".
fn only_relative(file: &[u8]) -> Result<()> {
    let file = ElfFile64::<Endianness>::parse(file)?;
    let Some(relocations) = file.dynamic_relocations() else {
        return Ok(());
    };
    for (place, relocation) in relocations {
        match relocation.flags() {
            RelocationFlags::Elf { r_type } if r_type == elf::R_AARCH64_RELATIVE => {}
            other => bail!("relocation {other:?} at {place:#x} is not R_AARCH64_RELATIVE"),
        }
    }
    Ok(())
}

/// Writes `target/image/<name>`. The same bytes keep their time stamp, so that what includes them is not built again.
fn write(bytes: &[u8], name: &str) -> Result<PathBuf> {
    let path = paths::target("image").join(name);
    if !fs::read(&path).is_ok_and(|old| old == bytes) {
        paths::write(&path, bytes)?;
    }
    Ok(path)
}

/// SHA-256 of a file, in hexadecimal.
pub(crate) fn sha256(path: &Path) -> Result<String> {
    let digest = Sha256::digest(fs::read(path)?);
    Ok(digest.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A number that changes when the image does.
pub(crate) fn fingerprint(path: &Path) -> Result<u64> {
    use std::hash::{DefaultHasher, Hash as _, Hasher as _};
    let mut hasher = DefaultHasher::new();
    fs::read(path)?.hash(&mut hasher);
    Ok(hasher.finish())
}

#[cfg(test)]
mod tests {
    use super::{executable, flatten, only_relative, sha256};

    /// A little ELF file: header, one program header per `(address, file size, memory size)`, then the bytes 1, 2, 3...
    fn elf(loads: &[(u64, u64, u64)]) -> Vec<u8> {
        let count = u16::try_from(loads.len()).expect("few segments");
        let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        file.extend(3u16.to_le_bytes());
        file.extend(183u16.to_le_bytes());
        file.extend(1u32.to_le_bytes());
        for word in [0u64, 64, 0] {
            file.extend(word.to_le_bytes());
        }
        file.extend(0u32.to_le_bytes());
        for half in [64, 56, count, 64, 0, 0] {
            file.extend(half.to_le_bytes());
        }
        let mut offset = 64 + 56 * u64::from(count);
        for &(address, filesz, memsz) in loads {
            file.extend(1u32.to_le_bytes());
            file.extend(5u32.to_le_bytes());
            for word in [offset, address, address, filesz, memsz, 1] {
                file.extend(word.to_le_bytes());
            }
            offset += filesz;
        }
        let bytes: u64 = loads.iter().map(|load| load.1).sum();
        file.extend((1..=bytes).map(|byte| u8::try_from(byte).expect("few bytes")));
        file
    }

    #[test]
    fn segments_stand_at_their_distance_and_memory_is_padded() {
        let flat = flatten(&elf(&[(0x1000, 2, 2), (0x1004, 1, 4)])).expect("it is flattened");
        assert_eq!(flat, [1, 2, 0, 0, 3, 0, 0, 0]);
    }

    #[test]
    fn what_a_program_clears_itself_is_behind_the_file() {
        let file = elf(&[(0, 2, 2), (4, 1, 4)]);
        assert_eq!(super::file_bytes(&file).expect("it loads"), 5);
    }

    #[test]
    fn a_file_that_loads_nothing_is_refused() {
        assert!(flatten(&elf(&[])).is_err());
        assert!(flatten(b"MZ").is_err());
    }

    #[test]
    fn a_file_without_relocations_is_relocatable() {
        assert!(only_relative(&elf(&[(0, 1, 1)])).is_ok());
    }

    #[test]
    fn a_file_has_its_standard_hash() {
        let path = std::env::temp_dir().join(format!("vellum-hash-{}", std::process::id()));
        std::fs::write(&path, "abc").expect("it is written");
        let hash = sha256(&path).expect("it is read");
        std::fs::remove_file(&path).expect("it is there");
        assert_eq!(
            hash,
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    #[test]
    fn the_program_is_the_last_one_cargo_names() {
        let messages = "{\"reason\":\"compiler-artifact\",\"executable\":null}\n\
                        {\"reason\":\"compiler-artifact\",\"executable\":\"/t/vellum\"}\n\
                        {\"reason\":\"build-finished\",\"success\":true}\n";
        assert_eq!(executable(messages), Some("/t/vellum".into()));
        assert_eq!(executable("{}"), None);
    }
}
