//! What a CPU can do, read once from its ID registers.
//!
//! Machines mix CPUs, and a VM's tables are shared by all of them, so decisions are taken from the weakest
//! ([`Features::weakest`]). Field meanings: Arm ARM DDI 0487 K.a, D24.2.

/// The ID registers of one CPU.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct IdRegisters {
    /// MIDR_EL1.
    pub midr: u64,
    /// CTR_EL0.
    pub ctr: u64,
    /// ID_AA64PFR0_EL1.
    pub pfr0: u64,
    /// ID_AA64PFR1_EL1.
    pub pfr1: u64,
    /// ID_AA64DFR0_EL1.
    pub dfr0: u64,
    /// ID_AA64ISAR0_EL1.
    pub isar0: u64,
    /// ID_AA64ISAR1_EL1.
    pub isar1: u64,
    /// ID_AA64ISAR2_EL1.
    pub isar2: u64,
    /// ID_AA64MMFR0_EL1.
    pub mmfr0: u64,
    /// ID_AA64MMFR1_EL1.
    pub mmfr1: u64,
    /// ID_AA64MMFR2_EL1.
    pub mmfr2: u64,
    /// ID_AA64MMFR3_EL1.
    pub mmfr3: u64,
}

impl IdRegisters {
    /// What both CPUs have, field by field, for guests that run on either; of MIDR_EL1 and CTR_EL0 `self`'s.
    pub fn weakest(self, other: Self) -> Self {
        /// Fields where 0xf means that there is nothing: PFR0.FP, AdvSIMD.
        const PFR0_SIGNED: [u32; 2] = [16, 20];
        /// DFR0.DoubleLock.
        const DFR0_SIGNED: [u32; 1] = [36];
        /// MMFR0.TGran64, TGran4.
        const MMFR0_SIGNED: [u32; 2] = [24, 28];
        Self {
            midr: self.midr,
            ctr: self.ctr,
            pfr0: least(self.pfr0, other.pfr0, &PFR0_SIGNED),
            pfr1: least(self.pfr1, other.pfr1, &[]),
            dfr0: least(self.dfr0, other.dfr0, &DFR0_SIGNED),
            isar0: least(self.isar0, other.isar0, &[]),
            isar1: least(self.isar1, other.isar1, &[]),
            isar2: least(self.isar2, other.isar2, &[]),
            mmfr0: least(self.mmfr0, other.mmfr0, &MMFR0_SIGNED),
            mmfr1: least(self.mmfr1, other.mmfr1, &[]),
            mmfr2: least(self.mmfr2, other.mmfr2, &[]),
            mmfr3: least(self.mmfr3, other.mmfr3, &[]),
        }
    }

    /// The register S3_0_C0_C`crm`_`op2`; zero for one that nobody asks for.
    pub const fn numbered(&self, crm: u8, op2: u8) -> u64 {
        match (crm, op2) {
            (4, 0) => self.pfr0,
            (4, 1) => self.pfr1,
            (5, 0) => self.dfr0,
            (6, 0) => self.isar0,
            (6, 1) => self.isar1,
            (6, 2) => self.isar2,
            (7, 0) => self.mmfr0,
            (7, 1) => self.mmfr1,
            (7, 2) => self.mmfr2,
            (7, 3) => self.mmfr3,
            _ => 0,
        }
    }
}

/// The lesser of each of sixteen fields; those whose lowest bits are listed are signed.
fn least(one: u64, other: u64, signed: &[u32]) -> u64 {
    (0..64).step_by(4).fold(0, |least, low| {
        // A signed field is ordered as an unsigned one is, once its sign bit is turned over.
        let turned = if signed.contains(&low) { 8 } else { 0 };
        let field = |register: u64| (register >> low & 0xf) ^ turned;
        least | (field(one).min(field(other)) ^ turned) << low
    })
}

