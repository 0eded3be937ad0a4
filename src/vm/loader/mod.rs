//! Linux as a guest: from a bundle of kernel and initial RAM disk to what stands where in guest memory.
//!
//! Everything is checked before a VM exists: [`Plan::new`] either says what is to be copied where, or why the bundle
//! cannot be started.
//!
//! ```text
//! RAM                 device tree, in 2 MiB of its own
//! RAM + 2 MiB + text  kernel, with the memory that its header asks for
//! the next 2 MiB      initial RAM disk
//! ```
//!
//! | file | what |
//! |---|---|
//! | [`newc`] | the bundle's format |
//! | [`image`] | the kernel's header |
//! | [`tree`] | the device tree |

pub mod image;
pub mod newc;
pub mod tree;

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use crate::addr::Ipa;
use crate::vm::loader::image::{ALIGN_BYTES, Header};
use crate::vm::loader::tree::Description;
use crate::vm::vm::RAM;

/// Names of the bundle's entries.
const KERNEL: &str = "Image";
const INITRD: &str = "initramfs";
/// The longest command line that an arm64 kernel takes.
const LONGEST_COMMAND_LINE: usize = 2047;
/// Memory that a kernel needs beside what is loaded, to come up at all.
const SLACK_BYTES: u64 = 32 << 20;

/// The machine that a kernel is started on.
#[derive(Clone, Debug)]
pub struct Target {
    /// Number of vCPUs.
    pub vcpus: usize,
    /// Bytes of RAM.
    pub ram_bytes: u64,
    /// 2 or 3.
    pub gic_version: u32,
    /// The kernel's command line.
    pub command_line: String,
}

/// Why a bundle cannot be started.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Error {
    /// The bundle itself.
    Archive(newc::Error),
    /// It has no entry of this name.
    Missing(&'static str),
    /// The kernel.
    Kernel(image::Error),
    /// The guest has this many bytes of RAM and needs this many.
    LittleMemory(u64, u64),
    /// The command line is longer than a kernel takes, or has a zero in it.
    CommandLine,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Archive(error) => write!(f, "the bundle cannot be read: {error}"),
            Self::Missing(name) => write!(f, "the bundle has no entry '{name}'"),
            Self::Kernel(error) => write!(f, "the kernel cannot be started: {error}"),
            Self::LittleMemory(given, needed) => write!(
                f,
                "{} MiB of guest memory are too little: kernel and RAM disk need {} MiB",
                given >> 20,
                needed.div_ceil(1 << 20)
            ),
            Self::CommandLine => write!(
                f,
                "the kernel's command line has more than {LONGEST_COMMAND_LINE} bytes or a zero in it"
            ),
        }
    }
}

/// What is copied to guest memory, and where the guest begins.
#[derive(Debug)]
pub struct Plan<'a> {
    /// Where vCPU 0 begins, with [`RAM`], the device tree, in x0.
    pub entry: Ipa,
    kernel: &'a [u8],
    initrd: (Ipa, &'a [u8]),
    tree: Vec<u8>,
}

impl<'a> Plan<'a> {
    /// Reads `bundle` and decides what stands where on `target`.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub fn new(bundle: &'a [u8], target: &Target) -> Result<Self, Error> {
        let part = |name| {
            let found = newc::find(bundle, name).map_err(Error::Archive)?;
            found.ok_or(Error::Missing(name))
        };
        let (kernel, initrd) = (part(KERNEL)?, part(INITRD)?);
        let header = Header::new(kernel).map_err(Error::Kernel)?;
        if target.command_line.len() > LONGEST_COMMAND_LINE {
            return Err(Error::CommandLine);
        }
        let at = |offset: u64| RAM.checked_add(offset);
        let initrd_offset = (ALIGN_BYTES + header.text_offset)
            .checked_add(header.image_bytes)
            .and_then(|end| end.checked_next_multiple_of(ALIGN_BYTES));
        let end = initrd_offset.and_then(|offset| offset.checked_add(initrd.len() as u64));
        let needed = end.and_then(|end| end.checked_add(SLACK_BYTES));
        let needed = needed.unwrap_or(u64::MAX);
        let places = (
            at(ALIGN_BYTES + header.text_offset),
            initrd_offset.and_then(at),
            end.and_then(at),
        );
        let (Some(entry), Some(start), Some(end)) = places else {
            return Err(Error::LittleMemory(target.ram_bytes, needed));
        };
        if target.ram_bytes < needed {
            return Err(Error::LittleMemory(target.ram_bytes, needed));
        }
        let tree = tree::draw(&Description {
            vcpus: target.vcpus,
            ram_bytes: target.ram_bytes,
            gic_version: target.gic_version,
            command_line: &target.command_line,
            initrd: start..end,
        });
        Ok(Self {
            entry,
            kernel,
            initrd: (start, initrd),
            tree: tree.map_err(|_| Error::CommandLine)?,
        })
    }

    /// What is copied where.
    pub fn pieces(&self) -> [(Ipa, &[u8]); 3] {
        [
            (RAM, &self.tree),
            (self.entry, self.kernel),
            (self.initrd.0, self.initrd.1),
        ]
    }
}

