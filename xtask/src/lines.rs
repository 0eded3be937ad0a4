//! Who shares what under the parallel clock: transfers of lines by the code that took them and the data in them.
//!
//! The plugin tells addresses, as they were at run time; names come from the images' symbol tables and, for functions that were
//! inlined, from their debugging information.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use addr2line::{Context, gimli};
use anyhow::{Context as _, Result, anyhow};
use object::read::elf::ElfFile64;
use object::{Endianness, Object as _, ObjectSection as _, ObjectSymbol as _, SymbolKind};
use serde::Deserialize;

use crate::image::Image;
use crate::table::Table;

/// Lines of a table.
const MOST: usize = 20;
/// Functions that are named for a place, the innermost first.
const FRAMES: usize = 3;

/// What was taken between two marks, or, without a number, otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub(crate) struct Section {
    #[serde(rename = "section")]
    pub(crate) number: Option<u64>,
    pub(crate) transfers: u64,
    /// Instructions that they took, waiting included.
    pub(crate) charged: u64,
    /// Those that another CPU between its marks has used in the same section, so that each takes it from the other.
    pub(crate) among: u64,
    /// A CPU had a copy, and others lost theirs; those that have used it in the same section.
    pub(crate) upgrades: u64,
    pub(crate) upgrades_among: u64,
    #[serde(skip)]
    pub(crate) sites: Vec<Site>,
}

/// An instruction, a line that it took, and how often.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Site {
    code: u64,
    data: u64,
    transfers: u64,
}

/// What the plugin says, line by line.
#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Said {
    Site(Site),
    Lines(Section),
}

/// All sections in what QEMU wrote to standard error.
pub(crate) fn sections(said: &str) -> Vec<Section> {
    let mut sections = Vec::new();
    let mut sites = Vec::new();
    for line in said.lines() {
        match serde_json::from_str(line) {
            Ok(Said::Site(site)) => sites.push(site),
            Ok(Said::Lines(total)) => sections.push(Section {
                sites: std::mem::take(&mut sites),
                ..total
            }),
            Err(_) => {}
        }
    }
    sections
}

/// A table of a section, most transfers first; `faults` happened meanwhile.
pub(crate) fn report(section: &Section, names: &Symbols<'_>, faults: Option<f64>) -> String {
    let mut places: BTreeMap<(String, String), (u64, BTreeSet<u64>)> = BTreeMap::new();
    for site in &section.sites {
        let key = (names.code(site.code), names.data(site.data));
        let (transfers, lines) = places.entry(key).or_default();
        *transfers += site.transfers;
        lines.insert(site.data);
    }
    let mut places: Vec<_> = places.into_iter().collect();
    places.sort_by_key(|(_, (transfers, _))| u64::MAX - transfers);
    let each = |transfers: u64| match faults.filter(|faults| *faults > 0.0) {
        Some(faults) => crate::table::number(count(transfers) / faults),
        None => "-".to_owned(),
    };
    let mut table = Table::new(&["taken", "a fault", "lines", "data", "code"]);
    for ((code, data), (transfers, lines)) in places.iter().take(MOST) {
        let data = match (data.as_str(), lines.first()) {
            ("", Some(only)) if lines.len() == 1 => format!("memory at {only:#x}"),
            ("", _) => "memory".to_owned(),
            (name, Some(only)) if lines.len() == 1 => format!("{name}, {only:#x}"),
            (name, _) => name.to_owned(),
        };
        table.row(vec![
            transfers.to_string(),
            each(*transfers),
            lines.len().to_string(),
            data,
            code.clone(),
        ]);
    }
    let shown: u64 = places.iter().take(MOST).map(|(_, (count, _))| count).sum();
    let others = (section.transfers + section.upgrades).saturating_sub(shown);
    if others > 0 {
        let words = ["", "others", ""].map(str::to_owned);
        let [lines, data, code] = words;
        table.row(vec![others.to_string(), each(others), lines, data, code]);
    }
    table.left(&[3, 4]).to_string()
}

/// A count as a number to calculate with.
fn count(number: u64) -> f64 {
    u32::try_from(number).map_or(f64::INFINITY, f64::from)
}

type Reader<'a> = gimli::EndianSlice<'a, gimli::RunTimeEndian>;

/// An image and the guest in it, with their symbols.
pub(crate) struct Files {
    image: Vec<u8>,
    guest: Vec<u8>,
}

impl Files {
    /// Those of `image`.
    pub(crate) fn of(image: &Image) -> Result<Self> {
        let read = |path: &Path| std::fs::read(path).with_context(|| path.display().to_string());
        Ok(Self {
            image: read(&image.symbols)?,
            guest: read(&image.guest)?,
        })
    }
}

/// Names of what is in the image and in the guest that it contains.
pub(crate) struct Symbols<'a> {
    /// Where the image was loaded.
    base: u64,
    image: Names<'a>,
    guest: Names<'a>,
}

/// One file's.
struct Names<'a> {
    inlined: Context<Reader<'a>>,
    /// Address, bytes, name.
    symbols: Vec<(u64, u64, String)>,
    end: u64,
}

impl<'a> Symbols<'a> {
    /// Those of files that were loaded at `base`.
    pub(crate) fn of(files: &'a Files, base: u64) -> Result<Self> {
        Ok(Self {
            base,
            image: Names::of(&files.image)?,
            guest: Names::of(&files.guest)?,
        })
    }

    /// The functions that the instruction at `address` is in: the innermost, then who they were inlined into.
    fn code(&self, address: u64) -> String {
        match address.checked_sub(self.base) {
            Some(offset) if offset < self.image.end => self.image.code(offset),
            _ => format!("guest: {}", self.guest.code(address)),
        }
    }

