//! Vellum as a UEFI application: from firmware's entry to the one that every boot loader uses.
//!
//! The image copies itself to memory of its own, gathers what firmware knows (its tables, the memory map, boot
//! arguments, the initial RAM disk) into one device tree, leaves boot services, and starts the copy as a boot loader
//! would: MMU and caches off, the tree in x0. So nothing of firmware's state survives, and the rest of boot is the same
//! on every machine. Until boot services are left, everything is checked that can be, and what is wrong is said on
//! firmware's own console. Runtime services are never used.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::convert::Infallible;
use core::ffi::c_void;
use core::ops::Range;
use core::ptr;

use uefi_raw::protocol::console::SimpleTextOutputProtocol;
use uefi_raw::protocol::device_path::DevicePathProtocol;
use uefi_raw::protocol::file_system::{
    FileAttribute, FileMode, FileProtocolV1, SimpleFileSystemProtocol,
};
use uefi_raw::protocol::loaded_image::LoadedImageProtocol;
use uefi_raw::protocol::media::LoadFile2Protocol;
use uefi_raw::table::boot::{AllocateType, BootServices, MemoryType};
use uefi_raw::table::system::SystemTable;
use uefi_raw::{Guid, Handle, Status, guid};
use vellum::addr::{PAGE_BYTES, Pa, to_usize};
use vellum::arch;
use vellum::arch::boot::CURRENT_EL2;
use vellum::dev::acpi::{Memory, Platform};
use vellum::dev::handover::{self, Boot, Description};
use vellum::dev::machine::Machine;
use vellum::dev::tree::{self, Malformed, Tree, Why};
use vellum::dev::uefi;

/// Blocks of the early map: the copy shares none with anybody.
const BLOCK_BYTES: u64 = 2 << 20;
/// Room for the tree, behind the image.
const TREE_BYTES: u64 = 2 << 20;
/// By how much the memory map may grow between two looks at it, and the tree with it.
const SLACK_BYTES: usize = 64 << 10;
/// How often firmware may change the memory map under our hands.
const ATTEMPTS: usize = 8;

const ACPI_2: Guid = guid!("8868e871-e4f1-11d3-bc22-0080c73c8881");
const DEVICE_TREE: Guid = guid!("b1b621d5-f19c-41a5-830b-d9152c69aae0");
/// Vendor media device path of the initial RAM disk, as boot loaders for Linux install it.
const INITRD_PATH: [u8; 24] = [
    4, 3, 20, 0, 0x27, 0xe4, 0x68, 0x55, 0xfc, 0x68, 0x3d, 0x4f, 0xac, 0x74, 0xca, 0x55, 0x52,
    0x31, 0xcc, 0x68, 0x7f, 0xff, 4, 0,
];
/// Files beside the image, on the volume it was loaded from.
const ARGUMENTS_FILE: &str = "\\vellum\\cmdline.txt";
const BUNDLE_FILE: &str = "\\vellum\\bundle.cpio";

/// What firmware calls; `level` is CurrentEL.
#[unsafe(no_mangle)]
extern "C" fn uefi_main(image: Handle, system: *const SystemTable, level: u64) -> Status {
    // SAFETY: firmware passes its own table, which lives as long as boot services.
    let system = unsafe { &*system };
    // SAFETY: as above.
    let services = unsafe { &*system.boot_services };
    let firmware = Firmware {
        image,
        system,
        services,
    };
    match firmware.start(level) {
        Ok(never) => match never {},
        Err(reason) => {
            firmware.say(&format!("Vellum cannot start: {reason}"));
            Status::UNSUPPORTED
        }
    }
}

struct Firmware<'a> {
    image: Handle,
    system: &'a SystemTable,
    services: &'a BootServices,
}

/// The memory map, and what firmware wants to hear with its next call.
struct MemoryMap {
    words: Vec<u64>,
    bytes: usize,
    descriptor_bytes: usize,
    key: usize,
}