#[cfg(test)]
mod tests {
    use std::format;
    use std::string::ToString;
    use std::vec;
    use std::vec::Vec;

    use super::{Error, Plan, Target, image, newc};
    use crate::addr::Ipa;
    use crate::dev::tree::Tree;

    fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
        let mut archive = Vec::new();
        for (name, data) in entries.iter().chain(&[("TRAILER!!!", &[][..])]) {
            archive.extend(b"070701");
            for position in 0..13 {
                let number = match position {
                    6 => data.len(),
                    11 => name.len() + 1,
                    _ => 0,
                };
                archive.extend(format!("{number:08X}").bytes());
            }
            archive.extend(name.bytes().chain([0]));
            archive.resize(archive.len().next_multiple_of(4), 0);
            archive.extend(*data);
            archive.resize(archive.len().next_multiple_of(4), 0);
        }
        archive
    }

    fn kernel(text_offset: u64, image_bytes: u64) -> Vec<u8> {
        let mut image = vec![0; 4096];
        image[0x08..0x10].copy_from_slice(&text_offset.to_le_bytes());
        image[0x10..0x18].copy_from_slice(&image_bytes.to_le_bytes());
        image[0x38..0x3c].copy_from_slice(b"ARMd");
        image
    }

    fn target(mib: u64) -> Target {
        Target {
            vcpus: 2,
            ram_bytes: mib << 20,
            gic_version: 3,
            command_line: "quiet".to_string(),
        }
    }

    #[test]
    fn tree_kernel_and_ram_disk_do_not_meet() {
        let kernel = kernel(0x8_0000, 0x31_0000);
        let bundle = archive(&[("Image", &kernel), ("initramfs", &[9; 77])]);
        let plan = Plan::new(&bundle, &target(64)).unwrap();
        let [(tree_at, tree), (kernel_at, copied), (initrd_at, initrd)] = plan.pieces();
        assert_eq!(tree_at, Ipa::new(0x4000_0000));
        assert!(tree.len() < 2 << 20);
        assert_eq!((kernel_at, copied), (Ipa::new(0x4028_0000), &kernel[..]));
        assert_eq!(plan.entry, kernel_at);
        assert_eq!((initrd_at, initrd), (Ipa::new(0x4060_0000), &[9; 77][..]));
        let tree = Tree::new(tree).unwrap();
        let chosen = tree.at("/chosen").unwrap();
        assert_eq!(chosen.address("linux,initrd-start"), Some(0x4060_0000));
        assert_eq!(chosen.address("linux,initrd-end"), Some(0x4060_004d));
    }

    #[test]
    fn what_cannot_be_started_is_refused_with_the_reason() {
        let good = kernel(0, 0x20_0000);
        let whole = archive(&[("Image", &good), ("initramfs", b"x")]);
        let refused = |bundle: &[u8], target: &Target| Plan::new(bundle, target).unwrap_err();
        assert_eq!(
            refused(b"gzip", &target(64)),
            Error::Archive(newc::Error::Truncated(0))
        );
        assert_eq!(
            refused(&archive(&[("Image", &good)]), &target(64)),
            Error::Missing("initramfs")
        );
        let compressed = archive(&[("Image", &[0x1f, 0x8b, 8]), ("initramfs", b"")]);
        assert_eq!(
            refused(&compressed, &target(64)),
            Error::Kernel(image::Error::Compressed)
        );
        let needed = (4 << 20) + 1 + (32 << 20);
        assert_eq!(
            refused(&whole, &target(36)),
            Error::LittleMemory(36 << 20, needed)
        );
        assert!(Plan::new(&whole, &target(37)).is_ok());
        let endless = archive(&[("Image", &kernel(0, u64::MAX)), ("initramfs", b"")]);
        assert!(matches!(
            refused(&endless, &target(64)),
            Error::LittleMemory(_, u64::MAX)
        ));
        for line in ["a\0b".to_string(), "x".repeat(2048)] {
            let command_line = Target {
                command_line: line,
                ..target(64)
            };
            assert_eq!(refused(&whole, &command_line), Error::CommandLine);
        }
    }
}
