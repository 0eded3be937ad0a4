//! List registers: what the virtual CPU interface is told of interrupts in flight, for GICv3 (`ICH_LR<n>_EL2`, IHI 0069H
//! 12.4.8) and GICv2 (`GICH_LR<n>`, IHI 0048B 5.3.9).
//!
//! An [`Entry`] is encoded when it is listed and decoded when it is taken back; both are pure.

/// Where an interrupt stands between being made pending and being deactivated.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum State {
    /// To be taken.
    Pending,
    /// Taken, not yet deactivated.
    Active,
    /// Taken, and pending again.
    PendingAndActive,
}

/// One interrupt in flight.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Entry {
    /// What the guest reads when it takes it.
    pub intid: u16,
    /// Sender of an SGI on GICv2, as the guest numbers its CPUs; zero otherwise.
    pub source: u8,
    /// Five bits are implemented: the upper ones.
    pub priority: u8,
    /// Group 1, an IRQ; group 0 may be signalled as an FIQ.
    pub group1: bool,
    /// Where it stands.
    pub state: State,
    /// The physical interrupt that the guest's deactivation deactivates, too.
    pub hardware: Option<u16>,
    /// The guest's deactivation raises the maintenance interrupt; not together with `hardware`.
    pub tell: bool,
}

/// Which format a machine's list registers have.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Format {
    /// GICv2.
    V2,
    /// GICv3.
    V3,
}

const PRIORITY: u64 = 0xf8;
pub(super) const SGIS: u16 = 16;
/// From here on numbers are special or LPIs'.
const INTIDS: u16 = 1020;

mod v3 {
    pub(super) const HW: u64 = 1 << 61;
    pub(super) const GROUP1: u64 = 1 << 60;
    pub(super) const STATE: u32 = 62;
    pub(super) const PRIORITY: u32 = 48;
    pub(super) const PINTID: u32 = 32;
    pub(super) const PINTID_BITS: u64 = 0x1fff;
    /// Without HW, the field's upper bit asks for maintenance.
    pub(super) const TELL: u64 = 1 << 41;
}

mod v2 {
    pub(super) const HW: u64 = 1 << 31;
    pub(super) const GROUP1: u64 = 1 << 30;
    pub(super) const STATE: u32 = 28;
    /// The field holds priority bits 7:3.
    pub(super) const PRIORITY: u32 = 23 - 3;
    pub(super) const PHYSICAL: u32 = 10;
    pub(super) const PHYSICAL_BITS: u64 = 0x3ff;
    pub(super) const SOURCE_BITS: u64 = 0x7;
    /// Without HW, the field's upper bit asks for maintenance.
    pub(super) const TELL: u64 = 1 << 19;
}

impl State {
    const fn bits(self) -> u64 {
        match self {
            Self::Pending => 0b01,
            Self::Active => 0b10,
            Self::PendingAndActive => 0b11,
        }
    }

    const fn from_bits(bits: u64) -> Option<Self> {
        match bits & 0b11 {
            0b01 => Some(Self::Pending),
            0b10 => Some(Self::Active),
            0b11 => Some(Self::PendingAndActive),
            _ => None,
        }
    }

    /// Whether it is to be taken (again).
    pub const fn is_pending(self) -> bool {
        matches!(self, Self::Pending | Self::PendingAndActive)
    }

    /// Whether it was taken and not deactivated.
    pub const fn is_active(self) -> bool {
        matches!(self, Self::Active | Self::PendingAndActive)
    }
}

impl Format {
    /// The list register that holds `entry`.
    pub fn encode(self, entry: &Entry) -> u64 {
        let (intid, priority) = (u64::from(entry.intid), u64::from(entry.priority) & PRIORITY);
        match self {
            Self::V3 => {
                let told = if entry.tell { v3::TELL } else { 0 };
                let hardware = entry
                    .hardware
                    .map_or(told, |pintid| v3::HW | u64::from(pintid) << v3::PINTID);
                let group = if entry.group1 { v3::GROUP1 } else { 0 };
                entry.state.bits() << v3::STATE
                    | hardware
                    | group
                    | priority << v3::PRIORITY
                    | intid
            }
            Self::V2 => {
                let physical = match entry.hardware {
                    Some(pintid) => {
                        v2::HW | (u64::from(pintid) & v2::PHYSICAL_BITS) << v2::PHYSICAL
                    }
                    None => {
                        let told = if entry.tell { v2::TELL } else { 0 };
                        (u64::from(entry.source) & v2::SOURCE_BITS) << v2::PHYSICAL | told
                    }
                };
                let group = if entry.group1 { v2::GROUP1 } else { 0 };
                entry.state.bits() << v2::STATE
                    | physical
                    | group
                    | priority << v2::PRIORITY
                    | intid
            }
        }
    }

