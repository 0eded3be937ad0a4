//! The hostile boot loader: assembly only, in a crate of its own so that a compiler can be asked for it.
#![no_std]
#![no_main]

core::arch::global_asm!(include_str!("hostile.S"));

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
