//! What boot's assembly needs to know, and what it offers to Rust.

use core::arch::{asm, global_asm};
use core::ops::Range;
use core::sync::atomic::{AtomicU64, Ordering};

use aarch64_cpu::registers::{
    CurrentEL, HCR_EL2, MAIR_EL1, MAIR_EL2, SCTLR_EL1, SCTLR_EL2, TCR_EL1, TCR_EL2,
};

use super::{dc_civac_range, sev};
use crate::addr::Pa;
use crate::arch::{offsets, stage1};

/// Bytes of the boot CPU's stack, which runs the controller too; the other CPUs' stacks are allocated.
pub const BOOT_STACK_BYTES: u64 = 64 << 10;
/// Bytes of every CPU's stack for exceptions taken from EL2.
pub const EMERGENCY_STACK_BYTES: u64 = 8 << 10;

/// Tables for the image, the tree and the UART, each possibly across a 1 GiB boundary, beside the root.
const EARLY_TABLES: u64 = 12;
/// Affinity fields of MPIDR_EL1.
const AFFINITY: u64 = 0xff_00ff_ffff;
/// Relocation kind that adds the load address.
const R_AARCH64_RELATIVE: u32 = 1027;
/// SCTLR_EL2 bits that are RES1 without FEAT_VHE's E2H.
const SCTLR_EL2_RES1: u64 = 0x30c5_0830;
/// SCTLR_EL1 bits that are RES1 in Armv8.0.
const SCTLR_EL1_RES1: u64 = 0x30d0_0800;
/// TCR_EL2 bits that are RES1 without E2H.
const TCR_EL2_RES1: u64 = 1 << 31 | 1 << 23;

const SCTLR_ON: u64 = SCTLR_EL2_RES1
    | SCTLR_EL2::M::Enable.value
    | SCTLR_EL2::C::Cacheable.value
    | SCTLR_EL2::I::Cacheable.value
    | SCTLR_EL2::SA::Enable.value;
/// With the final map: nothing writable is executable, whatever its descriptor says.
const SCTLR_FINAL: u64 = SCTLR_ON | SCTLR_EL2::WXN::Enable.value;
const SCTLR_EL1_ON: u64 = SCTLR_EL1_RES1
    | SCTLR_EL1::M::Enable.value
    | SCTLR_EL1::C::Cacheable.value
    | SCTLR_EL1::I::Cacheable.value;
const TCR_EL2_VALUE: u64 = TCR_EL2_RES1
    | TCR_EL2::T0SZ.val(stage1::T0SZ).value
    | TCR_EL2::TG0::KiB_4.value
    | TCR_EL2::SH0::Inner.value
    | TCR_EL2::ORGN0::WriteBack_ReadAlloc_WriteAlloc_Cacheable.value
    | TCR_EL2::IRGN0::WriteBack_ReadAlloc_WriteAlloc_Cacheable.value;
const TCR_EL1_VALUE: u64 = TCR_EL1::EPD1::DisableTTBR1Walks.value
    | TCR_EL1::T0SZ.val(stage1::T0SZ).value
    | TCR_EL1::TG0::KiB_4.value
    | TCR_EL1::SH0::Inner.value
    | TCR_EL1::ORGN0::WriteBack_ReadAlloc_WriteAlloc_Cacheable.value
    | TCR_EL1::IRGN0::WriteBack_ReadAlloc_WriteAlloc_Cacheable.value;
const MAIR: u64 = MAIR_EL2::Attr0_Normal_Outer::WriteBack_NonTransient_ReadWriteAlloc.value
    | MAIR_EL2::Attr0_Normal_Inner::WriteBack_NonTransient_ReadWriteAlloc.value
    | MAIR_EL2::Attr1_Device::nonGathering_nonReordering_EarlyWriteAck.value;
const _: () = assert!(
    MAIR == MAIR_EL1::Attr0_Normal_Outer::WriteBack_NonTransient_ReadWriteAlloc.value
        | MAIR_EL1::Attr0_Normal_Inner::WriteBack_NonTransient_ReadWriteAlloc.value
        | MAIR_EL1::Attr1_Device::nonGathering_nonReordering_EarlyWriteAck.value
);

