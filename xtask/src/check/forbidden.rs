//! What does not land: assembly and the target switch outside their places, `static mut`, unfinished work, and a panic
//! that a guest could reach.

use super::Finding;
use super::source::{File, Tree};

const ASSEMBLY: [&str; 3] = ["asm!", "global_asm!", "naked_asm!"];

/// Where host and target part. `src/bin/guest.rs` is on the list because a program for the target alone must still compile
/// to something on the host, like `src/main.rs`.
const SWITCHES: [&str; 4] = [
    "src/main.rs",
    "src/arch/mod.rs",
    "src/mem/mod.rs",
    "src/bin/guest.rs",
];

/// Built from halves, so that this file does not find itself.
const UNFINISHED: [&str; 3] = [
    concat!("TO", "DO"),
    concat!("FIX", "ME"),
    concat!("todo", "!("),
];

const PANICS: [&str; 6] = [
    ".unwrap()",
    ".expect(",
    "panic!(",
    "unreachable!(",
    "unimplemented!(",
    ".unwrap_unchecked(",
];

/// Every forbidden construct.
pub(super) fn check(tree: &Tree) -> Vec<Finding> {
    let mut findings: Vec<Finding> = tree.files.iter().flat_map(of_file).collect();
    findings.extend(guest_assembly(tree));
    findings
}

fn of_file(file: &File) -> Vec<Finding> {
    let mut findings = Vec::new();
    let path = file.path.as_str();
    let source = path.starts_with("src/");
    let guarded = path.starts_with("src/mmu/") || path.starts_with("src/vm/");
    for (line, code) in file.code_lines() {
        let mut object = |what: &str| findings.push(Finding::new(file, line, what));
        let assembly = ["src/arch/", "src/guest/", "tests/loaders/"];
        if !assembly.iter().any(|it| path.starts_with(it)) && has_assembly(code) {
            object("assembly stands in arch only");
        }
        if source && !SWITCHES.contains(&path) && code.contains("target_os") {
            object(
                "the switch between host and target stands in main.rs, arch/mod.rs and mem/mod.rs only",
            );
        }
        if code.contains("static mut ") {
            object("static mut: use an atomic, a lock or a per-CPU cell");
        }
        if code.contains("#[allow(") || code.contains("#![allow(") {
            object("#[allow]: use #[expect(lint, reason = ..)] on the smallest item");
        }
    }
    for (index, text) in file.text.lines().enumerate() {
        if let Some(word) = UNFINISHED.iter().find(|word| text.contains(*word)) {
            findings.push(Finding::new(file, index + 1, format!("unfinished: {word}")));
        }
    }
    if guarded {
        for (line, code) in file.shipped_lines() {
            if let Some(word) = PANICS.iter().find(|word| code.contains(*word)) {
                findings.push(Finding::new(
                    file,
                    line,
                    format!("{word}..) in code that a guest drives"),
                ));
            }
        }
    }
    findings
}

fn has_assembly(code: &str) -> bool {
    ASSEMBLY.iter().any(|word| {
        let whole = |at: usize| !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
        code.match_indices(word).any(|(at, _)| whole(at))
    })
}

/// The built-in guest is a program of its own and has assembly of its own, in one file.
fn guest_assembly(tree: &Tree) -> Vec<Finding> {
    let guest = tree
        .files
        .iter()
        .filter(|file| file.path.starts_with("src/guest/") && has_assembly(&file.code));
    guest
        .skip(1)
        .map(|file| Finding::new(file, 0, "the guest's assembly stands in one file"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{UNFINISHED, check};
    use crate::check::source::Tree;

    fn found(files: &[(&str, &str)]) -> usize {
        check(&Tree::of(files)).len()
    }

    #[test]
    fn what_stands_in_its_place_is_accepted() {
        let good = [
            (
                "src/arch/hw/tlbi.rs",
                "fn f() { unsafe { core::arch::asm!(\"nop\") } }\n",
            ),
            ("src/guest/cpu.rs", "global_asm!(\"nop\");\n"),
            (
                "src/main.rs",
                "#![cfg_attr(target_os = \"none\", no_std)]\n",
            ),
            (
                "src/mmu/walk.rs",
                "//! Says panic! and .unwrap() and asm! and static mut.\nlet a = b.unwrap_or(c);\n",
            ),
            (
                "src/mmu/walk.rs",
                "#[expect(dead_code, reason = \"x\")]\nfn a() {}\n#[cfg(test)]\nmod tests {\n    fn b() { c().unwrap(); panic!(); }\n}\n",
            ),
            ("src/bench/mod.rs", "fn a() { b().expect(\"c\") }\n"),
            ("src/trace.rs", "fn wasm!() {}\n"),
        ];
        for file in good {
            assert_eq!(found(&[file]), 0, "{file:?}");
        }
    }

    #[test]
    fn what_does_not_is_refused() {
        let unfinished = format!("// {} later\n", UNFINISHED[0]);
        let bad = [
            ("src/mmu/tlb.rs", "fn f() { unsafe { asm!(\"nop\") } }\n"),
            ("src/vm/run.rs", "core::arch::global_asm!(\"nop\");\n"),
            ("src/mmu/mod.rs", "#[cfg(target_os = \"none\")]\nmod a;\n"),
            ("src/trace.rs", "static mut A: u32 = 0;\n"),
            ("src/trace.rs", "#[allow(dead_code)]\nfn a() {}\n"),
            ("src/trace.rs", unfinished.as_str()),
            ("src/mmu/walk.rs", "fn a() { b().unwrap() }\n"),
            ("src/mmu/walk.rs", "fn a() { b().expect(\"c\") }\n"),
            ("src/vm/run.rs", "fn a() { panic!(\"c\") }\n"),
        ];
        for file in bad {
            assert_eq!(found(&[file]), 1, "{file:?}");
        }
    }

    #[test]
    fn the_guest_has_assembly_in_one_file() {
        let one = ("src/guest/cpu.rs", "asm!(\"nop\");\n");
        assert_eq!(found(&[one]), 0);
        assert_eq!(found(&[one, ("src/guest/other.rs", "asm!(\"nop\");\n")]), 1);
    }
}
