//! What the Markdown files link to is there. Addresses elsewhere and places within a file are not looked at.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::Finding;
use crate::paths;

/// Folders with Markdown files, beside those at the top.
const FOLDERS: [&str; 4] = ["src", "boards", "tests", "xtask"];

/// Every link of this repository's files to a file that is not there.
pub(super) fn check() -> Result<Vec<Finding>> {
    let root = paths::root();
    let mut documents = of_folder(&root, false)?;
    for folder in FOLDERS {
        documents.extend(of_folder(&root.join(folder), true)?);
    }
    let mut findings = Vec::new();
    for document in documents {
        let text = fs::read_to_string(&document)?;
        let folder = document.parent().context("a file without a folder")?;
        let name = document.strip_prefix(&root)?.display().to_string();
        findings.extend(broken(&name, &text, |link| folder.join(link).exists()));
    }
    Ok(findings)
}

fn of_folder(folder: &Path, deep: bool) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() && deep {
            found.extend(of_folder(&path, deep)?);
        } else if path.extension().is_some_and(|it| it == "md") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn broken(name: &str, text: &str, exists: impl Fn(&str) -> bool) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (index, line) in text.lines().enumerate() {
        for link in links(line).filter(|link| !exists(link)) {
            findings.push(Finding {
                path: name.to_owned(),
                line: index + 1,
                what: format!("there is no {link}"),
            });
        }
    }
    findings
}

/// The files that a line links to.
fn links(line: &str) -> impl Iterator<Item = &str> {
    let targets = line.split("](").skip(1);
    targets
        .filter_map(|rest| rest.split([')', '#']).next())
        .filter(|link| !link.is_empty() && !link.contains("://"))
}

#[cfg(test)]
mod tests {
    use super::{broken, links};

    #[test]
    fn files_are_told_from_addresses_and_places() {
        let line =
            "[a](src/a.rs), [b](b.md#there), [c](#here), <https://d> and [d](https://d/e.md)";
        assert_eq!(links(line).collect::<Vec<_>>(), ["src/a.rs", "b.md"]);
    }

    #[test]
    fn a_file_that_is_not_there_is_found_with_its_line() {
        let text = "see\n[this](here.rs) and\n[that](gone.rs)";
        let findings = broken("x.md", text, |link| link == "here.rs");
        assert_eq!(findings.len(), 1);
        assert_eq!((findings[0].line, findings[0].path.as_str()), (3, "x.md"));
        assert!(findings[0].what.contains("gone.rs"));
    }
}
