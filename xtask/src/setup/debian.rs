//! Files out of Debian's packages for arm64: fetched by the machine's own `apt-get`, from the mirror that it is configured to
//! use, into a folder of their own: without root, for a foreign architecture, and leaving the system as it is.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use super::apt;
use crate::process;

/// Nothing can be fetched on this machine: no apt, no mirror, or no network.
#[derive(Debug)]
pub(crate) struct NoSource(String);

impl std::fmt::Display for NoSource {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            out,
            "Debian's packages cannot be fetched, and target/ does not have what is needed of them: {}",
            self.0
        )
    }
}

impl std::error::Error for NoSource {}

/// The packages of one release, below a folder that is removed when this is dropped.
#[derive(Debug)]
pub(crate) struct Packages {
    folder: PathBuf,
}

impl Drop for Packages {
    fn drop(&mut self) {
        // What stays is in nobody's way: the folder's name is this process's.
        fs::remove_dir_all(&self.folder).unwrap_or_default();
    }
}

impl Packages {
    /// Fetches the list of `release`'s packages; `what` is what they are wanted for.
    pub(crate) fn of(release: &str, folder: PathBuf, what: &str) -> Result<Self> {
        if process::output(Command::new("apt-get").arg("--version")).is_err() {
            bail!(NoSource("there is no apt-get".into()));
        }
        let Some(mirror) = apt::mirror() else {
            bail!(NoSource(
                "apt is not configured to use a Debian mirror".into()
            ));
        };
        eprintln!("fetching {what}, no root needed");
        let packages = Self { folder };
        for below in ["etc", "state/lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(packages.folder.join(below))?;
        }
        fs::write(packages.folder.join("status"), "")?;
        fs::write(
            packages.folder.join("etc/sources.list"),
            mirror.entry(release),
        )?;
        if let Err(error) = process::output(packages.apt("apt-get").args(["-q", "update"])) {
            bail!(NoSource(format!("{error:#}")));
        }
        Ok(packages)
    }

    /// What the list says of a package.
    pub(crate) fn show(&self, name: &str) -> Result<String> {
        process::output(self.apt("apt-cache").args(["show", name]))
    }

    /// Fetches packages.
    pub(crate) fn download(&self, names: &[&str]) -> Result<()> {
        let mut download = self.apt("apt-get");
        download.args(["-q", "download"]).args(names);
        process::output(download.current_dir(&self.folder)).map(drop)
    }

    /// `program` of apt with every folder it reads or writes below the folder, and an empty list of installed packages.
    fn apt(&self, program: &str) -> Command {
        let at =
            |option: &str, below: &str| format!("{option}={}", self.folder.join(below).display());
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

    /// One file, which may be a pattern, out of the package `name` that was fetched.
    pub(crate) fn file(&self, name: &str, file: &str) -> Result<Vec<u8>> {
        let package =
            find(&self.folder, name)?.with_context(|| format!("package {name} was not fetched"))?;
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
}

/// The file of package `name` in `folder`.
fn find(folder: &Path, name: &str) -> Result<Option<PathBuf>> {
    let prefix = format!("{name}_");
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(&prefix) {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::find;
    use std::fs;

    #[test]
    fn a_package_is_found_by_its_whole_name() {
        let folder = std::env::temp_dir().join(format!("vellum-packages-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("made");
        fs::write(folder.join("busybox-static_1.35_arm64.deb"), "").expect("written");
        let found = |name| find(&folder, name).expect("listed").is_some();
        assert!(found("busybox-static"));
        assert!(!found("busybox"));
        fs::remove_dir_all(&folder).expect("removed");
    }
}
