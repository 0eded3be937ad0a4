//! The hypervisor's side of the virtual CPU interface, on the CPU that holds the vCPU: ICH_* or GICH.

use super::listing::{Groups, Listing, MOST_LISTS};
use super::lists::{Entry, Format, SGIS, State};
use crate::arch;
use crate::dev::gic::Gic;
use crate::dev::mmio::Registers;
use crate::sync::percpu;
use crate::trace::Event;

const GICH_HCR: usize = 0x000;
const GICH_VTR: usize = 0x004;
const GICH_VMCR: usize = 0x008;
const GICH_APR: usize = 0x0f0;
const GICH_LR: usize = 0x100;

/// ICH_HCR_EL2 and GICH_HCR: the virtual interface is on.
const HCR_ENABLE: u64 = 1 << 0;
/// As above: maintenance interrupt when the guest ended an interrupt that is not listed.
const HCR_NOT_PRESENT: u64 = 1 << 2;
/// As above: maintenance interrupt when no listed interrupt is pending.
const HCR_NONE_PENDING: u64 = 1 << 3;
/// As above: maintenance interrupt while the guest has group 0 signalled, or has it not; the same of group 1.
const HCR_GROUP0_ENABLED: u64 = 1 << 4;
const HCR_GROUP0_DISABLED: u64 = 1 << 5;
const HCR_GROUP1_ENABLED: u64 = 1 << 6;
const HCR_GROUP1_DISABLED: u64 = 1 << 7;
/// ICH_HCR_EL2: the guest's deactivations by ICC_DIR_EL1 trap.
const HCR_TRAP_DEACTIVATION: u64 = 1 << 14;
const HCR_EOI_COUNT: u32 = 27;
/// ICH_VMCR_EL2 and GICH_VMCR: the guest has each group signalled.
const VMCR_GROUP0: u64 = 1 << 0;
const VMCR_GROUP1: u64 = 1 << 1;
/// As above: EOImode.
const VMCR_EOI_MODE: u64 = 1 << 9;

/// Where the registers are.
#[derive(Clone, Copy, Debug)]
pub enum Access {
    /// ICH_* system registers.
    V3,
    /// GICH, banked by CPU.
    V2(Registers),
}

impl Access {
    /// How the CPU that asks reaches its virtual interface.
    pub fn of(gic: &Gic) -> Self {
        match gic {
            Gic::V2(gic) => Self::V2(gic.hypervisor_interface()),
            Gic::V3(_) => Self::V3,
        }
    }
}

/// The virtual CPU interface of the vCPU that this CPU holds.
#[derive(Debug)]
pub struct Interface {
    access: Access,
    count: usize,
    /// What each list register was given; `None`: free.
    listed: [Option<Entry>; MOST_LISTS],
    in_use: bool,
    /// Active interrupts are not listed.
    active_left: bool,
    hcr: u64,
    /// What HCR has in any case.
    always: u64,
}

/// What has become of interrupts in flight.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Returned<'a> {
    /// The guest has ended this many interrupts that were not listed. Comes before the others.
    Unlisted(u32),
    /// A listed one is in this state now; `None`: deactivated.
    Listed(&'a Entry, Option<State>),
}

/// What the virtual CPU interface of a vCPU that is not resident holds beside listed interrupts.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Saved {
    /// ICH_VMCR_EL2 or GICH_VMCR.
    pub vmcr: u64,
    /// ICH_AP0R0 to 3 and ICH_AP1R0 to 3, or GICH_APR.
    pub active_priorities: [u64; 8],
}

impl Interface {
    /// Turns this CPU's virtual interface on with `saved`; nothing is listed.
    pub fn load(access: Access, saved: &Saved) -> Self {
        let traps = matches!(access, Access::V3) && arch::ich_traps_deactivation();
        let always = HCR_ENABLE | if traps { HCR_TRAP_DEACTIVATION } else { 0 };
        let this = Self {
            access,
            count: count(access),
            listed: [None; MOST_LISTS],
            in_use: false,
            active_left: false,
            hcr: always,
            always,
        };
        match access {
            Access::V3 => {
                arch::set_ich_vmcr(saved.vmcr);
                arch::set_ich_active_priorities(saved.active_priorities);
            }
            Access::V2(gich) => {
                gich.write(GICH_VMCR, low_word(saved.vmcr));
                gich.write(GICH_APR, low_word(saved.active_priorities[0]));
            }
        }
        this.set_hcr(always);
        this
    }

    /// Turns it off; everything listed has been taken back, so the list registers are empty. What else it has stays until another
    /// vCPU's takes its place, and does nothing meanwhile.
    pub fn put(&self) -> Saved {
        self.set_hcr(0);
        match self.access {
            Access::V3 => Saved {
                vmcr: arch::ich_vmcr(),
                active_priorities: arch::ich_active_priorities(),
            },
            Access::V2(gich) => {
                let mut saved = Saved {
                    vmcr: u64::from(gich.read(GICH_VMCR)),
                    active_priorities: [0; 8],
                };
                saved.active_priorities[0] = u64::from(gich.read(GICH_APR));
                saved
            }
        }
    }

