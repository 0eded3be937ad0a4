//! Random programs: devices, guests and the virtual CPU interfaces take turns at random, and whatever guests see is what the
//! reference would show them.

use vellum::vm::vgic::access::{self, Frame};

use crate::cpu::{Machine, TIMER};
use crate::reference::{Interrupt, Reference};

/// Interrupts that the programs use: few, so that they meet.
const USED: [u16; 14] = [0, 1, 2, 15, 20, 21, 27, 30, 33, 34, 63, 64, 100, 127];
const PRIORITIES: [u8; 5] = [0x10, 0x50, 0x50, 0xa0, 0xf0];

/// A machine, its reference, and a source of chance.
pub(crate) struct Program {
    machine: Machine,
    reference: Reference,
    random: u64,
    trace: Vec<String>,
}

impl Program {
    pub(crate) fn new(seed: u64, machine: Machine) -> Self {
        let reference = Reference::new(machine.gicv3, machine.cpus.len());
        let mut this = Self {
            machine,
            reference,
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            trace: Vec::new(),
        };
        this.set_control(3);
        for vcpu in 0..this.machine.cpus.len() {
            for intid in USED {
                this.write_bit(vcpu, 0x100, intid);
                this.reference.at(vcpu, intid).enabled = true;
            }
        }
        this
    }

    fn below(&mut self, limit: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        usize::try_from(self.random >> 33).unwrap() % limit
    }

