//! The register frames of the virtual distributors: which register an access names, for GICv2 (IHI 0048B, 4.3) and
//! GICv3 (IHI 0069H, 12.9 to 12.11).
//!
//! Registers of private interrupts are those of [`Private`](super::private::Private), registers of SPIs those of
//! [`Shared`](super::shared::Shared); what is left is small.

use super::registers::IGROUPR;
use super::shared::{self, Routing};
use super::shared_registers;

/// Bytes of GICv3's GICD frame.
pub const V3_DISTRIBUTOR_BYTES: u64 = 0x1_0000;
/// Bytes of a redistributor's two frames.
pub const REDISTRIBUTOR_BYTES: u64 = 0x2_0000;
/// Bytes of GICv2's GICD frame.
pub const V2_DISTRIBUTOR_BYTES: u64 = 0x1000;

const CTLR: u64 = 0x000;
const TYPER: u64 = 0x004;
const IIDR: u64 = 0x008;
const PRIVATE_REGISTERS: core::ops::Range<u64> = IGROUPR..0x800;
const CONFIGURATION: core::ops::Range<u64> = 0xc00..0xc08;

const V2_ITARGETSR: core::ops::Range<u64> = 0x800..0x820;
const V2_SGIR: u64 = 0xf00;
const V2_CPENDSGIR: core::ops::Range<u64> = 0xf10..0xf20;
const V2_SPENDSGIR: core::ops::Range<u64> = 0xf20..0xf30;
const V2_IDENTIFICATION: core::ops::Range<u64> = 0xfd0..0x1000;

const V3_IDENTIFICATION: core::ops::Range<u64> = 0xffd0..0x1_0000;
const GICR_TYPER: u64 = 0x0008;
const GICR_TYPER_HIGH: u64 = 0x000c;
const GICR_WAKER: u64 = 0x0014;
const SGI_FRAME: u64 = 0x1_0000;

/// What a word of a frame is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Register {
    /// GICD_CTLR: which groups are forwarded.
    Control,
    /// Reads as this and ignores writes.
    Constant(u32),
    /// A register of the accessing (GICv2) or addressed (GICv3) vCPU's private interrupts.
    Private(u64),
    /// A register of the VM's shared interrupts.
    Shared(u64),
    /// GICv2's GICD_ITARGETSR for private interrupts: the accessing CPU's own bit in each byte.
    OwnTarget,
    /// GICv2's GICD_SGIR.
    SendSgi,
    /// GICv2's GICD_CPENDSGIR (false) and GICD_SPENDSGIR (true), from this SGI on.
    SgiSenders(u64, bool),
    /// GICR_WAKER.
    Waker,
    /// GICC_DIR.
    Deactivate,
}

/// IIDR: implementer Arm, a product number that none of its products has.
const IDENTITY: u32 = 0x56 << 24 | 0x43b;

/// The last words of a frame: PIDR4 to PIDR7, PIDR0 to PIDR3 (with the architecture's version) and CIDR0 to CIDR3.
const fn identification(version: u32, word: u64) -> u32 {
    match word {
        0 => 0x04,
        5 => 0xb0,
        6 => version << 4 | 0xb,
        8 => 0x0d,
        9 => 0xf0,
        10 => 0x05,
        11 => 0xb1,
        _ => 0,
    }
}
/// GICD_TYPER.ITLinesNumber: how many words of 32 SPIs there are.
const LINES: u32 = shared::SPIS as u32 / 32;
/// GICD_TYPER of GICv3: 16 bits of INTID as ICH_VTR offers, no LPIs, no message-based SPIs.
const V3_TYPER: u32 = 15 << 19 | LINES;

/// GICv2's GICD at `offset`, a multiple of four, for a VM of `vcpus`.
#[inline(always)]
pub fn v2(offset: u64, vcpus: usize) -> Register {
    const CPU_NUMBER: u32 = 5;
    match offset {
        CTLR => Register::Control,
        TYPER => Register::Constant(
            u32::try_from(vcpus.saturating_sub(1)).unwrap_or(7).min(7) << CPU_NUMBER | LINES,
        ),
        IIDR => Register::Constant(IDENTITY),
        _ if first_word(offset) || CONFIGURATION.contains(&offset) => Register::Private(offset),
        _ if V2_ITARGETSR.contains(&offset) && vcpus > 1 => Register::OwnTarget,
        V2_SGIR => Register::SendSgi,
        _ if V2_CPENDSGIR.contains(&offset) => {
            Register::SgiSenders(offset - V2_CPENDSGIR.start, false)
        }
        _ if V2_SPENDSGIR.contains(&offset) => {
            Register::SgiSenders(offset - V2_SPENDSGIR.start, true)
        }
        _ if V2_IDENTIFICATION.contains(&offset) => {
            Register::Constant(identification(2, (offset - V2_IDENTIFICATION.start) / 4))
        }
        _ => of_shared(offset, Routing::Targets(vcpus)),
    }
}