    /// Number of list registers.
    pub fn lists(&self) -> usize {
        self.count
    }

    /// Whether anything is in flight.
    #[inline]
    pub fn is_in_use(&self) -> bool {
        self.in_use
    }

    /// Whether the guest has chosen to deactivate interrupts apart from dropping their priority.
    pub fn has_eoi_mode(&self) -> bool {
        self.vmcr() & VMCR_EOI_MODE != 0
    }

    /// The groups that the guest lets this interface signal.
    #[cold]
    pub fn groups_taken(&self) -> Groups {
        let vmcr = self.vmcr();
        Groups {
            group0: vmcr & VMCR_GROUP0 != 0,
            group1: vmcr & VMCR_GROUP1 != 0,
        }
    }

    fn vmcr(&self) -> u64 {
        match self.access {
            Access::V3 => arch::ich_vmcr(),
            Access::V2(gich) => u64::from(gich.read(GICH_VMCR)),
        }
    }

    /// Empties the list registers, telling `each` what became of every interrupt.
    pub fn take_back(&mut self, mut each: impl FnMut(Returned<'_>)) {
        if !self.in_use {
            return;
        }
        self.in_use = false;
        self.settle();
        if self.active_left {
            let ended = self.hcr() >> HCR_EOI_COUNT & 0x1f;
            each(Returned::Unlisted(u32::try_from(ended).unwrap_or(0)));
        }
        let (access, format) = (self.access, self.format());
        for (index, place) in self.listed.iter_mut().enumerate() {
            let Some(entry) = place.take() else { break };
            let left = format.decode(read_list(access, index));
            each(Returned::Listed(&entry, left.map(|left| left.state)));
            write_list(access, index, 0);
        }
    }

    /// If nothing is in flight but one SGI that the guest has ended: `Some` of what was listed. If nothing is: `Some(None)`. Its list register is free then.
    #[inline]
    pub fn only_ended(&self) -> Option<Option<Entry>> {
        if !self.in_use {
            return (self.hcr == self.always).then_some(None);
        }
        let [Some(entry), None, ..] = &self.listed else {
            return None;
        };
        if entry.intid >= SGIS || self.hcr != self.always {
            return None;
        }
        self.settle();
        note_access();
        let left = match self.access {
            Access::V3 => arch::ich_lr(0),
            Access::V2(gich) => u64::from(gich.read(GICH_LR)),
        };
        self.format().is_free(left).then_some(Some(*entry))
    }

    /// Lists `entry` alone, after [`Interface::only_ended`] has said that there is nothing else.
    #[inline]
    pub fn list_only(&mut self, entry: &Entry) {
        note_access();
        let value = self.format().encode(entry);
        match self.access {
            Access::V3 => arch::set_ich_lr(0, value),
            Access::V2(gich) => gich.write(GICH_LR, low_word(value)),
        }
        let [first, ..] = &mut self.listed;
        *first = Some(*entry);
        self.in_use = true;
    }

    /// Lists what `listing` says; the list registers are empty.
    pub fn list(&mut self, listing: &Listing) {
        let format = self.format();
        for (index, entry) in listing.listed().enumerate().take(self.count) {
            write_list(self.access, index, format.encode(entry));
            self.in_use = true;
        }
        self.listed = listing.entries;
        let when = |left, maintenance| if left { maintenance } else { 0 };
        let hcr = self.always
            | when(listing.pending_left, HCR_NONE_PENDING)
            | when(listing.active_left, HCR_NOT_PRESENT)
            | listing.groups().map_or(0, hcr_until_changed);
        // Writing it also resets the count of ended interrupts.
        if hcr != self.hcr || self.active_left {
            self.set_hcr(hcr);
        }
        self.hcr = hcr;
        self.active_left = listing.active_left;
    }

    /// Waits until the list registers show what the guest did with its interrupts. GICv2 has nothing to wait for: GICV, to which
    /// the guest writes, and GICH are frames of one peripheral, and stage 2 leaves the guest no weaker type for its frame than the
    /// Device-nGnRE of the other, so what it wrote arrives before what is read here (Arm ARM, Device memory, Reordering); what is
    /// written here arrives before what it reads.
    #[inline]
    fn settle(&self) {
        if matches!(self.access, Access::V3) {
            arch::ich_settle();
        }
    }

    fn format(&self) -> Format {
        match self.access {
            Access::V3 => Format::V3,
            Access::V2(_) => Format::V2,
        }
    }

    fn hcr(&self) -> u64 {
        note_access();
        match self.access {
            Access::V3 => arch::ich_hcr(),
            Access::V2(gich) => u64::from(gich.read(GICH_HCR)),
        }
    }

    fn set_hcr(&self, value: u64) {
        note_access();
        match self.access {
            Access::V3 => arch::set_ich_hcr(value),
            Access::V2(gich) => gich.write(GICH_HCR, low_word(value)),
        }
    }
}

/// What HCR has for a maintenance interrupt when other groups are signalled than these.
const fn hcr_until_changed(Groups { group0, group1 }: Groups) -> u64 {
    let group0 = if group0 {
        HCR_GROUP0_DISABLED
    } else {
        HCR_GROUP0_ENABLED
    };
    let group1 = if group1 {
        HCR_GROUP1_DISABLED
    } else {
        HCR_GROUP1_ENABLED
    };
    group0 | group1
}

fn count(access: Access) -> usize {
    let count = match access {
        Access::V3 => arch::ich_lr_count(),
        Access::V2(gich) => usize::try_from(gich.read(GICH_VTR) & 0x3f).map_or(1, |last| last + 1),
    };
    count.min(MOST_LISTS)
}

/// In debug builds, counts an access to a list register or its control register.
#[inline]
fn note_access() {
    if cfg!(debug_assertions) {
        percpu::count(Event::ListAccesses);
    }
}

fn read_list(access: Access, index: usize) -> u64 {
    note_access();
    match access {
        Access::V3 => arch::ich_lr(index),
        Access::V2(gich) => u64::from(gich.read(GICH_LR + 4 * index)),
    }
}

fn write_list(access: Access, index: usize, value: u64) {
    note_access();
    match access {
        Access::V3 => arch::set_ich_lr(index, value),
        Access::V2(gich) => gich.write(GICH_LR + 4 * index, low_word(value)),
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "GICv2's registers have 32 bits"
)]
const fn low_word(value: u64) -> u32 {
    value as u32
}

#[cfg(test)]
mod tests {
    use super::{Access, Interface, Saved};
    use crate::arch;
    use crate::vm::vgic::flight::{Models, SpiSet};
    use crate::vm::vgic::lists::{Format, State};
    use crate::vm::vgic::private::{Private, Wiring};