    /// What lies at `address`, if that is in the image.
    fn data(&self, address: u64) -> String {
        let inside = address.checked_sub(self.base);
        let inside = inside.filter(|offset| *offset < self.image.end);
        inside.map_or_else(String::new, |offset| self.image.data(offset))
    }
}

impl<'a> Names<'a> {
    fn of(bytes: &'a [u8]) -> Result<Self> {
        let file = ElfFile64::<Endianness>::parse(bytes)?;
        let section = |id: gimli::SectionId| {
            let found = file.section_by_name(id.name());
            let data = found.and_then(|section| section.data().ok());
            let data = data.unwrap_or_default();
            Ok::<_, gimli::Error>(Reader::new(data, gimli::RunTimeEndian::Little))
        };
        let dwarf = gimli::Dwarf::load(section)?;
        let inlined = Context::from_dwarf(dwarf).map_err(|error| anyhow!("{error}"))?;
        let named = file.symbols().filter(|symbol| {
            let kind = symbol.kind();
            symbol.is_definition() && !matches!(kind, SymbolKind::File | SymbolKind::Section)
        });
        let symbols = named.filter_map(|symbol| {
            let name = symbol.name().ok().filter(|name| !name.starts_with('$'))?;
            let name = addr2line::demangle_auto(name.into(), None);
            Some((symbol.address(), symbol.size(), shorten(&name)))
        });
        let mut symbols: Vec<_> = symbols.collect();
        symbols.sort();
        let ends = file
            .sections()
            .filter(|section| section.address() > 0 || section.name() == Ok(".text"))
            .map(|section| section.address() + section.size());
        let end = ends.max().unwrap_or(0);
        Ok(Self {
            inlined,
            symbols,
            end,
        })
    }

    fn code(&self, address: u64) -> String {
        let frames = self.frames(address).unwrap_or_default();
        if frames.is_empty() {
            self.data(address)
        } else {
            frames.join(" < ")
        }
    }

    fn frames(&self, address: u64) -> Option<Vec<String>> {
        let mut frames = self.inlined.find_frames(address).skip_all_loads().ok()?;
        let mut names = Vec::new();
        while let Ok(Some(frame)) = frames.next() {
            let Some(name) = frame.function else { continue };
            let name = name.demangle().ok()?.into_owned();
            if !is_library(&name) && names.len() < FRAMES {
                names.push(shorten(&name));
            }
        }
        Some(names)
    }

    /// The symbol that contains `address`, else the last before it.
    fn data(&self, address: u64) -> String {
        let before = self
            .symbols
            .partition_point(|(start, ..)| *start <= address);
        let before = self.symbols.get(..before).unwrap_or_default();
        let inside = |(start, bytes, _): &&(u64, u64, String)| address - start < *bytes;
        let found = before.iter().rev().take(64).find(inside);
        found
            .or(before.last())
            .map_or_else(|| format!("{address:#x}"), |(.., name)| name.clone())
    }
}

/// What every program has inlined everywhere.
fn is_library(name: &str) -> bool {
    let name = name.trim_start_matches('<');
    ["core::", "alloc::", "&", "("]
        .iter()
        .any(|prefix| name.starts_with(prefix))
}

/// A name without the crates and modules that lead to it, but for the last.
fn shorten(name: &str) -> String {
    let mut short = String::new();
    let mut path = String::new();
    for letter in name.chars().chain([' ']) {
        if letter.is_alphanumeric() || matches!(letter, '_' | ':' | '{' | '}' | '#') {
            path.push(letter);
            continue;
        }
        let words: Vec<&str> = path.split("::").collect();
        let from = words.len().saturating_sub(2);
        short += &words.get(from..).unwrap_or_default().join("::");
        path.clear();
        short.push(letter);
    }
    short.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::{Section, is_library, sections, shorten};

    #[test]
    fn sections_have_the_sites_before_them() {
        let said = r#"noise
{"site":{"section":0,"code":1074790400,"data":1090519040,"transfers":12}}
{"lines":{"section":0,"transfers":14,"charged":2100,"among":2,"upgrades":7,"upgrades_among":1}}
{"lines":{"section":null,"transfers":3,"charged":450,"among":0,"upgrades":0,"upgrades_among":0}}
{"clock":{"turns":5,"timeouts":0}}
"#;
        let [first, rest] = sections(said).try_into().expect("two sections");
        assert_eq!(first.sites.len(), 1);
        assert_eq!((first.number, first.transfers), (Some(0), 14));
        let expected = Section {
            transfers: 3,
            charged: 450,
            ..Section::default()
        };
        assert_eq!(rest, expected);
        assert!(sections("QEMU: something else").is_empty());
    }

    #[test]
    fn names_lose_their_crates() {
        for (name, short) in [
            ("vellum::mmu::bitmap::Bitmap::set", "Bitmap::set"),
            (
                "<vellum::mmu::bitmap::Bitmap>::set",
                "<bitmap::Bitmap>::set",
            ),
            ("el2_vectors", "el2_vectors"),
            (
                "vellum::mmu::fault::<impl vellum::mmu::stage2::Stage2>::attempt",
                "fault::<impl stage2::Stage2>::attempt",
            ),
        ] {
            assert_eq!(shorten(name), short);
        }
        assert!(is_library("<core::sync::atomic::Atomic<u64>>::load"));
        assert!(!is_library("<spin::mutex::SpinMutex<u64>>::lock"));
    }
}