/// CurrentEL of a hypervisor.
pub const CURRENT_EL2: u64 = CurrentEL::EL::EL2.value;

/// Why the exception level at entry cannot be used, as the entry code passes it on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u64)]
pub enum Unusable {
    /// The CPU was at EL1.
    El1 = 1,
    /// HCR_EL2.E2H cannot be cleared.
    E2h = 2,
}

/// What another CPU starts from; read with its MMU off. PSCI passes its address on; a CPU from a spin table, which is
/// given nothing, looks for its own.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Launch {
    /// Root of the final EL2 map.
    pub tables: Pa,
    /// Top of its stack.
    pub stack_top: u64,
    /// Its [`crate::sync::percpu::CpuBlock`].
    pub block: u64,
    /// Passed to `other_cpu_main`.
    pub argument: u64,
    /// MPIDR_EL1's affinity fields of the CPU.
    pub affinity: u64,
    /// Address of the next CPU's, or 0.
    pub next: u64,
}

global_asm!(
    include_str!("../boot.S"),
    include_str!("../head.S"),
    CURRENT_EL2 = const CURRENT_EL2,
    EMERGENCY_STACK_TOP = const offsets::EMERGENCY_STACK_TOP,
    LAUNCH_TABLES = const core::mem::offset_of!(Launch, tables),
    LAUNCH_STACK_TOP = const core::mem::offset_of!(Launch, stack_top),
    LAUNCH_ARGUMENT = const core::mem::offset_of!(Launch, argument),
    LAUNCH_AFFINITY = const core::mem::offset_of!(Launch, affinity),
    LAUNCH_NEXT = const core::mem::offset_of!(Launch, next),
    AFFINITY = const AFFINITY,
    MAIR = const MAIR,
    TCR_EL1 = const TCR_EL1_VALUE,
    TCR_EL2 = const TCR_EL2_VALUE,
    SCTLR_EL1_ON = const SCTLR_EL1_ON,
    SCTLR_MMU_AND_CACHES = const SCTLR_ON & !SCTLR_EL2_RES1,
    SCTLR_OFF = const SCTLR_EL2_RES1,
    SCTLR_ON = const SCTLR_ON,
    HCR_RESET = const HCR_EL2::RW::EL1IsAarch64.value,
    REFUSED_EL1 = const Unusable::El1 as u64,
    REFUSED_E2H = const Unusable::E2h as u64,
    R_AARCH64_RELATIVE = const R_AARCH64_RELATIVE,
    BLOCK_IMAGE = const stage1::BLOCK_IMAGE,
    BLOCK_IMAGE_EL1 = const stage1::BLOCK_IMAGE_EL1,
    BLOCK_TREE = const stage1::BLOCK_TREE,
    EARLY_TABLES = const EARLY_TABLES,
    BOOT_STACK = const BOOT_STACK_BYTES,
    EMERGENCY_STACK = const EMERGENCY_STACK_BYTES,
);

const _: () =
    assert!(core::mem::offset_of!(Launch, block) == core::mem::offset_of!(Launch, stack_top) + 8);

// SAFETY: The linker script places these symbols and `boot.S` defines the functions with these arguments.
unsafe extern "C" {
    static image_start: u8;
    static image_code_end: u8;
    static image_constants_end: u8;
    static image_file_end: u8;
    static image_end: u8;
    static boot_stack_guard: u8;
    static boot_emergency_stack_guard: u8;
    fn other_cpu_entry();
    fn spin_table_entry();
    static first_launch: AtomicU64;
    fn map_early_block(address: u64, attributes: u64) -> u64;
    fn switch_tables(root: u64, sctlr: u64);
    fn leave_firmware(entry: u64, tree: u64) -> !;
}

fn address_of(symbol: *const u8) -> Pa {
    Pa::new(symbol.expose_provenance() as u64)
}

/// Where the image was loaded: what to subtract from an address to find it in the ELF file.
pub fn image_base() -> u64 {
    address_of(&raw const image_start).raw()
}

/// Where the image lies; everything runs at its physical address.
#[derive(Clone, Debug)]
pub struct Image {
    /// Executable, read-only.
    pub code: Range<Pa>,
    /// Read-only.
    pub constants: Range<Pa>,
    /// Writable; holds the boot CPU's stacks.
    pub data: Range<Pa>,
    /// First bytes of pages in `data` that must fault: they end stacks.
    pub guards: [Pa; 2],
}

