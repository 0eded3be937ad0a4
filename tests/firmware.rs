//! ACPI tables of machines that exist, as the device tree that boot makes of them, and broken ones.

use std::collections::BTreeMap;

use vellum::addr::Pa;
use vellum::dev::acpi::{Error, Memory, Platform, Why};
use vellum::dev::handover::{self, Boot, Description};
use vellum::dev::machine::{Gic, Machine, Uart, UartKind};
use vellum::dev::psci::Conduit;
use vellum::dev::tree::Tree;

/// Tables by address; nothing else can be read.
#[derive(Clone, Default)]
struct Tables(BTreeMap<u64, Vec<u8>>);

impl Memory for Tables {
    fn read(&self, at: Pa, bytes: usize) -> Option<&[u8]> {
        let (start, table) = self.0.range(..=at.raw()).next_back()?;
        let offset = usize::try_from(at.raw() - start).ok()?;
        table.get(offset..offset.checked_add(bytes)?)
    }
}

impl Tables {
    /// From a file of addresses and bytes; the first is the root pointer's.
    fn load(text: &str) -> (Pa, Self) {
        let mut tables = Self::default();
        let mut first = None;
        let mut at = 0;
        for line in text.lines().filter(|it| !it.starts_with('#')) {
            if let Some(address) = line.strip_suffix(':') {
                at = u64::from_str_radix(address, 16).unwrap();
                first = first.or(Some(at));
            } else {
                let bytes = (0..line.len()).step_by(2);
                let bytes = bytes.map(|it| u8::from_str_radix(&line[it..it + 2], 16).unwrap());
                tables.0.entry(at).or_default().extend(bytes);
            }
        }
        (Pa::new(first.unwrap()), tables)
    }

    fn table(&mut self, signature: &[u8; 4]) -> &mut Vec<u8> {
        let found = self.0.values_mut().find(|it| it.starts_with(signature));
        found.unwrap()
    }
}

/// Makes the bytes of a table add up to zero again.
fn seal(table: &mut [u8]) {
    table[9] = 0;
    let sum = table.iter().fold(0u8, |sum, &it| sum.wrapping_add(it));
    table[9] = sum.wrapping_neg();
}

/// Appends little-endian numbers, each of its own width.
macro_rules! fields {
    ($to:expr, $($value:expr),* $(,)?) => {{ $($to.extend($value.to_le_bytes());)* }};
}

/// A table with its header, sealed.
fn table(signature: &[u8; 4], revision: u8, oem: &[u8; 14], body: &[u8]) -> Vec<u8> {
    let mut table = signature.to_vec();
    fields!(
        table,
        u32::try_from(36 + body.len()).unwrap(),
        revision,
        0u8
    );
    table.extend(oem);
    fields!(table, 1u32, 0u32, 1u32);
    table.extend(body);
    seal(&mut table);
    table
}

const ALTRA: &[u8; 14] = b"AmpereAltra   ";

fn altra_affinity(cpu: u64) -> u64 {
    (cpu / 2) << 16 | (cpu % 2) << 8
}