/// What the hypervisor wants to know of a CPU.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Features {
    /// Physical addresses have this many bits (at most 48: the 4 KiB granule without FEAT_LPA2).
    pub pa_bits: u32,
    /// VMIDs have this many bits.
    pub vmid_bits: u32,
    /// FEAT_LSE: atomic instructions.
    pub lse: bool,
    /// FEAT_HAFDBS, access flag: the walker sets it.
    pub hardware_access_flag: bool,
    /// FEAT_HAFDBS, dirty state: the walker makes marked leaves writable.
    pub hardware_dirty: bool,
    /// FEAT_BBM level: what may change without break-before-make.
    pub bbm: u32,
    /// A core known not to raise TLB conflict aborts where FEAT_BBM level 2 permits them.
    pub bbm_without_conflicts: bool,
    /// FEAT_TLBIRANGE.
    pub tlbi_range: bool,
    /// FEAT_TTL: invalidations may name a level.
    pub ttl: bool,
    /// FEAT_S2FWB: stage 2 can force cacheability.
    pub fwb: bool,
    /// FEAT_S2PIE: permission indirection at stage 2.
    pub s2pie: bool,
    /// FEAT_XNX: execute-never at stage 2 for EL0 and EL1 apart.
    pub xnx: bool,
    /// CTR_EL0.IDC: instruction fetch sees data without cleaning.
    pub idc: bool,
    /// CTR_EL0.DIC: instruction fetch sees data without invalidation.
    pub dic: bool,
    /// FEAT_RAS.
    pub ras: bool,
    /// Pointer authentication, of any algorithm.
    pub pauth: bool,
    /// FEAT_SVE.
    pub sve: bool,
    /// System-register access to a GICv3.
    pub gic_registers: bool,
    /// FEAT_FGT: 0 none, 1 the first registers, 2 all.
    pub fine_grained_traps: u32,
    /// FEAT_HCX.
    pub hcx: bool,
    /// FEAT_SPE.
    pub spe: bool,
    /// FEAT_PMUv3.
    pub pmu: bool,
    /// FEAT_TRF.
    pub trace_filter: bool,
    /// FEAT_MPAM.
    pub mpam: bool,
    /// FEAT_AMUv1.
    pub amu: bool,
    /// FEAT_SSBS.
    pub ssbs: bool,
    /// FEAT_CSV2: branch targets of other contexts cannot steer speculation.
    pub csv2: u32,
    /// FEAT_CSV3: speculation cannot read what a faulting load would.
    pub csv3: bool,
}

/// Four bits of an ID register.
const fn field(register: u64, low_bit: u32) -> u32 {
    (register >> low_bit & 0xf) as u32
}

impl Features {
    /// Decodes `id`.
    pub const fn new(id: &IdRegisters) -> Self {
        let pmu = field(id.dfr0, 8);
        Self {
            pa_bits: match field(id.mmfr0, 0) {
                0 => 32,
                1 => 36,
                2 => 40,
                3 => 42,
                4 => 44,
                _ => 48,
            },
            vmid_bits: if field(id.mmfr1, 4) == 2 { 16 } else { 8 },
            lse: field(id.isar0, 20) >= 2,
            hardware_access_flag: field(id.mmfr1, 0) >= 1 && !sets_no_flags(id.midr),
            hardware_dirty: field(id.mmfr1, 0) >= 2 && !sets_no_flags(id.midr),
            bbm: field(id.mmfr2, 52),
            bbm_without_conflicts: never_conflicts(id.midr),
            tlbi_range: field(id.isar0, 56) >= 2,
            ttl: field(id.mmfr2, 48) >= 1,
            fwb: field(id.mmfr2, 40) >= 1,
            s2pie: field(id.mmfr3, 12) >= 1,
            xnx: field(id.mmfr1, 28) >= 1,
            idc: id.ctr >> 28 & 1 == 1,
            dic: id.ctr >> 29 & 1 == 1,
            ras: field(id.pfr0, 28) >= 1,
            pauth: field(id.isar1, 4) != 0 || field(id.isar1, 8) != 0 || field(id.isar2, 12) != 0,
            sve: field(id.pfr0, 32) >= 1,
            gic_registers: field(id.pfr0, 24) >= 1,
            fine_grained_traps: field(id.mmfr0, 56),
            hcx: field(id.mmfr1, 40) >= 1,
            spe: field(id.dfr0, 32) >= 1,
            pmu: pmu != 0 && pmu != 0xf,
            trace_filter: field(id.dfr0, 40) >= 1,
            mpam: field(id.pfr0, 40) >= 1 || field(id.pfr1, 16) >= 1,
            amu: field(id.pfr0, 44) >= 1,
            ssbs: field(id.pfr1, 4) >= 1,
            csv2: field(id.pfr0, 56),
            csv3: field(id.pfr0, 60) >= 1,
        }
    }