impl MemoryMap {
    fn bytes(&self) -> &[u8] {
        // SAFETY: the words are initialized, and `bytes` is no more than firmware wrote into them.
        unsafe { core::slice::from_raw_parts(self.words.as_ptr().cast(), self.bytes) }
    }
}

impl Firmware<'_> {
    fn start(&self, level: u64) -> Result<Infallible, String> {
        if level != CURRENT_EL2 {
            return Err("firmware runs at EL1, but a hypervisor needs EL2".into());
        }
        let copy = self.copy_image()?;
        let volume = self.volume();
        let arguments = self.arguments(volume);
        let rehearsal = self.memory_map()?;
        let described = Described(
            uefi::described_memory(rehearsal.bytes(), rehearsal.descriptor_bytes)
                .map_err(|it| it.to_string())?,
        );
        let firmware_tree = self.table(DEVICE_TREE).and_then(|at| {
            let tree = read_tree(at, &described);
            tree.map_err(|error| self.say(&format!("Vellum goes on without: {error}")))
                .ok()
        });
        let initrd = self.initrd(volume, firmware_tree.as_ref());
        let platform;
        let description = match firmware_tree
            .as_ref()
            .filter(|it| handover::describes_a_machine(it))
        {
            Some(tree) => Description::Tree(tree),
            None => {
                let rsdp = self.table(ACPI_2);
                let rsdp = rsdp.ok_or("firmware gives neither ACPI tables nor a device tree")?;
                platform = Platform::new(rsdp, &described).map_err(|it| it.to_string())?;
                for error in &platform.left_out {
                    self.say(&format!("Vellum goes on without: {error}"));
                }
                Description::Acpi(&platform)
            }
        };
        let tree = |map: &MemoryMap| {
            let free = uefi::free_memory(map.bytes(), map.descriptor_bytes)
                .map_err(|it| it.to_string())?;
            let boot = Boot {
                memory: &free,
                arguments: &arguments,
                initrd: initrd.clone(),
            };
            handover::tree(description, &boot)
                .map_err(|it| format!("no device tree can be made: {it}"))
        };
        check(&tree(&rehearsal)?)?;
        self.say("Vellum leaves UEFI");
        let map = self.leave()?;
        let tree = tree(&map)?;
        // SAFETY: boot services have been left, and the copy is ours.
        unsafe { jump(copy, &tree) }
    }

    /// Copies the image as it is now, before anything has changed in it, to memory that it shares with nobody.
    fn copy_image(&self) -> Result<Range<Pa>, String> {
        let image = arch::boot::image();
        let span = image.data.end.offset_from(image.code.start).unwrap_or(0);
        let bytes = span.next_multiple_of(BLOCK_BYTES) + TREE_BYTES;
        let pages = self.pages(bytes + BLOCK_BYTES)?;
        let Some(start) = pages.align_up(BLOCK_BYTES) else {
            return Err("firmware gives memory beyond 64 bits".into());
        };
        let file = arch::boot::file();
        let length = to_usize(file.end.offset_from(file.start).unwrap_or(0));
        let from = ptr::with_exposed_provenance::<u8>(to_usize(file.start.raw()));
        let to = ptr::with_exposed_provenance_mut::<u8>(to_usize(start.raw()));
        // SAFETY: the image is readable, the new pages are ours, and nothing writes either meanwhile.
        unsafe { ptr::copy_nonoverlapping(from, to, length) };
        Ok(start..Pa::new(start.raw() + bytes))
    }

    fn pages(&self, bytes: u64) -> Result<Pa, String> {
        let mut at = 0;
        // SAFETY: a call as UEFI defines it.
        let status = unsafe {
            (self.services.allocate_pages)(
                AllocateType::ANY_PAGES,
                MemoryType::LOADER_DATA,
                to_usize(bytes.div_ceil(PAGE_BYTES)),
                &raw mut at,
            )
        };
        if status.is_success() {
            Ok(Pa::new(at))
        } else {
            Err(format!("firmware has no {} MiB to give", bytes >> 20))
        }
    }

    /// The configuration table with this identifier.
    fn table(&self, wanted: Guid) -> Option<Pa> {
        let tables = self.system.configuration_table;
        let count = self.system.number_of_configuration_table_entries;
        (0..count).find_map(|index| {
            // SAFETY: firmware says that there are as many.
            let table = unsafe { tables.wrapping_add(index).read() };
            let at = table.vendor_table.expose_provenance() as u64;
            (table.vendor_guid == wanted && at != 0).then_some(Pa::new(at))
        })
    }

    fn protocol<T>(&self, handle: Handle, protocol: Guid) -> Option<*mut T> {
        let mut found = ptr::null_mut::<c_void>();
        // SAFETY: a call as UEFI defines it.
        let status =
            unsafe { (self.services.handle_protocol)(handle, &raw const protocol, &raw mut found) };
        (status.is_success() && !found.is_null()).then_some(found.cast())
    }

    fn loaded_image(&self) -> Option<&LoadedImageProtocol> {
        let found = self.protocol::<LoadedImageProtocol>(self.image, LoadedImageProtocol::GUID)?;
        // SAFETY: firmware's, for as long as boot services live.
        Some(unsafe { &*found })
    }

    /// The root of the volume that the image was loaded from, when it was loaded from one.
    fn volume(&self) -> Option<*mut FileProtocolV1> {
        let device = self.loaded_image()?.device_handle;
        if device.is_null() {
            return None;
        }
        let system =
            self.protocol::<SimpleFileSystemProtocol>(device, SimpleFileSystemProtocol::GUID)?;
        // SAFETY: firmware's protocol.
        let open = unsafe { (*system).open_volume };
        let mut root = ptr::null_mut();
        // SAFETY: a call as UEFI defines it.
        let status = unsafe { open(system, &raw mut root) };
        status.is_success().then_some(root)
    }

    /// A file of the volume in pages of its own, to the byte.
    fn file(&self, volume: Option<*mut FileProtocolV1>, path: &str) -> Option<Range<Pa>> {
        let root = volume?;
        let path: Vec<u16> = path.encode_utf16().chain([0]).collect();
        let mut file = ptr::null_mut();
        // SAFETY: firmware's protocol.
        let open = unsafe { (*root).open };
        // SAFETY: a call as UEFI defines it; the name ends with a zero.
        let status = unsafe {
            open(
                root,
                &raw mut file,
                path.as_ptr(),
                FileMode::READ,
                FileAttribute::empty(),
            )
        };
        status.is_success().then_some(())?;
        let content = self.content(file);
        // SAFETY: firmware's protocol.
        let close = unsafe { (*file).close };
        // SAFETY: a call as UEFI defines it; the file is not used afterwards.
        let closed = unsafe { close(file) };
        debug_assert!(closed.is_success(), "closing a file always succeeds");
        content
    }

    fn content(&self, file: *mut FileProtocolV1) -> Option<Range<Pa>> {
        /// A position that means the end.
        const END: u64 = u64::MAX;
        // SAFETY: firmware's protocol.
        let protocol = unsafe { &*file };
        let mut bytes = 0;
        // SAFETY: calls as UEFI defines them, here and below.
        unsafe { (protocol.set_position)(file, END) }
            .is_success()
            .then_some(())?;
        // SAFETY: as above.
        unsafe { (protocol.get_position)(file, &raw mut bytes) }
            .is_success()
            .then_some(())?;
        // SAFETY: as above.
        unsafe { (protocol.set_position)(file, 0) }
            .is_success()
            .then_some(())?;
        let start = self.pages(bytes.max(1)).ok()?;
        let end = start.checked_add(bytes)?;
        let mut at = start.raw();
        while at < end.raw() {
            let mut part = to_usize(end.raw() - at);
            let to = ptr::with_exposed_provenance_mut::<c_void>(to_usize(at));
            // SAFETY: the pages are ours and have room for so much.
            let status = unsafe { (protocol.read)(file, &raw mut part, to) };
            if !status.is_success() || part == 0 {
                return None;
            }
            at += part as u64;
        }
        Some(start..end)
    }

    /// Load options, else what the file beside the image says.
    fn arguments(&self, volume: Option<*mut FileProtocolV1>) -> String {
        let loaded = self.loaded_image();
        let options = loaded.and_then(|it| {
            let bytes = usize::try_from(it.load_options_size).ok()?;
            if it.load_options.is_null() {
                return None;
            }
            // SAFETY: firmware says that so many bytes are there.
            let options = unsafe { core::slice::from_raw_parts(it.load_options.cast(), bytes) };
            uefi::boot_arguments(options)
        });
        let file = || {
            let content = self.file(volume, ARGUMENTS_FILE)?;
            Some(uefi::argument_lines(bytes_at(&content)))
        };
        options.or_else(file).unwrap_or_default()
    }

    /// From the boot loader, else from the file beside the image, else from the tree that a boot loader left.
    fn initrd(
        &self,
        volume: Option<*mut FileProtocolV1>,
        tree: Option<&Tree<'_>>,
    ) -> Option<Range<Pa>> {
        self.offered_initrd()
            .or_else(|| self.file(volume, BUNDLE_FILE))
            .or_else(|| vellum::dev::machine::initrd(tree?))
    }

    fn offered_initrd(&self) -> Option<Range<Pa>> {
        let mut path = INITRD_PATH.as_ptr().cast::<DevicePathProtocol>();
        let mut handle = ptr::null_mut();
        let wanted = LoadFile2Protocol::GUID;
        // SAFETY: a call as UEFI defines it; the path is a whole one.
        let status = unsafe {
            (self.services.locate_device_path)(&raw const wanted, &raw mut path, &raw mut handle)
        };
        status.is_success().then_some(())?;
        let protocol = self.protocol::<LoadFile2Protocol>(handle, wanted)?;
        // SAFETY: firmware's protocol.
        let load = unsafe { (*protocol).load_file };
        let mut bytes = 0;
        // SAFETY: a call as UEFI defines it: without a buffer it tells the size.
        let status = unsafe {
            load(
                protocol,
                path,
                false.into(),
                &raw mut bytes,
                ptr::null_mut(),
            )
        };
        (status == Status::BUFFER_TOO_SMALL && bytes > 0).then_some(())?;
        let start = self.pages(bytes as u64).ok()?;
        let to = ptr::with_exposed_provenance_mut::<c_void>(to_usize(start.raw()));
        // SAFETY: as above, and the pages are ours.
        let status = unsafe { load(protocol, path, false.into(), &raw mut bytes, to) };
        status
            .is_success()
            .then_some(start..start.checked_add(bytes as u64)?)
    }

    fn memory_map(&self) -> Result<MemoryMap, String> {
        let mut map = MemoryMap {
            words: Vec::new(),
            bytes: 0,
            descriptor_bytes: 0,
            key: 0,
        };
        if self.fill(&mut map) == Status::BUFFER_TOO_SMALL {
            map.words.resize((map.bytes + SLACK_BYTES) / 8, 0);
        }
        match self.fill(&mut map) {
            Status::SUCCESS => Ok(map),
            status => Err(format!("firmware gives no memory map: {status:?}")),
        }
    }

    /// Asks for the map; allocates and prints nothing.
    fn fill(&self, map: &mut MemoryMap) -> Status {
        let mut version = 0;
        map.bytes = map.words.len() * 8;
        // SAFETY: a call as UEFI defines it; the buffer has as many bytes as it says.
        unsafe {
            (self.services.get_memory_map)(
                &raw mut map.bytes,
                map.words.as_mut_ptr().cast(),
                &raw mut map.key,
                &raw mut map.descriptor_bytes,
                &raw mut version,
            )
        }
    }

    /// Leaves boot services and returns the memory map of that moment. Between the look at the map and the leave,
    /// nothing is allocated or printed; firmware may change it all the same, and is asked again.
    fn leave(&self) -> Result<MemoryMap, String> {
        let mut map = self.memory_map()?;
        for _ in 0..ATTEMPTS {
            // SAFETY: a call as UEFI defines it; nothing of boot services is used once it succeeds.
            let left = unsafe { (self.services.exit_boot_services)(self.image, map.key) };
            if left.is_success() {
                return Ok(map);
            }
            if !self.fill(&mut map).is_success() {
                break;
            }
        }
        Err("firmware does not let go: ExitBootServices fails".into())
    }

    /// Says a line on firmware's console.
    fn say(&self, text: &str) {
        let console: *mut SimpleTextOutputProtocol = self.system.stdout;
        if console.is_null() {
            return;
        }
        let line: Vec<u16> = text.encode_utf16().chain([13, 10, 0]).collect();
        // SAFETY: firmware's protocol.
        let print = unsafe { (*console).output_string };
        // SAFETY: a call as UEFI defines it; the text ends with a zero. Nobody can be told if it fails.
        let (Status::SUCCESS | _) = unsafe { print(console, line.as_ptr()) };
    }
}

