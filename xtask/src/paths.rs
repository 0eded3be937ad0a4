//! Where things lie in the repository. Everything a task writes is below `target/`.

use std::path::{Path, PathBuf};

/// The root of the repository: the folder above this package.
pub(crate) fn root() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package).to_path_buf()
}

/// A path below `target/`, which need not exist.
pub(crate) fn target(below: &str) -> PathBuf {
    root().join("target").join(below)
}