    fn one_of<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }

    /// Runs `steps` steps.
    pub(crate) fn run(&mut self, steps: usize) {
        for _ in 0..steps {
            self.step();
            self.machine.run_loops();
            self.compare();
        }
    }

    /// The machine with everything taken back.
    pub(crate) fn stopped(&mut self) -> &mut Machine {
        for vcpu in 0..self.machine.cpus.len() {
            access::Accessor::take_back(&mut self.machine.by(vcpu));
        }
        &mut self.machine
    }

    /// Lines drop, guests take and end everything, and then nothing is left.
    pub(crate) fn finish(&mut self) {
        self.note(|| "finish".into());
        for vcpu in 0..self.machine.cpus.len() {
            if !self.machine.on[vcpu] {
                self.set_power(vcpu);
            }
            self.set_groups(vcpu, 0b11);
        }
        self.set_control(3);
        let vcpus = self.machine.cpus.len();
        for vcpu in 0..vcpus {
            for intid in USED {
                self.set_line(vcpu, intid, false);
                self.write_bit(vcpu, 0x100, intid);
                self.reference.at(vcpu, intid).enabled = true;
            }
        }
        self.machine.run_loops();
        for _ in 0..200 {
            if (0..vcpus).all(|vcpu| self.is_idle(vcpu)) {
                break;
            }
            for vcpu in 0..vcpus {
                self.acknowledge(vcpu);
                self.machine.run_loops();
                self.end(vcpu);
                self.machine.run_loops();
            }
            for intid in USED {
                (0..vcpus).for_each(|vcpu| self.deactivate(vcpu, intid));
                self.machine.run_loops();
            }
        }
        self.compare();
        for vcpu in 0..vcpus {
            let (_, left) = self.reference.deliverable(vcpu);
            assert!(left.is_empty(), "vCPU {vcpu} never got {left:?}");
            let cpu = &self.machine.cpus[vcpu];
            assert!(
                !cpu.timer_active,
                "the timer's physical active state leaked"
            );
        }
    }

    fn is_idle(&mut self, vcpu: usize) -> bool {
        let is_active = |intid| self.reference.at(vcpu, intid).active;
        let ended = !USED.into_iter().any(is_active);
        ended
            && self.machine.cpus[vcpu].running.is_empty()
            && self.reference.deliverable(vcpu).1.is_empty()
    }

    fn note(&mut self, what: impl FnOnce() -> String) {
        self.trace.push(what());
    }

    fn fail(&self, what: &str) -> ! {
        let from = self.trace.len().saturating_sub(60);
        let gicv = if self.machine.gicv3 { 3 } else { 2 };
        panic!(
            "GICv{gicv}: {what} after:\n{}",
            self.trace[from..].join("\n")
        );
    }

    fn step(&mut self) {
        let vcpu = self.below(self.machine.cpus.len());
        let intid = self.one_of(&USED);
        match self.below(23) {
            20 => self.set_power(vcpu),
            21..23 => {
                let groups = self.one_of(&[0b11, 0b11, 0b01, 0b10, 0b00]);
                self.set_groups(vcpu, groups);
            }
            0..5 => self.acknowledge(vcpu),
            5..8 => self.end(vcpu),
            8 => {
                let asserted = self.below(2) == 1;
                self.set_line(vcpu, intid, asserted);
            }
            9 => self.pulse(intid),
            10..13 => self.send(vcpu, intid % 16),
            13..15 => self.deactivate(vcpu, intid),
            15 => self.enable(vcpu, intid),
            16 => self.pend(vcpu, intid),
            17 => self.activate(vcpu, intid),
            18 => self.configure(vcpu, intid),
            _ => {
                let control = self.one_of(&[3, 3, 3, 1, 2, 0]);
                self.set_control(control);
            }
        }
    }

    /// What the vCPU's CPU interface signals.
    fn set_groups(&mut self, vcpu: usize, groups: u64) {
        self.note(|| format!("vCPU {vcpu} has groups {groups:#b} signalled"));
        self.machine.set_groups(vcpu, groups);
        self.reference.groups[vcpu] = groups;
    }

    /// Off goes only who handles no interrupt; it takes none then.
    fn set_power(&mut self, vcpu: usize) {
        let handles = (0..128).any(|intid| {
            let it = self.reference.at(vcpu, intid);
            it.active && (intid < 32 || it.handler == vcpu)
        });
        let on = !self.machine.on[vcpu];
        if on || !handles && self.machine.cpus[vcpu].running.is_empty() {
            self.note(|| format!("vCPU {vcpu} on: {on}"));
            self.machine.set_power(vcpu, on);
            self.reference.on[vcpu] = on;
        }
    }

    fn acknowledge(&mut self, vcpu: usize) {
        if !self.machine.on[vcpu] {
            return;
        }
        let choice = self.below(16);
        let running = self.machine.cpus[vcpu]
            .running
            .last()
            .map_or(0x100, |it| u16::from(it.2));
        let taken = self.machine.acknowledge(vcpu, choice);
        self.note(|| format!("vCPU {vcpu} takes {taken:x?}"));
        let (best, candidates) = self.reference.deliverable(vcpu);
        match taken {
            None if best < running => self.fail(&format!("{candidates:?} not delivered")),
            None => {}
            // What is listed stays so when the line drops unseen.
            Some((TIMER, source, _)) if !self.reference.at(vcpu, TIMER).line => {
                self.reference.take(vcpu, TIMER, source);
            }
            Some((intid, source, priority)) => {
                if u16::from(priority) != best || !candidates.contains(&intid) {
                    self.fail(&format!("not one of {candidates:?} of {best:#x}"));
                }
                let it = *self.reference.at(vcpu, intid);
                if !self.reference.gicv3 && intid < 16 && it.senders >> source & 1 == 0 {
                    self.fail("not a sender");
                }
                self.reference.take(vcpu, intid, source);
            }
        }
    }

    fn end(&mut self, vcpu: usize) {
        let ended = self.machine.end(vcpu);
        self.note(|| format!("vCPU {vcpu} ends {ended:x?}"));
        if let Some((intid, ..)) = ended.filter(|_| !self.machine.eoi_mode) {
            self.reference.at(vcpu, intid).active = false;
        }
    }

    /// ICC_DIR or GICC_DIR, which guests of EOImode 0 never write.
    fn deactivate(&mut self, vcpu: usize, intid: u16) {
        if !self.machine.eoi_mode {
            return;
        }
        self.note(|| format!("vCPU {vcpu} deactivates {intid}"));
        access::deactivate(&mut self.machine.by(vcpu), u32::from(intid));
        self.reference.at(vcpu, intid).active = false;
    }

    fn set_line(&mut self, vcpu: usize, intid: u16, asserted: bool) {
        if intid < 16 {
            return;
        }
        self.note(|| format!("line {intid} of vCPU {vcpu}: {asserted}"));
        match intid {
            // It reaches the model when its interrupt does or its vCPU looks: nobody is told when it drops.
            TIMER => self.machine.cpus[vcpu].timer_line = asserted,
            0..32 => {
                let private = u8::try_from(intid).unwrap();
                self.machine.set_private_line(vcpu, private, asserted);
            }
            _ => self
                .machine
                .change(intid, |shared| shared.set_line(intid, asserted)),
        }
        let it = self.reference.at(vcpu, intid);
        it.latch |= it.edge && asserted && !it.line;
        it.line = asserted;
    }

    fn pulse(&mut self, intid: u16) {
        if intid >= 32 {
            self.note(|| format!("pulse {intid}"));
            self.machine.change(intid, |shared| shared.pulse(intid));
            let it = self.reference.at(0, intid);
            it.latch |= it.edge;
        }
    }

    fn send(&mut self, vcpu: usize, intid: u16) {
        let count = self.machine.cpus.len();
        let list = self.below(1 << count);
        let to_others = self.below(4) == 0;
        let receivers: Vec<usize> = (0..count)
            .filter(|it| {
                if to_others {
                    *it != vcpu
                } else {
                    list >> it & 1 != 0
                }
            })
            .collect();
        self.note(|| format!("vCPU {vcpu} sends {intid} to {receivers:?}"));
        let list = list as u64;
        let group1 = self.below(4) != 0;
        let mut by = self.machine.by(vcpu);
        if by.machine.gicv3 {
            let others = if to_others { 1 << 40 } else { 0 };
            access::send_v3(&by, u64::from(intid) << 24 | others | list, group1);
            self.reference.send(vcpu, &receivers, intid, Some(group1));
        } else {
            let filter = if to_others { 1 << 24 } else { 0 };
            let value = list << 16 | filter | u64::from(intid);
            access::write(&mut by, Frame::DistributorV2, 0xf00, 4, value);
            self.reference.send(vcpu, &receivers, intid, None);
        }
    }

    /// The frame and offset of the register at `base` that has `bits` for each interrupt, as `vcpu` finds it.
    fn register(&self, vcpu: usize, base: u64, bits: u64, intid: u16) -> (Frame, u64) {
        let offset = base + u64::from(intid) * bits / 32 * 4;
        match (self.machine.gicv3, intid < 32) {
            (true, true) => (Frame::Redistributor(vcpu), 0x1_0000 + offset),
            (true, false) => (Frame::DistributorV3, offset),
            (false, _) => (Frame::DistributorV2, offset),
        }
    }

    /// Any vCPU can access a redistributor and what is shared; on GICv2 only the vCPU itself what is private.
    fn accessor(&mut self, vcpu: usize) -> usize {
        let any = self.below(self.machine.cpus.len());
        if self.machine.gicv3 { any } else { vcpu }
    }

    fn write_bit(&mut self, vcpu: usize, base: u64, intid: u16) {
        let (frame, offset) = self.register(vcpu, base, 1, intid);
        let by = self.accessor(vcpu);
        self.note(|| format!("vCPU {by} writes {frame:?} {offset:#x}: {intid}"));
        access::write(
            &mut self.machine.by(by),
            frame,
            offset,
            4,
            1 << (intid % 32),
        );
    }

    fn enable(&mut self, vcpu: usize, intid: u16) {
        let enable = self.below(3) != 0;
        self.write_bit(vcpu, if enable { 0x100 } else { 0x180 }, intid);
        self.reference.at(vcpu, intid).enabled = enable;
    }

    fn pend(&mut self, vcpu: usize, intid: u16) {
        let pend = self.below(2) == 0;
        if !self.machine.gicv3 && intid < 16 {
            let sender = self.below(self.machine.cpus.len());
            let offset = if pend { 0xf20 } else { 0xf10 } + u64::from(intid);
            self.note(|| format!("vCPU {vcpu} writes {offset:#x}: {sender}"));
            let mut by = self.machine.by(vcpu);
            access::write(&mut by, Frame::DistributorV2, offset, 1, 1 << sender);
            let it = self.reference.at(vcpu, intid);
            it.senders = it.senders & !(1 << sender) | u8::from(pend) << sender;
            return;
        }
        self.write_bit(vcpu, if pend { 0x200 } else { 0x280 }, intid);
        self.reference.at(vcpu, intid).latch = pend;
    }

    /// Whether some guest has taken `intid` and not dropped its priority. What then becomes of it by other writes than its end
    /// is unpredictable.
    fn runs(&self, intid: u16) -> bool {
        let running = |it: &crate::cpu::Cpu| it.running.iter().any(|it| it.0 == intid);
        self.machine.cpus.iter().any(running)
    }

    /// Active state that no acknowledge brought about is told apart from what runs only by GICC_DIR: EOImode 1.
    fn activate(&mut self, vcpu: usize, intid: u16) {
        if !self.machine.eoi_mode || self.runs(intid) {
            return;
        }
        let activate = self.below(3) == 0;
        self.write_bit(vcpu, if activate { 0x300 } else { 0x380 }, intid);
        let target = self
            .reference
            .target(&self.reference.shared[usize::from(intid % 96)]);
        let it = self.reference.at(vcpu, intid);
        if activate && !it.active {
            it.handler = target.unwrap_or(0);
        }
        it.active = activate;
    }

    /// Priority, group, trigger and route, of interrupts that nobody handles.
    fn configure(&mut self, vcpu: usize, intid: u16) {
        if self.reference.at(vcpu, intid).active || self.runs(intid) {
            return;
        }
        match self.below(4) {
            0 => {
                let priority = self.one_of(&PRIORITIES);
                let (frame, word) = self.register(vcpu, 0x400, 8, intid);
                let (by, offset) = (self.accessor(vcpu), word + u64::from(intid % 4));
                self.note(|| format!("vCPU {by} gives {intid} of {vcpu} priority {priority:#x}"));
                let mut by = self.machine.by(by);
                access::write(&mut by, frame, offset, 1, u64::from(priority));
                self.reference.at(vcpu, intid).priority = priority;
            }
            1 => self.regroup(vcpu, intid),
            2 if intid >= 32 => self.reroute(vcpu, intid),
            3 if intid >= 32 => self.retrigger(vcpu, intid),
            _ => {}
        }
    }

    fn regroup(&mut self, vcpu: usize, intid: u16) {
        let it = self.reference.at(vcpu, intid);
        it.group1 = !it.group1;
        let value = self.reference.word(vcpu, intid & !31, |it| it.group1);
        let (frame, offset) = self.register(vcpu, 0x80, 1, intid);
        let by = self.accessor(vcpu);
        self.note(|| format!("vCPU {by} writes groups {offset:#x}: {value:#x}"));
        access::write(&mut self.machine.by(by), frame, offset, 4, value);
    }

    fn reroute(&mut self, vcpu: usize, intid: u16) {
        let count = self.machine.cpus.len();
        let (frame, offset, bytes, value) = if self.machine.gicv3 {
            let any = if self.below(4) == 0 { 1 << 31 } else { 0 };
            let affinity = self.below(count + 1) as u64;
            let offset = 0x6000 + 8 * u64::from(intid);
            (Frame::DistributorV3, offset, 8, any | affinity)
        } else {
            let targets = self.below(1 << count) as u64;
            (Frame::DistributorV2, 0x800 + u64::from(intid), 1, targets)
        };
        self.note(|| format!("vCPU {vcpu} routes {intid} to {value:#x}"));
        access::write(&mut self.machine.by(vcpu), frame, offset, bytes, value);
        self.reference.at(vcpu, intid).route = value;
    }

    /// While it is pending, what a change does is unpredictable.
    fn retrigger(&mut self, vcpu: usize, intid: u16) {
        let it = self.reference.at(vcpu, intid);
        if it.is_pending() || it.line {
            return;
        }
        it.edge = !it.edge;
        let half = intid & !15;
        let word = self.reference.word(vcpu, intid & !31, |it| it.edge) >> (half % 32);
        let value = (0..16).fold(0, |value, n| value | (word >> n & 1) << (2 * n + 1));
        let offset = 0xc00 + u64::from(half) / 4;
        let (frame, _) = self.register(vcpu, 0, 1, intid);
        self.note(|| format!("vCPU {vcpu} writes triggers {offset:#x}: {value:#x}"));
        access::write(&mut self.machine.by(vcpu), frame, offset, 4, value);
    }

    fn set_control(&mut self, control: u32) {
        self.note(|| format!("groups {control}"));
        let frame = if self.machine.gicv3 {
            Frame::DistributorV3
        } else {
            Frame::DistributorV2
        };
        access::write(&mut self.machine.by(0), frame, 0, 4, u64::from(control));
        self.reference.control = control;
    }

    /// Reads a register, which may make another vCPU take interrupts back.
    fn compare(&mut self) {
        let vcpu = self.below(self.machine.cpus.len());
        let by = self.accessor(vcpu);
        let first = self.one_of(&[0, 32, 64, 96]);
        type Bit = fn(&Interrupt) -> bool;
        let registers: [(u64, Bit); 4] = [
            (0x080, |it| it.group1),
            (0x180, |it| it.enabled),
            (0x200, Interrupt::is_pending),
            (0x380, |it| it.active),
        ];
        let (base, bit) = self.one_of(&registers);
        let (frame, offset) = self.register(vcpu, base, 1, first);
        let read = access::read(&mut self.machine.by(by), frame, offset, 4);
        let expected = self.reference.word(vcpu, first, bit);
        // The linked interrupt reads as pending until it is taken, whatever its line is then.
        let handled = first == 0 && base == 0x200 && self.reference.at(vcpu, TIMER).active;
        let compared = if handled { !(1 << TIMER) } else { !0 };
        let mut wrong = (read ^ expected) & compared;
        if by != vcpu && first == 0 && wrong == 1 << TIMER {
            // That its line has dropped, others see when its vCPU has looked, which the first read makes it do.
            self.machine.run_loops();
            let again = access::read(&mut self.machine.by(by), frame, offset, 4);
            wrong = (again ^ expected) & compared;
        }
        if wrong != 0 {
            self.fail(&format!(
                "vCPU {by} reads {read:#x} instead of {expected:#x} at {frame:?} {offset:#x}"
            ));
        }
        self.machine.run_loops();
    }
}

