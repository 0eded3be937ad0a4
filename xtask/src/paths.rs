//! Where things lie in the repository, and how a file is written there. Everything a task writes is below `target/`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

/// The root of the repository: the folder above this package.
pub(crate) fn root() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package).to_path_buf()
}

/// A path below `target/`, which need not exist.
pub(crate) fn target(below: &str) -> PathBuf {
    root().join("target").join(below)
}

/// Writes a file whole or not at all.
pub(crate) fn write(path: &Path, bytes: impl AsRef<[u8]>) -> Result<()> {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let name = path
        .file_name()
        .with_context(|| format!("{} is not a file", path.display()))?;
    let partial = folder.join(format!(
        "{}.partial-{}",
        name.to_string_lossy(),
        std::process::id()
    ));
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    fs::write(&partial, bytes).with_context(|| partial.display().to_string())?;
    fs::rename(&partial, path).with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::write;
    use std::fs;

    #[test]
    fn a_file_is_replaced_and_nothing_partial_stays() {
        let folder = std::env::temp_dir().join(format!("vellum-write-{}", std::process::id()));
        let path = folder.join("a.json");
        write(&path, "1").expect("written");
        write(&path, "2").expect("replaced");
        assert_eq!(fs::read_to_string(&path).expect("read"), "2");
        assert_eq!(fs::read_dir(&folder).expect("listed").count(), 1);
        fs::remove_dir_all(&folder).expect("removed");
    }
}
