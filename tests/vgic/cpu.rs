//! The virtual CPU interface of a CPU, played on the contents of its list registers, as IHI 0048B (5.2) and IHI 0069H (6.3)
//! describe it, and the run loop's side of it, which is the hypervisor's own code.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU32};

use spin::Mutex;
use vellum::addr::Pa;
use vellum::arch;
use vellum::dev::mmio::Registers;
use vellum::vm::vgic::access::Accessor;
use vellum::vm::vgic::flight::{Holder, SpiSet, concern};
use vellum::vm::vgic::homes::Homes;
use vellum::vm::vgic::interface::{Access, Interface, Saved};
use vellum::vm::vgic::lists::{Entry, Format, State};
use vellum::vm::vgic::private::{Private, Wiring};
use vellum::vm::vgic::shared::{Routing, Shared};

/// The virtual timer's PPI, linked to this physical one.
pub(crate) const TIMER: u16 = 27;
const PHYSICAL: u16 = 30;

const GICH_HCR: usize = 0x00;
const GICH_VTR: usize = 0x04;
const GICH_VMCR: usize = 0x08;
const GICH_LR: usize = 0x100;
const HCR_EOI_COUNT: u32 = 27;
/// ICH_VMCR_EL2 and GICH_VMCR: both groups are signalled.
const BOTH_GROUPS: u64 = 0b11;
/// Polls after which an answer that has not come never comes.
const PATIENCE: usize = 1_000_000;

/// An interrupt that a guest has taken: number, sender, priority.
pub(crate) type Taken = (u16, u8, u8);

/// A CPU, its vCPU and what this one's guest did.
pub(crate) struct Cpu {
    access: Access,
    /// List registers, HCR and VMCR while another CPU's are in place (GICv3).
    parked: ([u64; 16], u64, u64),
    interface: Interface,
    pub(crate) private: Mutex<Private>,
    spis: AtomicBool,
    attention: Cell<bool>,
    /// Priorities not yet dropped, the last is the highest.
    pub(crate) running: Vec<Taken>,
    pub(crate) timer_line: bool,
    /// The timer's physical interrupt is active.
    pub(crate) timer_active: bool,
    /// How often its list registers were brought up to date.
    pub(crate) updates: usize,
}

/// A VM whose vCPUs each have a CPU.
pub(crate) struct Machine {
    pub(crate) gicv3: bool,
    pub(crate) eoi_mode: bool,
    lists: usize,
    pub(crate) cpus: Vec<Cpu>,
    /// Which vCPUs are on.
    pub(crate) on: Vec<bool>,
    pub(crate) shared: Mutex<Shared>,
    pub(crate) control: AtomicU32,
    current: usize,
    /// So many more times, what is asked of a vCPU reaches nobody.
    pub(crate) lost: Cell<usize>,
    /// How often somebody waited for others.
    pub(crate) waits: usize,
    /// How often a vCPU was asked whether it is on.
    pub(crate) asked: Cell<usize>,
}

/// A vCPU of a machine that accesses registers.
pub(crate) struct By<'a> {
    pub(crate) machine: &'a mut Machine,
    pub(crate) own: usize,
}

impl Machine {
    pub(crate) fn new(gicv3: bool, vcpus: usize, lists: usize, eoi_mode: bool) -> Self {
        let vmcr = BOTH_GROUPS | if eoi_mode { 1 << 9 } else { 0 };
        arch::set_ich_lr_count(lists);
        let saved = Saved {
            vmcr,
            active_priorities: [0; 8],
        };
        let cpu = |_| {
            let access = if gicv3 {
                Access::V3
            } else {
                Access::V2(gich(lists))
            };
            let interface = Interface::load(access, &saved);
            let parked = ([0; 16], arch::ich_hcr(), arch::ich_vmcr());
            Cpu {
                access,
                parked,
                interface,
                private: Mutex::new(Private::new(gicv3)),
                spis: AtomicBool::new(false),
                attention: Cell::new(true),
                running: Vec::new(),
                timer_line: false,
                timer_active: false,
                updates: 0,
            }
        };
        Self {
            gicv3,
            eoi_mode,
            lists,
            cpus: (0..vcpus).map(cpu).collect(),
            on: vec![true; vcpus],
            shared: Mutex::new(Shared::new(Routing::new(gicv3, vcpus))),
            control: AtomicU32::new(0),
            current: 0,
            lost: Cell::new(0),
            waits: 0,
            asked: Cell::new(0),
        }
    }

