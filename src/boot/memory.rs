//! From the early map to the final one: who gets which RAM, and where EL2 may look.
//!
//! The early map reaches image, tree and UART only. A *workshop*, a piece of RAM large enough for the final map's tables
//! and all stacks, is mapped early and becomes the first frames; the rest of RAM is added once the final map reaches it.

use alloc::vec::Vec;
use core::ops::Range;

use vellum::addr::{PAGE_BYTES, Pa};
use vellum::arch::boot::{EMERGENCY_STACK_BYTES, Image};
use vellum::arch::stage1::{Error, Kind, Map};
use vellum::dev::machine::{Gic, Machine, Uart};
use vellum::dev::power::BCM2711_BYTES;
use vellum::mem::{frames, ram};
use vellum::{arch, panic};

/// Bytes of a CPU's stack.
const STACK_BYTES: u64 = 32 << 10;
/// What a CPU needs: two stacks, each above a page that faults.
const STACKS_BYTES: u64 = PAGE_BYTES + STACK_BYTES + PAGE_BYTES + EMERGENCY_STACK_BYTES;
/// Room for tables, per-CPU blocks and the heap's growth until all of RAM is there.
const TABLES_BYTES: u64 = 8 << 20;
/// The early map works in blocks of this size.
const BLOCK_BYTES: u64 = 2 << 20;
/// Bytes of the devices' register frames.
const UART_BYTES: u64 = 4 << 10;
const GICD_V3_BYTES: u64 = 64 << 10;
const GICD_V2_BYTES: u64 = 4 << 10;
const GICC_BYTES: u64 = 8 << 10;
const GICH_BYTES: u64 = 4 << 10;

/// The stacks of one CPU.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stacks {
    base: Pa,
}

impl Stacks {
    pub(super) fn top(self) -> u64 {
        self.base.raw() + PAGE_BYTES + STACK_BYTES
    }

    pub(super) fn emergency_top(self) -> u64 {
        self.base.raw() + STACKS_BYTES
    }

    fn guards(self) -> [Pa; 2] {
        [self.base, Pa::new(self.top())]
    }
}

/// The final map and what was carved out of RAM for it.
#[derive(Debug)]
pub(super) struct Memory {
    /// Root of the final map.
    pub(super) root: Pa,
    /// One per CPU but the boot CPU.
    pub(super) stacks: Vec<Stacks>,
    /// Bytes of RAM in use.
    pub(super) bytes: u64,
}

/// Builds and activates the final map, and gives all usable RAM to the frames.
pub(super) fn take_over(machine: &Machine, tree: Range<Pa>, uart: Option<Uart>) -> Memory {
    let image = arch::boot::image();
    if !machine.memory_nodes.is_empty() {
        frames::set_nodes(machine.memory_nodes.clone());
    }
    let usable = usable(machine, &image, &tree);
    let others = machine.cpus.len() as u64 - 1;
    let workshop = open_workshop(&usable, TABLES_BYTES + others * STACKS_BYTES);
    let stacks = (0..others).map_while(|_| {
        Some(Stacks {
            base: frames::contiguous(STACKS_BYTES, PAGE_BYTES)?.pa,
        })
    });
    let stacks: Vec<_> = stacks.collect();
    let root = draw_map(machine, &image, &usable, tree, uart, &stacks).unwrap_or_else(|error| {
        panic::refuse(format_args!("the EL2 map cannot be built: {error:?}"))
    });
    // SAFETY: the map holds image, stacks, frames, heap and devices at their own addresses, code not writable.
    unsafe { arch::boot::activate_map(root) };
    for rest in ram::subtract(&usable, &workshop) {
        // SAFETY: usable RAM, mapped now, and not yet added.
        unsafe { frames::add(rest) };
    }
    Memory {
        root,
        stacks,
        bytes: ram::bytes(&machine.ram),
    }
}

/// RAM that nobody else has.
fn usable(machine: &Machine, image: &Image, tree: &Range<Pa>) -> Vec<Range<Pa>> {
    let image = image.code.start..image.data.end;
    if let Some(taken) = machine.reserved.iter().find(|it| ram::overlap(it, &image)) {
        panic::refuse(format_args!(
            "the loader put {}..{} over the hypervisor at {}..{}",
            taken.start, taken.end, image.start, image.end
        ));
    }
    let holes = machine
        .reserved
        .iter()
        .cloned()
        .chain([image])
        .chain(ram::covering_pages(tree.clone()));
    let page_zero = Pa::new(0)..Pa::new(PAGE_BYTES);
    holes
        .chain([page_zero])
        .fold(machine.ram.clone(), |usable, hole| {
            ram::subtract(&usable, &hole)
        })
}

