//! The values of boot arguments: words of a table, numbers within limits, lists. What cannot be read is refused with its key.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::str::FromStr;

/// The word for `value`.
pub(super) fn name_of<T: PartialEq>(value: T, table: &[(&'static str, T)]) -> &'static str {
    let found = table.iter().find(|(_, known)| *known == value);
    found.map_or("", |(name, _)| name)
}

/// What the word `value` stands for.
pub(super) fn named<T: Copy>(key: &str, value: &str, table: &[(&str, T)]) -> Result<T, String> {
    let found = table.iter().find(|(name, _)| *name == value);
    found.map(|(_, item)| *item).ok_or_else(|| {
        let names: Vec<&str> = table.iter().map(|(name, _)| *name).collect();
        format!(
            "boot argument '{key}={value}': {key} is one of {}",
            names.join(", ")
        )
    })
}

/// A number from `low` to `high`.
pub(super) fn number<T>(key: &str, value: &str, low: T, high: T) -> Result<T, String>
where
    T: FromStr + PartialOrd + core::fmt::Display,
{
    match value.parse() {
        Ok(number) if number >= low && number <= high => Ok(number),
        _ => Err(format!(
            "boot argument '{key}={value}': {key} is a number from {low} to {high}"
        )),
    }
}

/// What stands between commas.
pub(super) fn list<T>(
    value: &str,
    item: impl Fn(&str) -> Result<T, String>,
) -> Result<Vec<T>, String> {
    value.split(',').map(item).collect()
}
