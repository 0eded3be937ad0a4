//! The guest: boots on vCPU 0, then does what it is told, one operation after the other.

mod asm;
mod debug;
mod events;
mod gic;
mod hostile;
mod interrupts;
mod ipi;
mod measure;
mod pass;
mod restarts;
mod storm;
mod trap;
mod uart;

use core::sync::atomic::Ordering::Relaxed;

use vellum::guest::abi::{self, Area, Params, op, status};

/// What an operation reports.
pub(crate) struct Done {
    status: u64,
    ticks: u64,
    results: [u64; 2],
}

impl Done {
    /// Success with two results; the time is filled in by the loop.
    pub(crate) fn ok(first: u64, second: u64) -> Self {
        Self {
            status: status::OK,
            ticks: 0,
            results: [first, second],
        }
    }
}

/// Rust's first function on every vCPU, on its own stack with its own stage 1 on.
#[unsafe(no_mangle)]
extern "C" fn guest_main(index: u64) -> ! {
    let area = area_of(index);
    area.index.store(index, Relaxed);
    area.affinity.store(asm::affinity(), Relaxed);
    asm::set_area_address(abi::area(index));
    let mut done = if area.lives.load(Relaxed) > 0 {
        restarts::live(area)
    } else {
        gic::init(params().gic, index);
        Done::ok(0, 0)
    };
    loop {
        let command = asm::next(done.status, done.ticks, done.results);
        asm::hint_begin();
        let start = asm::counter();
        done = perform(
            command[0],
            [command[1], command[2], command[3], command[4], command[5]],
        );
        done.ticks = asm::counter() - start;
        asm::hint_end();
        area.operations
            .store(area.operations.load(Relaxed) + 1, Relaxed);
    }
}

fn perform(op: u64, args: [u64; 5]) -> Done {
    let [first, second, third, fourth, fifth] = args;
    match op {
        op::STOP => asm::cpu_off(),
        op::START_OTHERS => Done::ok(start_others(), 0),
        op::PASS => pass::run(first, second, third, fourth, fifth),
        op::FREE_RUN => pass::free_run(first, second, third),
        op::ADD => pass::add(first, second),
        op::ROUNDS => pass::rounds(first, second, third, fourth),
        op::REPORT => uart::report(this_area(), first),
        op::FLOOD if first == 0 => uart::flood(this_area()),
        op::FLOOD => interrupts::flood(this_area()),
        op::STORM => storm::run(first, second, third, fourth),
        op::HELD_TICKS => interrupts::held_ticks(first),
        op::TIMER_TEST => interrupts::timer_test(first != 0),
        op::IPI_SEND => interrupts::ipi_send(first),
        op::IPI_SERVE => interrupts::ipi_serve(first),
        op::EVENTS => events::run(first),
        op::RESTARTS => restarts::run(first),
        op::HOSTILE => hostile::run(first),
        op::DEBUG => debug::run(first),
        op::HYPERCALLS => hypercalls(first),
        op::MEASURE => measure::run(first, second, third, fourth != 0),
        op::LISTEN => ipi::listen(first),
        op::IPI_MODES => ipi::modes(first, second),
        op::FIRMWARE => Done::ok(asm::hvc(first), 1),
        op::AARCH32 => asm::run_aarch32(abi::DATA - 0x1000),
        _ => Done {
            status: status::UNKNOWN,
            ticks: 0,
            results: [op, 0],
        },
    }
}

fn start_others() -> u64 {
    let failed = |index: &u64| asm::cpu_on(affinity_of(*index), *index) != 0;
    (1..params().vcpus).filter(failed).count() as u64
}

/// MPIDR_EL1 affinity that the machine model gives vCPU `index`: 16 to a cluster.
pub(crate) fn affinity_of(index: u64) -> u64 {
    ((index / 16) << 8) | (index % 16)
}

fn hypercalls(count: u64) -> Done {
    for _ in 0..count {
        asm::hvc(abi::HVC_NULL);
    }
    Done::ok(count, 0)
}

/// What the hypervisor said.
pub(crate) fn params() -> Params {
    *asm::place::<Params>(abi::RAM)
}

/// The area of vCPU `index`.
pub(crate) fn area_of(index: u64) -> &'static Area {
    asm::place(abi::area(index))
}

/// The calling vCPU's area.
pub(crate) fn this_area() -> &'static Area {
    asm::place(asm::area_address())
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    asm::fail(status::EXCEPTION, u64::MAX, 0)
}
