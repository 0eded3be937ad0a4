//! The sources as the rules see them: each file as it stands, and as code alone, with comments, strings and tests blanked.
//!
//! Blanking keeps every line break, so that a line number means the same in both.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

use crate::paths;

/// One file.
#[derive(Clone, Debug)]
pub(crate) struct File {
    /// From the root of the repository, with `/`.
    pub(crate) path: String,
    pub(crate) text: String,
    /// Without comments and strings; for Rust only, the text itself otherwise.
    pub(crate) code: String,
    /// The same without tests.
    pub(crate) shipped: String,
}

/// All files that rules look at.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tree {
    pub(crate) files: Vec<File>,
}

impl File {
    /// A file with the given text.
    pub(crate) fn new(path: &str, text: &str) -> Self {
        let rust = path.ends_with(".rs");
        let code = if rust { blank(text) } else { text.to_owned() };
        let shipped = match rust {
            true if is_test(path) => only_line_breaks(&code),
            true => without_tests(&code),
            false => code.clone(),
        };
        Self {
            path: path.to_owned(),
            text: text.to_owned(),
            code,
            shipped,
        }
    }

    /// Lines of code with their numbers, counted from one.
    pub(crate) fn code_lines(&self) -> impl Iterator<Item = (usize, &str)> {
        numbered(&self.code)
    }

    /// Lines of code outside tests with their numbers.
    pub(crate) fn shipped_lines(&self) -> impl Iterator<Item = (usize, &str)> {
        numbered(&self.shipped)
    }
}

fn numbered(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines()
        .enumerate()
        .map(|(index, line)| (index + 1, line))
}

impl Tree {
    /// Reads the tree of this repository.
    pub(crate) fn read() -> Result<Self> {
        let mut tree = Self::default();
        for folder in ["src", "tests", "xtask"] {
            tree.add(&paths::root().join(folder), folder)?;
        }
        tree.mark_out_of_line_tests();
        Ok(tree)
    }

    /// A tree of the given files, for tests of rules.
    #[cfg(test)]
    pub(crate) fn of(files: &[(&str, &str)]) -> Self {
        let files = files
            .iter()
            .map(|(path, text)| File::new(path, text))
            .collect();
        let mut tree = Self { files };
        tree.mark_out_of_line_tests();
        tree
    }

    fn add(&mut self, folder: &Path, name: &str) -> Result<()> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(folder).with_context(|| name.to_owned())? {
            entries.push(entry?.path());
        }
        entries.sort();
        for path in entries {
            let name = format!(
                "{name}/{}",
                path.file_name().unwrap_or_default().to_string_lossy()
            );
            if path.is_dir() {
                self.add(&path, &name)?;
            } else if [".rs", ".S", ".ld", ".toml"]
                .iter()
                .any(|end| name.ends_with(end))
            {
                let text = fs::read_to_string(&path).with_context(|| name.clone())?;
                self.files.push(File::new(&name, &text));
            }
        }
        Ok(())
    }

    /// `#[cfg(test)] mod name;` makes a test of the file that holds the module.
    fn mark_out_of_line_tests(&mut self) {
        let mut stems = Vec::new();
        for file in &self.files {
            for name in test_modules(&file.code) {
                stems.push(format!("{}{name}", folder_of_children(&file.path)));
            }
        }
        for file in &mut self.files {
            let within = |stem: &String| {
                file.path == format!("{stem}.rs") || file.path.starts_with(&format!("{stem}/"))
            };
            if stems.iter().any(within) {
                file.shipped = only_line_breaks(&file.code);
            }
        }
    }
}

/// Whether the file's place says that it holds tests only.
pub(crate) fn is_test(path: &str) -> bool {
    let stem = path
        .rsplit('/')
        .next()
        .unwrap_or(path)
        .trim_end_matches(".rs");
    stem == "tests"
        || stem.ends_with("_tests")
        || path.starts_with("tests/")
        || path.contains("/tests/")
}

/// Where the modules declared in a file lie.
fn folder_of_children(path: &str) -> String {
    let (folder, file) = path.rsplit_once('/').unwrap_or(("", path));
    match file {
        "mod.rs" | "lib.rs" | "main.rs" => format!("{folder}/"),
        other => format!("{folder}/{}/", other.trim_end_matches(".rs")),
    }
}

/// Names of modules declared by `#[cfg(test)] mod name;`.
fn test_modules(code: &str) -> Vec<String> {
    let lines: Vec<&str> = code.lines().map(str::trim).collect();
    let mut names = Vec::new();
    for pair in lines.windows(2) {
        if let [attribute, item] = pair
            && is_test_attribute(attribute)
            && let Some(declared) = item.strip_suffix(';')
            && let Some(name) = declared
                .rsplit("mod ")
                .next()
                .filter(|_| declared.contains("mod "))
        {
            names.push(name.to_owned());
        }
    }
    names
}

fn is_test_attribute(line: &str) -> bool {
    line.starts_with("#[cfg(test)]") || line.starts_with("#[cfg(all(test")
}

fn only_line_breaks(text: &str) -> String {
    text.chars().filter(|&c| c == '\n').collect()
}