fn programs(vcpus: usize, lists: usize, eoi_mode: bool) {
    for gicv3 in [false, true] {
        for seed in 0..30 {
            let mut program = Program::new(seed, Machine::new(gicv3, vcpus, lists, eoi_mode));
            program.run(400);
            program.finish();
        }
    }
}

#[test]
fn guests_see_the_architecture_with_four_list_registers() {
    programs(3, 4, false);
}

#[test]
fn guests_see_the_architecture_with_sixteen_list_registers() {
    programs(3, 16, false);
}

#[test]
fn guests_see_the_architecture_with_one_list_register() {
    programs(2, 1, false);
}

#[test]
fn guests_that_deactivate_see_the_architecture_with_four_list_registers() {
    programs(3, 4, true);
}

#[test]
fn guests_that_deactivate_see_the_architecture_with_sixteen_list_registers() {
    programs(3, 16, true);
}

#[test]
fn guests_that_deactivate_see_the_architecture_with_one_list_register() {
    programs(2, 1, true);
}

/// Group-0 interrupts that the guest's CPU interface does not signal, more urgent than anything and more than list registers.
#[test]
fn what_is_not_signalled_keeps_nothing_from_coming() {
    for (gicv3, lists) in [(false, 1), (false, 4), (true, 1), (true, 4)] {
        let mut machine = Machine::new(gicv3, 1, lists, false);
        let (frame, sgis) = if gicv3 {
            (Frame::Redistributor(0), 0x1_0000)
        } else {
            (Frame::DistributorV2, 0)
        };
        let control = if gicv3 {
            Frame::DistributorV3
        } else {
            Frame::DistributorV2
        };
        let mut write = |frame, offset, value| {
            access::write(&mut machine.by(0), frame, offset, 4, value);
        };
        // PPIs 16 to 23 in group 0, of priority 0.
        write(frame, sgis + 0x80, 1 << 27 | 1 << 30);
        for word in 0..8 {
            let priority = if (4..6).contains(&word) {
                0
            } else {
                0xa0a0_a0a0
            };
            write(frame, sgis + 0x400 + 4 * word, priority);
        }
        write(frame, sgis + 0x100, u64::from(u32::MAX));
        write(control, 0, 3);
        machine.set_groups(0, 0b10);
        for intid in (16..24).chain([30]) {
            machine.set_private_line(0, intid, true);
        }
        machine.run_loops();
        let taken = machine.acknowledge(0, 0).map(|taken| taken.0);
        assert_eq!(taken, Some(30), "GICv3: {gicv3}, {lists} list registers");
        machine.set_private_line(0, 30, false);
        machine.end(0);
        machine.run_loops();
        machine.set_groups(0, 0b11);
        machine.run_loops();
        let taken = machine.acknowledge(0, 0).map(|taken| taken.0);
        assert!(taken.is_some_and(|intid| (16..24).contains(&intid)));
    }
}

