//! Every offset of every frame by every width: each access is answered, and those that the architecture does not have read
//! as zero and change nothing.

use vellum::vm::vgic::access::{self, Frame};
use vellum::vm::vgic::state::{PrivateState, SharedState};

use crate::cpu::Machine;

const WIDTHS: [u8; 4] = [1, 2, 4, 8];

fn frames(gicv3: bool) -> Vec<(Frame, u64)> {
    if gicv3 {
        let redistributor = |vcpu| (Frame::Redistributor(vcpu), 0x2_0000);
        let own_and_others = [0, 1, 2].map(redistributor);
        let mut frames = own_and_others.to_vec();
        frames.push((Frame::DistributorV3, 0x1_0000));
        frames
    } else {
        vec![
            (Frame::DistributorV2, 0x1000),
            (Frame::Deactivation, 0x1000),
        ]
    }
}

/// Whether the register at `offset` can be accessed by `width` bytes, as the manuals list them.
fn is_allowed(frame: Frame, offset: u64, width: u8) -> bool {
    let bytes = match frame {
        Frame::DistributorV2 => matches!(offset, 0x400..0x480 | 0x800..0x880 | 0xf10..0xf30),
        Frame::DistributorV3 => (0x420..0x480).contains(&offset),
        Frame::Redistributor(_) => (0x1_0400..0x1_0420).contains(&offset),
        Frame::Deactivation => false,
    };
    match width {
        1 => bytes,
        2 => false,
        4 => true,
        _ => match frame {
            Frame::DistributorV3 => (0x6100..0x6400).contains(&offset),
            Frame::Redistributor(_) => offset == 8,
            _ => false,
        },
    }
}

fn state(machine: &mut Machine) -> (u32, SharedState, Vec<PrivateState>) {
    for vcpu in 0..3 {
        access::Accessor::take_back(&mut machine.by(vcpu));
    }
    let control = *machine.control.get_mut();
    let shared = machine.shared.lock().save().unwrap();
    let private = machine
        .cpus
        .iter()
        .map(|cpu| cpu.private.lock().save().unwrap());
    (control, shared, private.collect())
}

/// A machine in which registers of every kind hold something.
fn machine(gicv3: bool) -> Machine {
    let mut machine = Machine::new(gicv3, 3, 4, false);
    for (frame, bytes) in frames(gicv3) {
        for offset in (0..bytes).step_by(4) {
            // Nothing is cleared, disabled or ended.
            if !matches!(offset & 0xff80, 0x180 | 0x280 | 0x380) && frame != Frame::Deactivation {
                access::write(&mut machine.by(1), frame, offset, 4, 0x0303_0503);
            }
        }
    }
    machine.run_loops();
    machine
}

#[test]
fn accesses_of_a_width_that_a_register_does_not_have_read_zero_and_change_nothing() {
    for gicv3 in [false, true] {
        let mut machine = machine(gicv3);
        let before = state(&mut machine);
        for (frame, bytes) in frames(gicv3) {
            for width in WIDTHS {
                for offset in (0..bytes).step_by(usize::from(width)) {
                    if is_allowed(frame, offset, width) {
                        continue;
                    }
                    let mut by = machine.by(1);
                    let value = access::read(&mut by, frame, offset, width);
                    assert_eq!(value, 0, "{frame:?} {offset:#x} by {width}");
                    access::write(&mut by, frame, offset, width, u64::MAX);
                }
            }
            assert_eq!(state(&mut machine), before, "{frame:?}");
        }
    }
}

#[test]
fn every_access_is_answered() {
    for gicv3 in [false, true] {
        let mut machine = machine(gicv3);
        for value in [u64::MAX, 0, 0x5a5a_5a5a_5a5a_5a5a] {
            for (frame, bytes) in frames(gicv3) {
                for width in WIDTHS {
                    for offset in (0..bytes).step_by(usize::from(width)) {
                        let mut by = machine.by(usize::try_from(offset / 4 % 3).unwrap());
                        access::write(&mut by, frame, offset, width, value);
                        let read = access::read(&mut by, frame, offset, width);
                        assert_eq!(read >> (8 * width - 1) >> 1, 0, "more than was asked for");
                    }
                }
                machine.run_loops();
            }
        }
    }
}

#[test]
fn bytes_and_double_words_are_those_of_the_words() {
    for gicv3 in [false, true] {
        let mut machine = machine(gicv3);
        for (frame, bytes) in frames(gicv3) {
            for width in [1, 8] {
                for offset in (0..bytes).step_by(usize::from(width)) {
                    if !is_allowed(frame, offset, width) {
                        continue;
                    }
                    let mut by = machine.by(1);
                    let mut word = |offset| access::read(&mut by, frame, offset, 4);
                    let expected = if width == 1 {
                        word(offset & !3) >> (8 * (offset & 3)) & 0xff
                    } else {
                        word(offset) | word(offset + 4) << 32
                    };
                    let read = access::read(&mut by, frame, offset, width);
                    assert_eq!(read, expected, "{frame:?} {offset:#x} by {width}");
                }
            }
        }
    }
}

#[test]
fn what_does_not_exist_reads_zero_and_ignores_writes() {
    for gicv3 in [false, true] {
        let mut machine = machine(gicv3);
        for (frame, bytes) in frames(gicv3) {
            for offset in (0..bytes)
                .step_by(4)
                .filter(|offset| is_reserved(frame, *offset))
            {
                let mut by = machine.by(1);
                access::write(&mut by, frame, offset, 4, u64::MAX);
                let read = access::read(&mut by, frame, offset, 4);
                assert_eq!(read, 0, "{frame:?} {offset:#x}");
            }
        }
    }
}

/// Words that hold nothing in a VM with 96 SPIs, without LPIs, message-based SPIs and extended ranges.
fn is_reserved(frame: Frame, offset: u64) -> bool {
    let words = |offset: u64| match offset {
        0x080..0x400 => Some(offset & 0x7f),
        _ => None,
    };
    match frame {
        Frame::DistributorV2 => match offset {
            0x00c..0x080 | 0x480..0x800 | 0x880..0xc00 | 0xc20..0xf10 | 0xf30..0xfd0 => {
                offset != 0xf00
            }
            _ => words(offset).is_some_and(|at| at > 12),
        },
        Frame::DistributorV3 => match offset {
            0x00c..0x080 | 0x400..0x420 | 0x480..0xc08 | 0xc20..0x6100 | 0x6400..0xffd0 => true,
            0x6100..0x6400 => offset % 8 == 4,
            _ => words(offset).is_some_and(|at| at == 0 || at > 12),
        },
        Frame::Redistributor(_) => match offset {
            0x0000 | 0x0010 | 0x0018..0xffd0 => true,
            0x1_0080..0x1_0400 => offset & 0x7f != 0,
            0x1_0000..0x1_0080 | 0x1_0420..0x1_0c00 | 0x1_0c04..0x2_0000 => true,
            _ => false,
        },
        Frame::Deactivation => true,
    }
}