/// Blanks every item that stands under `#[cfg(test)]`: to its closing brace, or to its semicolon if that comes first.
fn without_tests(code: &str) -> String {
    let mut kept = String::with_capacity(code.len());
    let mut lines = code.lines();
    while let Some(line) = lines.next() {
        if !is_test_attribute(line.trim()) {
            kept.push_str(line);
            kept.push('\n');
            continue;
        }
        kept.push('\n');
        let mut depth = 0usize;
        for line in lines.by_ref() {
            kept.push('\n');
            let opened = line.matches('{').count();
            depth = (depth + opened).saturating_sub(line.matches('}').count());
            let closed =
                depth == 0 && (opened > 0 || line.contains('}') || line.trim_end().ends_with(';'));
            if closed {
                break;
            }
        }
    }
    kept
}

/// Replaces comments and the contents of strings and characters by spaces.
fn blank(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let length = skipped(rest, code.chars().last());
        let (taken, left) = rest.split_at(length.max(first.len_utf8()));
        if length == 0 {
            code.push(first);
        } else {
            code.extend(taken.chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
        }
        rest = left;
    }
    code
}

/// Length in bytes of the comment, string or character that starts here; zero if none does.
fn skipped(rest: &str, before: Option<char>) -> usize {
    let in_word = before.is_some_and(|c| c.is_alphanumeric() || c == '_');
    if rest.starts_with("//") {
        return rest.find('\n').unwrap_or(rest.len());
    }
    if rest.starts_with("/*") {
        return block_comment(rest);
    }
    if rest.starts_with('"') {
        return quoted(rest, 1, '"');
    }
    if let Some(hashes) = raw_string(rest).filter(|_| !in_word) {
        let open = rest.find('"').unwrap_or(0) + 1;
        let close = format!("\"{}", "#".repeat(hashes));
        return rest[open..]
            .find(&close)
            .map_or(rest.len(), |at| open + at + close.len());
    }
    if rest.starts_with('\'') && is_character(rest) {
        return quoted(rest, 1, '\'');
    }
    0
}

fn block_comment(rest: &str) -> usize {
    let mut depth = 0usize;
    let bytes = rest.as_bytes();
    let mut at = 0;
    while at + 1 < bytes.len() {
        match &bytes[at..at + 2] {
            b"/*" => (depth, at) = (depth + 1, at + 2),
            b"*/" => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            return at;
        }
    }
    rest.len()
}

/// From an opening quote to its end, over escapes.
fn quoted(rest: &str, open: usize, end: char) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(open) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == end => return at + c.len_utf8(),
            _ => {}
        }
    }
    rest.len()
}

/// The number of hashes if a raw string starts here.
fn raw_string(rest: &str) -> Option<usize> {
    let after = rest
        .strip_prefix("br")
        .or_else(|| rest.strip_prefix("cr"))
        .or_else(|| rest.strip_prefix('r'))?;
    let hashes = after.len() - after.trim_start_matches('#').len();
    after[hashes..].starts_with('"').then_some(hashes)
}

/// `'x'` or `'\n'` and no lifetime.
fn is_character(rest: &str) -> bool {
    let mut chars = rest.chars().skip(1);
    match chars.next() {
        Some('\\') => true,
        Some(_) => chars.next() == Some('\''),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::{File, Tree, blank, is_test};

    #[test]
    fn comments_and_strings_are_blanked_and_line_breaks_stay() {
        let cases = [
            ("let a = 1; // asm!\nlet b;", "let a = 1;        \nlet b;"),
            ("a /* x /* y */ z */ b", "a                   b"),
            ("f(\"a\\\"b\", c)", "f(      , c)"),
            ("f(r#\"a\"b\"#, c)", "f(        , c)"),
            ("let c = '\"'; let d = 'x';", "let c =    ; let d =    ;"),
            ("fn f<'a>(x: &'a str) {}", "fn f<'a>(x: &'a str) {}"),
            (
                "/// doc with `panic!`\nfn f() {}",
                "                     \nfn f() {}",
            ),
        ];
        for (text, code) in cases {
            assert_eq!(blank(text), code, "{text}");
        }
    }

    #[test]
    fn tests_are_not_shipped() {
        let text = "fn a() {}\n#[cfg(test)]\nmod tests {\n    fn b() { c() }\n}\nfn d() {}\n";
        assert_eq!(
            File::new("src/a.rs", text).shipped,
            "fn a() {}\n\n\n\n\nfn d() {}\n"
        );
        let text = "#[cfg(test)]\nuse a::b;\nfn d() {}\n";
        assert_eq!(File::new("src/a.rs", text).shipped, "\n\nfn d() {}\n");
    }

    #[test]
    fn a_module_file_declared_for_tests_is_not_shipped() {
        let files = [
            ("src/mmu/mod.rs", "#[cfg(test)]\nmod model;\nmod walk;\n"),
            ("src/mmu/model.rs", "fn a() {}\n"),
            ("src/mmu/walk.rs", "fn b() {}\n"),
        ];
        let tree = Tree::of(&files);
        assert_eq!(tree.files[1].shipped, "\n");
        assert_eq!(tree.files[2].shipped, "fn b() {}\n");
    }

    #[test]
    fn test_files_are_known_by_their_place() {
        for path in [
            "tests/a.rs",
            "src/mmu/tests.rs",
            "src/mmu/walk_tests.rs",
            "src/mmu/tests/a.rs",
        ] {
            assert!(is_test(path), "{path}");
        }
        assert!(!is_test("src/mmu/walk.rs"));
    }
}
