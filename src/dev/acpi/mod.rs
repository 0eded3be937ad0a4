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
use core::ops::Range;

use super::machine::{Gic, Interrupts, Uart};
use super::psci::Conduit;
use crate::addr::Pa;
pub use raw::Memory;
use raw::{Table, Tables};

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
    /// Memory that reaches beyond 64 bits.
    Range,
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
            Why::Range => write!(f, "memory reaches beyond 64 bits"),
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
    /// Memory and the NUMA node it is in; there may be none of it.
    pub memory_nodes: Vec<(Range<Pa>, u32)>,
    /// Tables that were left out because they are broken; the machine can do without.
    pub left_out: Vec<Error>,
}

impl Platform {
    /// Reads the tables that the root pointer at `rsdp` leads to.
    ///
    /// # Errors
    ///
    /// See [`Error`]. A table that is only needed for comfort (SPCR, DBG2, SRAT) is left out when it is broken.
    pub fn new(rsdp: Pa, memory: &dyn Memory) -> Result<Self, Error> {
        let tables = Tables::find(rsdp, memory)?;
        let psci = fixed::psci(&tables.table(*b"FACP")?)?;
        let processors = madt::read(&tables.table(*b"APIC")?)?;
        let timers = fixed::timers(&tables.table(*b"GTDT")?)?;
        let mut left_out = Vec::new();
        let spcr = tables.table(*b"SPCR");
        let mut console = comfort(spcr, fixed::serial_port, &mut left_out);
        if console.is_none() {
            console = comfort(tables.table(*b"DBG2"), fixed::debug_port, &mut left_out);
        }
        let srat = tables.table(*b"SRAT");
        let affinities = comfort(srat, fixed::affinities, &mut left_out);
        let mut cpus = processors.cpus;
        for cpu in &mut cpus {
            let known = |(uid, _): &&(u32, u32)| *uid == cpu.uid;
            let found = affinities.processors.iter().find(known);
            cpu.node = found.map(|&(_, node)| node);
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
            console,
            memory_nodes: affinities.memory,
            left_out,
        })
    }
}

/// What `read` makes of a table that need not be there; one that is broken is noted and tells nothing.
fn comfort<T: Default>(
    table: Result<Table<'_>, Error>,
    read: fn(&Table<'_>) -> Result<T, Error>,
    left_out: &mut Vec<Error>,
) -> T {
    match table.and_then(|it| read(&it)) {
        Ok(told) => told,
        Err(error) => {
            left_out.extend((error.why != Why::Missing).then_some(error));
            T::default()
        }
    }
}
