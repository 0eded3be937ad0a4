//! The tables of one layout: FADT, GTDT, SPCR, DBG2 and SRAT.

use alloc::vec::Vec;

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

/// SRAT: for each processor's identifier the NUMA node that it is in.
///
/// # Errors
///
/// [`Why::Length`].
pub fn processor_nodes(table: &Table<'_>) -> Result<Vec<(u32, u32)>, Error> {
    const FIRST_ENTRY: usize = 48;
    const GICC_AFFINITY: u8 = 3;
    const ENABLED: u32 = 1 << 0;
    let mut nodes = Vec::new();
    for entry in table.entries(FIRST_ENTRY) {
        let entry = entry?;
        if entry.kind == GICC_AFFINITY && entry.u32(10)? & ENABLED != 0 {
            nodes.push((entry.u32(6)?, entry.u32(2)?));
        }
    }
    Ok(nodes)
}