/// Tables as the public sources of the Altra's firmware make them: 80 CPUs, the first of which is not affinity 0.
fn altra() -> (Pa, Tables) {
    const CPUS: u64 = 80;
    let mut madt = Vec::new();
    fields!(madt, 0u32, 0u32);
    for cpu in 0..CPUS {
        let number = u32::try_from(cpu).unwrap();
        fields!(
            madt,
            0xbu8,
            80u8,
            0u16,
            number,
            number,
            u32::from(cpu != 79),
            0u32,
            23u32
        );
        fields!(
            madt,
            0u64,
            0u64,
            0u64,
            0u64,
            25u32,
            0u64,
            altra_affinity((cpu + 36) % CPUS)
        );
        fields!(madt, 0u8, 0u8, 21u16);
    }
    fields!(
        madt,
        0xcu8,
        24u8,
        0u16,
        0u32,
        0x1001_0000_0000u64,
        0u32,
        3u8,
        [0u8; 3][0],
        0u16
    );
    fields!(madt, 0xeu8, 16u8, 0u16, 0x1001_0014_0000u64, 0x0100_0000u32);
    for its in 0..8u32 {
        let base = 0x1001_0004_0000 + u64::from(its) * 0x2_0000;
        fields!(madt, 0xfu8, 20u8, 0u16, its, base, 0u32);
    }
    let mut gtdt = Vec::new();
    fields!(
        gtdt,
        u64::MAX,
        0u32,
        29u32,
        0u32,
        30u32,
        0u32,
        27u32,
        0u32,
        26u32,
        0u32,
        u64::MAX
    );
    fields!(gtdt, 0u32, 0u32, 0u32, 0u32);
    let mut spcr = Vec::new();
    fields!(
        spcr,
        3u8,
        0u8,
        0u16,
        0u8,
        32u8,
        0u8,
        3u8,
        0x1000_0260_0000u64,
        8u8,
        0u8,
        98u32
    );
    spcr.resize(80 - 36, 0);
    let mut fadt = vec![0; 276 - 36];
    fadt[129 - 36] = 1;
    let mut tables = Tables::default();
    let mut xsdt = Vec::new();
    let all = [
        table(b"FACP", 6, ALTRA, &fadt),
        table(b"APIC", 5, ALTRA, &madt),
        table(b"GTDT", 2, ALTRA, &gtdt),
        table(b"SPCR", 2, ALTRA, &spcr),
    ];
    for (at, bytes) in (0u64..).map(|it| 0xbff0_0000 + it * 0x1_0000).zip(all) {
        fields!(xsdt, at);
        tables.0.insert(at, bytes);
    }
    let root = 0xbfe0_0000;
    tables
        .0
        .insert(root + 0x1000, table(b"XSDT", 1, ALTRA, &xsdt));
    let mut rsdp = b"RSD PTR \0Ampere\x02".to_vec();
    fields!(rsdp, 0u32, 36u32, root + 0x1000, 0u8, 0u8, 0u16);
    let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, &it| sum.wrapping_sub(it));
    rsdp[8] = sum(&rsdp[..20]);
    rsdp[32] = sum(&rsdp);
    tables.0.insert(root, rsdp);
    (Pa::new(root), tables)
}

fn virt(gic: u32) -> (Pa, Tables) {
    Tables::load(match gic {
        2 => include_str!("tables/virt-gicv2.hex"),
        _ => include_str!("tables/virt-gicv3.hex"),
    })
}

fn read((rsdp, tables): &(Pa, Tables)) -> Result<Platform, Error> {
    Platform::new(*rsdp, tables)
}

/// The machine that boot makes of it.
fn machine(platform: &Platform) -> Machine {
    let memory = [Pa::new(0x8000_0000)..Pa::new(0x1_0000_0000)];
    let boot = Boot {
        memory: &memory,
        arguments: "suite=none vcpus=1",
        initrd: Some(Pa::new(0x9000_0000)..Pa::new(0x9000_1234)),
    };
    let bytes = handover::tree(Description::Acpi(platform), &boot).unwrap();
    let tree = Tree::new(&bytes).unwrap();
    assert!(handover::describes_a_machine(&tree));
    Machine::new(&tree).unwrap()
}

#[test]
fn the_emulated_board_is_understood_with_either_interrupt_controller() {
    for gic in [2, 3] {
        let platform = read(&virt(gic)).unwrap();
        let machine = machine(&platform);
        assert_eq!(machine.board, "qemu-virt");
        assert_eq!(machine.psci, Some(Conduit::Smc));
        let cpus: Vec<_> = machine.cpus.iter().map(|it| (it.mpidr, it.psci)).collect();
        assert_eq!(cpus, [(0, true), (1, true)]);
        assert_eq!(machine.ram, [Pa::new(0x8000_0000)..Pa::new(0x1_0000_0000)]);
        assert_eq!(machine.bootargs, "suite=none vcpus=1");
        assert_eq!(
            machine.initrd,
            Some(Pa::new(0x9000_0000)..Pa::new(0x9000_1234))
        );
        assert_eq!(machine.interrupts, platform.interrupts);
        assert_eq!(machine.interrupts.maintenance, 25);
        assert_eq!(machine.interrupts.hypervisor_timer, 26);
        assert_eq!(machine.interrupts.virtual_timer, 27);
        assert_eq!(machine.interrupts.physical_timer, 30);
        let uart = Uart {
            base: Pa::new(0x0900_0000),
            intid: Some(33),
            kind: UartKind::Sbsa,
        };
        assert_eq!(machine.console, Some(uart));
        assert_eq!(machine.gic, platform.gic);
        let distributor = Pa::new(0x0800_0000);
        let wanted = match gic {
            2 => Gic::V2 {
                distributor,
                cpu_interface: Pa::new(0x0801_0000),
                hypervisor_interface: Pa::new(0x0803_0000),
                virtual_interface: Pa::new(0x0804_0000),
            },
            _ => Gic::V3 {
                distributor,
                redistributors: vec![Pa::new(0x080a_0000)..Pa::new(0x0900_0000)],
            },
        };
        assert_eq!(machine.gic, wanted);
    }
}