/// What the memory map describes may be read; an address elsewhere would fault.
struct Described(Vec<Range<Pa>>);

impl Memory for Described {
    fn read(&self, at: Pa, bytes: usize) -> Option<&[u8]> {
        let end = at.checked_add(bytes as u64)?;
        let inside = |it: &Range<Pa>| it.start <= at && end <= it.end;
        (at.raw() != 0 && self.0.iter().any(inside)).then(|| bytes_at(&(at..end)))
    }
}

/// Memory that firmware maps and nobody writes while boot services live.
fn bytes_at(range: &Range<Pa>) -> &'static [u8] {
    let start = ptr::with_exposed_provenance::<u8>(to_usize(range.start.raw()));
    let bytes = to_usize(range.end.offset_from(range.start).unwrap_or(0));
    // SAFETY: callers name memory that is mapped, initialized, and not written.
    unsafe { core::slice::from_raw_parts(start, bytes) }
}

fn read_tree(at: Pa, memory: &Described) -> Result<Tree<'static>, Malformed> {
    let fail = |offset, why| Malformed { offset, why };
    let header = memory.read(at, 8).ok_or(fail(0, Why::Unreadable))?;
    let bytes = tree::total_bytes(header).ok_or(fail(0, Why::Magic))?;
    let whole = memory.read(at, bytes).and(at.checked_add(bytes as u64));
    let end = whole.ok_or(fail(4, Why::Unreadable))?;
    Tree::new(bytes_at(&(at..end)))
}

