//! Device trees of machines that exist, of machines that cannot be used, and of no machine at all.

use vellum::addr::Pa;
use vellum::dev::machine::{self, CpuInfo, Error, Gic, Machine, Uart, UartKind};
use vellum::dev::psci::Conduit;
use vellum::dev::tree::{self, Malformed, Tree, Why};
use vm_fdt::{FdtReserveEntry, FdtWriter, FdtWriterNode};

const GIC_PHANDLE: u32 = 7;

/// What differs between the trees of these tests; the rest is as QEMU's `virt` board has it.
struct Virt {
    cpus: u32,
    memory: Vec<(u64, u64)>,
    gic: u32,
    /// Register frames of a GICv2.
    frames: usize,
    /// For each piece of memory and as many CPUs its `numa-node-id`.
    nodes: Vec<u32>,
    redistributors: Vec<(u64, u64)>,
    chosen: fn(&mut FdtWriter),
}

impl Default for Virt {
    fn default() -> Self {
        Self {
            cpus: 2,
            memory: vec![(0x4000_0000, 0x2000_0000)],
            gic: 3,
            frames: 4,
            nodes: vec![],
            redistributors: vec![(0x080a_0000, 0x00f6_0000)],
            chosen: |fdt| {
                fdt.property_string("stdout-path", "/pl011@9000000")
                    .unwrap();
                fdt.property_string("bootargs", "suite=none vcpus=1")
                    .unwrap();
            },
        }
    }
}

fn node(fdt: &mut FdtWriter, name: &str, body: impl FnOnce(&mut FdtWriter)) {
    let node: FdtWriterNode = fdt.begin_node(name).unwrap();
    body(fdt);
    fdt.end_node(node).unwrap();
}

impl Virt {
    fn bytes(&self) -> Vec<u8> {
        let reserved = [FdtReserveEntry::new(0x4100_0000, 0x1800).unwrap()];
        let mut fdt = FdtWriter::new_with_mem_reserv(&reserved).unwrap();
        node(&mut fdt, "", |fdt| {
            fdt.property_string("compatible", "linux,dummy-virt")
                .unwrap();
            fdt.property_u32("#address-cells", 2).unwrap();
            fdt.property_u32("#size-cells", 2).unwrap();
            fdt.property_u32("interrupt-parent", GIC_PHANDLE).unwrap();
            node(fdt, "psci", |fdt| {
                fdt.property_string_list(
                    "compatible",
                    vec!["arm,psci-1.0".into(), "arm,psci-0.2".into()],
                )
                .unwrap();
                fdt.property_string("method", "smc").unwrap();
            });
            for (number, &(start, bytes)) in self.memory.iter().enumerate() {
                node(fdt, &format!("memory@{start:x}"), |fdt| {
                    fdt.property_string("device_type", "memory").unwrap();
                    fdt.property_array_u64("reg", &[start, bytes]).unwrap();
                    if let Some(&node) = self.nodes.get(number) {
                        fdt.property_u32("numa-node-id", node).unwrap();
                    }
                });
            }
            node(fdt, "reserved-memory", |fdt| {
                fdt.property_u32("#address-cells", 2).unwrap();
                fdt.property_u32("#size-cells", 2).unwrap();
                fdt.property_null("ranges").unwrap();
                node(fdt, "firmware@42000000", |fdt| {
                    fdt.property_array_u64("reg", &[0x4200_0000, 0x1_0000])
                        .unwrap();
                });
            });
            self.processors(fdt);
            self.interrupt_controller(fdt);
            node(fdt, "timer", |fdt| {
                fdt.property_string("compatible", "arm,armv8-timer")
                    .unwrap();
                fdt.property_array_u32("interrupts", &[1, 13, 4, 1, 14, 4, 1, 11, 4, 1, 10, 4])
                    .unwrap();
            });
            node(fdt, "pl011@9000000", |fdt| {
                fdt.property_string_list(
                    "compatible",
                    vec!["arm,pl011".into(), "arm,primecell".into()],
                )
                .unwrap();
                fdt.property_array_u64("reg", &[0x0900_0000, 0x1000])
                    .unwrap();
                fdt.property_array_u32("interrupts", &[0, 1, 4]).unwrap();
            });
            node(fdt, "chosen", self.chosen);
        });
        fdt.finish().unwrap()
    }

