//! What a long run remembers, so that it can be stopped and taken up again: which cases passed for which image.

use std::fs;
use std::path::PathBuf;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::paths;

/// The record of one image.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Record {
    image: u64,
    passed: Vec<String>,
    /// Where it is kept.
    #[serde(skip)]
    file: PathBuf,
}

impl Record {
    /// What is known about this image, at full sizes or not; nothing if the record is of another or cannot be read.
    pub(super) fn load(image: u64, soak: bool) -> Self {
        let name = if soak { "state" } else { "hostile" };
        let file = paths::target(&format!("soak/{name}.json"));
        let text = fs::read_to_string(&file).unwrap_or_default();
        Self {
            file,
            ..Self::parse(&text, image)
        }
    }

    fn parse(text: &str, image: u64) -> Self {
        let read = serde_json::from_str(text)
            .ok()
            .filter(|record: &Self| record.image == image);
        read.unwrap_or(Self {
            image,
            ..Self::default()
        })
    }

    /// Whether the case passed before.
    pub(super) fn knows(&self, case: &str) -> bool {
        self.passed.iter().any(|name| name == case)
    }

    /// Remembers a case that passed.
    pub(super) fn add(&mut self, case: &str) -> Result<()> {
        self.passed.push(case.to_owned());
        paths::write(&self.file, serde_json::to_string(self)?)
    }
}

#[cfg(test)]
mod tests {
    use super::Record;

    #[test]
    fn a_record_is_of_one_image() {
        let text = serde_json::to_string(&Record {
            image: 7,
            passed: vec!["a".into()],
            ..Record::default()
        })
        .expect("it is JSON");
        assert!(Record::parse(&text, 7).knows("a"));
        assert!(!Record::parse(&text, 7).knows("b"));
        assert!(!Record::parse(&text, 8).knows("a"));
        assert_eq!(
            Record::parse("torn", 8),
            Record {
                image: 8,
                ..Record::default()
            }
        );
    }
}
