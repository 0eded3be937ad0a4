//! The tables of one layout: FADT, GTDT, SPCR, DBG2 and SRAT.

use alloc::vec::Vec;
use core::ops::Range;

use super::raw::Table;
use super::{Error, Why};
use crate::addr::Pa;
use crate::dev::machine::{Uart, UartKind};
use crate::dev::psci::Conduit;

/// Interface types of SPCR and subtypes of DBG2's serial ports: a PL011, and its subset (two numbers).
const PL011: [u16; 3] = [0x3, 0xd, 0xe];
/// Generic address: system memory.
const SYSTEM_MEMORY: u8 = 0;

/// FADT: how firmware is called.
///
/// # Errors
///
/// [`Why::NoPsci`], [`Why::Length`].
pub fn psci(table: &Table<'_>) -> Result<Conduit, Error> {
    const ARM_BOOT_ARCHITECTURE: usize = 129;
    const PSCI: u16 = 1 << 0;
    const HVC: u16 = 1 << 1;
    let flags = table.u16(ARM_BOOT_ARCHITECTURE)?;
    match (flags & PSCI != 0, flags & HVC != 0) {
        (false, _) => Err(table.error(ARM_BOOT_ARCHITECTURE, Why::NoPsci)),
        (true, true) => Ok(Conduit::Hvc),
        (true, false) => Ok(Conduit::Smc),
    }
}

/// Interrupts of the timers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Timers {
    /// CNTP.
    pub physical_timer: u32,
    /// CNTV.
    pub virtual_timer: u32,
    /// CNTHP.
    pub hypervisor_timer: u32,
}

/// GTDT: the timers.
///
/// # Errors
///
/// [`Why::NotPrivate`], [`Why::Length`].
pub fn timers(table: &Table<'_>) -> Result<Timers, Error> {
    let private = |offset| match table.u32(offset)? {
        intid @ 16..32 => Ok(intid),
        other => Err(table.error(offset, Why::NotPrivate(other))),
    };
    Ok(Timers {
        physical_timer: private(56)?,
        virtual_timer: private(64)?,
        hypervisor_timer: private(72)?,
    })
}

/// SPCR: the serial console, when it is one that is understood.
///
/// # Errors
///
/// [`Why::Length`].
pub fn serial_port(table: &Table<'_>) -> Result<Option<Uart>, Error> {
    /// Interrupt type: the number is the GIC's.
    const OF_GIC: u8 = 1 << 3;
    let kind = u16::from(table.u8(36)?);
    let (space, base) = (table.u8(40)?, table.u64(44)?);
    let intid = (table.u8(52)? & OF_GIC != 0).then_some(table.u32(54)?);
    Ok(uart(kind, space, base, intid))
}

/// DBG2: the first serial port that is understood.
///
/// # Errors
///
/// [`Why::Length`].
pub fn debug_port(table: &Table<'_>) -> Result<Option<Uart>, Error> {
    const SERIAL: u16 = 0x8000;
    let index = |offset| table.u32(offset).map(|it| usize::try_from(it).ok());
    let (Some(mut at), Some(count)) = (index(36)?, index(40)?) else {
        return Err(table.error(36, Why::Length));
    };
    for _ in 0..count {
        let length = usize::from(table.u16(at.saturating_add(1))?);
        let (kind, subtype) = (table.u16(at + 12)?, table.u16(at + 14)?);
        if kind == SERIAL {
            let address = at + usize::from(table.u16(at + 18)?);
            let (space, base) = (table.u8(address)?, table.u64(address + 4)?);
            if let Some(uart) = uart(subtype, space, base, None) {
                return Ok(Some(uart));
            }
        }
        if length == 0 {
            return Err(table.error(at + 1, Why::Length));
        }
        at += length;
    }
    Ok(None)
}

/// What firmware uses is set up already, so every PL011 is driven as its subset, which has no baud rate to set.
fn uart(kind: u16, space: u8, base: u64, intid: Option<u32>) -> Option<Uart> {
    let usable = PL011.contains(&kind) && space == SYSTEM_MEMORY && base != 0;
    usable.then_some(Uart {
        base: Pa::new(base),
        intid,
        kind: UartKind::Sbsa,
    })
}

/// What is in which NUMA node.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Affinities {
    /// Processors by their identifiers, and their nodes.
    pub processors: Vec<(u32, u32)>,
    /// Memory, and its nodes: as the table has it, in whatever order. Some may not be plugged in; which is there, the memory
    /// map says.
    pub memory: Vec<(Range<Pa>, u32)>,
}

/// SRAT: which processor and which memory is in which NUMA node.
///
/// # Errors
///
/// [`Why::Length`], [`Why::Range`].
pub fn affinities(table: &Table<'_>) -> Result<Affinities, Error> {
    const FIRST_ENTRY: usize = 48;
    const MEMORY_AFFINITY: u8 = 1;
    const GICC_AFFINITY: u8 = 3;
    const ENABLED: u32 = 1 << 0;
    let mut found = Affinities::default();
    for entry in table.entries(FIRST_ENTRY) {
        let entry = entry?;
        if entry.kind == GICC_AFFINITY && entry.u32(10)? & ENABLED != 0 {
            found.processors.push((entry.u32(6)?, entry.u32(2)?));
        }
        if entry.kind == MEMORY_AFFINITY && entry.u32(28)? & ENABLED != 0 {
            let (start, bytes) = (Pa::new(entry.u64(8)?), entry.u64(16)?);
            let end = start.checked_add(bytes);
            let end = end.ok_or(table.error(entry.at + 16, Why::Range))?;
            found.memory.push((start..end, entry.u32(2)?));
        }
    }
    Ok(found)
}