/// The timer fires while its interrupt is disabled, or while the guest takes none, and the guest turns it off: nobody is told, and
/// yet it is not pending any more, for the guest itself at once, for another when it has looked once.
#[test]
fn a_timer_that_was_turned_off_is_not_pending() {
    for (gicv3, enabled) in [(false, false), (false, true), (true, false), (true, true)] {
        for by in if gicv3 { 0..2 } else { 0..1 } {
            let mut machine = Machine::new(gicv3, 2, 4, false);
            let (control, frame, base) = if gicv3 {
                (Frame::DistributorV3, Frame::Redistributor(0), 0x1_0000)
            } else {
                (Frame::DistributorV2, Frame::DistributorV2, 0)
            };
            access::write(&mut machine.by(0), control, 0, 4, 3);
            if enabled {
                access::write(&mut machine.by(0), frame, base + 0x100, 4, 1 << TIMER);
            }
            let pending = |machine: &mut Machine| {
                let read = access::read(&mut machine.by(by), frame, base + 0x200, 4);
                machine.run_loops();
                read >> TIMER & 1
            };
            machine.run_loops();
            machine.cpus[0].timer_line = true;
            machine.run_loops();
            assert_eq!(pending(&mut machine), 1, "{gicv3} {enabled} {by}");
            machine.cpus[0].timer_line = false;
            if by != 0 {
                pending(&mut machine);
            }
            assert_eq!(pending(&mut machine), 0, "{gicv3} {enabled} {by}");
            assert!(!machine.cpus[0].timer_active);
        }
    }
}

