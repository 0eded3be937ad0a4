//! Safe access to a flattened device tree of any quality.
//!
//! `fdt` walks the tree; this module makes sure beforehand that the blocks named by the header lie inside it (the crate
//! trusts sums of header fields), lists all nodes once, and reads cells, translated addresses and interrupts. What is
//! malformed is absent: every reader returns an `Option`; what is no tree at all is [`Malformed`], with its offset.
//! Reference: Devicetree Specification v0.4.

use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

use fdt::Fdt;
use fdt::helpers::UnalignedFallibleNode;
use fdt::nodes::AsNode;
use fdt::parsing::NoPanic;
use fdt::parsing::unaligned::UnalignedParser;

use crate::addr::Pa;

/// Bytes of the header that are read before its own size is known.
const HEADER_BYTES: usize = 40;
/// First word of a tree.
const MAGIC: u32 = 0xd00d_feed;
/// Tokens of the structure block; the last is its last word.
const BEGIN_NODE: u32 = 1;
const END_NODE: u32 = 2;
const PROPERTY: u32 = 3;
const NOP: u32 = 4;
const END: u32 = 9;
/// A tree deeper than this is not a machine's.
const MOST_LEVELS: usize = 16;
/// A tree with more nodes than this is not a machine's.
const MOST_NODES: usize = 1 << 16;

/// Why a tree cannot be read at all: where in it, and what is wrong there.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Malformed {
    /// Bytes from the tree's start.
    pub offset: usize,
    /// What is wrong.
    pub why: Why,
}

/// What is wrong with a tree.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Why {
    /// Nothing can be read where it should be.
    Unreadable,
    /// It does not begin like one.
    Magic,
    /// A block reaches beyond the tree, or the tree beyond what there is of it.
    Length,
    /// A token that cannot stand there.
    Token,
    /// A name or value that does not end inside the tree.
    Endless,
    /// More levels or nodes than a machine has.
    Large,
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "device tree at offset {}: ", self.offset)?;
        f.write_str(match self.why {
            Why::Unreadable => "it cannot be read",
            Why::Magic => "it does not begin like one",
            Why::Length => "a length or position is wrong",
            Why::Token => "a token that cannot stand there",
            Why::Endless => "a name or value has no end",
            Why::Large => "it has too many levels or nodes",
        })
    }
}

struct Entry<'a> {
    node: UnalignedFallibleNode<'a>,
    parent: Option<usize>,
}

/// A tree whose nodes have been listed, parents before children.
pub struct Tree<'a> {
    entries: Vec<Entry<'a>>,
    reservations: Vec<Range<Pa>>,
}

impl fmt::Debug for Tree<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tree({} nodes)", self.entries.len())
    }
}

/// Bytes of the tree that starts with `header`, when it is one.
pub fn total_bytes(header: &[u8]) -> Option<usize> {
    (word(header, 0)? == MAGIC).then_some(())?;
    usize::try_from(word(header, 4)?).ok()
}