    const WIRING: Wiring = Wiring {
        group0_enabled: false,
        group1_enabled: true,
        linked: (27, 27),
        asserted: true,
        lists: 4,
    };

    fn private() -> Private {
        let mut private = Private::new(true);
        private.write(0x100, u32::MAX, u32::MAX);
        private
    }

    fn relist(private: &mut Private, interface: &mut Interface) {
        let mut models = Models {
            home: 0,
            private,
            shared: None,
        };
        interface.take_back(|what| models.take_back(what, &mut SpiSet::default()));
        let groups = || interface.groups_taken();
        let listing = models.list(&WIRING, |_| false, groups).0;
        interface.list(&listing);
    }

    #[test]
    fn an_interrupt_goes_through_the_list_registers_and_is_gone() {
        let (mut private, mut interface) =
            (private(), Interface::load(Access::V3, &Saved::default()));
        private.send(5, 0);
        relist(&mut private, &mut interface);
        let entry = Format::V3.decode(arch::ich_lr(0)).unwrap();
        assert_eq!((entry.intid, entry.state), (5, State::Pending));
        arch::set_ich_lr(0, 0);
        let mut seen = Vec::new();
        interface.take_back(|what| seen.push(format!("{what:?}")));
        assert_eq!(seen.len(), 1);
        assert!(seen[0].ends_with("None)"), "{seen:?}");
    }

    #[test]
    fn nothing_in_flight_reads_no_list_register() {
        let mut interface = Interface::load(Access::V3, &Saved::default());
        arch::set_ich_lr(0, u64::MAX);
        interface.take_back(|_| panic!("nothing was listed"));
    }

    #[test]
    fn an_overflow_that_was_taken_back_is_no_usual_case() {
        let (mut private, mut interface) =
            (private(), Interface::load(Access::V3, &Saved::default()));
        assert_eq!(interface.only_ended(), Some(None));
        for intid in 0..5 {
            private.send(intid, 0);
        }
        relist(&mut private, &mut interface);
        interface.take_back(|_| ());
        // Maintenance is still asked for.
        assert_eq!(interface.only_ended(), None);
    }

    #[test]
    fn a_group_that_becomes_signalled_is_told_when_not_everything_fits() {
        let (mut private, mut interface) =
            (private(), Interface::load(Access::V3, &Saved::default()));
        for intid in 0..6 {
            private.send(intid, 0);
        }
        for (vmcr, hcr) in [
            (0b00, 0b0101_0000),
            (0b01, 0b0110_0000),
            (0b10, 0b1001_1000),
            (0b11, 0b1010_1000),
        ] {
            arch::set_ich_vmcr(vmcr);
            relist(&mut private, &mut interface);
            assert_eq!(arch::ich_hcr(), 1 << 14 | hcr | 1, "{vmcr:#b}");
        }
    }

    #[test]
    fn more_interrupts_than_list_registers_ask_for_maintenance_until_they_fit() {
        let (mut private, mut interface) =
            (private(), Interface::load(Access::V3, &Saved::default()));
        arch::set_ich_vmcr(0b11);
        for intid in 0..5 {
            private.send(intid, 0);
        }
        relist(&mut private, &mut interface);
        assert_eq!(arch::ich_hcr(), 1 << 14 | 0b1010_1001);
        for index in 0..4 {
            arch::set_ich_lr(index, 0);
        }
        relist(&mut private, &mut interface);
        assert_eq!(arch::ich_hcr(), 1 << 14 | 0b0001);
        assert_eq!(Format::V3.decode(arch::ich_lr(0)).unwrap().intid, 4);
    }
}