/// Whether `offset` names one of the registers of the first 32 interrupts.
fn first_word(offset: u64) -> bool {
    const PRIORITIES: core::ops::Range<u64> = 0x400..0x420;
    PRIVATE_REGISTERS.contains(&offset)
        && if offset < PRIORITIES.start {
            offset & 0x7f == 0
        } else {
            PRIORITIES.contains(&offset)
        }
}

/// GICv3's GICD at `offset`, a multiple of four. With affinity routing the private interrupts are not here.
#[inline(always)]
pub fn v3(offset: u64) -> Register {
    match offset {
        CTLR => Register::Control,
        TYPER => Register::Constant(V3_TYPER),
        IIDR => Register::Constant(IDENTITY),
        _ if V3_IDENTIFICATION.contains(&offset) => {
            Register::Constant(identification(3, (offset - V3_IDENTIFICATION.start) / 4))
        }
        _ => of_shared(offset, Routing::Affinity),
    }
}

fn of_shared(offset: u64, routing: Routing) -> Register {
    if shared_registers::interrupts(offset, routing).is_empty() {
        Register::Constant(0)
    } else {
        Register::Shared(offset)
    }
}

/// A redistributor's frames at `offset`, a multiple of four, of vCPU `index` of `vcpus` whose affinity is `affinity`.
#[inline(always)]
pub fn redistributor(offset: u64, index: usize, vcpus: usize, affinity: u64) -> Register {
    const LAST: u32 = 1 << 4;
    const NUMBER: u32 = 8;
    match offset {
        IIDR_GICR => Register::Constant(IDENTITY),
        GICR_TYPER => {
            let last = if index + 1 == vcpus { LAST } else { 0 };
            Register::Constant(u32::try_from(index & 0xffff).unwrap_or(0) << NUMBER | last)
        }
        GICR_TYPER_HIGH => Register::Constant(packed_affinity(affinity)),
        GICR_WAKER => Register::Waker,
        _ if V3_IDENTIFICATION.contains(&offset) => {
            Register::Constant(identification(3, (offset - V3_IDENTIFICATION.start) / 4))
        }
        _ if offset < SGI_FRAME => Register::Constant(0),
        _ => match offset - SGI_FRAME {
            private if first_word(private) || CONFIGURATION.contains(&private) => {
                Register::Private(private)
            }
            _ => Register::Constant(0),
        },
    }
}

const IIDR_GICR: u64 = 0x0004;

/// Aff3.Aff2.Aff1.Aff0 of an MPIDR_EL1 in 32 bits.
fn packed_affinity(mpidr: u64) -> u32 {
    let [aff0, aff1, aff2, _, aff3, ..] = mpidr.to_le_bytes();
    u32::from_le_bytes([aff0, aff1, aff2, aff3])
}

/// MPIDR_EL1 of vCPU `index`: sixteen share Aff1 and above, so that one SGI reaches all of them.
pub const fn vmpidr(index: usize) -> u64 {
    const RES1: usize = 1 << 31;
    let (aff0, aff1, aff2) = (index & 0xf, (index >> 4) & 0xff, (index >> 12) & 0xff);
    (RES1 | aff0 | aff1 << 8 | aff2 << 16) as u64
}

/// Position of the vCPU with affinity `mpidr`, were there enough.
pub const fn index_of(mpidr: u64) -> Option<usize> {
    let [aff0, aff1, aff2, _, aff3, ..] = mpidr.to_le_bytes();
    if aff0 > 0xf || aff3 != 0 {
        return None;
    }
    Some(aff0 as usize | (aff1 as usize) << 4 | (aff2 as usize) << 12)
}

/// Who gets an SGI.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Receivers {
    /// The vCPUs from `first` on whose bit is set.
    Some {
        /// vCPU of bit 0.
        first: usize,
        /// One bit each.
        bits: u16,
    },
    /// All but the sender.
    Others,
}

/// ICC_SGI1R_EL1 and its likes (IHI 0069H, 12.2.21): the SGI and its receivers.
pub fn sgi_v3(value: u64) -> (u8, Receivers) {
    const OTHERS: u64 = 1 << 40;
    const AFF0_RANGE: u32 = 44;
    let [low, high, aff1, intid, aff2, _, aff3, _] = value.to_le_bytes();
    let receivers = if value & OTHERS != 0 {
        Receivers::Others
    } else {
        let affinity = u64::from(aff1) << 8 | u64::from(aff2) << 16 | u64::from(aff3) << 32;
        let exists = value >> AFF0_RANGE & 0xf == 0;
        match index_of(affinity).filter(|_| exists) {
            Some(first) => Receivers::Some {
                first,
                bits: u16::from_le_bytes([low, high]),
            },
            None => Receivers::Some { first: 0, bits: 0 },
        }
    };
    (intid & 0xf, receivers)
}

