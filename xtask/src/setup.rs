//! `cargo xtask setup`: the Rust target and a recent QEMU. The other tasks call the two halves when something is missing.
//!
//! The toolchain itself is rustup's business: `rust-toolchain.toml` pins it and the first `cargo` fetches it.

pub(crate) mod apt;
pub(crate) mod debian;
pub(crate) mod firmware;
mod private_qemu;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};

use crate::process;
use crate::qemu::{OLDEST, Qemu};

/// The target of the hypervisor and of its built-in guest.
pub(crate) const TARGET: &str = "aarch64-unknown-none-softfloat";

/// Options of the task.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    qemu: Choice,
}

/// Which QEMU a task uses.
#[derive(clap::Args, Clone, Default)]
pub(crate) struct Choice {
    /// Use this qemu-system-aarch64 (VELLUM_QEMU in the environment does the same)
    #[arg(long = "qemu", value_name = "PATH")]
    program: Option<PathBuf>,
}

impl Choice {
    fn program(&self) -> Option<PathBuf> {
        self.program
            .clone()
            .or_else(|| std::env::var_os("VELLUM_QEMU").map(PathBuf::from))
    }
}

/// Installs what is missing and says what is used.
pub(crate) fn main(args: &Args) -> Result<ExitCode> {
    rust_target()?;
    println!("Rust target: {TARGET}");
    let qemu = qemu(&args.qemu)?;
    println!("QEMU {}: {}", qemu.version(), qemu.program().display());
    Ok(ExitCode::SUCCESS)
}

/// The target's `core` and `alloc`, through rustup when they are missing.
pub(crate) fn rust_target() -> Result<()> {
    let sysroot = process::output(Command::new("rustc").args(["--print", "sysroot"]))?;
    if Path::new(sysroot.trim())
        .join("lib/rustlib")
        .join(TARGET)
        .join("lib")
        .is_dir()
    {
        return Ok(());
    }
    eprintln!("installing the Rust target {TARGET} (rustup target add)");
    process::run(Command::new("rustup").args(["target", "add", TARGET])).with_context(|| {
        format!("the Rust target {TARGET} is missing and rustup cannot add it; install it by hand")
    })
}

/// The QEMU to use: the one asked for, the machine's own, or a private one below `target/`, fetched when needed.
pub(crate) fn qemu(choice: &Choice) -> Result<Qemu> {
    if let Some(program) = choice.program() {
        let qemu = Qemu::probe(&program)?;
        if !qemu.recent() {
            bail!(
                "{} is QEMU {}; {OLDEST} or newer is needed",
                program.display(),
                qemu.version()
            );
        }
        return Ok(qemu);
    }
    let own = Qemu::probe(Path::new("qemu-system-aarch64")).ok();
    if let Some(qemu) = own.as_ref().filter(|qemu| qemu.recent()) {
        return Ok(qemu.clone());
    }
    let found = own.map_or_else(
        || "no qemu-system-aarch64".to_owned(),
        |qemu| format!("only QEMU {}", qemu.version()),
    );
    private_qemu::ready(&found)
}