    /// What both `self` and `other` can do.
    pub fn weakest(self, other: Self) -> Self {
        Self {
            pa_bits: self.pa_bits.min(other.pa_bits),
            vmid_bits: self.vmid_bits.min(other.vmid_bits),
            lse: self.lse && other.lse,
            hardware_access_flag: self.hardware_access_flag && other.hardware_access_flag,
            hardware_dirty: self.hardware_dirty && other.hardware_dirty,
            bbm: self.bbm.min(other.bbm),
            bbm_without_conflicts: self.bbm_without_conflicts && other.bbm_without_conflicts,
            tlbi_range: self.tlbi_range && other.tlbi_range,
            ttl: self.ttl && other.ttl,
            fwb: self.fwb && other.fwb,
            s2pie: self.s2pie && other.s2pie,
            xnx: self.xnx && other.xnx,
            idc: self.idc && other.idc,
            dic: self.dic && other.dic,
            ras: self.ras && other.ras,
            pauth: self.pauth && other.pauth,
            sve: self.sve && other.sve,
            gic_registers: self.gic_registers && other.gic_registers,
            fine_grained_traps: self.fine_grained_traps.min(other.fine_grained_traps),
            hcx: self.hcx && other.hcx,
            spe: self.spe && other.spe,
            pmu: self.pmu && other.pmu,
            trace_filter: self.trace_filter && other.trace_filter,
            mpam: self.mpam && other.mpam,
            amu: self.amu && other.amu,
            ssbs: self.ssbs && other.ssbs,
            csv2: self.csv2.min(other.csv2),
            csv3: self.csv3 && other.csv3,
        }
    }

    /// Short names of those that shape results.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        let bbm = match self.bbm {
            0 => "bbm0",
            1 => "bbm1",
            _ => "bbm2",
        };
        [
            (self.lse, "lse"),
            (true, bbm),
            (self.vmid_bits == 16, "vmid16"),
            (self.hardware_access_flag, "haf"),
            (self.hardware_dirty, "hd"),
            (self.tlbi_range, "tlbirange"),
            (self.ttl, "ttl"),
            (self.fwb, "fwb"),
            (self.s2pie, "s2pie"),
            (self.xnx, "xnx"),
            (self.idc, "idc"),
            (self.dic, "dic"),
            (self.ras, "ras"),
            (self.pauth, "pauth"),
        ]
        .into_iter()
        .filter_map(|(has, name)| has.then_some(name))
    }
}

/// Whether the core with this MIDR_EL1 says that it has FEAT_HAFDBS at stage 2 and must not be asked to use it: AmpereOne,
/// erratum AC03_CPU_38.
const fn sets_no_flags(midr: u64) -> bool {
    midr >> 24 & 0xff == 0xc0 && midr >> 4 & 0xfff == 0xac3
}

/// Whether the core with this MIDR_EL1 implements FEAT_BBM level 2 without raising TLB conflict aborts, which may surface
/// at stage 1, inside the guest. ID_AA64MMFR2_EL1.BBM promises no such thing, so cores are listed: those that Linux trusts
/// with its own tables (`BBML2_NOABORT`, 2026).
pub const fn never_conflicts(midr: u64) -> bool {
    /// Implementer, part, and the first variant and revision, as in MIDR_EL1\[23:20\] and \[3:0\].
    const CORES: [(u64, u64, u64); 6] = [
        (0x41, 0xd82, 0x03), // Cortex-X4 from r0p3
        (0x41, 0xd84, 0x02), // Neoverse-V3 from r0p2
        (0x41, 0xd83, 0x02), // Neoverse-V3AE from r0p2
        (0x4e, 0x010, 0x00), // Olympus
        (0xc0, 0xac3, 0x00), // AmpereOne
        (0xc0, 0xac4, 0x00), // AmpereOne A
    ];
    let (implementer, part) = (midr >> 24 & 0xff, midr >> 4 & 0xfff);
    let revision = (midr >> 20 & 0xf) << 4 | midr & 0xf;
    let mut index = 0;
    while index < CORES.len() {
        let (known_implementer, known_part, first) = CORES[index];
        if implementer == known_implementer && part == known_part {
            return revision >= first;
        }
        index += 1;
    }
    false
}

