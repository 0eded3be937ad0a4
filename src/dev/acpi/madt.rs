//! The MADT: processors, and the parts of the interrupt controller, each in an entry of its own.

use alloc::vec::Vec;
use core::ops::Range;

use super::raw::{Entry, Table};
use super::{Cpu, Error, Why};
use crate::addr::Pa;
use crate::dev::machine::{AFFINITY, Gic};

/// Where the entries begin.
const FIRST_ENTRY: usize = 44;
/// Types of entries.
const GICC: u8 = 0xb;
const GICD: u8 = 0xc;
const GICR: u8 = 0xe;
const ITS: u8 = 0xf;
/// GICC flags: firmware enabled it, or it may be brought up later.
const ENABLED: u32 = 1 << 0;
const ONLINE_CAPABLE: u32 = 1 << 3;
/// Bytes of a redistributor that no GICR entry covers; whether more follow, its own registers tell.
const REDISTRIBUTOR_BYTES: u64 = 0x2_0000;
/// The maintenance interrupt where the table has none: PPI 9.
const USUAL_MAINTENANCE: u32 = 25;

/// What the table tells.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Processors {
    /// Processors that may be started.
    pub cpus: Vec<Cpu>,
    /// The interrupt controller.
    pub gic: Gic,
    /// Its maintenance interrupt.
    pub maintenance: u32,
    /// Translation services.
    pub its: Vec<Pa>,
}

/// What one GICC entry tells of the controller.
#[derive(Clone, Copy, Default)]
struct Interface {
    gicc: u64,
    gicv: u64,
    gich: u64,
    redistributor: u64,
    maintenance: u32,
}

/// Reads the table.
///
/// # Errors
///
/// See [`Error`].
pub fn read(table: &Table<'_>) -> Result<Processors, Error> {
    let mut cpus = Vec::new();
    let mut interfaces = Vec::new();
    let mut distributor = None;
    let mut redistributors = Vec::new();
    let mut its = Vec::new();
    for entry in table.entries(FIRST_ENTRY) {
        let entry = entry?;
        match entry.kind {
            GICC => {
                if let Some((cpu, interface)) = processor(&entry)? {
                    cpus.push(cpu);
                    interfaces.push(interface);
                }
            }
            GICD => distributor = distributor.or(Some((entry.at, entry.u64(8)?, entry.u8(20)?))),
            GICR => redistributors.extend(range(entry.u64(4)?, entry.u32(12)?.into())),
            ITS => its.push(Pa::new(entry.u64(8)?)),
            _ => {}
        }
    }
    let Some(first) = interfaces.first().copied() else {
        return Err(table.error(FIRST_ENTRY, Why::NoCpus));
    };
    let Some((at, base, version)) = distributor else {
        return Err(table.error(FIRST_ENTRY, Why::NoGic));
    };
    if redistributors.is_empty() {
        let named = interfaces.iter().filter(|it| it.redistributor != 0);
        redistributors.extend(named.filter_map(|it| range(it.redistributor, REDISTRIBUTOR_BYTES)));
    }
    let distributor = Pa::new(base);
    // Version 0 leaves it to the hardware; then redistributors tell.
    let three = version >= 3 || version == 0 && !redistributors.is_empty();
    let gic = if three && !redistributors.is_empty() {
        Gic::V3 {
            distributor,
            redistributors,
        }
    } else if !three && first.gicc != 0 && first.gich != 0 && first.gicv != 0 {
        Gic::V2 {
            distributor,
            cpu_interface: Pa::new(first.gicc),
            hypervisor_interface: Pa::new(first.gich),
            virtual_interface: Pa::new(first.gicv),
        }
    } else {
        return Err(table.error(at, Why::NoGic));
    };
    let maintenance = Some(first.maintenance).filter(|it| (16..32).contains(it));
    Ok(Processors {
        cpus,
        gic,
        maintenance: maintenance.unwrap_or(USUAL_MAINTENANCE),
        its,
    })
}

/// A processor that may be started, and its view of the interrupt controller.
fn processor(entry: &Entry<'_>) -> Result<Option<(Cpu, Interface)>, Error> {
    if entry.u32(12)? & (ENABLED | ONLINE_CAPABLE) == 0 {
        return Ok(None);
    }
    let cpu = Cpu {
        mpidr: entry.u64(68)? & AFFINITY,
        uid: entry.u32(8)?,
        node: None,
    };
    let interface = Interface {
        gicc: entry.u64(32)?,
        gicv: entry.u64(40)?,
        gich: entry.u64(48)?,
        maintenance: entry.u32(56)?,
        redistributor: entry.u64(60)?,
    };
    Ok(Some((cpu, interface)))
}

fn range(start: u64, bytes: u64) -> Option<Range<Pa>> {
    let start = Pa::new(start);
    Some(start..start.checked_add(bytes)?).filter(|it| it.start < it.end)
}