/// Maps a piece of usable RAM of at least `bytes` and makes it the first frames.
fn open_workshop(usable: &[Range<Pa>], bytes: u64) -> Range<Pa> {
    let bytes = bytes.next_multiple_of(BLOCK_BYTES);
    let piece = usable.iter().find_map(|it| {
        let start = it.start.align_up(BLOCK_BYTES)?;
        let end = start.checked_add(bytes)?;
        (end <= it.end).then_some(start..end)
    });
    let Some(piece) = piece else {
        panic::refuse(format_args!(
            "too little RAM: {} MiB in one piece are needed for tables and stacks",
            bytes >> 20
        ))
    };
    let mut at = piece.start;
    while at < piece.end {
        // SAFETY: whole blocks of RAM that nobody has.
        if !unsafe { arch::boot::map_early_ram(at) } {
            panic::refuse(format_args!("no early table left for {at}"));
        }
        at = Pa::new(at.raw() + BLOCK_BYTES);
    }
    // SAFETY: usable RAM, mapped now, and not yet added.
    unsafe { frames::add(piece.clone()) };
    piece
}

fn draw_map(
    machine: &Machine,
    image: &Image,
    usable: &[Range<Pa>],
    tree: Range<Pa>,
    uart: Option<Uart>,
    stacks: &[Stacks],
) -> Result<Pa, Error> {
    // SAFETY: frames are RAM, reachable at their own address, and these are zeroed and never released.
    let mut map = unsafe { Map::new(zeroed_page) }?;
    for ram in usable {
        map.identity(ram.clone(), Kind::Data)?;
    }
    let initrd = machine.initrd.clone().and_then(ram::covering_pages);
    let constants = [ram::covering_pages(tree), initrd];
    for region in constants.into_iter().flatten() {
        map.identity(region, Kind::Constants)?;
    }
    map.identity(image.code.clone(), Kind::Code)?;
    map.identity(image.constants.clone(), Kind::Constants)?;
    map.identity(image.data.clone(), Kind::Data)?;
    // Words that parked CPUs poll: in memory that firmware keeps for them.
    for word in machine.cpus.iter().filter_map(|it| it.spin_table) {
        let end = word.checked_add(8).ok_or(Error::BadRegion)?;
        let page = ram::covering_pages(word..end).ok_or(Error::BadRegion)?;
        map.identity(page, Kind::Data)?;
    }
    let power = machine.power.map(|it| (it, BCM2711_BYTES));
    for (start, bytes) in devices(&machine.gic, uart).into_iter().chain(power) {
        let end = start.checked_add(bytes).ok_or(Error::BadRegion)?;
        map.identity(
            ram::covering_pages(start..end).ok_or(Error::BadRegion)?,
            Kind::Device,
        )?;
    }
    for guard in image
        .guards
        .into_iter()
        .chain(stacks.iter().flat_map(|it| it.guards()))
    {
        map.guard(guard)?;
    }
    Ok(map.into_root())
}

fn devices(gic: &Gic, uart: Option<Uart>) -> Vec<(Pa, u64)> {
    let mut devices = match *gic {
        Gic::V2 {
            distributor,
            cpu_interface,
            hypervisor_interface,
            ..
        } => Vec::from([
            (distributor, GICD_V2_BYTES),
            (cpu_interface, GICC_BYTES),
            (hypervisor_interface, GICH_BYTES),
        ]),
        Gic::V3 {
            distributor,
            ref redistributors,
        } => {
            let regions = redistributors
                .iter()
                .filter_map(|it| Some((it.start, it.end.offset_from(it.start)?)));
            [(distributor, GICD_V3_BYTES)]
                .into_iter()
                .chain(regions)
                .collect()
        }
    };
    devices.extend(uart.map(|it| (it.base, UART_BYTES)));
    devices
}

/// A page of zeros that is never given back.
fn zeroed_page() -> Option<Pa> {
    zeroed(frames::allocate()?)
}

/// As [`zeroed_page`], of NUMA node `node` if that has one.
pub(super) fn zeroed_page_near(node: usize) -> Option<Pa> {
    zeroed(frames::allocate_near(node)?)
}

fn zeroed(page: Pa) -> Option<Pa> {
    // SAFETY: the page is new and nobody refers to it.
    unsafe { arch::zero_page(page) };
    Some(page)
}
