//! Every MMU entry point ends its documentation with its debts: Rounding, Races, TLB, Cost.

use super::Finding;
use super::source::{File, Tree};

const DEBTS: [&str; 4] = ["Rounding", "Races", "TLB", "Cost"];

/// Every public function of `Stage2` that leaves one out.
pub(super) fn check(tree: &Tree) -> Vec<Finding> {
    tree.files
        .iter()
        .filter(|file| file.path.starts_with("src/mmu/"))
        .flat_map(of_file)
        .collect()
}

fn of_file(file: &File) -> Vec<Finding> {
    let text: Vec<&str> = file.text.lines().collect();
    let mut findings = Vec::new();
    let mut inside = false;
    for (line, code) in file.shipped_lines() {
        // rustfmt puts an impl block and its closing brace at the left margin, and its functions one step in.
        if code.starts_with("impl") {
            inside = is_stage2(code);
        } else if code.starts_with('}') {
            inside = false;
        }
        if let Some(name) = inside.then(|| public_function(code)).flatten() {
            let missing = missing(&documentation(&text, line - 1));
            if !missing.is_empty() {
                findings.push(Finding::new(
                    file,
                    line,
                    format!("{name} does not say its {}", missing.join(", ")),
                ));
            }
        }
    }
    findings
}

/// An inherent impl of `Stage2`, with or without parameters.
fn is_stage2(code: &str) -> bool {
    let head = code.split('{').next().unwrap_or(code);
    !head.contains(" for ")
        && head
            .split(|c: char| !c.is_alphanumeric() && c != '_')
            .any(|word| word == "Stage2")
}

fn public_function(code: &str) -> Option<&str> {
    let declared = code.strip_prefix("    pub ")?;
    let name = declared.split_once("fn ")?.1;
    name.split(|c: char| !c.is_alphanumeric() && c != '_')
        .next()
}

/// The lines of documentation above a line, over attributes.
fn documentation<'a>(text: &[&'a str], below: usize) -> Vec<&'a str> {
    let above = text
        .get(..below)
        .unwrap_or_default()
        .iter()
        .rev()
        .map(|line| line.trim());
    let part =
        |line: &&str| line.starts_with("///") || line.starts_with('#') || line.ends_with(']');
    above
        .take_while(part)
        .filter_map(|line| line.strip_prefix("///"))
        .collect()
}

/// Labels that do not stand in the documentation, each as a word with a colon behind it.
fn missing(documentation: &[&str]) -> Vec<&'static str> {
    let labels: Vec<&str> = documentation
        .iter()
        .flat_map(|line| line.split_whitespace())
        .filter(|word| word.contains(':'))
        .map(|word| word.trim_matches(|c: char| !c.is_alphanumeric()))
        .collect();
    DEBTS
        .into_iter()
        .filter(|debt| !labels.contains(debt))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::check;
    use crate::check::source::Tree;

    fn found(text: &str) -> Vec<String> {
        check(&Tree::of(&[("src/mmu/map.rs", text)]))
            .into_iter()
            .map(|finding| finding.what)
            .collect()
    }

    const DEBTS: &str = "    /// - *Rounding*: none.\n    /// - *Races*: any.\n    /// - *TLB*: owed.\n    /// - *Cost*: O(1).\n";

    #[test]
    fn an_entry_point_with_its_four_lines_is_accepted() {
        let text = format!(
            "impl<'a> Stage2<'a> {{\n    /// Maps.\n    ///\n{DEBTS}    #[must_use]\n    pub fn map(&self) {{\n    }}\n}}\n"
        );
        assert_eq!(found(&text), [""; 0]);
    }

    #[test]
    fn each_missing_line_is_named() {
        let text = "impl Stage2 {\n    /// Maps, whatever the Cost.\n    ///\n    /// **Rounding**: none. TLB:\n    /// owed.\n    pub fn map(&self) {}\n}\n";
        assert_eq!(found(text), ["map does not say its Races, Cost"]);
        assert_eq!(
            found("impl Stage2 {\n    pub fn map(&self) {}\n}\n"),
            ["map does not say its Rounding, Races, TLB, Cost"]
        );
    }

    #[test]
    fn only_public_functions_of_stage2_are_entry_points() {
        let text = "impl Stage2 {\n    fn a() {}\n    pub(crate) fn b() {}\n}\nimpl Drop for Stage2 {\n    fn drop(&mut self) {}\n}\nimpl Walk {\n    pub fn c() {}\n}\nimpl Stage2Config {\n    pub fn d() {}\n}\n";
        assert_eq!(found(text), [""; 0]);
    }
}
