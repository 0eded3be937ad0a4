//! What ACPI tables say of a machine (ACPI 6.5): processors and interrupt controller (MADT), timers (GTDT), how firmware
//! is called (FADT), the console (SPCR, else DBG2), and which memory is near which processor (SRAT).
//!
//! Pure: tables are read through [`Memory`], nothing is mapped or called, so the same code runs on the host against
//! tables of real machines and broken ones. AML is not read. Every table is checked for length and checksum before it
//! is used, and an [`Error`] names the table and the offset at which it cannot be believed.
//!
//! | file | what |
//! |---|---|
//! | [`raw`] | tables as bytes: finding them, and reading fields that may not be there |
//! | [`madt`] | processors and interrupt controller |
//! | [`fixed`] | the tables of one layout: FADT, GTDT, SPCR, DBG2, SRAT |

pub mod fixed;
pub mod madt;
pub mod raw;

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use super::machine::{Gic, Interrupts, Uart};
use super::psci::Conduit;
use crate::addr::Pa;
pub use raw::Memory;
use raw::Tables;

/// Why tables cannot be used: which one, where, and what is wrong there.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Error {
    /// The table's signature.
    pub table: [u8; 4],
    /// Bytes from its start.
    pub offset: usize,
    /// What is wrong.
    pub why: Why,
}

/// What is wrong with a table.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Why {
    /// Nothing can be read where it should be.
    Unreadable,
    /// It is something else than its place says.
    Signature,
    /// A length that cannot be, or a field beyond the end.
    Length,
    /// The bytes do not add up to zero.
    Checksum,
    /// The tables do not include it.
    Missing,
    /// Firmware has no PSCI, so other CPUs would need the parking protocol.
    NoPsci,
    /// No processor is enabled.
    NoCpus,
    /// No interrupt controller that can virtualize.
    NoGic,
    /// A timer's interrupt is no private one.
    NotPrivate(u32),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "ACPI table {} at offset {}: ",
            self.table.escape_ascii(),
            self.offset
        )?;
        match self.why {
            Why::Unreadable => write!(f, "it cannot be read"),
            Why::Signature => write!(f, "it has another signature"),
            Why::Length => write!(f, "its length is wrong"),
            Why::Checksum => write!(f, "its checksum is wrong"),
            Why::Missing => write!(f, "the firmware does not give it"),
            Why::NoPsci => write!(
                f,
                "firmware offers no PSCI (the parking protocol is not supported)"
            ),
            Why::NoCpus => write!(f, "no processor is enabled"),
            Why::NoGic => write!(f, "no interrupt controller that can virtualize"),
            Why::NotPrivate(intid) => write!(f, "interrupt {intid} of a timer is not private"),
        }
    }
}

/// One processor that may be started.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Cpu {
    /// Affinity, as in MPIDR_EL1; opaque, Aff3 included.
    pub mpidr: u64,
    /// What other tables call it.
    pub uid: u32,
    /// The NUMA node it is in.
    pub node: Option<u32>,
}

/// Everything the tables tell.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Platform {
    /// Who made the machine and what it is, from the XSDT: `oem,table` in lower case.
    pub name: String,
    /// How firmware is called.
    pub psci: Conduit,
    /// Processors, in the table's order.
    pub cpus: Vec<Cpu>,
    /// The interrupt controller.
    pub gic: Gic,
    /// Translation services for message-signalled interrupts.
    pub its: Vec<Pa>,
    /// Private interrupts.
    pub interrupts: Interrupts,
    /// The console; the first that is understood of what SPCR and DBG2 name.
    pub console: Option<Uart>,
}

impl Platform {
    /// Reads the tables that the root pointer at `rsdp` leads to.
    ///
    /// # Errors
    ///
    /// See [`Error`]. A table that is only needed for comfort (SPCR, DBG2, SRAT) counts as missing when it is broken.
    pub fn new(rsdp: Pa, memory: &dyn Memory) -> Result<Self, Error> {
        let tables = Tables::find(rsdp, memory)?;
        let psci = fixed::psci(&tables.table(*b"FACP")?)?;
        let processors = madt::read(&tables.table(*b"APIC")?)?;
        let timers = fixed::timers(&tables.table(*b"GTDT")?)?;
        let console = || fixed::serial_port(&tables.table(*b"SPCR").ok()?).ok()?;
        let debug_port = || fixed::debug_port(&tables.table(*b"DBG2").ok()?).ok()?;
        let mut cpus = processors.cpus;
        if let Ok(nodes) = tables
            .table(*b"SRAT")
            .and_then(|it| fixed::processor_nodes(&it))
        {
            for cpu in &mut cpus {
                cpu.node = nodes
                    .iter()
                    .find(|(uid, _)| *uid == cpu.uid)
                    .map(|&(_, node)| node);
            }
        }
        Ok(Self {
            name: tables.name(),
            psci,
            cpus,
            gic: processors.gic,
            its: processors.its,
            interrupts: Interrupts {
                maintenance: processors.maintenance,
                virtual_timer: timers.virtual_timer,
                hypervisor_timer: timers.hypervisor_timer,
                physical_timer: timers.physical_timer,
            },
            console: console().or_else(debug_port),
        })
    }
}
