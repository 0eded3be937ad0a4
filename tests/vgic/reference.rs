//! The interrupt controller's architecture, as slowly and plainly as it can be written: each interrupt is a state of its own,
//! and everything asked is computed from them.

use std::collections::BTreeSet;

/// One interrupt of one vCPU, or of all.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Interrupt {
    pub(crate) enabled: bool,
    pub(crate) group1: bool,
    pub(crate) priority: u8,
    pub(crate) edge: bool,
    /// Pending from an edge, a write or, on GICv3, an SGI.
    pub(crate) latch: bool,
    /// The device asserts its line.
    pub(crate) line: bool,
    pub(crate) active: bool,
    /// GICv2's SGIs: senders.
    pub(crate) senders: u8,
    /// ITARGETSR or IROUTER.
    pub(crate) route: u64,
    /// Who handles it, if it is active.
    pub(crate) handler: usize,
}

impl Interrupt {
    pub(crate) fn is_pending(&self) -> bool {
        self.latch || self.senders != 0 || self.line && !self.edge
    }
}

/// A VM's interrupts.
pub(crate) struct Reference {
    pub(crate) gicv3: bool,
    pub(crate) control: u32,
    pub(crate) private: Vec<[Interrupt; 32]>,
    /// Which groups each vCPU's CPU interface signals, one bit each.
    pub(crate) groups: Vec<u64>,
    /// Which vCPUs are on.
    pub(crate) on: Vec<bool>,
    /// By their numbers, from 32 on.
    pub(crate) shared: [Interrupt; 96],
}

impl Reference {
    pub(crate) fn new(gicv3: bool, vcpus: usize) -> Self {
        let reset = Interrupt {
            group1: gicv3,
            ..Interrupt::default()
        };
        Self {
            gicv3,
            control: 0,
            private: vec![[reset; 32]; vcpus],
            groups: vec![0b11; vcpus],
            on: vec![true; vcpus],
            shared: [reset; 96],
        }
    }

    pub(crate) fn at(&mut self, vcpu: usize, intid: u16) -> &mut Interrupt {
        match usize::from(intid) {
            private @ 0..32 => &mut self.private[vcpu][private],
            shared => &mut self.shared[shared - 32],
        }
    }

    /// Who would take a shared interrupt: of several, the first that is on, or the first if none is.
    pub(crate) fn target(&self, interrupt: &Interrupt) -> Option<usize> {
        let vcpus = self.private.len();
        let route = interrupt.route;
        let several = |list: u64| {
            let candidates = || (0..vcpus).filter(|vcpu| list >> vcpu & 1 != 0);
            let on = candidates().find(|vcpu| self.on[*vcpu]);
            on.or(candidates().next())
        };
        if !self.gicv3 {
            return several(route);
        }
        if route & 1 << 31 != 0 {
            return several(u64::MAX);
        }
        let exists = route & 0xff_ffff < vcpus as u64;
        exists.then(|| usize::try_from(route & 0xff_ffff).unwrap())
    }

    /// What `vcpu` could take next: the most urgent pending interrupts, and their priority.
    pub(crate) fn deliverable(&self, vcpu: usize) -> (u16, BTreeSet<u16>) {
        let own = (0..).zip(&self.private[vcpu]);
        let shared = (32..)
            .zip(&self.shared)
            .filter(|(_, interrupt)| self.target(interrupt) == Some(vcpu));
        let forwarded = |interrupt: &Interrupt| {
            let bit: u32 = if interrupt.group1 { 2 } else { 1 };
            let signalled = self.groups[vcpu] & u64::from(bit) != 0;
            interrupt.enabled && self.control & bit != 0 && signalled
        };
        let candidates: Vec<(u16, u8)> = own
            .chain(shared)
            .filter(|(_, it)| it.is_pending() && !it.active && forwarded(it))
            .map(|(intid, it)| (intid, it.priority))
            .collect();
        let best = candidates.iter().map(|it| it.1).min();
        let most_urgent = candidates.iter().filter(|it| Some(it.1) == best);
        (
            best.map_or(0x100, u16::from),
            most_urgent.map(|it| it.0).collect(),
        )
    }

    /// `vcpu` takes `intid`, which `source` sent.
    pub(crate) fn take(&mut self, vcpu: usize, intid: u16, source: u8) {
        let it = self.at(vcpu, intid);
        it.latch = false;
        it.senders &= !(1 << source);
        it.active = true;
        it.handler = vcpu;
    }

    /// `sender` sends an SGI to `receivers`; to those only that have it in `group1`, if that is said.
    pub(crate) fn send(
        &mut self,
        sender: usize,
        receivers: &[usize],
        intid: u16,
        group1: Option<bool>,
    ) {
        let gicv3 = self.gicv3;
        for receiver in receivers {
            let it = self.at(*receiver, intid);
            if group1.is_some_and(|group1| group1 != it.group1) {
                continue;
            }
            if gicv3 {
                it.latch = true;
            } else {
                it.senders |= 1 << sender;
            }
        }
    }

    /// One bit of each of 32 interrupts.
    pub(crate) fn word(
        &mut self,
        vcpu: usize,
        first: u16,
        bit: impl Fn(&Interrupt) -> bool,
    ) -> u64 {
        (0..32).fold(0, |word, n| {
            word | if bit(self.at(vcpu, first + n)) {
                1 << n
            } else {
                0
            }
        })
    }
}