    fn processors(&self, fdt: &mut FdtWriter) {
        node(fdt, "cpus", |fdt| {
            fdt.property_u32("#address-cells", 1).unwrap();
            fdt.property_u32("#size-cells", 0).unwrap();
            for cpu in 0..self.cpus {
                let affinity = ((cpu / 16) << 8) | (cpu % 16);
                node(fdt, &format!("cpu@{affinity:x}"), |fdt| {
                    fdt.property_string("device_type", "cpu").unwrap();
                    fdt.property_string("enable-method", "psci").unwrap();
                    fdt.property_u32("reg", affinity).unwrap();
                    if let Some(&node) = self.nodes.get(usize::try_from(cpu).unwrap()) {
                        fdt.property_u32("numa-node-id", node).unwrap();
                    }
                });
            }
        });
    }

    fn interrupt_controller(&self, fdt: &mut FdtWriter) {
        let (compatible, regions) = match self.gic {
            3 => (
                "arm,gic-v3",
                [&[(0x0800_0000, 0x1_0000)], self.redistributors.as_slice()].concat(),
            ),
            2 => (
                "arm,cortex-a15-gic",
                (0..self.frames)
                    .map(|frame| {
                        (
                            0x0800_0000 + [0, 0x1_0000, 0x3_0000, 0x4_0000][frame],
                            0x1_0000,
                        )
                    })
                    .collect(),
            ),
            _ => return,
        };
        node(fdt, "intc@8000000", |fdt| {
            fdt.property_string("compatible", compatible).unwrap();
            fdt.property_u32("#interrupt-cells", 3).unwrap();
            fdt.property_u32(
                "#redistributor-regions",
                u32::try_from(self.redistributors.len()).unwrap(),
            )
            .unwrap();
            fdt.property_array_u32("interrupts", &[1, 9, 4]).unwrap();
            let cells: Vec<u64> = regions
                .iter()
                .flat_map(|&(start, bytes)| [start, bytes])
                .collect();
            fdt.property_array_u64("reg", &cells).unwrap();
            fdt.property_phandle(GIC_PHANDLE).unwrap();
        });
    }

    fn machine(&self) -> Result<Machine, Error> {
        Machine::new(&Tree::new(&self.bytes()).unwrap())
    }
}

#[test]
fn a_virt_board_is_understood() {
    let bytes = Virt::default().bytes();
    let tree = Tree::new(&bytes).unwrap();
    let machine = Machine::new(&tree).unwrap();
    assert_eq!(machine.board, "qemu-virt");
    assert_eq!(
        machine.cpus,
        [
            CpuInfo {
                mpidr: 0,
                psci: true,
                spin_table: None,
                node: None
            },
            CpuInfo {
                mpidr: 1,
                psci: true,
                spin_table: None,
                node: None
            }
        ]
    );
    assert_eq!(machine.ram, [Pa::new(0x4000_0000)..Pa::new(0x6000_0000)]);
    let reserved = [(0x4100_0000, 0x4100_2000), (0x4200_0000, 0x4201_0000)];
    assert_eq!(
        machine.reserved,
        reserved.map(|(start, end)| Pa::new(start)..Pa::new(end))
    );
    assert_eq!(machine.psci, Some(Conduit::Smc));
    assert_eq!(machine.bootargs, "suite=none vcpus=1");
    let interrupts = machine.interrupts;
    assert_eq!(
        (
            interrupts.maintenance,
            interrupts.virtual_timer,
            interrupts.hypervisor_timer
        ),
        (25, 27, 26)
    );
    assert_eq!(
        machine::consoles(&tree).next(),
        Some(Uart {
            base: Pa::new(0x0900_0000),
            intid: Some(33),
            kind: UartKind::Pl011
        })
    );
}

