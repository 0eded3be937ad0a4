//! The state of a VM's interrupt controller as plain data, to be saved while its vCPUs are stopped and restored later, maybe
//! on another machine.
//!
//! Nothing is listed then, so the models are all there is beside the virtual CPU interfaces. What is restored may come from
//! anywhere: values that no guest could have brought about are made harmless, never believed.

use alloc::vec::Vec;

use super::interface::Saved;
use super::private::{PRIVATE, Private, SGI_BITS, SGIS};
use super::shared::{AFFINITY, ANY, Routing, SPIS, Shared, WORDS};
use super::shared_registers::PRIORITY;

/// One vCPU's private interrupts. One bit each, where not said otherwise.
#[derive(Clone, Debug, Eq, PartialEq)]
#[expect(missing_docs, reason = "named after the registers that show them")]
pub struct PrivateState {
    pub enabled: u32,
    pub group1: u32,
    pub pending: u32,
    pub active: u32,
    /// Lines that devices assert.
    pub line: u32,
    pub priority: [u8; PRIVATE as usize],
    /// Pending senders of each SGI; bit 0 on GICv3.
    pub senders: [u8; SGIS as usize],
    /// The sender of each SGI that is active or was last.
    pub sender: [u8; SGIS as usize],
    /// Interrupts of the host that are active on the guest's behalf.
    pub held: u32,
    /// GICR_WAKER.ProcessorSleep.
    pub sleeps: bool,
    /// The interrupt that is next among equals.
    pub turn: u16,
}

/// A VM's shared interrupts. One bit each, where not said otherwise.
#[derive(Clone, Debug, Eq, PartialEq)]
#[expect(missing_docs, reason = "named after the registers that show them")]
pub struct SharedState {
    pub enabled: [u32; WORDS],
    pub group1: [u32; WORDS],
    pub edge: [u32; WORDS],
    pub pending: [u32; WORDS],
    pub active: [u32; WORDS],
    /// Lines that devices assert.
    pub line: [u32; WORDS],
    pub priority: [u8; SPIS as usize],
    /// GICD_ITARGETSR's byte or GICD_IROUTER's lower word.
    pub route: [u32; SPIS as usize],
    /// The vCPU that handles an active interrupt.
    pub home: [u16; SPIS as usize],
}

/// One vCPU.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct VcpuState {
    /// Its private interrupts.
    pub private: PrivateState,
    /// Its CPU interface.
    pub interface: Saved,
}

/// A VM.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct VmState {
    /// A GICv3, not a GICv2.
    pub gicv3: bool,
    /// GICD_CTLR: the groups that are enabled.
    pub control: u32,
    /// The shared interrupts.
    pub shared: SharedState,
    /// The vCPUs, by their numbers.
    pub vcpus: Vec<VcpuState>,
}

impl Private {
    /// The state; `None` while interrupts are listed.
    pub fn save(&self) -> Option<PrivateState> {
        (self.listed == 0).then_some(PrivateState {
            enabled: self.enabled,
            group1: self.group1,
            pending: self.pending,
            active: self.active,
            line: self.line,
            priority: self.priority,
            senders: self.senders,
            sender: self.sender,
            held: self.held,
            sleeps: self.sleeps,
            turn: self.turn,
        })
    }

    /// What `state` says, on GICv3 or GICv2. Only `linked` can be held.
    pub fn restored(state: &PrivateState, gicv3: bool, linked: u8) -> Self {
        let mut this = Self::new(gicv3);
        this.enabled = state.enabled;
        this.group1 = state.group1;
        this.active = state.active;
        this.line = state.line & !SGI_BITS;
        this.priority = state.priority.map(|it| it & PRIORITY);
        let exist = if gicv3 { 1 } else { 0xff };
        this.senders = state.senders.map(|it| it & exist);
        this.sender = state.sender.map(|it| if gicv3 { 0 } else { it & 7 });
        let sent = (0..).zip(this.senders).filter(|(_, senders)| *senders != 0);
        let sgis = sent.fold(0, |bits, (intid, _)| bits | 1 << intid);
        this.pending = state.pending & !SGI_BITS | sgis;
        this.held = state.held & super::private::bit(linked);
        this.sleeps = state.sleeps;
        this.turn = state.turn;
        this
    }
}

/// ICH_VMCR_EL2: VPMR, VBPR0, VBPR1, VEOIM, VCBPR, VFIQEn, VENG1 and VENG0.
const VMCR_V3: u64 = 0xfffc_021b;
/// GICH_VMCR: VMPriMask, VMBP, VMABP, VEM, VMCBPR, VMFIQEn, VMAckCtl and the groups' enables.
const VMCR_V2: u64 = 0xf8fc_021f;

impl Saved {
    /// What `self` says, on GICv3 or GICv2: bits that exist, and no priority active in both groups, which is UNPREDICTABLE
    /// (IHI 0069H, `ICH_AP0R<n>_EL2` and `ICH_AP1R<n>_EL2`).
    pub fn restored(&self, gicv3: bool) -> Self {
        let [a0, a1, a2, a3, b0, b1, b2, b3] = self.active_priorities;
        let active_priorities = if gicv3 {
            [a0, a1, a2, a3, b0 & !a0, b1 & !a1, b2 & !a2, b3 & !a3]
        } else {
            [a0, 0, 0, 0, 0, 0, 0, 0]
        };
        Self {
            vmcr: self.vmcr & if gicv3 { VMCR_V3 } else { VMCR_V2 },
            active_priorities: active_priorities.map(|it| it & u64::from(u32::MAX)),
        }
    }
}

impl Shared {
    /// The state; `None` while interrupts are listed.
    pub fn save(&self) -> Option<SharedState> {
        (self.listed == [0; WORDS]).then_some(SharedState {
            enabled: self.enabled,
            group1: self.group1,
            edge: self.edge,
            pending: self.pending,
            active: self.active,
            line: self.line,
            priority: self.priority,
            route: self.route,
            home: self.home,
        })
    }

    /// What `state` says, in a VM of `vcpus`.
    pub fn restored(state: &SharedState, routing: Routing, vcpus: usize) -> Self {
        let routes = match routing {
            Routing::Affinity => ANY | AFFINITY,
            Routing::Targets(_) => super::shared_registers::targets(vcpus).into(),
        };
        let mut this = Self::new(routing);
        this.enabled = state.enabled;
        this.group1 = state.group1;
        this.edge = state.edge;
        this.pending = state.pending;
        this.active = state.active;
        this.line = state.line;
        this.priority = state.priority.map(|it| it & PRIORITY);
        this.route = state.route.map(|it| it & routes);
        this.home = state
            .home
            .map(|it| if usize::from(it) < vcpus { it } else { 0 });
        this
    }
}
