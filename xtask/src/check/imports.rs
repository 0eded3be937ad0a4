//! Imports point one way, and only `arch` knows the register crates.

use super::Finding;
use super::source::{File, Tree};

/// Each module and what it may name by `crate::`; its own parts it always may.
const ALLOWED: [(&str, &[&str]); 13] = [
    ("addr", &[]),
    ("arch", &["addr"]),
    ("sync", &["addr", "arch", "trace"]),
    ("trace", &["addr", "arch", "sync"]),
    ("mem", &["addr", "arch", "sync", "trace"]),
    ("mmu", &["addr", "arch", "sync", "trace", "mem"]),
    ("dev", &["addr", "arch", "sync", "trace", "mem"]),
    (
        "vm",
        &[
            "addr", "arch", "sync", "trace", "mem", "mmu", "dev", "guest", "log", "panic",
        ],
    ),
    (
        "bench",
        &[
            "addr", "arch", "sync", "trace", "mem", "mmu", "dev", "vm", "guest", "log",
        ],
    ),
    ("log", &["addr", "arch", "sync", "trace", "mem", "dev"]),
    (
        "panic",
        &["addr", "arch", "sync", "trace", "mem", "dev", "log"],
    ),
    ("guest", &[]),
    (
        "boot",
        &[
            "addr", "arch", "sync", "trace", "mem", "mmu", "dev", "vm", "bench", "guest", "log",
            "panic",
        ],
    ),
];

const REGISTER_CRATES: [&str; 2] = ["aarch64_cpu", "tock_registers"];

/// Every import that points the wrong way.
pub(super) fn check(tree: &Tree) -> Vec<Finding> {
    tree.files
        .iter()
        .filter(|file| file.path.starts_with("src/") && file.path.ends_with(".rs"))
        .flat_map(of_file)
        .collect()
}

fn of_file(file: &File) -> Vec<Finding> {
    let mut findings = Vec::new();
    let module = module(&file.path);
    if module != "arch" {
        for (line, code) in file.code_lines() {
            if let Some(name) = REGISTER_CRATES.iter().find(|name| code.contains(*name)) {
                findings.push(Finding::new(
                    file,
                    line,
                    format!("only arch may use {name}"),
                ));
            }
        }
    }
    let Some((_, allowed)) = ALLOWED.iter().find(|(name, _)| *name == module) else {
        if !["lib", "main", "bin"].contains(&module) {
            findings.push(Finding::new(
                file,
                0,
                format!("module '{module}' has no place in the direction of imports"),
            ));
        }
        return findings;
    };
    for (line, named) in named(&file.shipped) {
        let known = ALLOWED.iter().any(|(name, _)| *name == named);
        if known && named != module && !allowed.contains(&named.as_str()) {
            findings.push(Finding::new(
                file,
                line,
                format!("{module} may not use crate::{named}"),
            ));
        }
    }
    findings
}

/// The top-level module that a file belongs to.
fn module(path: &str) -> &str {
    let below = path.trim_start_matches("src/");
    below
        .split('/')
        .next()
        .unwrap_or(below)
        .trim_end_matches(".rs")
}

/// Every module named by `crate::name` or `crate::{name, ..}`, with its line.
fn named(code: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (at, prefix) in code.match_indices("crate::") {
        let line = code[..at].matches('\n').count() + 1;
        let rest = &code[at + prefix.len()..];
        match rest.strip_prefix('{') {
            Some(group) => found.extend(heads(group).into_iter().map(|name| (line, name))),
            None => found.push((line, word(rest))),
        }
    }
    found
}

/// The first word of each entry of a group, to the group's closing brace.
fn heads(group: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut depth = 0usize;
    let mut fresh = true;
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => return names,
            '}' => depth -= 1,
            ',' if depth == 0 => fresh = true,
            c if fresh && (c.is_alphanumeric() || c == '_') => {
                names.push(word(&group[at..]));
                fresh = false;
            }
            _ => {}
        }
    }
    names
}

fn word(text: &str) -> String {
    text.chars()
        .take_while(|c| c.is_alphanumeric() || *c == '_')
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{ALLOWED, check, named};
    use crate::check::source::Tree;

    fn refused(path: &str, text: &str) -> Vec<String> {
        check(&Tree::of(&[(path, text)]))
            .into_iter()
            .map(|finding| finding.what)
            .collect()
    }

    #[test]
    fn imports_that_point_down_are_accepted() {
        let good = [
            (
                "src/mmu/walk.rs",
                "use crate::addr::Ipa;\nuse crate::mmu::table::Slot;\nuse crate::sync::{percpu, quiescence};\n",
            ),
            ("src/boot.rs", "use crate::{bench, vm};\n"),
            ("src/main.rs", "use vellum::boot;\n"),
            (
                "src/arch/hw/mod.rs",
                "use aarch64_cpu::registers::HCR_EL2;\n",
            ),
            (
                "src/mmu/walk.rs",
                "//! crate::vm drives this.\n#[cfg(test)]\nmod tests {\n    use crate::vm::Vm;\n}\n",
            ),
        ];
        for (path, text) in good {
            assert_eq!(refused(path, text), [""; 0], "{text}");
        }
    }

    #[test]
    fn imports_that_point_up_or_sideways_are_refused() {
        let bad = [
            ("src/mmu/walk.rs", "use crate::vm::Vm;\n"),
            (
                "src/mmu/walk.rs",
                "use crate::{\n    addr::{Ipa, Pa},\n    dev::gic,\n};\n",
            ),
            ("src/dev/gic.rs", "fn f(m: &crate::mmu::Stage2) {}\n"),
            ("src/arch/hw/mod.rs", "pub(crate) use crate::mem::frames;\n"),
            ("src/addr.rs", "use crate::arch;\n"),
            ("src/vm/trap.rs", "use aarch64_cpu::registers::ESR_EL2;\n"),
            (
                "src/mmu/tests.rs",
                "use tock_registers::interfaces::Readable;\n",
            ),
            ("src/novel/mod.rs", "fn f() {}\n"),
        ];
        for (path, text) in bad {
            assert_eq!(refused(path, text).len(), 1, "{text}");
        }
    }

    #[test]
    fn the_table_has_no_cycle_between_different_levels() {
        let of = |name: &str| {
            ALLOWED
                .iter()
                .find(|(module, _)| *module == name)
                .map_or(&[][..], |(_, allowed)| *allowed)
        };
        for (module, allowed) in ALLOWED {
            for other in allowed {
                let pair =
                    [module, *other].contains(&"sync") && [module, *other].contains(&"trace");
                assert!(
                    pair || !of(other).contains(&module),
                    "{module} and {other} see each other"
                );
            }
        }
    }

    #[test]
    fn groups_are_read_over_lines() {
        let names: Vec<String> =
            named("use crate::{\n    addr::{Ipa, Pa}, sync,\n    trace as t,\n};\ncrate::mem::x()")
                .into_iter()
                .map(|(_, name)| name)
                .collect();
        assert_eq!(names, ["addr", "sync", "trace", "mem"]);
    }
}
