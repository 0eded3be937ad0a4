//! The registers of a VM's shared interrupts, by their offset in the distributor: GICv2 (IHI 0048B, 4.3) and GICv3
//! (IHI 0069H, 12.9).

use core::ops::Range;

use super::registers::{
    ICACTIVER, ICENABLER, ICFGR0, ICPENDR, IGROUPR, IPRIORITYR, ISACTIVER, ISENABLER, ISPENDR,
    gather, lanes_of, spread,
};
use super::shared::{AFFINITY, ANY, FIRST, Routing, SPIS, Shared, Target, WORDS};

const ITARGETSR: u64 = 0x800;
const IROUTER: u64 = 0x6000;
/// The highest priority bits are implemented.
pub(super) const PRIORITY: u8 = 0xf8;

/// Words of SPIs.
pub const WORDS_OF_SPIS: u64 = WORDS as u64;
const END: u64 = (FIRST + SPIS) as u64;

/// What the word at an offset is of.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Field {
    /// One bit each of the 32 SPIs of this word.
    Bits(u64, usize),
    /// One byte each of four SPIs from this one on.
    Priorities(usize),
    /// As above.
    Targets(usize),
    /// Two bits each of 16 SPIs: the word they are in, and how many bits up.
    Configuration(usize, u32),
    /// The lower word of IROUTER.
    Route(usize),
}

/// The word of SPIs that the register at `offset` has one bit each of.
pub fn word_of(offset: u64) -> Option<usize> {
    match field(offset, Routing::Affinity) {
        Some(Field::Bits(_, word)) => Some(word),
        _ => None,
    }
}

/// Whether the bytes of the register at `offset` can be accessed.
pub fn has_bytes(offset: u64) -> bool {
    (IPRIORITYR..ICFGR0).contains(&offset)
}

/// Whether `offset` is of an IROUTER, the lower half or the upper.
pub fn is_route(offset: u64) -> bool {
    matches!(field(offset & !7, Routing::Affinity), Some(Field::Route(_)))
}

/// Which SPIs the register at `offset` is of; none where nothing is.
pub fn interrupts(offset: u64, routing: Routing) -> Range<u16> {
    let from = |first: usize, count: u16| {
        let first = u16::try_from(first).unwrap_or(SPIS) + FIRST;
        first..first + count
    };
    match field(offset, routing) {
        Some(Field::Bits(_, word)) => from(32 * word, 32),
        Some(Field::Priorities(first) | Field::Targets(first)) => from(first, 4),
        Some(Field::Configuration(word, 0)) => from(32 * word, 16),
        Some(Field::Configuration(word, _)) => from(32 * word + 16, 16),
        Some(Field::Route(index)) => from(index, 1),
        None => 0..0,
    }
}

fn field(offset: u64, routing: Routing) -> Option<Field> {
    let index = |base: u64, per_spi: u64| {
        let first = offset.checked_sub(base + u64::from(FIRST) * per_spi)?;
        let end = (END - u64::from(FIRST)) * per_spi;
        usize::try_from(first).ok().filter(|_| first < end)
    };
    match offset {
        IGROUPR..IPRIORITYR => {
            let base = offset & !0x7f;
            let word = usize::try_from((offset - base) / 4).ok()?.checked_sub(1)?;
            (word < WORDS).then_some(Field::Bits(base, word))
        }
        _ => index(IPRIORITYR, 1)
            .map(Field::Priorities)
            .or_else(|| {
                let first = index(ITARGETSR, 1)?;
                matches!(routing, Routing::Targets(2..)).then_some(Field::Targets(first))
            })
            .or_else(|| {
                let place = offset.checked_sub(ICFGR0)?.checked_sub(8)? / 4;
                let word = usize::try_from(place / 2).ok()?;
                let up = if place % 2 == 0 { 0 } else { 16 };
                (word < WORDS).then_some(Field::Configuration(word, up))
            })
            .or_else(|| {
                let bytes = index(IROUTER, 8)?;
                let lower = routing == Routing::Affinity && bytes % 8 == 0;
                lower.then_some(Field::Route(bytes / 8))
            }),
    }
}

impl Shared {
    /// Reads the word at `offset`, a multiple of four; zero where nothing is.
    pub fn read(&self, offset: u64) -> u32 {
        match field(offset, self.routing) {
            Some(Field::Bits(base, word)) => self.read_bits(base, word),
            Some(Field::Priorities(first)) => {
                u32::from_le_bytes(of_four(&self.priority, first, |it| it))
            }
            Some(Field::Targets(first)) => {
                u32::from_le_bytes(of_four(&self.route, first, |it| it.to_le_bytes()[0]))
            }
            Some(Field::Configuration(word, up)) => {
                spread(self.edge.get(word).map_or(0, |edge| edge >> up))
            }
            Some(Field::Route(index)) => self.route.get(index).copied().unwrap_or(0),
            None => 0,
        }
    }

    fn read_bits(&self, base: u64, word: usize) -> u32 {
        let of = |words: &[u32; WORDS]| words.get(word).copied().unwrap_or(0);
        match base {
            IGROUPR => of(&self.group1),
            ISENABLER | ICENABLER => of(&self.enabled),
            ISPENDR | ICPENDR => self.all_pending(word),
            ISACTIVER | ICACTIVER => of(&self.active),
            _ => 0,
        }
    }

