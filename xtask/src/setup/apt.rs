//! Which Debian mirror this machine uses, read from its own apt configuration: one-line files (`*.list`) and
//! deb822 files (`*.sources`).

use std::fs;
use std::path::{Path, PathBuf};

/// A mirror of the Debian archive and the key file that its entry names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mirror {
    pub(crate) uri: String,
    pub(crate) signed_by: Option<String>,
}

impl Mirror {
    /// A one-line entry for `suite` of this mirror.
    pub(crate) fn entry(&self, suite: &str) -> String {
        let key = self
            .signed_by
            .as_ref()
            .map_or(String::new(), |path| format!(" [signed-by={path}]"));
        format!("deb{key} {} {suite} main\n", self.uri)
    }
}

/// The first mirror of the Debian archive that the machine is configured to use.
pub(crate) fn mirror() -> Option<Mirror> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(entries.filter_map(|entry| Some(entry.ok()?.path())));
    }
    files.sort();
    files
        .iter()
        .find_map(|path| first(path, &fs::read_to_string(path).ok()?))
}

fn first(path: &Path, text: &str) -> Option<Mirror> {
    let mirrors = match path.extension()?.to_str()? {
        "list" => one_line(text),
        "sources" => deb822(text),
        _ => Vec::new(),
    };
    mirrors.into_iter().next()
}

/// `deb [option=value ...] URI suite component...`, one a line.
fn one_line(text: &str) -> Vec<Mirror> {
    text.lines().filter_map(one_entry).collect()
}

fn one_entry(line: &str) -> Option<Mirror> {
    let rest = line.trim().strip_prefix("deb")?;
    if !rest.starts_with([' ', '\t']) {
        return None;
    }
    let rest = rest.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => ("", rest),
    };
    let uri = archive(rest.split_whitespace().next()?)?;
    let signed_by = options
        .split_whitespace()
        .find_map(|option| option.strip_prefix("signed-by="))
        .map(str::to_owned);
    Some(Mirror { uri, signed_by })
}

/// Stanzas of `Field: value`, empty lines between them; only those of type `deb`.
fn deb822(text: &str) -> Vec<Mirror> {
    let mut mirrors = Vec::new();
    for stanza in text.split("\n\n") {
        let types = field(stanza, "Types").unwrap_or_default();
        if !types.split_whitespace().any(|kind| kind == "deb")
            || field(stanza, "Enabled").is_some_and(|value| value == "no")
        {
            continue;
        }
        let uris = field(stanza, "URIs").unwrap_or_default();
        // A key may also stand in the stanza itself; only a file can be named again.
        let signed_by = field(stanza, "Signed-By").filter(|value| value.starts_with('/'));
        mirrors.extend(
            uris.split_whitespace()
                .filter_map(archive)
                .map(|uri| Mirror {
                    uri,
                    signed_by: signed_by.clone(),
                }),
        );
    }
    mirrors
}

/// The value of a field on its own line; names do not depend on case.
fn field(stanza: &str, name: &str) -> Option<String> {
    stanza
        .lines()
        .filter(|line| !line.starts_with('#'))
        .find_map(|line| {
            let (field, value) = line.split_once(':')?;
            field
                .eq_ignore_ascii_case(name)
                .then(|| value.trim().to_owned())
        })
}

/// The URI if it names the Debian archive itself: a path that ends in `debian`.
fn archive(uri: &str) -> Option<String> {
    let reachable = uri.starts_with("http://") || uri.starts_with("https://");
    let trimmed = uri.trim_end_matches('/');
    (reachable && trimmed.ends_with("/debian")).then(|| trimmed.to_owned())
}

#[cfg(test)]
mod tests {
    use super::{Mirror, deb822, first, one_line};
    use std::path::Path;

    fn uris(mirrors: &[Mirror]) -> Vec<&str> {
        mirrors.iter().map(|mirror| mirror.uri.as_str()).collect()
    }

    #[test]
    fn one_line_entries_with_and_without_options() {
        let text = "# deb http://old.example/debian buster main\n\
                    deb http://mirror.example/debian/ bookworm main\n\
                    deb [arch=amd64 signed-by=/keys/a.gpg] https://other.example/debian bookworm main\n\
                    deb-src http://source.example/debian bookworm main\n";
        let mirrors = one_line(text);
        assert_eq!(
            uris(&mirrors),
            [
                "http://mirror.example/debian",
                "https://other.example/debian"
            ]
        );
        assert_eq!(mirrors[1].signed_by.as_deref(), Some("/keys/a.gpg"));
    }

    #[test]
    fn stanzas_with_comments_and_keys() {
        let text = "Types: deb\n# a remark: http://remark.example/debian\nURIs: http://mirror.example/debian\n\
                    Suites: bookworm\nComponents: main\nSigned-By: /keys/debian.gpg\n\n\
                    Types: deb-src\nURIs: http://source.example/debian\n\n\
                    Types: deb\nEnabled: no\nURIs: http://off.example/debian\n";
        let mirrors = deb822(text);
        assert_eq!(uris(&mirrors), ["http://mirror.example/debian"]);
        assert_eq!(
            mirrors[0].entry("sid"),
            "deb [signed-by=/keys/debian.gpg] http://mirror.example/debian sid main\n"
        );
    }

    #[test]
    fn other_archives_are_not_taken_for_debian() {
        let text = "deb http://mirror.example/debian-security bookworm-security main\n\
                    deb http://mirror.example/ubuntu noble main\n\
                    deb cdrom:[Debian]/debian bookworm main\n\
                    deb file:/srv/debian bookworm main\n";
        assert_eq!(one_line(text), []);
    }

    #[test]
    fn the_format_follows_the_extension() {
        let text = "deb http://mirror.example/debian bookworm main\n";
        assert!(first(Path::new("a.list"), text).is_some());
        assert!(first(Path::new("a.sources"), text).is_none());
        assert!(first(Path::new("a.save"), text).is_none());
    }
}