impl<'a> Tree<'a> {
    /// Lists the nodes of `bytes`.
    ///
    /// # Errors
    ///
    /// [`Malformed`] when there is no tree in it.
    pub fn new(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let structure = check_header(bytes)?;
        let offset = structure.start;
        check_structure(bytes, structure)?;
        let malformed = Malformed {
            offset,
            why: Why::Token,
        };
        let fdt = Fdt::<(UnalignedParser<'a>, NoPanic)>::new_unaligned_fallible(bytes)
            .map_err(|_| malformed)?;
        let root = fdt.root().map_err(|_| malformed)?.as_node();
        let mut tree = Self {
            entries: Vec::new(),
            reservations: reservations(bytes),
        };
        tree.list(root, None).ok_or(malformed)?;
        Ok(tree)
    }

    fn list(&mut self, node: UnalignedFallibleNode<'a>, parent: Option<usize>) -> Option<()> {
        let index = self.entries.len();
        self.entries.push(Entry { node, parent });
        for child in node.children().ok()?.iter() {
            // The iterator repeats an error for ever: leave at the first.
            self.list(child.ok()?, Some(index))?;
        }
        Some(())
    }

    /// All nodes, parents before children.
    pub fn nodes(&self) -> impl Iterator<Item = Node<'_, 'a>> {
        (0..self.entries.len()).map(|index| Node { tree: self, index })
    }

    /// The node at `path`; a component without unit address matches the first of its name.
    pub fn at(&self, path: &str) -> Option<Node<'_, 'a>> {
        let root = self.nodes().next()?;
        path.split('/')
            .filter(|it| !it.is_empty())
            .try_fold(root, |node, name| node.child(name))
    }

    /// The first node compatible with one of `names`.
    pub fn compatible(&self, names: &[&str]) -> Option<Node<'_, 'a>> {
        self.nodes()
            .find(|it| it.is_available() && it.is_compatible(names))
    }

    /// The memory reservation block.
    pub fn reservations(&self) -> &[Range<Pa>] {
        &self.reservations
    }

    fn by_phandle(&self, phandle: u32) -> Option<Node<'_, 'a>> {
        self.nodes().find(|it| it.u32("phandle") == Some(phandle))
    }
}

/// One node of a [`Tree`].
#[derive(Clone, Copy, Debug)]
pub struct Node<'t, 'a> {
    tree: &'t Tree<'a>,
    index: usize,
}

impl<'t, 'a> Node<'t, 'a> {
    fn entry(&self) -> &'t Entry<'a> {
        &self.tree.entries[self.index]
    }

    /// Name with unit address.
    pub fn name(&self) -> Option<(&'a str, Option<&'a str>)> {
        let name = self.entry().node.name().ok()?;
        Some((name.name, name.unit_address))
    }

    /// The node this one is a child of.
    pub fn parent(&self) -> Option<Self> {
        Some(Self {
            tree: self.tree,
            index: self.entry().parent?,
        })
    }

    /// Children, in order.
    pub fn children(&self) -> impl Iterator<Item = Self> + use<'t, 'a> {
        let this = self.index;
        self.tree
            .nodes()
            .filter(move |it| it.entry().parent == Some(this))
    }

    fn child(&self, name: &str) -> Option<Self> {
        self.children()
            .find(|it| match (it.name(), name.split_once('@')) {
                (Some((base, unit)), Some((wanted, wanted_unit))) => {
                    base == wanted && unit == Some(wanted_unit)
                }
                (Some((base, _)), None) => base == name,
                (None, _) => false,
            })
    }

    /// Raw bytes of a property.
    pub fn property(&self, name: &str) -> Option<&'a [u8]> {
        Some(self.entry().node.raw_property(name).ok()??.value)
    }