/// All SPIs are pending and for any vCPU, and only the last of many is on: no step asks a vCPU more than once whether it is on.
#[test]
fn interrupts_for_any_vcpu_ask_each_once() {
    let mut machine = Machine::new(true, 123, 4, false);
    for vcpu in 0..122 {
        machine.set_power(vcpu, false);
    }
    let mut write = |offset, bytes, value| {
        let before = machine.asked.get();
        access::write(
            &mut machine.by(122),
            Frame::DistributorV3,
            offset,
            bytes,
            value,
        );
        assert!(machine.asked.get() - before <= 123, "write at {offset:#x}");
        let (before, updates) = (machine.asked.get(), machine.cpus[122].updates);
        machine.run_loops();
        let updates = machine.cpus[122].updates - updates;
        assert!(machine.asked.get() - before <= 123 * updates);
    };
    (32..128).for_each(|intid| write(0x6000 + 8 * intid, 8, 1 << 31));
    (1..4).for_each(|word| write(0x200 + 4 * word, 4, u64::from(u32::MAX)));
    write(0, 4, 3);
    (1..4).for_each(|word| write(0x100 + 4 * word, 4, u64::from(u32::MAX)));
    assert!(machine.acknowledge(122, 0).is_some());
}

/// Every vCPU handles an interrupt, its own or a shared one, and has it listed all the while: who turns a group off asks all of
/// them, and waits for all of them at once.
#[test]
fn who_turns_a_group_off_waits_for_all_at_once() {
    for (gicv3, vcpus) in [(false, 8), (true, 16)] {
        let mut machine = Machine::new(gicv3, vcpus, 4, false);
        let write = |machine: &mut Machine, by, (frame, offset), bytes, value| {
            access::write(&mut machine.by(by), frame, offset, bytes, value);
            machine.run_loops();
        };
        let shared = if gicv3 {
            Frame::DistributorV3
        } else {
            Frame::DistributorV2
        };
        write(&mut machine, 0, (shared, 0), 4, 3);
        for (vcpu, spi) in (0..vcpus).zip([None, Some(40), None, Some(100)].into_iter().cycle()) {
            let intid = spi.map_or(20, |spi| spi + vcpu as u64);
            let (word, bit) = (intid / 32 * 4, 1 << (intid % 32));
            let (private, routes, bytes, route) = if gicv3 {
                let private = (Frame::Redistributor(vcpu), 0x1_0100);
                (private, 0x6000 + 8 * intid, 8, vcpu as u64)
            } else {
                ((shared, 0x100), 0x800 + intid, 1, 1 << vcpu)
            };
            if spi.is_some() {
                write(&mut machine, vcpu, (shared, routes), bytes, route);
                write(&mut machine, vcpu, (shared, 0x100 + word), 4, bit);
                write(&mut machine, vcpu, (shared, 0x200 + word), 4, bit);
            } else {
                write(&mut machine, vcpu, private, 4, bit);
                machine.set_private_line(vcpu, 20, true);
                machine.run_loops();
            }
            let taken = machine.acknowledge(vcpu, 0).map(|taken| u64::from(taken.0));
            assert_eq!(taken, Some(intid), "{gicv3} {vcpu}");
        }
        let before = machine.waits;
        write(&mut machine, 0, (shared, 0), 4, 0);
        assert_eq!(machine.waits - before, 1, "{gicv3}");
    }
}

