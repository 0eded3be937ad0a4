//! A QEMU of the project's own below `target/qemu`: fetched and unpacked without root and without touching the system,
//! run through its own loader and libraries. Debian on amd64 only; elsewhere one line says what to do.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use super::apt;
use crate::paths;
use crate::process;
use crate::qemu::{OLDEST, Qemu};

const BASE: &str = "trixie";
const BACKPORTS: &str = "trixie-backports";

/// Finds itself, so that the folder may be renamed.
const LAUNCHER: &str = r#"#!/bin/sh
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
lib=$here/root/usr/lib/x86_64-linux-gnu
exec "$lib/ld-linux-x86-64.so.2" --library-path "$lib" "$here/root/usr/bin/qemu-system-aarch64" -L "$here/root/usr/share/qemu" "$@"
"#;

/// The private QEMU, unpacked first if it is not there; `found` says why the machine's own will not do.
pub(crate) fn ready(found: &str) -> Result<Qemu> {
    let folder = paths::target("qemu");
    let program = folder.join("qemu-system-aarch64");
    if let Ok(qemu) = Qemu::probe(&program) {
        return Ok(qemu);
    }
    let Some(mirror) = debian_amd64().then(apt::mirror).flatten() else {
        bail!(
            "{found} in PATH and no Debian mirror to take one from; \
             install QEMU {OLDEST} or newer, or name one with --qemu PATH or VELLUM_QEMU=PATH"
        );
    };
    eprintln!(
        "{found} in PATH: unpacking a private QEMU below target/qemu (about 40 MB to fetch, no root needed)"
    );
    install(&mirror, &folder).with_context(|| {
        format!("cannot unpack a private QEMU; install QEMU {OLDEST} or newer, or name one with --qemu PATH or VELLUM_QEMU=PATH")
    })?;
    let qemu = Qemu::probe(&program)?;
    if !qemu.recent() {
        bail!(
            "{BACKPORTS} has only QEMU {}; {OLDEST} or newer is needed",
            qemu.version()
        );
    }
    eprintln!("QEMU {} is ready", qemu.version());
    Ok(qemu)
}

fn debian_amd64() -> bool {
    let answers = |command: &mut Command| process::output(command).is_ok();
    cfg!(target_arch = "x86_64")
        && answers(Command::new("apt-get").arg("--version"))
        && answers(Command::new("dpkg").arg("--version"))
}

/// Unpacks into a folder of its own, then renames: what stands in `folder` is always whole.
fn install(mirror: &apt::Mirror, folder: &Path) -> Result<()> {
    let partial = paths::target(&format!("qemu.partial-{}", std::process::id()));
    let done = unpack(mirror, &partial).and_then(|()| put(&partial, folder));
    if partial.exists() {
        fs::remove_dir_all(&partial)?;
    }
    done
}

/// Another task may have been faster: then its folder stays.
fn put(partial: &Path, folder: &Path) -> Result<()> {
    if Qemu::probe(&folder.join("qemu-system-aarch64")).is_ok() {
        return Ok(());
    }
    if folder.exists() {
        fs::remove_dir_all(folder)?;
    }
    fs::rename(partial, folder).context("target/qemu")
}

fn unpack(mirror: &apt::Mirror, folder: &Path) -> Result<()> {
    for below in [
        "etc",
        "state/lists/partial",
        "cache/archives/partial",
        "root",
    ] {
        fs::create_dir_all(folder.join(below))?;
    }
    fs::write(folder.join("status"), "")?;
    fs::write(
        folder.join("etc/sources.list"),
        mirror.entry(BASE) + &mirror.entry(BACKPORTS),
    )?;
    quiet(apt_get(folder).arg("update"))?;
    quiet(apt_get(folder).args([
        "-y",
        "--download-only",
        "-t",
        BACKPORTS,
        "install",
        "qemu-system-arm",
    ]))?;
    for package in packages(&folder.join("cache/archives"))? {
        quiet(
            Command::new("dpkg")
                .arg("-x")
                .arg(&package)
                .arg(folder.join("root")),
        )?;
    }
    fs::remove_dir_all(folder.join("cache"))?;
    fs::remove_dir_all(folder.join("state"))?;
    let launcher = folder.join("qemu-system-aarch64");
    fs::write(&launcher, LAUNCHER)?;
    fs::set_permissions(&launcher, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// `apt-get` with every folder it reads or writes below `folder`, and an empty list of installed packages: it fetches
/// all that QEMU needs, the C library included.
fn apt_get(folder: &Path) -> Command {
    let at = |option: &str, below: &str| format!("{option}={}", folder.join(below).display());
    let mut command = Command::new("apt-get");
    for option in [
        at("Dir::Etc::SourceList", "etc/sources.list"),
        at("Dir::State", "state"),
        at("Dir::Cache", "cache"),
        at("Dir::State::status", "status"),
        "Dir::Etc::SourceParts=/dev/null".into(),
        "Dir::Etc::PreferencesParts=/dev/null".into(),
        "APT::Architecture=amd64".into(),
        "APT::Install-Recommends=false".into(),
        "APT::Sandbox::User=root".into(),
        "Debug::NoLocking=1".into(),
    ] {
        command.arg("-o").arg(option);
    }
    command.arg("-q");
    command
}

fn quiet(command: &mut Command) -> Result<()> {
    process::output(command.stdout(Stdio::null())).map(drop)
}

fn packages(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut packages = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            packages.push(path);
        }
    }
    packages.sort();
    Ok(packages)
}