    /// Names and values of all properties, up to the first that is malformed.
    pub fn properties(&self) -> impl Iterator<Item = (&'a str, &'a [u8])> + use<'a> {
        let properties = self.entry().node.properties().ok();
        properties
            .into_iter()
            .flat_map(|it| it.iter())
            .map_while(|it| it.ok().map(|it| (it.name, it.value)))
    }

    /// A property of one cell.
    pub fn u32(&self, name: &str) -> Option<u32> {
        word(self.property(name)?, 0)
    }

    /// A property of one or two cells.
    pub fn address(&self, name: &str) -> Option<u64> {
        let bytes = self.property(name)?;
        cells(bytes, 0, bytes.len() / 4)
    }

    /// A property that is one string.
    pub fn string(&self, name: &str) -> Option<&'a str> {
        strings(self.property(name)?).next()
    }

    /// Whether `compatible` lists one of `names`.
    pub fn is_compatible(&self, names: &[&str]) -> bool {
        self.property("compatible")
            .is_some_and(|it| strings(it).any(|it| names.contains(&it)))
    }

    /// Whether neither this node nor a bus above it is disabled.
    pub fn is_available(&self) -> bool {
        let here = self
            .string("status")
            .is_none_or(|it| it == "okay" || it == "ok");
        here && self.parent().is_none_or(|it| it.is_available())
    }

    /// `#address-cells` and `#size-cells` for this node's children.
    fn cell_counts(&self) -> (usize, usize) {
        let count = |name, default| {
            self.u32(name)
                .and_then(|it| usize::try_from(it).ok())
                .unwrap_or(default)
        };
        (count("#address-cells", 2), count("#size-cells", 1))
    }

    /// `reg`, as the CPU sees it: address and bytes. Regions that no bus passes on are left out.
    pub fn regions(&self) -> Vec<(Pa, u64)> {
        self.raw_regions()
            .into_iter()
            .filter_map(|(address, bytes)| {
                Some((Pa::new(self.parent()?.translate(address, bytes)?), bytes))
            })
            .collect()
    }

    /// `reg`, as the bus sees it.
    pub fn raw_regions(&self) -> Vec<(u64, u64)> {
        let Some((bus, reg)) = self.parent().zip(self.property("reg")) else {
            return Vec::new();
        };
        let (of_address, of_size) = bus.cell_counts();
        rows(reg, of_address.saturating_add(of_size))
            .filter_map(|row| Some((cells(row, 0, of_address)?, cells(row, of_address, of_size)?)))
            .collect()
    }

    /// An address on this bus, as the CPU sees it.
    fn translate(&self, address: u64, bytes: u64) -> Option<u64> {
        let Some(above) = self.parent() else {
            return Some(address);
        };
        let ranges = self.property("ranges")?;
        if ranges.is_empty() {
            return above.translate(address, bytes);
        }
        let (of_child, of_size) = self.cell_counts();
        let (of_parent, _) = above.cell_counts();
        let width = of_child.saturating_add(of_parent).saturating_add(of_size);
        let target = rows(ranges, width).find_map(|row| {
            let child = cells(row, 0, of_child)?;
            let parent = cells(row, of_child, of_parent)?;
            let span = cells(row, of_child + of_parent, of_size)?;
            let offset = address.checked_sub(child)?;
            (offset.checked_add(bytes)? <= span).then_some(parent.checked_add(offset)?)
        })?;
        above.translate(target, bytes)
    }

    /// INTIDs of the node's interrupts, which must go to a GIC.
    pub fn interrupts(&self) -> Vec<u32> {
        if let Some(list) = self.property("interrupts") {
            let width = self
                .interrupt_parent()
                .and_then(|it| it.interrupt_cells())
                .unwrap_or(3);
            return rows(list, width).filter_map(intid).collect();
        }
        let mut rest = self.property("interrupts-extended").unwrap_or_default();
        let mut found = Vec::new();
        while let Some(controller) = word(rest, 0).and_then(|it| self.tree.by_phandle(it)) {
            let Some(width) = controller.interrupt_cells() else {
                break;
            };
            let Some((one, more)) = rest
                .get(4..)
                .and_then(|it| it.split_at_checked(width.saturating_mul(4)))
            else {
                break;
            };
            found.extend(intid(one));
            rest = more;
        }
        found
    }

    fn interrupt_parent(&self) -> Option<Self> {
        match self.u32("interrupt-parent") {
            Some(phandle) => self.tree.by_phandle(phandle),
            None => self.parent()?.interrupt_parent(),
        }
    }

    fn interrupt_cells(&self) -> Option<usize> {
        usize::try_from(self.u32("#interrupt-cells")?).ok()
    }
}

/// The GIC's binding: kind (0 = shared, 1 = private), number, flags.
fn intid(cells: &[u8]) -> Option<u32> {
    let first = match word(cells, 0)? {
        0 => 32,
        1 => 16,
        _ => return None,
    };
    word(cells, 4)?.checked_add(first)
}