/// Where the image lies.
pub fn image() -> Image {
    let [start, code_end, constants_end, end] = [
        &raw const image_start,
        &raw const image_code_end,
        &raw const image_constants_end,
        &raw const image_end,
    ]
    .map(address_of);
    Image {
        code: start..code_end,
        constants: code_end..constants_end,
        data: constants_end..end,
        guards: [
            &raw const boot_stack_guard,
            &raw const boot_emergency_stack_guard,
        ]
        .map(address_of),
    }
}

/// Where PSCI has to send a CPU.
pub fn other_cpu_entry_point() -> Pa {
    Pa::new((other_cpu_entry as *const ()).expose_provenance() as u64)
}

/// Lets CPUs from spin tables find their [`Launch`]: the first one's address, 0 where there is none.
pub fn publish_launches(first: u64) {
    // SAFETY: `boot.S` defines it, eight aligned bytes in BSS; CPUs that read it with their MMU off start later.
    let place = unsafe { &first_launch };
    place.store(first, Ordering::Relaxed);
    dc_civac_range(address_of((&raw const *place).cast()), 8);
}

/// Tells the CPU that polls `word` where to start.
///
/// # Safety
///
/// A CPU that firmware parked polls the word, which is mapped; its [`Launch`] is published and clean.
pub unsafe fn release_from_spin_table(word: Pa) {
    let entry = (spin_table_entry as *const ()).expose_provenance() as u64;
    let place = core::ptr::with_exposed_provenance_mut::<u64>(crate::addr::to_usize(word.raw()));
    // SAFETY: the caller vouches for the word; it is aligned, as PSCI's and Linux' bindings have it.
    unsafe { place.write_volatile(entry) };
    dc_civac_range(word, 8);
    sev();
}

/// Maps the 2 MiB around a device before the final map exists. False: no table is left.
///
/// # Safety
///
/// The 2 MiB around `device` hold devices only, and only the boot CPU runs, on the early map.
pub unsafe fn map_early_device(device: Pa) -> bool {
    // SAFETY: the early tables are the boot CPU's alone; a new mapping of a device makes no reference invalid.
    unsafe { map_early_block(device.raw(), stage1::BLOCK_DEVICE) == 0 }
}

/// Maps the 2 MiB of RAM at `block` before the final map exists. False: no table is left.
///
/// # Safety
///
/// The block is RAM that nobody has, and only the boot CPU runs, on the early map.
pub unsafe fn map_early_ram(block: Pa) -> bool {
    // SAFETY: as in `map_early_device`.
    unsafe { map_early_block(block.raw(), stage1::BLOCK_RAM) == 0 }
}

/// Replaces this CPU's early map by the final one.
///
/// # Safety
///
/// `root` is the root of an identity map of everything in use, under which code is executable and not writable.
pub unsafe fn activate_map(root: Pa) {
    // SAFETY: the caller vouches for the map; the switch itself touches no memory.
    unsafe { switch_tables(root.raw(), SCTLR_FINAL) };
}

/// The part of the image that a loader copies, as it is in memory now; BSS and stacks lie behind it.
pub fn file() -> Range<Pa> {
    address_of(&raw const image_start)..address_of(&raw const image_file_end)
}

/// Ends UEFI's time: starts the image that was copied to `copy` as a boot loader would, with the device tree at `tree`.
///
/// # Safety
///
/// Boot services have been left. `copy` holds what [`file()`] holds, and room for the rest of the image, on a 2 MiB
/// boundary; it, the tree and the code that runs now have been cleaned to the point of coherency.
pub unsafe fn start_copy(copy: Pa, tree: Pa) -> ! {
    // SAFETY: the caller's duty; the image starts with its entry.
    unsafe { leave_firmware(copy.raw(), tree.raw()) }
}

/// Adds write-implies-execute-never to a CPU that started on the final map.
pub fn forbid_writable_code() {
    // SAFETY: under the final map nothing that is executed is writable.
    unsafe {
        asm!("msr sctlr_el2, {}", "isb", in(reg) SCTLR_FINAL, options(nostack, preserves_flags))
    };
}