/// The name of the CPU with this MIDR_EL1, as QEMU's `-cpu` spells it; `None` when it is not known here.
pub const fn cpu_name(midr: u64) -> Option<&'static str> {
    const ARM: u64 = 0x41;
    match (midr >> 24 & 0xff, midr >> 4 & 0xfff) {
        (0, _) => Some("max"),
        (ARM, 0xd03) => Some("cortex-a53"),
        (ARM, 0xd05) => Some("cortex-a55"),
        (ARM, 0xd07) => Some("cortex-a57"),
        (ARM, 0xd08) => Some("cortex-a72"),
        (ARM, 0xd0b) => Some("cortex-a76"),
        (ARM, 0xd0c) => Some("neoverse-n1"),
        (ARM, 0xd40) => Some("neoverse-v1"),
        (ARM, 0xd47) => Some("cortex-a710"),
        (ARM, 0xd49) => Some("neoverse-n2"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::{Features, IdRegisters, cpu_name, never_conflicts};

    /// Neoverse N1 r3p1, from its reference manual.
    const N1: IdRegisters = IdRegisters {
        midr: 0x413f_d0c1,
        ctr: 0x8444_c004,
        pfr0: 0x1100_0000_1111_1112,
        pfr1: 0x20,
        dfr0: 0x1_1030_5408,
        isar0: 0x0000_1000_1021_1120,
        isar1: 0x10_0001,
        isar2: 0,
        mmfr0: 0x10_1125,
        mmfr1: 0x1021_2122,
        mmfr2: 0x1011,
        mmfr3: 0,
    };

    #[test]
    fn only_listed_cores_from_their_first_good_revision_never_conflict() {
        for (midr, never) in [
            (0x410f_d823, true),
            (0x410f_d822, false),
            (0x411f_d820, true),
            (0x410f_d842, true),
            (0xc00f_ac30, true),
            (N1.midr, false),
            (0x0000_0510, false),
        ] {
            assert_eq!(never_conflicts(midr), never, "{midr:#x}");
        }
    }

    #[test]
    fn neoverse_n1_is_decoded_as_its_manual_says() {
        let n1 = Features::new(&N1);
        assert!(
            n1.lse && n1.hardware_access_flag && n1.hardware_dirty && n1.xnx && n1.ras && n1.ssbs
        );
        assert!(
            !n1.fwb && !n1.ttl && !n1.tlbi_range && !n1.s2pie && !n1.pauth && !n1.sve && !n1.dic
        );
        assert_eq!((n1.pa_bits, n1.vmid_bits, n1.bbm, n1.csv2), (48, 16, 0, 1));
        assert_eq!(cpu_name(N1.midr), Some("neoverse-n1"));
    }

    #[test]
    fn ampere_one_is_not_asked_to_set_flags() {
        let one = Features::new(&IdRegisters {
            midr: 0xc00f_ac30,
            ..N1
        });
        assert!(!one.hardware_access_flag && !one.hardware_dirty);
    }

    #[test]
    fn guests_are_told_of_what_every_cpu_has() {
        let other = IdRegisters {
            pfr0: 0xf << 16 | 1 << 20 | 2 << 56 | 0x1111,
            mmfr0: 0xf << 28 | 0x1122,
            ..IdRegisters::default()
        };
        for both in [N1.weakest(other), other.weakest(N1)] {
            assert_eq!(both.pfr0, 1 << 56 | 0xf << 16 | 1 << 20 | 0x1111);
            assert_eq!(both.mmfr0, 0xf << 28 | 0x1122);
            assert_eq!((both.isar0, both.mmfr1), (0, 0));
        }
        assert_eq!(N1.weakest(other).midr, N1.midr);
        assert_eq!(N1.weakest(N1), N1);
    }

    #[test]
    fn registers_are_found_by_their_numbers() {
        for (crm, op2, value) in [
            (4, 0, N1.pfr0),
            (4, 1, N1.pfr1),
            (5, 0, N1.dfr0),
            (6, 0, N1.isar0),
            (6, 1, N1.isar1),
            (7, 0, N1.mmfr0),
            (7, 1, N1.mmfr1),
            (7, 2, N1.mmfr2),
            (4, 4, 0),
            (1, 0, 0),
        ] {
            assert_eq!(N1.numbered(crm, op2), value, "CRm {crm} op2 {op2}");
        }
    }

    #[test]
    fn the_weakest_lacks_what_either_lacks() {
        let none = Features::new(&IdRegisters::default());
        assert_eq!(Features::new(&N1).weakest(none), none);
        assert_eq!(none.weakest(Features::new(&N1)), none);
        assert_eq!((none.pa_bits, none.vmid_bits), (32, 8));
    }
}