    /// Whether a list register that holds `value` is free: neither pending nor active.
    #[inline]
    pub const fn is_free(self, value: u64) -> bool {
        let state = match self {
            Self::V3 => value >> v3::STATE,
            Self::V2 => value >> v2::STATE,
        };
        state & 0b11 == 0
    }

    /// What a list register holds; `None` when it is free.
    pub fn decode(self, register: u64) -> Option<Entry> {
        let (state, hw, group1, priority) = match self {
            Self::V3 => (
                register >> v3::STATE,
                v3::HW,
                v3::GROUP1,
                register >> v3::PRIORITY,
            ),
            Self::V2 => (
                register >> v2::STATE,
                v2::HW,
                v2::GROUP1,
                register >> v2::PRIORITY,
            ),
        };
        let intid = match self {
            Self::V3 => u16::try_from(register & 0xffff_ffff),
            Self::V2 => u16::try_from(register & 0x3ff),
        };
        let intid = intid.ok().filter(|intid| *intid < INTIDS)?;
        let physical = match self {
            Self::V3 => register >> v3::PINTID & v3::PINTID_BITS,
            Self::V2 => register >> v2::PHYSICAL & v2::PHYSICAL_BITS,
        };
        let hardware = if register & hw != 0 {
            u16::try_from(physical).ok()
        } else {
            None
        };
        let told = match self {
            Self::V3 => v3::TELL,
            Self::V2 => v2::TELL,
        };
        let has_source = self == Self::V2 && hardware.is_none() && intid < SGIS;
        let source = if has_source {
            u8::try_from(physical & v2::SOURCE_BITS).ok()?
        } else {
            0
        };
        Some(Entry {
            intid,
            source,
            priority: u8::try_from(priority & PRIORITY).ok()?,
            group1: register & group1 != 0,
            state: State::from_bits(state)?,
            hardware,
            tell: hardware.is_none() && register & told != 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{Entry, Format, State};

    #[test]
    fn every_entry_comes_back_from_its_register() {
        for format in [Format::V2, Format::V3] {
            for intid in [0, 1, 15, 16, 27, 31, 32, 127, 1019] {
                for state in [State::Pending, State::Active, State::PendingAndActive] {
                    for priority in (0..=0xf8).step_by(8) {
                        for (hardware, group1, tell) in [
                            (None, true, false),
                            (None, false, true),
                            (Some(27), true, false),
                        ] {
                            let sources =
                                if format == Format::V2 && hardware.is_none() && intid < 16 {
                                    8
                                } else {
                                    1
                                };
                            for source in 0..sources {
                                let entry = Entry {
                                    intid,
                                    source,
                                    priority,
                                    group1,
                                    state,
                                    hardware,
                                    tell,
                                };
                                assert_eq!(format.decode(format.encode(&entry)), Some(entry));
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_free_register_holds_nothing() {
        assert_eq!(Format::V3.decode(0), None);
        assert_eq!(Format::V2.decode(0), None);
        // What the guest has deactivated keeps its other fields.
        assert_eq!(Format::V3.decode(1 << 60 | 27), None);
    }

    #[test]
    fn encodings_are_those_of_the_manuals() {
        let entry = Entry {
            intid: 27,
            source: 0,
            priority: 0xa0,
            group1: true,
            state: State::Pending,
            hardware: Some(27),
            tell: false,
        };
        assert_eq!(Format::V3.encode(&entry), 0x70a0_001b_0000_001b);
        assert_eq!(Format::V2.encode(&entry), 0xda00_6c1b);
        let entry = Entry {
            intid: 33,
            hardware: None,
            tell: true,
            ..entry
        };
        assert_eq!(Format::V3.encode(&entry), 0x50a0_0200_0000_0021);
        assert_eq!(Format::V2.encode(&entry), 0x5a08_0021);
    }
}