/// Who waits for what another has listed asks again: it does not depend on one word that may be lost.
#[test]
fn a_word_that_is_lost_hangs_nobody() {
    for (gicv3, intid) in [(true, 20), (true, 40), (false, 40)] {
        let mut program = Program::new(1, Machine::new(gicv3, 2, 4, false));
        let mut write = |by, (frame, offset), bytes, value| {
            access::write(&mut program.machine.by(by), frame, offset, bytes, value);
        };
        let register = |base| match (gicv3, intid < 32) {
            (true, false) => (Frame::DistributorV3, base + 4 * (intid / 32)),
            (false, _) => (Frame::DistributorV2, base + 4 * (intid / 32)),
            (true, true) => (Frame::Redistributor(0), 0x1_0000 + base),
        };
        write(0, register(0x100), 4, 1 << (intid % 32));
        if !gicv3 {
            write(0, (Frame::DistributorV2, 0x800 + intid), 1, 1);
        }
        write(0, register(0x200), 4, 1 << (intid % 32));
        program.machine.run_loops();
        program.machine.lost.set(1);
        let (frame, offset) = register(0x200);
        let pending = access::read(&mut program.machine.by(1), frame, offset, 4);
        assert_eq!(pending, 1 << (intid % 32), "GICv3: {gicv3}, {intid}");
    }
}