#[test]
fn processors_and_memory_know_their_numa_node() {
    let nodes = |gic| {
        let platform = read(&virt(gic)).unwrap();
        let nodes: Vec<_> = platform.cpus.iter().map(|it| it.node).collect();
        (nodes, platform.memory_nodes)
    };
    let range = |start, end| Pa::new(start)..Pa::new(end);
    let memory = vec![
        (range(0x4000_0000, 0x5000_0000), 0),
        (range(0x5000_0000, 0x6000_0000), 1),
    ];
    assert_eq!(nodes(3), (vec![Some(0), Some(1)], memory));
    assert_eq!(nodes(2), (vec![None, None], vec![]));
}

/// The emulated board's tables with this SRAT, and what is made of them.
fn with_affinities(entries: &[u8]) -> Platform {
    let (rsdp, mut tables) = virt(3);
    let mut body = vec![1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    body.extend(entries);
    *tables.table(b"SRAT") = table(b"SRAT", 3, ALTRA, &body);
    read(&(rsdp, tables)).unwrap()
}

/// An SRAT entry of so many bytes for the processor `uid`.
fn processor_near(bytes: u8, node: u32, uid: u32, flags: u32) -> Vec<u8> {
    let mut entry = Vec::new();
    fields!(entry, 3u8, bytes, node, uid, flags, 0u32);
    entry.resize(bytes.into(), 0);
    entry
}

/// An SRAT entry of so many bytes for memory.
fn memory_near(bytes: u8, node: u32, start: u64, length: u64, flags: u32) -> Vec<u8> {
    let mut entry = Vec::new();
    fields!(
        entry, 1u8, bytes, node, 0u16, start, length, 0u32, flags, 0u64
    );
    entry.resize(bytes.into(), 0);
    entry
}

#[test]
fn nodes_are_numbered_without_gaps_and_divide_the_memory_that_is_there() {
    const ENABLED: u32 = 1;
    const HOT_PLUGGABLE: u32 = 1 << 1;
    let entries = [
        processor_near(18, 40, 0, ENABLED),
        processor_near(18, 7, 1, ENABLED),
        // Of a processor that is none, and one that is not told.
        processor_near(18, 3, 9, ENABLED),
        processor_near(18, 2, 0, 0),
        // What may be plugged in later is memory only as far as the memory map knows of it.
        memory_near(40, 40, 0x7000_0000, 0x2000_0000, ENABLED | HOT_PLUGGABLE),
        memory_near(40, 1, 0x9000_0000, 0x1000_0000, 0),
        // The second one overlaps: the first counts.
        memory_near(40, 7, 0x9800_0000, 0x2800_0000, ENABLED),
        memory_near(40, 40, 0xa000_0000, 0x3000_0000, ENABLED),
        memory_near(40, 99, 0xf0_0000_0000, 0x1000_0000, ENABLED | HOT_PLUGGABLE),
        memory_near(40, 98, 0xd000_0000, 0, ENABLED),
        // Longer than it is today, and of a kind that nobody knows.
        memory_near(48, 5, 0xe000_0000, 0x1000_0000, ENABLED),
        vec![0xee, 2],
    ];
    let platform = with_affinities(&entries.concat());
    assert_eq!(platform.left_out, []);
    let nodes: Vec<_> = platform.cpus.iter().map(|it| it.node).collect();
    assert_eq!(nodes, [Some(40), Some(7)]);
    let machine = machine(&platform);
    assert_eq!(machine.ram, [Pa::new(0x8000_0000)..Pa::new(0x1_0000_0000)]);
    let nodes: Vec<_> = machine.cpus.iter().map(|it| it.node).collect();
    assert_eq!(nodes, [Some(2), Some(1)]);
    let mut parts = machine.memory_nodes;
    parts.sort_by_key(|it| it.0.start);
    let range = |start, end| Pa::new(start)..Pa::new(end);
    let wanted = [
        (range(0x8000_0000, 0x9000_0000), 2),
        (range(0x9800_0000, 0xc000_0000), 1),
        (range(0xc000_0000, 0xd000_0000), 2),
        (range(0xe000_0000, 0xf000_0000), 0),
    ];
    assert_eq!(parts, wanted);
}

#[test]
fn a_table_that_is_not_needed_is_left_out_when_it_is_broken_and_that_is_said() {
    let good = [
        processor_near(18, 1, 0, 1),
        memory_near(40, 1, 0x8000_0000, 0x1000_0000, 1),
    ];
    let good = good.concat();
    let cases = [
        (processor_near(13, 1, 1, 1), 48 + 58 + 10, Why::Length),
        (memory_near(31, 1, 0, 0x1000, 1), 48 + 58 + 28, Why::Length),
        (vec![1, 1], 48 + 58, Why::Length),
        (vec![1, 41, 0], 48 + 58, Why::Length),
        (vec![1], 48 + 58 + 1, Why::Length),
        (
            memory_near(40, 1, !0xfff, 0x2000, 1),
            48 + 58 + 16,
            Why::Range,
        ),
    ];
    for (bad, offset, why) in cases {
        let platform = with_affinities(&[good.clone(), bad].concat());
        let said = Error {
            table: *b"SRAT",
            offset,
            why,
        };
        assert_eq!(platform.left_out, [said]);
        assert!(platform.cpus.iter().all(|it| it.node.is_none()));
        assert_eq!(platform.memory_nodes, []);
    }
    assert_eq!(with_affinities(&good).left_out, []);
    for signature in [b"SRAT", b"SPCR"] {
        let (rsdp, mut tables) = virt(3);
        tables.table(signature)[36] ^= 1;
        let platform = read(&(rsdp, tables)).unwrap();
        let said = platform.left_out.iter().map(|it| (it.table, it.why));
        assert_eq!(said.collect::<Vec<_>>(), [(*signature, Why::Checksum)]);
        assert!(platform.console.is_some(), "DBG2 has it too");
    }
}

#[test]
fn an_altra_is_understood_without_any_cpu_at_affinity_0_first() {
    let platform = read(&altra()).unwrap();
    assert_eq!(platform.its.len(), 8);
    let machine = machine(&platform);
    assert_eq!(machine.board, "ampere-altra");
    // The last one is disabled.
    assert_eq!(machine.cpus.len(), 79);
    assert_eq!(machine.cpus[0].mpidr, 0x12_0000);
    assert!(machine.cpus.iter().all(|it| it.mpidr & 0xff == 0));
    let uart = Uart {
        base: Pa::new(0x1000_0260_0000),
        intid: Some(98),
        kind: UartKind::Sbsa,
    };
    assert_eq!(machine.console, Some(uart));
    let gic = Gic::V3 {
        distributor: Pa::new(0x1001_0000_0000),
        redistributors: vec![Pa::new(0x1001_0014_0000)..Pa::new(0x1001_0114_0000)],
    };
    assert_eq!(machine.gic, gic);
}

/// The emulated board's MADT with other processors: a GICC entry for each `(bytes, flags, affinity)`, the rest as it was.
fn with_processors(entries: &[(u8, u32, u64)]) -> Result<Platform, Error> {
    let (rsdp, mut tables) = virt(3);
    let madt = tables.table(b"APIC");
    let mut body = madt[36..44].to_vec();
    for (number, &(bytes, flags, affinity)) in (0u32..).zip(entries) {
        let start = body.len();
        fields!(body, 0xbu8, bytes, 0u16, number, number, flags, 0u32, 23u32);
        fields!(body, 0u64, 0u64, 0u64, 0u64, 25u32, 0u64, affinity);
        body.resize(start + usize::from(bytes), 0);
    }
    let mut at = 44;
    while at < madt.len() {
        let end = at + usize::from(madt[at + 1]);
        if madt[at] != 0xb {
            body.extend(&madt[at..end]);
        }
        at = end;
    }
    *madt = table(b"APIC", madt[8], ALTRA, &body);
    read(&(rsdp, tables))
}

#[test]
fn processors_are_those_that_can_be_started_however_long_their_entries_are() {
    const ENABLED: u32 = 1;
    const ONLINE_CAPABLE: u32 = 1 << 3;
    // ACPI 5.1; 6.0, which adds the profiling interrupt; 6.3, which adds the trace buffer's; one that is not written yet.
    for bytes in [76, 80, 82, 96] {
        let entries = [
            (bytes, 0, 0x0000),
            (bytes, ENABLED, 0x1_0100),
            (bytes, ONLINE_CAPABLE, 0x1_0000),
            (bytes, ENABLED | 1 << 1 | 1 << 2, 0x1_0002_0000),
        ];
        let platform = with_processors(&entries).unwrap();
        let found: Vec<_> = platform.cpus.iter().map(|it| (it.uid, it.mpidr)).collect();
        let wanted = [(1, 0x1_0100), (2, 0x1_0000), (3, 0x1_0002_0000)];
        assert_eq!(found, wanted, "{bytes} bytes");
        assert_eq!(machine(&platform).cpus.len(), 3);
    }
}

#[test]
fn processors_without_an_affinity_or_that_are_all_off_are_refused() {
    // ACPI 5.0 knew no affinities.
    let short = with_processors(&[(76, 1, 0), (40, 1, 0)]).unwrap_err();
    assert_eq!((&short.table, short.why), (b"APIC", Why::Length));
    let off = with_processors(&[(80, 0, 0), (82, 0, 0x100)]).unwrap_err();
    assert_eq!((&off.table, off.why), (b"APIC", Why::NoCpus));
}

#[test]
fn a_second_socket_is_named_by_its_highest_affinity() {
    let (rsdp, mut tables) = altra();
    let madt = tables.table(b"APIC");
    madt[44 + 68 + 4] = 1;
    seal(madt);
    let platform = read(&(rsdp, tables)).unwrap();
    assert_eq!(machine(&platform).cpus[0].mpidr, 0x1_0012_0000);
}

#[test]
fn a_console_may_be_named_by_the_debug_port_table_alone() {
    let (rsdp, mut tables) = virt(3);
    tables.0.retain(|_, table| !table.starts_with(b"SPCR"));
    let platform = read(&(rsdp, tables)).unwrap();
    assert_eq!(
        platform.console.map(|it| it.base),
        Some(Pa::new(0x0900_0000))
    );
}

/// Changes a table and seals it; what is said then?
fn refusal(signature: &[u8; 4], change: impl Fn(&mut Vec<u8>)) -> Error {
    let (rsdp, mut tables) = virt(3);
    let table = tables.table(signature);
    change(table);
    seal(table);
    read(&(rsdp, tables)).unwrap_err()
}

#[test]
fn broken_tables_are_refused_by_name_and_offset() {
    let said = |table: &[u8; 4], offset, why| Error {
        table: *table,
        offset,
        why,
    };
    let number = |table: &mut Vec<u8>, at: usize, value: u32| {
        table[at..at + 4].copy_from_slice(&value.to_le_bytes())
    };
    let cases = [
        (
            refusal(b"FACP", |it| it[129] = 0),
            said(b"FACP", 129, Why::NoPsci),
        ),
        (
            refusal(b"GTDT", |it| number(it, 72, 90)),
            said(b"GTDT", 72, Why::NotPrivate(90)),
        ),
        (
            refusal(b"GTDT", |it| number(it, 4, 35)),
            said(b"GTDT", 4, Why::Length),
        ),
        (
            refusal(b"GTDT", |it| number(it, 4, u32::MAX)),
            said(b"GTDT", 4, Why::Length),
        ),
        (
            refusal(b"GTDT", |it| number(it, 4, 0x1000)),
            said(b"GTDT", 4, Why::Unreadable),
        ),
        (
            refusal(b"APIC", |it| it[45] = 0),
            said(b"APIC", 44, Why::Length),
        ),
        (
            refusal(b"APIC", |it| it[45] = 255),
            said(b"APIC", 68 + 255, Why::Length),
        ),
        // The distributor's entry is gone: no controller at all.
        (
            refusal(b"APIC", |it| {
                let at = (44..it.len()).find(|&at| it[at..].starts_with(&[0xc, 24]));
                it[at.unwrap()] = 0xcc;
            }),
            said(b"APIC", 44, Why::NoGic),
        ),
        (
            refusal(b"XSDT", |it| it[36..].fill(0)),
            said(b"FACP", 0, Why::Missing),
        ),
    ];
    for (number, (found, wanted)) in cases.into_iter().enumerate() {
        // Where a length leads astray, what stands there decides on the offset.
        let place = if number == 6 {
            found.offset
        } else {
            wanted.offset
        };
        assert_eq!(
            found,
            Error {
                offset: place,
                ..wanted
            },
            "case {number}"
        );
    }
    // A GICv2 whose processors have no virtual interface cannot virtualize.
    let (rsdp, mut tables) = virt(2);
    let madt = tables.table(b"APIC");
    let first = (44..madt.len()).find(|&at| madt[at..].starts_with(&[0xb, 80]));
    let first = first.unwrap();
    madt[first + 48..first + 56].fill(0);
    seal(madt);
    let found = read(&(rsdp, tables)).unwrap_err();
    assert_eq!((&found.table, found.why), (b"APIC", Why::NoGic));
    let error = refusal(b"FACP", |it| it[129] = 0).to_string();
    assert!(
        error.starts_with("ACPI table FACP at offset 129: "),
        "{error}"
    );
}

#[test]
fn a_byte_that_changed_is_noticed_in_every_table_that_matters() {
    let good = virt(3);
    for signature in [b"RSD ", b"XSDT", b"FACP", b"APIC", b"GTDT"] {
        let mut bad = good.clone();
        let table = bad.1.table(signature);
        let last = table.len() - 1;
        table[last] ^= 0x10;
        assert_eq!(
            read(&bad).unwrap_err().why,
            Why::Checksum,
            "{}",
            signature.escape_ascii()
        );
    }
}

#[test]
fn random_corruption_is_refused_or_understood_but_never_fatal() {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = |below: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        usize::try_from(seed % u64::try_from(below).unwrap()).unwrap()
    };
    let machines = [virt(2), virt(3), altra()];
    let (mut refused, mut understood) = (0, 0);
    for round in 0..6000 {
        let (rsdp, mut tables) = machines[round % 3].clone();
        for _ in 0..=random(4) {
            let which = random(tables.0.len());
            let table = tables.0.values_mut().nth(which).unwrap();
            match random(4) {
                0 => table.truncate(random(table.len() + 1)),
                1 => {
                    let at = random(table.len().max(1));
                    table.iter_mut().skip(at).take(8).for_each(|it| *it = 0xff);
                }
                _ => {
                    let at = random(table.len().max(1));
                    if let Some(byte) = table.get_mut(at) {
                        *byte = u8::try_from(random(256)).unwrap();
                    }
                }
            }
            if table.len() > 36 {
                seal(table);
            }
        }
        match read(&(rsdp, tables)) {
            Err(error) => {
                assert!(error.to_string().contains("ACPI table"));
                refused += 1;
            }
            Ok(platform) => {
                let boot = Boot::default();
                let tree = handover::tree(Description::Acpi(&platform), &boot).unwrap();
                assert!(Tree::new(&tree).is_ok());
                understood += 1;
            }
        }
    }
    assert!(
        refused > 500 && understood > 500,
        "{refused} refused, {understood} understood"
    );
}
