//! Debian's kernels and its static busybox for arm64: fetched as packages by the machine's own `apt-get`, from the mirror
//! that it is configured to use, into folders of their own: without root, for a foreign architecture, and leaving the
//! system as it is. What was fetched once stays below `target/linux`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use super::Series;
use crate::paths;
use crate::process;
use crate::setup::apt::{self, Mirror};

/// Nothing can be fetched on this machine: no apt, no mirror, or no network.
#[derive(Debug)]
pub(crate) struct NoSource(String);

impl std::fmt::Display for NoSource {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            out,
            "Debian's packages cannot be fetched, and target/linux does not have them: {}",
            self.0
        )
    }
}

impl std::error::Error for NoSource {}

/// The package that depends on the newest kernel of a release.
const NEWEST: &str = "linux-image-arm64";
/// The package of the programs.
const PROGRAMS: &str = "busybox-static";

/// The release of Debian that has a kernel of this series.
fn release(series: Series) -> &'static str {
    match series {
        Series::V6_1 => "bookworm",
        Series::V6_12 => "trixie",
    }
}

/// The kernel and busybox to go with it, fetched first if they are not there.
pub(super) fn ready(series: Series) -> Result<(PathBuf, PathBuf)> {
    let folder = paths::target("linux").join(series.name());
    let (kernel, busybox) = (folder.join("Image"), folder.join("busybox"));
    if kernel.is_file() && busybox.is_file() {
        return Ok((kernel, busybox));
    }
    if process::output(Command::new("apt-get").arg("--version")).is_err() {
        bail!(NoSource("there is no apt-get".into()));
    }
    let Some(mirror) = apt::mirror() else {
        bail!(NoSource(
            "apt is not configured to use a Debian mirror".into()
        ));
    };
    eprintln!(
        "fetching Debian's Linux {} and busybox for arm64 into target/linux (about 120 MB, no root needed)",
        series.name()
    );
    let partial = paths::target(&format!("linux/partial-{}", std::process::id()));
    let done = fetch(&mirror, series, &partial, &folder);
    if partial.exists() {
        fs::remove_dir_all(&partial)?;
    }
    done?;
    Ok((kernel, busybox))
}

fn fetch(mirror: &Mirror, series: Series, partial: &Path, folder: &Path) -> Result<()> {
    for below in ["etc", "state/lists/partial", "cache/archives/partial"] {
        fs::create_dir_all(partial.join(below))?;
    }
    fs::write(partial.join("status"), "")?;
    fs::write(
        partial.join("etc/sources.list"),
        mirror.entry(release(series)),
    )?;
    if let Err(error) = process::output(apt(partial, "apt-get").args(["-q", "update"])) {
        bail!(NoSource(format!("{error:#}")));
    }
    let said = process::output(apt(partial, "apt-cache").args(["show", NEWEST]))?;
    let name = newest(&said, series)
        .with_context(|| format!("{} has no Linux {}", release(series), series.name()))?;
    let mut download = apt(partial, "apt-get");
    download.args(["-q", "download", &name, PROGRAMS]);
    process::output(download.current_dir(partial))?;
    let version = name.trim_start_matches("linux-image-");
    let kernel = unpack(partial, &name, &format!("./boot/vmlinuz-{version}"))?;
    let busybox = unpack(partial, PROGRAMS, "*bin/busybox")?;
    if kernel.get(0x38..0x3c) != Some(b"ARMd") {
        bail!("the kernel of package {name} is no uncompressed arm64 Image");
    }
    if !busybox.starts_with(b"\x7fELF") {
        bail!("package {PROGRAMS} has no busybox");
    }
    paths::write(&folder.join("busybox"), busybox)?;
    paths::write(&folder.join("package"), format!("{name}\n"))?;
    paths::write(&folder.join("Image"), kernel)
}

/// `program` of apt with every folder it reads or writes below `folder`, and an empty list of installed packages.
fn apt(folder: &Path, program: &str) -> Command {
    let at = |option: &str, below: &str| format!("{option}={}", folder.join(below).display());
    let mut command = Command::new(program);
    for option in [
        at("Dir::Etc::SourceList", "etc/sources.list"),
        at("Dir::State", "state"),
        at("Dir::Cache", "cache"),
        at("Dir::State::status", "status"),
        "Dir::Etc::SourceParts=/dev/null".into(),
        "Dir::Etc::PreferencesParts=/dev/null".into(),
        "APT::Architecture=arm64".into(),
        "APT::Architectures=arm64".into(),
        "APT::Sandbox::User=root".into(),
        "APT::Update::Error-Mode=any".into(),
        "Acquire::Languages=none".into(),
        "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".into(),
        "Debug::NoLocking=1".into(),
    ] {
        command.arg("-o").arg(option);
    }
    command
}

/// The package that the newest kernel of the series is in, from what `apt-cache show` says.
fn newest(said: &str, series: Series) -> Option<String> {
    let of_series = |stanza: &&str| {
        stanza
            .lines()
            .filter_map(|line| line.strip_prefix("Version: "))
            .any(|version| version.starts_with(&format!("{}.", series.name())))
    };
    let stanza = said.split("\n\n").find(of_series)?;
    let depends = stanza
        .lines()
        .find_map(|line| line.strip_prefix("Depends: "))?;
    let package = depends.split([' ', ',']).next()?;
    package
        .starts_with("linux-image-")
        .then(|| package.to_owned())
}

/// One file out of the package `name` that was fetched to `folder`.
fn unpack(folder: &Path, name: &str, file: &str) -> Result<Vec<u8>> {
    let prefix = format!("{name}_");
    let mut found = None;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(&prefix) {
            found = Some(entry.path());
        }
    }
    let package = found.with_context(|| format!("package {name} was not fetched"))?;
    let mut files = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(&package)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start dpkg-deb")?;
    let pipe = files.stdout.take().context("dpkg-deb has no output")?;
    let unpacked = Command::new("tar")
        .args(["-x", "--to-stdout", "--wildcards", file])
        .stdin(pipe)
        .output()
        .context("cannot start tar")?;
    let whole = files.wait()?.success() && unpacked.status.success();
    if !whole || unpacked.stdout.is_empty() {
        bail!("package {name} has no {file}");
    }
    Ok(unpacked.stdout)
}

#[cfg(test)]
mod tests {
    use super::newest;
    use crate::linux::Series;

    const SAID: &str = "Package: linux-image-arm64\nVersion: 6.12.107-1\n\
        Depends: linux-image-6.12.107+deb13-arm64 (= 6.12.107-1)\nDescription: Linux\n\n\
        Package: linux-image-arm64\nVersion: 6.1.176-1\nDepends: linux-image-6.1.0-50-arm64 (= 6.1.176-1), x\n\n";

    #[test]
    fn the_kernel_is_the_one_of_the_series() {
        let name = |series| newest(SAID, series);
        assert_eq!(
            name(Series::V6_12).as_deref(),
            Some("linux-image-6.12.107+deb13-arm64")
        );
        assert_eq!(
            name(Series::V6_1).as_deref(),
            Some("linux-image-6.1.0-50-arm64")
        );
        assert_eq!(newest("", Series::V6_1), None);
        assert_eq!(
            newest("Version: 6.1.1\nDepends: perl\n", Series::V6_1),
            None
        );
    }
}