#[test]
fn redistributors_may_lie_in_several_regions() {
    let redistributors = vec![(0x080a_0000, 0x00f6_0000), (0x40_0000_0000, 0x400_0000)];
    let machine = Virt {
        cpus: 128,
        redistributors,
        ..Default::default()
    }
    .machine()
    .unwrap();
    assert_eq!(machine.cpus.len(), 128);
    let Gic::V3 { redistributors, .. } = machine.gic else {
        panic!("not a GICv3")
    };
    assert_eq!(redistributors.len(), 2);
    assert_eq!(
        redistributors[1],
        Pa::new(0x40_0000_0000)..Pa::new(0x40_0400_0000)
    );
}

#[test]
fn a_gicv2_brings_its_four_frames() {
    let machine = Virt {
        gic: 2,
        ..Default::default()
    }
    .machine()
    .unwrap();
    let [
        distributor,
        cpu_interface,
        hypervisor_interface,
        virtual_interface,
    ] = [0x0800_0000, 0x0801_0000, 0x0803_0000, 0x0804_0000].map(Pa::new);
    assert_eq!(
        machine.gic,
        Gic::V2 {
            distributor,
            cpu_interface,
            hypervisor_interface,
            virtual_interface
        }
    );
}

#[test]
fn an_initial_ram_disk_is_not_free_memory() {
    let chosen = |fdt: &mut FdtWriter| {
        fdt.property_u32("linux,initrd-start", 0x4800_0000).unwrap();
        fdt.property_u64("linux,initrd-end", 0x4800_1234).unwrap();
    };
    let machine = Virt {
        chosen,
        ..Default::default()
    }
    .machine()
    .unwrap();
    let start = Pa::new(0x4800_0000);
    assert_eq!(machine.initrd, Some(start..Pa::new(0x4800_1234)));
    // What it shares a page with is not free either.
    assert!(machine.reserved.contains(&(start..Pa::new(0x4800_2000))));
}

#[test]
fn nodes_are_numbered_in_their_order_and_the_last_takes_those_that_are_too_many() {
    let memory: Vec<_> = (0..20)
        .map(|it| (0x4000_0000 + it * 0x1000_0000, 0x1000_0000))
        .collect();
    let machine = Virt {
        cpus: 21,
        memory,
        nodes: (0..20).map(|it| 100 - it).collect(),
        ..Default::default()
    }
    .machine()
    .unwrap();
    assert_eq!(machine.ram.len(), 1, "neighbours are joined all the same");
    let of_cpus: Vec<_> = machine.cpus.iter().filter_map(|it| it.node).collect();
    let of_memory: Vec<_> = machine.memory_nodes.iter().map(|it| it.1).collect();
    let wanted: Vec<_> = (0..20_usize).map(|it| (19 - it).min(15)).collect();
    assert_eq!((of_cpus, of_memory), (wanted.clone(), wanted));
    assert_eq!(machine.cpus[20].node, None);
    assert!(Virt::default().machine().unwrap().memory_nodes.is_empty());
}

#[test]
fn machines_that_cannot_be_used_are_refused() {
    let refused = [
        (
            Virt {
                gic: 0,
                ..Default::default()
            },
            Error::NoGic,
        ),
        (
            Virt {
                cpus: 0,
                ..Default::default()
            },
            Error::NoCpus,
        ),
        (
            Virt {
                cpus: 9,
                gic: 2,
                ..Default::default()
            },
            Error::ManyCpus(9, 8),
        ),
        (
            Virt {
                cpus: 513,
                ..Default::default()
            },
            Error::ManyCpus(513, 512),
        ),
        (
            Virt {
                memory: vec![],
                ..Default::default()
            },
            Error::NoMemory,
        ),
        (
            Virt {
                memory: vec![(0x4000_0000, 64 << 20)],
                ..Default::default()
            },
            Error::LittleMemory(64 << 20),
        ),
        (
            Virt {
                redistributors: vec![],
                ..Default::default()
            },
            Error::NoGic,
        ),
        // Distributor and CPU interface only: a GICv2 without virtualization.
        (
            Virt {
                gic: 2,
                frames: 2,
                ..Default::default()
            },
            Error::NoGic,
        ),
    ];
    for (virt, error) in refused {
        assert_eq!(virt.machine().unwrap_err(), error);
        assert!(!error.to_string().contains('\n'), "one line");
    }
}

