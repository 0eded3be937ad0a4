//! What the parallel clock needs and does not find, as the command says it: one line, and a status that is not 0.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Writes a program that `sh` runs, and returns its path.
fn program(name: &str, script: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("the folder is there");
    let mode = fs::Permissions::from_mode(0o755);
    fs::set_permissions(&path, mode).expect("it was just written");
    path
}

/// A QEMU that says its version and its options, and does `script` when it is to run.
fn qemu(name: &str, options: &str, script: &str) -> PathBuf {
    let script = format!(
        r#"case "$*" in
--version) echo "QEMU emulator version 13.0.0" ;;
--help) echo "{options}" ;;
*) {script} ;;
esac"#
    );
    program(name, &script)
}

/// A cargo that compiled an empty library.
fn cargo(name: &str) -> PathBuf {
    let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join("libparallel_clock.so");
    fs::write(&library, "").expect("the folder is there");
    let message = format!(r#"{{"filenames":["{}"]}}"#, library.display());
    program(name, &format!("echo '{message}'"))
}

/// The one line that the command ends with.
fn refusal(words: &[&str], qemu: Option<&Path>, cargo: Option<&Path>) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    command.args(words);
    if let Some(qemu) = qemu {
        command.arg("--qemu").arg(qemu);
    }
    if let Some(cargo) = cargo {
        command.env("CARGO", cargo);
    }
    let output = command.output().expect("it was built for this test");
    let said = String::from_utf8_lossy(&output.stderr)
        .trim_end()
        .to_owned();
    assert_eq!(output.status.code(), Some(1), "{words:?}: {said}");
    assert!(output.stdout.is_empty(), "{words:?}");
    assert!(said.starts_with("error: "), "{words:?}: {said}");
    assert_eq!(said.lines().count(), 1, "{words:?}: {said}");
    said
}

const TASKS: [&[&str]; 2] = [
    &["run", "--timing", "parallel"],
    &["bench", "dirty", "--timing", "parallel"],
];

#[test]
fn what_goes_with_the_clock_only_is_refused_without_it() {
    for option in ["--line-cost", "--quantum"] {
        for task in [
            &["run"][..],
            &["bench"],
            &["bench", "split", "--timing", "wall"],
        ] {
            let said = refusal(&[task, &[option, "150"]].concat(), None, None);
            assert_eq!(
                said,
                format!("error: {option} goes with --timing parallel only")
            );
        }
    }
    let said = refusal(&["bench", "--lines"], None, None);
    assert_eq!(said, "error: --lines goes with --timing parallel only");
}

#[test]
fn a_qemu_without_plugins_is_refused() {
    let qemu = qemu("without-plugins", "-machine", "exit 1");
    for task in TASKS {
        let said = refusal(task, Some(&qemu), None);
        assert!(said.contains("is QEMU 13.0.0 without plugins"), "{said}");
    }
}

#[test]
fn a_qemu_with_another_interface_is_refused_in_its_own_words() {
    let words = "Could not load plugin x: plugin requires API version 7, but this QEMU supports only a minimum version of 9";
    let script = format!("echo '{words}' >&2; exit 1");
    let qemu = qemu("other-interface", "-plugin", &script);
    let cargo = cargo("compiled");
    for task in TASKS {
        let said = refusal(task, Some(&qemu), Some(&cargo));
        assert!(
            said.contains("QEMU 13.0.0 does not take the plugin"),
            "{said}"
        );
        assert!(said.ends_with(words), "{said}");
    }
}

#[test]
fn without_a_compiler_it_is_said_what_is_missing() {
    let qemu = qemu("with-plugins", "-plugin", "exit 1");
    let gone = Path::new("/nowhere/cargo");
    let linker = program(
        "no-linker",
        "echo '   Compiling libc' >&2; echo 'error: linker `cc` not found' >&2; exit 101",
    );
    for task in TASKS {
        let said = refusal(task, Some(&qemu), Some(gone));
        let start = "error: the plugin of --timing parallel cannot be built: ";
        assert!(said.starts_with(start), "{said}");
        assert!(said.contains("cannot start cargo"), "{said}");
        let said = refusal(task, Some(&qemu), Some(&linker));
        assert!(
            said.starts_with(start) && said.ends_with("linker `cc` not found"),
            "{said}"
        );
    }
}