/// The header's blocks lie inside `bytes` and the structure block ends as it must, so that `fdt` never computes past it.
/// Returns where the structure block is.
fn check_header(bytes: &[u8]) -> Result<Range<usize>, Malformed> {
    let fail = |offset, why| Malformed { offset, why };
    let total = total_bytes(bytes).ok_or(fail(0, Why::Magic))?;
    if total > bytes.len() {
        return Err(fail(4, Why::Length));
    }
    let inside = |offset: usize, size: usize| -> Option<Range<usize>> {
        let start = usize::try_from(word(bytes, offset)?).ok()?;
        let end = start.checked_add(usize::try_from(word(bytes, size)?).ok()?)?;
        (start >= HEADER_BYTES && end <= total).then_some(start..end)
    };
    let structure = inside(8, 36).ok_or(fail(8, Why::Length))?;
    inside(12, 32).ok_or(fail(12, Why::Length))?;
    if structure.len() < 8 || !structure.len().is_multiple_of(4) {
        return Err(fail(36, Why::Length));
    }
    match word(bytes, structure.end - 4) {
        Some(END) => Ok(structure),
        _ => Err(fail(structure.end - 4, Why::Token)),
    }
}

/// Goes over the tokens once, so that what is wrong with them is known with its place.
fn check_structure(bytes: &[u8], block: Range<usize>) -> Result<(), Malformed> {
    let (mut at, mut level, mut nodes) = (block.start, 0_usize, 0_usize);
    loop {
        let fail = |why| Malformed { offset: at, why };
        let block = bytes.get(at..block.end).unwrap_or_default();
        let token = word(block, 0).ok_or(fail(Why::Endless))?;
        let length = match token {
            BEGIN_NODE => {
                (level, nodes) = (level + 1, nodes + 1);
                if level > MOST_LEVELS || nodes > MOST_NODES {
                    return Err(fail(Why::Large));
                }
                let name = block.iter().skip(4).position(|&it| it == 0);
                4 + name.ok_or(fail(Why::Endless))? + 1
            }
            END_NODE => {
                level = level.checked_sub(1).ok_or(fail(Why::Token))?;
                4
            }
            PROPERTY => {
                let length = word(block, 4).and_then(|it| usize::try_from(it).ok());
                let end = length.and_then(|it| it.checked_add(12));
                let end = end.filter(|&it| it <= block.len());
                end.ok_or(fail(Why::Endless))?
            }
            NOP => 4,
            END if level == 0 && nodes > 0 => return Ok(()),
            _ => return Err(fail(Why::Token)),
        };
        at += length.next_multiple_of(4);
    }
}

fn reservations(bytes: &[u8]) -> Vec<Range<Pa>> {
    let start = word(bytes, 16).and_then(|it| usize::try_from(it).ok());
    let block = start.and_then(|it| bytes.get(it..)).unwrap_or_default();
    rows(block, 4)
        .map_while(|row| Some((cells(row, 0, 2)?, cells(row, 2, 2)?)))
        .take_while(|&(start, size)| (start, size) != (0, 0))
        .filter_map(|(start, size)| Some(Pa::new(start)..Pa::new(start.checked_add(size)?)))
        .collect()
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Rows of `width` cells; none when `width` is no sensible row.
fn rows(bytes: &[u8], width: usize) -> impl Iterator<Item = &[u8]> {
    let sensible = (1..=16).contains(&width);
    bytes
        .chunks_exact(if sensible { width * 4 } else { 4 })
        .filter(move |_| sensible)
}

/// The number made of `count` cells from cell `first` on; no cell is zero, more than two are no number.
fn cells(bytes: &[u8], first: usize, count: usize) -> Option<u64> {
    match count {
        0 => Some(0),
        1 => word(bytes, first * 4).map(u64::from),
        2 => {
            Some(u64::from(word(bytes, first * 4)?) << 32 | u64::from(word(bytes, first * 4 + 4)?))
        }
        _ => None,
    }
}

fn strings(bytes: &[u8]) -> impl Iterator<Item = &str> {
    bytes
        .split(|&byte| byte == 0)
        .filter_map(|it| core::str::from_utf8(it).ok())
}
