//! The machine itself.

use vellum::addr::{Ipa, Pa};
use vellum::arch;
use vellum::arch::fake::{Access, Event, Features, Machine, Outcome};

use crate::{HOST, RAM, READ, ROOT, VTTBR, WRITABLE, begin, block, guest_with_page, store};

#[test]
fn each_cpu_has_its_block_and_its_vttbr() {
    let machine = guest_with_page(WRITABLE);
    let blocks = [0, 1, 2].map(|cpu| machine.on(cpu, arch::percpu_pointer));
    assert!(blocks[0] != blocks[1] && blocks[1] != blocks[2]);
    assert_eq!(machine.on(1, arch::vttbr), VTTBR);
    assert_eq!(
        machine.on(2, || arch::with_vttbr(VTTBR, arch::vttbr)),
        VTTBR
    );
    assert_eq!(machine.on(2, arch::vttbr), 0);
}

#[test]
fn the_log_names_what_was_executed() {
    let machine = guest_with_page(WRITABLE);
    machine.take_log();
    arch::dsb_ishst();
    arch::tlbi_ipas2e1is(RAM);
    assert_eq!(
        machine.take_log(),
        [Event::DsbIshst, Event::TlbiIpas2e1is(RAM)]
    );
}

#[test]
fn concatenated_initial_tables_are_one_root() {
    let machine = Machine::new(
        1,
        Features {
            initial_tables: 2,
            ..Features::default()
        },
    );
    begin(ROOT);
    begin(ROOT + 0x1000);
    store(ROOT + 0x1000, 0, block(HOST, READ));
    machine.load_vttbr(0, VTTBR);
    arch::dsb_ishst();
    let outcomes = machine.outcomes(0, Ipa::new(1 << 39), Access::Read);
    assert_eq!(outcomes, [Outcome::Hit(Pa::new(HOST))]);
}
