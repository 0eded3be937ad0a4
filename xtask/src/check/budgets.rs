//! Files stay short: split at 600 lines, tests apart.

use super::Finding;
use super::source::{File, Tree, is_test};

const MOST: usize = 600;

/// Every file that is over its budget, and every Rust file without a title page.
pub(super) fn check(tree: &Tree) -> Vec<Finding> {
    tree.files
        .iter()
        .flat_map(|file| [too_long(file), untitled(file)])
        .flatten()
        .collect()
}

fn too_long(file: &File) -> Option<Finding> {
    let counted = file.path.ends_with(".rs") || file.path.ends_with(".S");
    let lines = shipped_lines(file);
    (counted && lines > MOST).then(|| {
        Finding::new(
            file,
            0,
            format!("{lines} lines without tests; split at {MOST}"),
        )
    })
}

/// Lines outside tests, comments included.
fn shipped_lines(file: &File) -> usize {
    if is_test(&file.path) {
        return 0;
    }
    let tests = file
        .code
        .lines()
        .zip(file.shipped.lines())
        .filter(|(code, shipped)| !code.is_empty() && shipped.is_empty());
    file.text.lines().count() - tests.count()
}

fn untitled(file: &File) -> Option<Finding> {
    let missing = file.path.ends_with(".rs") && !file.text.trim_start().starts_with("//!");
    missing.then(|| Finding::new(file, 1, "no title page: the file opens with //!"))
}

#[cfg(test)]
mod tests {
    use super::{MOST, check};
    use crate::check::source::Tree;

    fn found(path: &str, text: &str) -> usize {
        check(&Tree::of(&[(path, text)])).len()
    }

    #[test]
    fn a_file_at_the_budget_passes_and_one_line_more_does_not() {
        let full = format!("//! Title.\n{}", "fn a() {}\n".repeat(MOST - 1));
        assert_eq!(found("src/a.rs", &full), 0);
        assert_eq!(found("src/a.rs", &format!("{full}fn b() {{}}\n")), 1);
        assert_eq!(found("src/a.S", &"nop\n".repeat(MOST + 1)), 1);
        assert_eq!(found("linker.ld", &"\n".repeat(MOST + 1)), 0);
    }

    #[test]
    fn tests_do_not_count() {
        let tests = format!(
            "//! Title.\n#[cfg(test)]\nmod tests {{\n{}}}\n",
            "    fn a() {}\n".repeat(MOST)
        );
        assert_eq!(found("src/a.rs", &tests), 0);
        assert_eq!(found("src/a/tests.rs", &tests), 0);
    }

    #[test]
    fn a_file_without_a_title_page_is_refused() {
        assert_eq!(found("src/a.rs", "fn a() {}\n"), 1);
    }
}