/// GICD_SGIR (IHI 0048B, 4.3.15): the SGI and its receivers, sent by vCPU `sender`.
pub fn sgi_v2(value: u32, sender: usize) -> (u8, Receivers) {
    let [intid, _, list, filter] = value.to_le_bytes();
    let receivers = match filter & 3 {
        0 => Receivers::Some {
            first: 0,
            bits: u16::from(list),
        },
        1 => Receivers::Others,
        2 => Receivers::Some {
            first: sender,
            bits: 1,
        },
        _ => Receivers::Some { first: 0, bits: 0 },
    };
    (intid & 0xf, receivers)
}

#[cfg(test)]
mod tests {
    use super::{Receivers, Register, index_of, redistributor, sgi_v2, sgi_v3, v2, v3, vmpidr};

    #[test]
    fn affinities_come_back() {
        for index in 0..512 {
            assert_eq!(index_of(vmpidr(index)), Some(index));
        }
        assert_eq!(vmpidr(17), 1 << 31 | 1 << 8 | 1);
        assert_eq!(index_of(0x10), None, "Aff0 of 16 and more is not given out");
        assert_eq!(index_of(1 << 32), None);
    }

    #[test]
    fn gicv3_sgis_name_a_cluster_and_sixteen_cpus() {
        let value = 5 << 24 | 2 << 16 | 0x8001;
        assert_eq!(
            sgi_v3(value),
            (
                5,
                Receivers::Some {
                    first: 32,
                    bits: 0x8001
                }
            )
        );
        assert_eq!(sgi_v3(1 << 40 | 1 << 24), (1, Receivers::Others));
        assert_eq!(
            sgi_v3(1 << 44 | 1),
            (0, Receivers::Some { first: 0, bits: 0 })
        );
        assert_eq!(
            sgi_v3(1 << 48 | 1),
            (0, Receivers::Some { first: 0, bits: 0 })
        );
    }

    #[test]
    fn gicv2_sgis_have_a_list_and_two_short_forms() {
        assert_eq!(
            sgi_v2(0x0005_0003, 1),
            (3, Receivers::Some { first: 0, bits: 5 })
        );
        assert_eq!(sgi_v2(0x0100_0003, 1), (3, Receivers::Others));
        assert_eq!(
            sgi_v2(0x0200_0003, 6),
            (3, Receivers::Some { first: 6, bits: 1 })
        );
        assert_eq!(
            sgi_v2(0x0300_0003, 6),
            (3, Receivers::Some { first: 0, bits: 0 })
        );
    }

    #[test]
    fn there_are_96_shared_interrupts() {
        assert!(matches!(v3(4), Register::Constant(typer) if typer & 0x1f == 3));
        assert!(
            matches!(v2(4, 4), Register::Constant(typer) if typer & 0x1f == 3 && typer >> 5 & 7 == 3)
        );
        assert_eq!(v2(0x100, 4), Register::Private(0x100));
        assert_eq!(v2(0x10c, 4), Register::Shared(0x10c));
        assert_eq!(v2(0x110, 4), Register::Constant(0));
        assert_eq!(v2(0x420, 4), Register::Shared(0x420));
        assert_eq!(v2(0x820, 4), Register::Shared(0x820));
        assert_eq!(
            v2(0x820, 1),
            Register::Constant(0),
            "a single CPU has no targets to choose"
        );
        assert_eq!(
            v3(0x100),
            Register::Constant(0),
            "private interrupts are the redistributor's"
        );
        assert_eq!(v3(0x820), Register::Constant(0));
        assert_eq!(v3(0x6100), Register::Shared(0x6100));
    }

    #[test]
    fn the_last_redistributor_says_so() {
        let typer = |index| redistributor(8, index, 3, vmpidr(index));
        assert_eq!(typer(0), Register::Constant(0));
        assert_eq!(typer(2), Register::Constant(2 << 8 | 1 << 4));
        assert_eq!(
            redistributor(12, 17, 18, vmpidr(17)),
            Register::Constant(0x101)
        );
        assert_eq!(redistributor(0x1_0100, 0, 1, 0), Register::Private(0x100));
        assert_eq!(redistributor(0x1_0c04, 0, 1, 0), Register::Private(0xc04));
    }

    #[test]
    fn both_versions_identify_themselves() {
        assert_eq!(v3(0xffe8), Register::Constant(0x3b));
        assert_eq!(v2(0xfe8, 1), Register::Constant(0x2b));
        assert_eq!(redistributor(0xffe8, 0, 1, 0), Register::Constant(0x3b));
        assert_eq!(v2(0xffc, 1), Register::Constant(0xb1));
    }
}