    pub(crate) fn by(&mut self, own: usize) -> By<'_> {
        self.switch(own);
        By { machine: self, own }
    }

    /// Puts this CPU's registers where the hypervisor finds them.
    fn switch(&mut self, to: usize) {
        if !self.gicv3 || self.current == to {
            return;
        }
        let lists = core::array::from_fn(arch::ich_lr);
        self.cpus[self.current].parked = (lists, arch::ich_hcr(), arch::ich_vmcr());
        let (lists, hcr, vmcr) = self.cpus[to].parked;
        for (n, list) in lists.into_iter().enumerate() {
            arch::set_ich_lr(n, list);
        }
        arch::set_ich_hcr(hcr);
        arch::set_ich_vmcr(vmcr);
        self.current = to;
    }

    fn format(&self) -> Format {
        if self.gicv3 { Format::V3 } else { Format::V2 }
    }

    fn list(&self, cpu: usize, n: usize) -> u64 {
        match self.cpus[cpu].access {
            Access::V3 => arch::ich_lr(n),
            Access::V2(gich) => u64::from(gich.read(GICH_LR + 4 * n)),
        }
    }

    fn set_list(&self, cpu: usize, n: usize, value: u64) {
        match self.cpus[cpu].access {
            Access::V3 => arch::set_ich_lr(n, value),
            Access::V2(gich) => gich.write(GICH_LR + 4 * n, u32::try_from(value).unwrap()),
        }
    }

    fn hcr(&self, cpu: usize) -> u64 {
        match self.cpus[cpu].access {
            Access::V3 => arch::ich_hcr(),
            Access::V2(gich) => u64::from(gich.read(GICH_HCR)),
        }
    }

    fn vmcr(&self, cpu: usize) -> u64 {
        match self.cpus[cpu].access {
            Access::V3 => arch::ich_vmcr(),
            Access::V2(gich) => u64::from(gich.read(GICH_VMCR)),
        }
    }

    /// The guest writes ICC_IGRPEN0_EL1 and ICC_IGRPEN1_EL1, or GICC_CTLR.
    pub(crate) fn set_groups(&mut self, cpu: usize, groups: u64) {
        self.switch(cpu);
        let vmcr = self.vmcr(cpu) & !BOTH_GROUPS | groups;
        match self.cpus[cpu].access {
            Access::V3 => arch::set_ich_vmcr(vmcr),
            Access::V2(gich) => gich.write(GICH_VMCR, u32::try_from(vmcr).unwrap()),
        }
    }

    fn listed(&self, cpu: usize) -> Vec<(usize, Entry)> {
        let decode = |n| Some((n, self.format().decode(self.list(cpu, n))?));
        (0..self.lists).filter_map(decode).collect()
    }

    /// The guest acknowledges: of the most urgent pending ones, if they are more urgent than what runs, the one that `choice`
    /// picks.
    pub(crate) fn acknowledge(&mut self, cpu: usize, choice: usize) -> Option<Taken> {
        self.switch(cpu);
        let running = self.cpus[cpu]
            .running
            .last()
            .map_or(0x100, |it| u16::from(it.2));
        let mut pending = self.listed(cpu);
        let groups = self.vmcr(cpu);
        let is_signalled = |entry: &Entry| groups >> u32::from(entry.group1) & 1 != 0;
        pending.retain(|(_, entry)| entry.state == State::Pending && is_signalled(entry));
        let best = pending.iter().map(|(_, entry)| entry.priority).min()?;
        pending.retain(|(_, entry)| entry.priority == best && u16::from(best) < running);
        let (n, entry) = *pending.get(choice % pending.len().max(1))?;
        let active = Entry {
            state: State::Active,
            ..entry
        };
        self.set_list(cpu, n, self.format().encode(&active));
        let taken = (entry.intid, entry.source, entry.priority);
        self.cpus[cpu].running.push(taken);
        Some(taken)
    }

    /// The guest writes EOIR for what it took last. Returns that.
    pub(crate) fn end(&mut self, cpu: usize) -> Option<Taken> {
        self.switch(cpu);
        let taken = self.cpus[cpu].running.pop()?;
        if self.eoi_mode {
            return Some(taken);
        }
        let found = self.listed(cpu).into_iter().find(|(_, entry)| {
            (entry.intid, entry.source) == (taken.0, taken.1) && entry.state.is_active()
        });
        let Some((n, entry)) = found else {
            let hcr = self.hcr(cpu) + (1 << HCR_EOI_COUNT);
            match self.cpus[cpu].access {
                Access::V3 => arch::set_ich_hcr(hcr),
                Access::V2(gich) => gich.write(GICH_HCR, u32::try_from(hcr).unwrap()),
            }
            return Some(taken);
        };
        // The state's upper bit goes; what else the register holds stays.
        let upper = if self.gicv3 { 1 << 63 } else { 1 << 29 };
        self.set_list(cpu, n, self.list(cpu, n) & !upper);
        if entry.hardware == Some(PHYSICAL) {
            self.cpus[cpu].timer_active = false;
        }
        Some(taken)
    }

    /// Whether the CPU interface raises its maintenance interrupt.
    fn wants_maintenance(&self, cpu: usize) -> bool {
        let hcr = self.hcr(cpu);
        let (state, hw, tell) = if self.gicv3 {
            (3 << 62, 1 << 61, 1 << 41)
        } else {
            (3 << 28, 1 << 31, 1 << 19)
        };
        let ended = (0..self.lists)
            .map(|n| self.list(cpu, n))
            .any(|list| list & (state | hw | tell) == tell);
        let unlisted = hcr & 1 << 2 != 0 && hcr >> HCR_EOI_COUNT & 0x1f != 0;
        let listed = self.listed(cpu);
        let is_pending = |(_, entry): &(usize, Entry)| entry.state == State::Pending;
        let none_pending = hcr & 1 << 3 != 0 && !listed.iter().any(is_pending);
        let enabled = self.vmcr(cpu) & BOTH_GROUPS;
        let changed = [
            (4, enabled),
            (5, !enabled),
            (6, enabled >> 1),
            (7, !enabled >> 1),
        ];
        let changed = changed
            .into_iter()
            .any(|(bit, is)| hcr >> bit & is & 1 != 0);
        ended || unlisted || none_pending || changed
    }

    /// What each CPU's run loop does on the interrupts it gets, until nothing is left to do.
    pub(crate) fn run_loops(&mut self) {
        for round in 0.. {
            assert!(round < 100, "the run loops do not come to rest");
            let mut any = false;
            for cpu in 0..self.cpus.len() {
                any |= self.run_loop(cpu);
            }
            if !any {
                return;
            }
        }
    }

    fn run_loop(&mut self, cpu: usize) -> bool {
        self.switch(cpu);
        let mut this = self.by(cpu);
        if this.cpu().timer_line && !this.cpu().timer_active {
            this.take_back();
            let cpu = &mut this.machine.cpus[cpu];
            cpu.timer_active = true;
            cpu.private.lock().hold(u8::try_from(TIMER).unwrap());
        }
        let any = self.cpus[cpu].attention.get() || self.wants_maintenance(cpu);
        if any {
            self.relist(cpu);
        }
        any
    }

    fn relist(&mut self, index: usize) {
        self.switch(index);
        let control = *self.control.get_mut();
        let (cpus, shared) = (&mut self.cpus, &self.shared);
        let homes = homes(&self.on, &self.asked);
        let cpu = &mut cpus[index];
        cpu.attention.set(false);
        cpu.updates += 1;
        let wiring = Wiring {
            group0_enabled: control & 1 != 0,
            group1_enabled: control & 2 != 0,
            linked: (u8::try_from(TIMER).unwrap(), PHYSICAL),
            asserted: cpu.timer_line,
            lists: cpu.interface.lists(),
        };
        let holder = Holder {
            index,
            private: &cpu.private,
            shared,
            spis: &cpu.spis,
        };
        let marked = Mutex::new(Vec::new());
        let (listing, others) = holder.relist(
            &mut cpu.interface,
            || wiring,
            |target| homes.of(target),
            |vcpu| marked.lock().push(vcpu),
        );
        if listing.release {
            cpu.timer_active = false;
        }
        self.marked(marked.into_inner());
        others.for_each(|vcpu| self.cpus[vcpu].attention.set(true));
    }

    fn marked(&self, vcpus: Vec<usize>) {
        for vcpu in vcpus {
            self.cpus[vcpu]
                .spis
                .store(true, std::sync::atomic::Ordering::Relaxed);
        }
    }

    /// Changes a shared interrupt as a device does.
    pub(crate) fn change(&mut self, intid: u16, change: impl FnOnce(&mut Shared) -> bool) {
        let homes = homes(&self.on, &self.asked);
        let shared = self.shared.get_mut();
        if change(shared) {
            let marked = Mutex::new(Vec::new());
            let home = |target| homes.of(target);
            let ids = intid..intid + 1;
            let set = concern(shared, ids, home, |vcpu| marked.lock().push(vcpu));
            self.marked(marked.into_inner());
            set.for_each(|vcpu| self.cpus[vcpu].attention.set(true));
        }
    }

    /// Turns a vCPU on or off, as PSCI does.
    pub(crate) fn set_power(&mut self, vcpu: usize, on: bool) {
        self.on[vcpu] = on;
        if !on {
            self.by(vcpu).take_back();
        }
        let marked = Mutex::new(Vec::new());
        let homes = homes(&self.on, &self.asked);
        let set = concern(
            self.shared.get_mut(),
            SpiSet::all(),
            |target| homes.of(target),
            |vcpu| marked.lock().push(vcpu),
        );
        self.marked(marked.into_inner());
        set.for_each(|vcpu| self.cpus[vcpu].attention.set(true));
    }

    /// Changes the line of a private interrupt as a device does.
    pub(crate) fn set_private_line(&mut self, cpu: usize, intid: u8, asserted: bool) {
        let cpu = &mut self.cpus[cpu];
        if cpu.private.get_mut().set_line(intid, asserted) {
            cpu.attention.set(true);
        }
    }
}

