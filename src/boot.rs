//! From the first line of Rust to the first guest: a story, told once.

use vellum::addr::{Pa, to_usize};
use vellum::dev::machine::{self, Machine};
use vellum::dev::pl011::Pl011;
use vellum::dev::psci;
use vellum::dev::tree::{self, Tree};
use vellum::{arch, log as console, panic};

#[unsafe(no_mangle)]
extern "C" fn boot_cpu_main(tree: u64) -> ! {
    let tree = read_tree(Pa::new(tree));
    start_console(&tree);
    let machine =
        Machine::new(&tree).unwrap_or_else(|error| panic::refuse(format_args!("{error}")));
    log::info!("{machine:?}");
    panic::exit(0)
}

#[unsafe(no_mangle)]
extern "C" fn other_cpu_main(_index: u64) -> ! {
    loop {
        arch::wfi();
    }
}

#[unsafe(no_mangle)]
extern "C" fn refuse_below_el2(tree: u64) -> ! {
    let tree = read_tree(Pa::new(tree));
    start_console(&tree);
    panic::refuse(format_args!(
        "started at EL1, but a hypervisor needs EL2 (QEMU: -machine virt,virtualization=on)"
    ))
}

fn read_tree(at: Pa) -> Tree<'static> {
    let start = core::ptr::with_exposed_provenance::<u8>(to_usize(at.raw()));
    // SAFETY: the entry code checked and mapped what the header claims; nobody writes it.
    let header = unsafe { core::slice::from_raw_parts(start, 8) };
    let bytes = tree::total_bytes(header).unwrap_or(header.len());
    // SAFETY: as above.
    let bytes = unsafe { core::slice::from_raw_parts(start, bytes) };
    match Tree::new(bytes) {
        Ok(tree) => tree,
        Err(_) => psci::system_off(),
    }
}

fn start_console(tree: &Tree<'_>) {
    if let Some(conduit) = machine::conduit(tree) {
        psci::set_conduit(conduit);
    }
    let Some(uart) = machine::console(tree) else {
        return;
    };
    // SAFETY: the tree says that a UART is there, and devices of a machine do not share 2 MiB with its RAM.
    if unsafe { arch::boot::map_early_device(uart.base) } {
        // SAFETY: it is mapped now, by both maps to come, and this is its only driver.
        console::start(unsafe { Pl011::new(uart.base, uart.full) });
    }
}