/// A board whose devices sit behind a bus that moves addresses, whose root sizes have one cell, and whose console is an
/// alias.
fn board_behind_a_bus() -> Vec<u8> {
    board_with_console("serial0:115200n8")
}

fn board_with_console(stdout_path: &str) -> Vec<u8> {
    let mut fdt = FdtWriter::new().unwrap();
    node(&mut fdt, "", |fdt| {
        fdt.property_string("compatible", "raspberrypi,4-model-b")
            .unwrap();
        fdt.property_u32("#address-cells", 2).unwrap();
        fdt.property_u32("#size-cells", 1).unwrap();
        node(fdt, "aliases", |fdt| {
            fdt.property_string("serial0", "/soc/serial@7e201000")
                .unwrap();
            fdt.property_string("serial1", "/soc/serial@7e215040")
                .unwrap()
        });
        node(fdt, "chosen", |fdt| {
            fdt.property_string("stdout-path", stdout_path).unwrap()
        });
        node(fdt, "cpus", |fdt| {
            fdt.property_u32("#address-cells", 1).unwrap();
            fdt.property_u32("#size-cells", 0).unwrap();
            for cpu in 0..3 {
                node(fdt, &format!("cpu@{cpu}"), |fdt| {
                    fdt.property_string("device_type", "cpu").unwrap();
                    fdt.property_string("enable-method", "spin-table").unwrap();
                    fdt.property_u32("reg", cpu).unwrap();
                    if cpu < 2 {
                        fdt.property_u64("cpu-release-addr", 0xd8 + 8 * u64::from(cpu))
                            .unwrap();
                    }
                });
            }
        });
        node(fdt, "memory@0", |fdt| {
            fdt.property_string("device_type", "memory").unwrap();
            fdt.property_array_u32("reg", &[0, 0, 0x3b40_0000]).unwrap();
        });
        node(fdt, "soc", |fdt| {
            fdt.property_u32("#address-cells", 1).unwrap();
            fdt.property_u32("#size-cells", 1).unwrap();
            fdt.property_array_u32(
                "ranges",
                &[
                    0x7e00_0000,
                    0,
                    0xfe00_0000,
                    0x0180_0000,
                    0x4000_0000,
                    0,
                    0xff80_0000,
                    0x0080_0000,
                ],
            )
            .unwrap();
            node(fdt, "power@7e100000", |fdt| {
                fdt.property_string("compatible", "brcm,bcm2835-pm")
                    .unwrap();
                fdt.property_array_u32("reg", &[0x7e10_0000, 0x114])
                    .unwrap();
            });
            node(fdt, "interrupt-controller@40041000", |fdt| {
                fdt.property_string("compatible", "arm,gic-400").unwrap();
                let frames = [0x1000, 0x2000, 0x4000, 0x6000];
                let reg: Vec<u32> = frames
                    .iter()
                    .flat_map(|at| [0x4004_0000 + at, 0x2000])
                    .collect();
                fdt.property_array_u32("reg", &reg).unwrap();
            });
            node(fdt, "serial@7e201000", |fdt| {
                fdt.property_string("compatible", "arm,pl011").unwrap();
                fdt.property_array_u32("reg", &[0x7e20_1000, 0x200])
                    .unwrap();
            });
            node(fdt, "serial@7e215040", |fdt| {
                fdt.property_string("compatible", "brcm,bcm2835-aux-uart")
                    .unwrap();
                fdt.property_array_u32("reg", &[0x7e21_5040, 0x40]).unwrap();
            });
            node(fdt, "elsewhere@0", |fdt| {
                fdt.property_string("compatible", "test,elsewhere").unwrap();
                fdt.property_array_u32("reg", &[0x7f80_0000, 0x1000, 0x7f7f_f000, 0x1000])
                    .unwrap();
            });
        });
    });
    fdt.finish().unwrap()
}