/// What would be refused later is refused now, where firmware's console can say why.
fn check(tree: &[u8]) -> Result<(), String> {
    if tree.len() + SLACK_BYTES > to_usize(TREE_BYTES) {
        return Err("the device tree is too large".into());
    }
    let tree = Tree::new(tree).map_err(|it| format!("what was made of firmware's tables: {it}"))?;
    let machine = Machine::new(&tree).map_err(|it| it.to_string())?;
    if machine.console.is_none() {
        return Err(
            "no usable console: neither SPCR, DBG2 nor the device tree names a PL011".into(),
        );
    }
    Ok(())
}

/// Puts the tree behind the copy and starts it.
///
/// # Safety
///
/// Boot services have been left; `copy` is memory of our own that holds the image's file and room for the rest.
unsafe fn jump(copy: Range<Pa>, tree: &[u8]) -> ! {
    let at = Pa::new(copy.end.raw() - TREE_BYTES);
    let room = to_usize(TREE_BYTES);
    let to = ptr::with_exposed_provenance_mut::<u8>(to_usize(at.raw()));
    // SAFETY: the room is ours; `check` saw that the tree fits, with slack.
    unsafe { ptr::copy_nonoverlapping(tree.as_ptr(), to, tree.len().min(room)) };
    arch::dc_civac_range(
        copy.start,
        copy.end.offset_from(copy.start).unwrap_or_default(),
    );
    let code = arch::boot::image().code;
    arch::dc_civac_range(
        code.start,
        code.end.offset_from(code.start).unwrap_or_default(),
    );
    // SAFETY: the copy and this code have been cleaned; the copy begins on a block, with room for all of the image.
    unsafe { arch::boot::start_copy(copy.start, at) }
}