impl By<'_> {
    fn cpu(&self) -> &Cpu {
        &self.machine.cpus[self.own]
    }
}

/// Whom targets mean, and how many vCPUs were asked for that.
fn homes<'a>(on: &'a [bool], asked: &'a Cell<usize>) -> Homes<impl Fn(usize) -> bool> {
    Homes::new(on.len(), |vcpu| {
        asked.set(asked.get() + 1);
        on[vcpu]
    })
}

/// The hypervisor's registers of a GICv2, in memory.
fn gich(lists: usize) -> Registers {
    let words = Box::leak(Box::new([0_u32; 0x80]));
    words[GICH_VTR / 4] = u32::try_from(lists - 1).unwrap();
    words[GICH_VMCR / 4] = 0;
    let base = words.as_mut_ptr().expose_provenance();
    // SAFETY: the words are leaked, so they stay; the highest offset used is that of list register 15, 0x13c.
    unsafe { Registers::new(Pa::new(base as u64)) }
}

impl Accessor for By<'_> {
    fn is_v3(&self) -> bool {
        self.machine.gicv3
    }

    fn vcpus(&self) -> usize {
        self.machine.cpus.len()
    }

    fn own(&self) -> usize {
        self.own
    }

    fn control(&self) -> &AtomicU32 {
        &self.machine.control
    }

    fn private(&self, vcpu: usize) -> Option<&Mutex<Private>> {
        self.machine.cpus.get(vcpu).map(|cpu| &cpu.private)
    }

    fn shared(&self) -> &Mutex<Shared> {
        &self.machine.shared
    }

    fn is_on(&self, vcpu: usize) -> bool {
        self.machine.asked.set(self.machine.asked.get() + 1);
        self.machine.on[vcpu]
    }

    fn mark(&self, vcpu: usize) {
        self.machine.marked(vec![vcpu]);
    }

    fn alert(&self, vcpu: usize) {
        match self.machine.lost.get().checked_sub(1) {
            Some(left) => self.machine.lost.set(left),
            None => self.machine.cpus[vcpu].attention.set(true),
        }
    }

    fn insist(&self, vcpu: usize) {
        self.machine.cpus[vcpu].attention.set(true);
    }

    fn take_back(&mut self) {
        let machine = &mut *self.machine;
        machine.switch(self.own);
        let homes = homes(&machine.on, &machine.asked);
        let cpu = &mut machine.cpus[self.own];
        let holder = Holder {
            index: self.own,
            private: &cpu.private,
            shared: &machine.shared,
            spis: &cpu.spis,
        };
        let marked = Mutex::new(Vec::new());
        let others = holder.take_back(
            &mut cpu.interface,
            |target| homes.of(target),
            |vcpu| marked.lock().push(vcpu),
        );
        cpu.attention.set(true);
        machine.marked(marked.into_inner());
        others.for_each(|vcpu| machine.cpus[vcpu].attention.set(true));
    }

    fn release(&mut self) {
        let cpu = &mut self.machine.cpus[self.own];
        let timer = u8::try_from(TIMER).unwrap();
        if cpu.private.get_mut().release(timer, cpu.timer_line) {
            cpu.timer_active = false;
        }
    }

    /// The others run meanwhile; this vCPU's run loop does not.
    fn wait(&mut self) {
        self.machine.waits += 1;
        assert!(self.machine.waits < PATIENCE, "nobody answers");
        for vcpu in (0..self.vcpus()).filter(|vcpu| *vcpu != self.own) {
            if self.machine.cpus[vcpu].attention.get() {
                self.machine.relist(vcpu);
            }
        }
        self.machine.switch(self.own);
    }

    fn deactivates(&self) -> bool {
        self.machine.eoi_mode
    }
}