#[test]
fn addresses_are_translated_through_buses() {
    let bytes = board_behind_a_bus();
    let tree = Tree::new(&bytes).unwrap();
    let uart = machine::consoles(&tree).next().unwrap();
    assert_eq!(
        uart,
        Uart {
            base: Pa::new(0xfe20_1000),
            intid: None,
            kind: UartKind::Pl011
        }
    );
    let elsewhere = tree.compatible(&["test,elsewhere"]).unwrap();
    assert_eq!(
        elsewhere.regions(),
        [(Pa::new(0xff7f_f000), 0x1000)],
        "what no range covers is unreachable"
    );
}

#[test]
fn the_console_is_the_chosen_one_and_another_where_that_cannot_be_used() {
    let first = (Pa::new(0xfe20_1000), UartKind::Pl011);
    let second = (Pa::new(0xfe21_5040), UartKind::Mini);
    for (path, wanted) in [
        ("serial0:115200n8", [first, first, second]),
        ("serial1:115200n8", [second, first, second]),
    ] {
        let bytes = board_with_console(path);
        let tree = Tree::new(&bytes).unwrap();
        let found: Vec<_> = machine::consoles(&tree)
            .map(|it| (it.base, it.kind))
            .collect();
        assert_eq!(found, wanted, "{path}");
    }
    let bytes = board_with_console("serial9");
    let found = machine::consoles(&Tree::new(&bytes).unwrap()).count();
    assert_eq!(found, 2, "what is chosen does not exist");
}

#[test]
fn cpus_on_a_spin_table_are_found_with_the_word_they_poll() {
    let bytes = board_behind_a_bus();
    let machine = Machine::new(&Tree::new(&bytes).unwrap()).unwrap();
    let words: Vec<_> = machine.cpus.iter().map(|it| it.spin_table).collect();
    assert_eq!(words, [Some(Pa::new(0xd8)), Some(Pa::new(0xe0)), None]);
    assert!(machine.cpus.iter().all(|it| !it.psci));
    assert_eq!(machine.psci, None);
}

#[test]
fn a_machine_without_psci_is_switched_off_by_its_power_manager() {
    let bytes = board_behind_a_bus();
    let machine = Machine::new(&Tree::new(&bytes).unwrap()).unwrap();
    assert_eq!(machine.board, "rpi4");
    assert_eq!(machine.power, Some(Pa::new(0xfe10_0000)));
    let frame = |at: u64| Pa::new(0xff84_0000 + at);
    assert_eq!(
        machine.gic,
        Gic::V2 {
            distributor: frame(0x1000),
            cpu_interface: frame(0x2000),
            hypervisor_interface: frame(0x4000),
            virtual_interface: frame(0x6000),
        }
    );
    assert_eq!(machine.interrupts.maintenance, 25, "an old tree has none");
}

#[test]
fn erased_properties_are_skipped() {
    let mut bytes = Virt::default().bytes();
    let method = [0, 0, 0, 4, b's', b'm', b'c', 0];
    let at = bytes
        .windows(8)
        .position(|it| it[4..] == method[4..] && it[..4] != [0, 0, 0, 3])
        .unwrap();
    // Length, name and value of the property, and the token before them, become NOPs.
    for word in bytes[at - 8..at + 8].chunks_exact_mut(4) {
        word.copy_from_slice(&4_u32.to_be_bytes());
    }
    let tree = Tree::new(&bytes).unwrap();
    assert_eq!(machine::conduit(&tree), None);
    assert!(Machine::new(&tree).is_ok());
}

