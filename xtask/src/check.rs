//! `cargo xtask check`: one command decides whether the tree keeps the house rules.
//!
//! What the compiler's tools can decide is left to them; the rest are small rules over the text of the sources, each
//! in a file of its own with snippets that it must accept and snippets that it must refuse.

mod budgets;
mod contracts;
mod forbidden;
mod imports;
mod links;
mod source;

use std::process::{Command, ExitCode};

use anyhow::Result;

use crate::image;
use crate::process;
use crate::setup::{self, TARGET};
use source::{File, Tree};

/// Something a rule objects to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    pub(crate) path: String,
    /// Counted from one; zero for the whole file.
    pub(crate) line: usize,
    pub(crate) what: String,
}

impl Finding {
    fn new(file: &File, line: usize, what: impl Into<String>) -> Self {
        Self {
            path: file.path.clone(),
            line,
            what: what.into(),
        }
    }
}

/// Runs every check, reports each, and fails if one failed.
pub(crate) fn main() -> Result<ExitCode> {
    setup::rust_target()?;
    let mut failed = Vec::new();
    for (name, done) in rules()?.into_iter().chain(tools()?) {
        match done {
            Ok(()) => println!("ok      {name}"),
            Err(why) => {
                println!("FAILED  {name}\n{why}");
                failed.push(name);
            }
        }
    }
    if failed.is_empty() {
        println!("every check passed");
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!(
        "error: {} of the checks failed: {}",
        failed.len(),
        failed.join(", ")
    );
    Ok(ExitCode::FAILURE)
}

type Outcome = (String, Result<(), String>);

fn rules() -> Result<Vec<Outcome>> {
    let tree = Tree::read()?;
    let rules: [(&str, Vec<Finding>); 5] = [
        ("import direction", imports::check(&tree)),
        ("file budgets", budgets::check(&tree)),
        ("forbidden constructs", forbidden::check(&tree)),
        ("contracts of MMU entry points", contracts::check(&tree)),
        ("links of the documents", links::check()?),
    ];
    Ok(rules
        .into_iter()
        .map(|(name, findings)| (name.to_owned(), verdict(&findings)))
        .collect())
}

fn verdict(findings: &[Finding]) -> Result<(), String> {
    if findings.is_empty() {
        return Ok(());
    }
    let place = |finding: &Finding| match finding.line {
        0 => finding.path.clone(),
        line => format!("{}:{line}", finding.path),
    };
    let lines: Vec<String> = findings
        .iter()
        .map(|finding| format!("  {}: {}", place(finding), finding.what))
        .collect();
    Err(lines.join("\n"))
}

/// The compiler's tools, for the host and for the target. The target's programs include the built-in guest, which must
/// exist for that.
fn tools() -> Result<Vec<Outcome>> {
    let guest = image::guest()?;
    let on_target = |words: &[&str]| {
        let mut command = process::cargo();
        command
            .args(words)
            .args(["--package", "vellum", "--target", TARGET])
            .env("VELLUM_GUEST", &guest.flat);
        command
    };
    let on_host = |words: &[&str]| {
        let mut command = process::cargo();
        command.args(words);
        command
    };
    let strict = ["--", "-D", "warnings"];
    let mut docs = [
        on_host(&[
            "doc",
            "--quiet",
            "--workspace",
            "--no-deps",
            "--document-private-items",
        ]),
        on_target(&[
            "doc",
            "--quiet",
            "--lib",
            "--no-deps",
            "--document-private-items",
        ]),
    ];
    for command in &mut docs {
        command.env("RUSTDOCFLAGS", "-D warnings");
    }
    let [host_docs, target_docs] = docs;
    let mut host_clippy = on_host(&["clippy", "--quiet", "--workspace", "--all-targets"]);
    host_clippy.args(strict);
    let mut target_clippy = on_target(&["clippy", "--quiet", "--lib", "--bins"]);
    target_clippy.args(strict);
    let tools: [(&str, Command); 5] = [
        ("rustfmt", on_host(&["fmt", "--all", "--check"])),
        ("clippy, host", host_clippy),
        ("clippy, target", target_clippy),
        ("rustdoc, host", host_docs),
        ("rustdoc, target", target_docs),
    ];
    let run = |(name, mut command): (&str, Command)| {
        let done = process::run(&mut command).map_err(|error| format!("  {error:#}"));
        (name.to_owned(), done)
    };
    Ok(tools.into_iter().map(run).collect())
}