    /// Writes the word at `offset`, a multiple of four; `lanes` selects bytes (only priorities and targets have bytes).
    /// `home` knows the vCPU that a target means.
    pub fn write(
        &mut self,
        offset: u64,
        value: u32,
        lanes: u32,
        home: impl Fn(Target) -> Option<usize>,
    ) {
        match field(offset, self.routing) {
            Some(Field::Priorities(first)) => {
                for (it, value) in lanes_of(value, lanes) {
                    if let Some(priority) = self.priority.get_mut(first + it) {
                        *priority = value & PRIORITY;
                    }
                }
            }
            Some(Field::Targets(first)) => self.set_targets(first, value, lanes),
            _ if lanes != u32::MAX => {}
            Some(Field::Bits(ISACTIVER, word)) => self.activate(word, value, home),
            Some(Field::Bits(base, word)) => self.write_bits(base, word, value),
            Some(Field::Configuration(word, up)) => {
                if let Some(edge) = self.edge.get_mut(word) {
                    *edge = *edge & !(0xffff << up) | gather(value) << up;
                }
            }
            Some(Field::Route(index)) => {
                if let Some(route) = self.route.get_mut(index) {
                    *route = value & (ANY | AFFINITY);
                }
            }
            None => {}
        }
    }

    fn write_bits(&mut self, base: u64, word: usize, value: u32) {
        let (words, set) = match base {
            IGROUPR => {
                if let Some(group1) = self.group1.get_mut(word) {
                    *group1 = value;
                }
                return;
            }
            ISENABLER => (&mut self.enabled, true),
            ICENABLER => (&mut self.enabled, false),
            ISPENDR => return self.set_pending(word, value, true),
            ICPENDR => return self.set_pending(word, value, false),
            ICACTIVER => return self.set_active(word, value, false),
            _ => return,
        };
        if let Some(word) = words.get_mut(word) {
            *word = if set { *word | value } else { *word & !value };
        }
    }

    fn set_targets(&mut self, first: usize, value: u32, lanes: u32) {
        let Routing::Targets(vcpus) = self.routing else {
            return;
        };
        let exist = targets(vcpus);
        for (it, value) in lanes_of(value, lanes) {
            if let Some(route) = self.route.get_mut(first + it) {
                *route = u32::from(value & exist);
            }
        }
    }
}

/// The bits of a byte of ITARGETSR that are vCPUs.
pub(super) fn targets(vcpus: usize) -> u8 {
    let missing = 8_usize.saturating_sub(vcpus);
    u8::MAX.unbounded_shr(u32::try_from(missing).unwrap_or(8))
}

fn of_four<T: Copy>(each: &[T], first: usize, byte: impl Fn(T) -> u8) -> [u8; 4] {
    core::array::from_fn(|it| each.get(first + it).map_or(0, |it| byte(*it)))
}

#[cfg(test)]
mod tests {
    use super::interrupts;
    use crate::vm::vgic::shared::{Routing, Shared};

    #[test]
    fn words_are_of_the_interrupts_the_manual_says() {
        let of = |offset| interrupts(offset, Routing::Affinity);
        assert_eq!(of(0x100), 0..0);
        assert_eq!(of(0x104), 32..64);
        assert_eq!(of(0x38c), 96..128);
        assert_eq!(of(0x390), 0..0);
        assert_eq!(of(0x41c), 0..0);
        assert_eq!(of(0x420), 32..36);
        assert_eq!(of(0x47c), 124..128);
        assert_eq!(of(0x480), 0..0);
        assert_eq!(of(0x820), 0..0);
        assert_eq!(interrupts(0x820, Routing::Targets(4)), 32..36);
        assert_eq!(of(0xc04), 0..0);
        assert_eq!(of(0xc08), 32..48);
        assert_eq!(of(0xc0c), 48..64);
        assert_eq!(of(0xc1c), 112..128);
        assert_eq!(of(0xc20), 0..0);
        assert_eq!(of(0x60f8), 0..0);
        assert_eq!(of(0x6108), 33..34);
        assert_eq!(of(0x63f8), 127..128);
        assert_eq!(of(0x6400), 0..0);
        assert_eq!(interrupts(0x6108, Routing::Targets(4)), 0..0);
    }

    #[test]
    fn registers_read_back_what_they_may() {
        for routing in [Routing::Affinity, Routing::Targets(3)] {
            let mut shared = Shared::new(routing);
            for offset in (0..0x1_0000).step_by(4) {
                shared.write(offset, u32::MAX, u32::MAX, |_| None);
            }
            // Written in order of their offsets: each bank that clears comes behind the one that sets.
            for (offset, value) in [
                (0x84, u32::MAX),
                (0x104, 0),
                (0x184, 0),
                (0x204, 0),
                (0x304, 0),
                (0x420, 0xf8f8_f8f8),
                (0xc08, 0xaaaa_aaaa),
            ] {
                assert_eq!(shared.read(offset), value, "{offset:#x}");
            }
            let affine = routing == Routing::Affinity;
            assert_eq!(shared.read(0x820), if affine { 0 } else { 0x0707_0707 });
            assert_eq!(shared.read(0x6108), if affine { 0x80ff_ffff } else { 0 });
            assert_eq!(shared.read(0x610c), 0, "no vCPU has an Aff3");
        }
    }
}