#[test]
fn what_is_no_tree_is_refused_with_its_place() {
    let good = Virt::default().bytes();
    let header = |offset: usize| {
        let word = good[offset..offset + 4].try_into().unwrap();
        usize::try_from(u32::from_be_bytes(word)).unwrap()
    };
    let (first, bytes) = (header(8), header(36));
    let last = first + bytes - 4;
    let property = good.windows(4).position(|it| it == [0, 0, 0, 3]).unwrap();
    assert!((first..last).contains(&property) && property.is_multiple_of(4));
    let nodes: Vec<u8> = (0..18).flat_map(|_| [0, 0, 0, 1, b'a', 0, 0, 0]).collect();
    let cases: [(usize, &[u8], usize, Why); 16] = [
        (0, &[0], 0, Why::Magic),
        (4, &[0xff], 4, Why::Length),
        (4, &[0, 0, 0, 64], 8, Why::Length),
        (8, &[0xff], 8, Why::Length),
        (8, &[0, 0, 0, 36], 8, Why::Length),
        (12, &[0x7f], 12, Why::Length),
        (36, &[0, 0, 0, 4], 36, Why::Length),
        (last, &[0, 0, 0, 8], last, Why::Token),
        (first, &[0, 0, 0, 2], first, Why::Token),
        (first, &[0, 0, 0, 9], first, Why::Token),
        (first, &[1], first, Why::Token),
        (first, &[0, 0, 0, 4], property, Why::Token),
        (property + 4, &[0xff; 4], property, Why::Endless),
        (property + 4, &[0, 1, 0, 0], property, Why::Endless),
        (last - 4, &[0, 0, 0, 4], last, Why::Token),
        (first, &nodes, first + 16 * 8, Why::Large),
    ];
    for (number, (at, change, offset, why)) in cases.into_iter().enumerate() {
        let mut bad = good.clone();
        bad[at..at + change.len()].copy_from_slice(change);
        let error = Tree::new(&bad).map(drop).unwrap_err();
        if number == 11 {
            // Without its root, a property stands nowhere; what is noticed first is one END_NODE too many, or that.
            assert!(error.offset >= first, "{error}");
            continue;
        }
        assert_eq!(error, Malformed { offset, why }, "case {number}");
        let text = format!("device tree at offset {offset}: ");
        assert!(error.to_string().starts_with(&text), "{error}");
    }
}

/// Reads everything that boot reads.
fn digest(bytes: &[u8]) {
    tree::total_bytes(bytes);
    match Tree::new(bytes) {
        Ok(tree) => {
            machine::consoles(&tree).for_each(drop);
            machine::conduit(&tree);
            if let Err(error) = Machine::new(&tree) {
                assert!(!error.to_string().is_empty());
            }
        }
        Err(error) => {
            assert!(error.offset <= bytes.len(), "{error}");
            assert!(error.to_string().contains("offset"), "{error}");
        }
    }
}

#[test]
fn no_tree_is_bad_enough_to_panic() {
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = |below: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        usize::try_from(random % below as u64).unwrap()
    };
    for original in [
        Virt::default().bytes(),
        Virt {
            gic: 2,
            ..Default::default()
        }
        .bytes(),
        board_behind_a_bus(),
    ] {
        for length in 0..original.len() {
            digest(&original[..length]);
        }
        for _ in 0..20_000 {
            let mut bytes = original.clone();
            for _ in 0..=next(4) {
                let at = next(bytes.len());
                bytes[at] = [
                    0,
                    1,
                    4,
                    9,
                    0x7f,
                    0x80,
                    0xff,
                    u8::try_from(next(256)).unwrap(),
                ][next(8)];
            }
            digest(&bytes);
        }
        for at in (0..original.len() - 3).step_by(4) {
            for word in [0_u32, 1, 2, 3, 4, 9, 0x7fff_ffff, 0xffff_fffc, 0xffff_ffff] {
                let mut bytes = original.clone();
                bytes[at..at + 4].copy_from_slice(&word.to_be_bytes());
                digest(&bytes);
            }
        }
    }
}