/// SGIs of one priority are sent again and again by others; each is taken as often as every other.
#[test]
fn equals_are_served_in_turn() {
    for gicv3 in [false, true] {
        let mut machine = Machine::new(gicv3, 2, 4, false);
        let mut program = Program::new(1, Machine::new(gicv3, 2, 4, false));
        std::mem::swap(&mut machine, &mut program.machine);
        for intid in 0..16 {
            let (frame, offset) = if gicv3 {
                (Frame::Redistributor(0), 0x1_0100)
            } else {
                (Frame::DistributorV2, 0x100)
            };
            access::write(&mut machine.by(0), frame, offset, 4, 1 << intid);
        }
        let control = if gicv3 {
            Frame::DistributorV3
        } else {
            Frame::DistributorV2
        };
        access::write(&mut machine.by(0), control, 0, 4, 3);
        let mut taken = [0; 16];
        for _ in 0..1600 {
            for intid in 0..16_u64 {
                let mut by = machine.by(1);
                if gicv3 {
                    access::send_v3(&by, intid << 24 | 1, true);
                } else {
                    access::write(&mut by, Frame::DistributorV2, 0xf00, 4, 1 << 16 | intid);
                }
            }
            machine.run_loops();
            // The CPU interface prefers the lowest list register.
            let (intid, ..) = machine.acknowledge(0, 0).expect("all are pending");
            taken[usize::from(intid)] += 1;
            machine.run_loops();
            machine.end(0);
            machine.run_loops();
        }
        assert_eq!(taken, [100; 16]);
    }
}

/// An interrupt for any of several, between its coming and its being taken while one of them is turned on or off: whoever it is
/// for afterwards gets it.
#[test]
fn who_comes_or_goes_keeps_no_interrupt_from_others() {
    const SPI: u16 = 40;
    let (word, bit) = (4 * (u64::from(SPI) / 32), 1 << (SPI % 32));
    for (gicv3, forwarded, goes) in [false, true]
        .into_iter()
        .flat_map(|gicv3| [(gicv3, false), (gicv3, true)])
        .flat_map(|(gicv3, forwarded)| [(gicv3, forwarded, false), (gicv3, forwarded, true)])
    {
        let mut machine = Machine::new(gicv3, 2, 4, false);
        let (frame, routes, any, bytes) = if gicv3 {
            let routes = 0x6000 + 8 * u64::from(SPI);
            (Frame::DistributorV3, routes, 1 << 31, 8)
        } else {
            let routes = 0x800 + u64::from(SPI);
            (Frame::DistributorV2, routes, 0b11, 1)
        };
        let write = |machine: &mut Machine, offset, bytes, value| {
            access::write(&mut machine.by(1), frame, offset, bytes, value);
            machine.run_loops();
        };
        write(&mut machine, 0x080 + word, 4, bit);
        write(&mut machine, 0x100 + word, 4, bit);
        write(&mut machine, routes, bytes, any);
        machine.set_power(0, goes);
        machine.run_loops();
        if forwarded {
            write(&mut machine, 0, 4, 3);
        }
        machine.change(SPI, |shared| shared.set_line(SPI, true));
        machine.run_loops();
        machine.set_power(0, !goes);
        machine.run_loops();
        write(&mut machine, 0, 4, 3);
        // What vCPU 1 had listed it may keep.
        let candidates = [Some(1), (!goes).then_some(0)];
        let mut takes = |vcpu| machine.acknowledge(vcpu, 0).map(|taken| taken.0);
        let taken = candidates.into_iter().flatten().find_map(&mut takes);
        assert_eq!(taken, Some(SPI), "{gicv3} {forwarded} {goes}");
    }
}
