//! A VM with the built-in guest in it: set up, told what to do, and cleared away.

use alloc::format;
use alloc::string::ToString;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt::Display;
use core::mem::offset_of;

use crate::addr::{Ipa, PAGE_BYTES, Pa, to_index};
use crate::arch;
use crate::guest::abi::{self, op, status};
use crate::mem::{self, frames};
use crate::mmu::descriptor::Leaf;
use crate::mmu::{
    AccessFlag, Bbm, Contents, Engine, Extent, Level, Locking, Memory, Policy, SlotConfig, SlotId,
    Splitting, Stage2, Tracking,
};
use crate::sync::percpu;
use crate::sync::quiescence::CpuId;
use crate::vm::vgic::state::VmState;
use crate::vm::{Command, Host, Placement, Vm, VmConfig, run};

use super::Refusal;
use super::params::Params;

/// What every suite is given.
pub(super) struct Stage<'a> {
    pub(super) host: &'static Host,
    pub(super) params: &'a Params,
    pub(super) guest: &'a [u8],
    /// The machine's initial RAM disk: kernel and RAM disk of a guest.
    pub(super) bundle: Option<&'a [u8]>,
    /// The guest's own part of the boot arguments.
    pub(super) guest_arguments: &'a str,
    /// The break-before-make levels that the parameters come to on this machine.
    pub(super) bbm: Vec<Bbm>,
    /// So are the engines, each with how writes are noticed.
    pub(super) trackers: Vec<(Engine, Tracking)>,
    /// And who sets access flags.
    pub(super) access_flag: AccessFlag,
}

/// A VM that differs from what the parameters say.
#[derive(Clone, Copy)]
pub(super) struct Cast {
    pub(super) locking: Locking,
    pub(super) vcpus: usize,
    pub(super) backing: Level,
    pub(super) splitting: Splitting,
    pub(super) engine: Engine,
    pub(super) tracking: Tracking,
    pub(super) access_flag: AccessFlag,
    /// Bytes of each vCPU's region.
    pub(super) region_bytes: u64,
    pub(super) placement: Placement,
    /// Of each vCPU, where it shares a CPU.
    pub(super) weight: u32,
}

/// Pages of a region, going on at its start where it ends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Part {
    pub(super) first: u64,
    pub(super) pages: u64,
}

/// A running VM whose vCPUs wait for operations.
pub(super) struct Scene {
    pub(super) vm: Arc<Vm>,
    host: &'static Host,
    memory: Vec<mem::Extent>,
    pub(super) data: SlotId,
    pub(super) cast: Cast,
    log_bytes: u64,
    /// Pages that each vCPU goes over, from its region's start.
    pub(super) pages_each: u64,
}

/// What a vCPU reports of an operation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outcome {
    /// Ticks of the virtual counter that it took.
    pub(super) ticks: u64,
    /// Its results.
    pub(super) results: [u64; 2],
}

const BLOCK: u64 = 2 << 20;
/// Naps of ten microseconds.
const NAPS_PER_SECOND: u64 = 100_000;

impl Stage<'_> {
    /// How blocks are split by `policy` at `bbm`, the rest as the parameters say.
    pub(super) fn splitting(&self, policy: Policy, bbm: Bbm) -> Splitting {
        let ticks = u128::from(self.params.pause_us) * u128::from(arch::counter_hz()) / 1_000_000;
        Splitting {
            policy,
            bbm,
            batch: self.params.bbm_batch,
            chunk_bytes: self.params.chunk.span_bytes(),
            pause_ticks: u64::try_from(ticks).unwrap_or(u64::MAX),
        }
    }

    /// The cast that the parameters say, for one of the modes and counts, with the first policy, level, engine and tracker
    /// named.
    pub(super) fn cast(&self, locking: Locking, vcpus: usize) -> Cast {
        let tracker = self.trackers.first().copied();
        let (engine, tracking) = tracker.unwrap_or((Engine::Walk, Tracking::Fault));
        Cast {
            locking,
            vcpus,
            backing: self.params.backing,
            splitting: self.splitting(
                self.params
                    .splitting
                    .first()
                    .copied()
                    .unwrap_or(Policy::Fault),
                self.bbm.first().copied().unwrap_or(Bbm::Zero),
            ),
            engine,
            tracking,
            access_flag: self.access_flag,
            region_bytes: self.params.mib << 20,
            placement: Placement::Spread,
            weight: 100,
        }
    }

    /// Sets a VM up and starts all its vCPUs; they wait for operations. Nobody asks how long that takes, or clearing away: a
    /// clock need not be exact then.
    pub(super) fn open(&self, cast: Cast) -> Result<Scene, Refusal> {
        arch::hint_unmeasured();
        let scene = self.set_up(cast)?;
        scene.measured();
        Ok(scene)
    }

    fn set_up(&self, cast: Cast) -> Result<Scene, Refusal> {
        let log_bytes = (cast.region_bytes / PAGE_BYTES / 8).next_multiple_of(PAGE_BYTES);
        let system_bytes =
            (abi::LOGS - abi::RAM + cast.vcpus as u64 * log_bytes).next_multiple_of(BLOCK);
        let data_bytes = cast.region_bytes * cast.vcpus as u64;
        let mut memory = Vec::new();
        let node = near(self.host, cast.placement);
        let system = reserve(&mut memory, system_bytes, abi::RAM, Level::L2, node)?;
        let mut data = reserve(&mut memory, data_bytes, abi::DATA, cast.backing, node)?;
        if cast.splitting.policy == Policy::FaultEmpty {
            keep_zeros(&mut data);
        }
        let vm = self.create(cast)?;
        vm.stage2().add_slot(system).map_err(refused)?;
        let data = vm.stage2().add_slot(data).map_err(refused)?;
        let scene = Scene {
            vm,
            host: self.host,
            memory,
            data,
            cast,
            log_bytes,
            pages_each: (cast.region_bytes / PAGE_BYTES).min(self.params.pages),
        };
        self.load(&scene)?;
        scene.vm.start(self.host);
        scene.outcome(0)?;
        let start = Command {
            op: op::START_OTHERS,
            args: [0; 5],
        };
        match scene.perform_one(0, start)?.results[0] {
            0 => {}
            failed => return Err(format!("{failed} vCPUs could not be started")),
        }
        (1..cast.vcpus).try_for_each(|vcpu| scene.outcome(vcpu).map(drop))?;
        Ok(scene)
    }

    pub(super) fn create(&self, cast: Cast) -> Result<Arc<Vm>, Refusal> {
        let config = VmConfig {
            vcpus: cast.vcpus,
            placement: cast.placement,
            weight: cast.weight,
            locking: cast.locking,
            splitting: cast.splitting,
            engine: cast.engine,
            tracking: cast.tracking,
            access_flag: cast.access_flag,
            trust_hpfar: self.params.trust_hpfar,
            entry: Ipa::new(abi::IMAGE),
        };
        Vm::create(self.host, &config).map_err(refused)
    }

    fn load(&self, scene: &Scene) -> Result<(), Refusal> {
        let params = abi::Params {
            vcpus: scene.cast.vcpus as u64,
            gic: u64::from(scene.vm.gic_version()),
            region_bytes: scene.cast.region_bytes,
            log_bytes: scene.log_bytes,
        };
        scene.write(Ipa::new(abi::RAM), &params.to_bytes())?;
        scene.write(Ipa::new(abi::IMAGE), self.guest)?;
        // The samples and the write logs are mapped now, so that keeping them costs no fault while something is measured.
        let samples = vec![0; to_index(8 * abi::MAX_SAMPLES)];
        scene.write(Ipa::new(abi::SAMPLES), &samples)?;
        let log = vec![0; to_index(scene.log_bytes)];
        (0..scene.cast.vcpus as u64)
            .try_for_each(|vcpu| scene.write(Ipa::new(abi::LOGS + vcpu * scene.log_bytes), &log))
    }
}

/// The NUMA node of the CPU on which a VM of this placement begins.
pub(super) fn near(host: &Host, placement: Placement) -> usize {
    placement.cpu_of(0, host.cpus()).map_or(0, percpu::node_of)
}

/// A slot with host memory behind it, of NUMA node `node` as far as that has any; `memory` owns it.
pub(super) fn reserve(
    memory: &mut Vec<mem::Extent>,
    bytes: u64,
    ipa: u64,
    max_leaf: Level,
    node: usize,
) -> Result<SlotConfig, Refusal> {
    let align = if max_leaf == Level::L1 {
        1 << 30
    } else {
        BLOCK
    };
    let extents = frames::scattered(bytes, align, node)
        .ok_or_else(|| format!("not enough memory: {} MiB of guest do not fit", bytes >> 20))?;
    let backing = extents
        .iter()
        .map(|extent| Extent {
            pa: extent.pa,
            bytes: extent.bytes,
        })
        .collect();
    memory.extend(extents);
    Ok(SlotConfig {
        ipa: Ipa::new(ipa),
        backing,
        max_leaf,
        memory: Memory::Normal,
        writable: true,
        contents: Contents::Zero,
    })
}

/// Zeroes the memory now, so that it may be unmapped and mapped again without being zeroed then.
fn keep_zeros(slot: &mut SlotConfig) {
    slot.contents = Contents::Keep;
    for extent in &slot.backing {
        for page in 0..extent.bytes / PAGE_BYTES {
            let page = Pa::new(extent.pa.raw() + page * PAGE_BYTES);
            // SAFETY: The page was reserved for this slot, which no VM has yet.
            unsafe { arch::zero_page(page) };
        }
    }
}

/// What a VM refuses, in the run's words.
pub(super) fn refused(error: impl Display) -> Refusal {
    format!("no VM: {error}")
}

/// Where a word of a vCPU's area is.
fn area_word(vcpu: usize, offset: usize) -> Ipa {
    Ipa::new(abi::area(vcpu as u64) + offset as u64)
}

/// The controller's position among the CPUs.
pub(super) fn cpu() -> CpuId {
    CpuId(percpu::index())
}

impl Scene {
    /// What follows is measured. Every vCPU waits for an operation, and is asleep by then, so that all begin alike.
    pub(super) fn measured(&self) {
        self.nap();
        arch::hint_measured();
    }

    /// The VM's stage 2.
    pub(super) fn stage2(&self) -> &Stage2 {
        self.vm.stage2()
    }

    /// Whether all of the VM's memory is of NUMA node `node`.
    pub(super) fn is_of(&self, node: usize) -> bool {
        let mut extents = self.memory.iter();
        extents.all(|it| frames::node(it.pa) == node)
    }

    /// Pages of the logged memory.
    pub(super) fn pages(&self) -> u64 {
        self.cast.region_bytes / PAGE_BYTES * self.cast.vcpus as u64
    }

    /// First address of the region of `vcpu`.
    pub(super) fn region(&self, vcpu: usize) -> u64 {
        abi::DATA + vcpu as u64 * self.cast.region_bytes
    }

    /// Posts an operation to every vCPU, without waiting.
    pub(super) fn post(&self, command: impl Fn(usize) -> Command) {
        (0..self.cast.vcpus).for_each(|vcpu| self.vm.post(vcpu, command(vcpu)));
    }

    /// Sleeps until every vCPU has done what it was told.
    pub(super) fn wait_all(&self) -> Result<Vec<Outcome>, Refusal> {
        (0..self.cast.vcpus)
            .map(|vcpu| self.outcome(vcpu))
            .collect()
    }

    /// Has every vCPU perform an operation.
    pub(super) fn perform(
        &self,
        command: impl Fn(usize) -> Command,
    ) -> Result<Vec<Outcome>, Refusal> {
        self.post(command);
        self.wait_all()
    }

    /// Has one vCPU perform an operation.
    pub(super) fn perform_one(&self, vcpu: usize, command: Command) -> Result<Outcome, Refusal> {
        self.vm.post(vcpu, command);
        self.outcome(vcpu)
    }

    /// Sleeps until `vcpu` has done what it was told.
    pub(super) fn outcome(&self, vcpu: usize) -> Result<Outcome, Refusal> {
        let stopped = |reason| format!("vCPU {vcpu} stopped: {reason}");
        let [found, ticks, first, second] = self.vm.wait(vcpu).map_err(stopped)?;
        match found {
            status::OK => Ok(Outcome {
                ticks,
                results: [first, second],
            }),
            status::EXCEPTION => Err(format!(
                "vCPU {vcpu} took an exception: ESR_EL1 {first:#x}, ELR_EL1 {second:#x}"
            )),
            _ => Err(format!("vCPU {vcpu} does not know operation {first}")),
        }
    }

    /// Has vCPU 0 do what must end its VM, and says in which words it ended.
    pub(super) fn last_words(self, command: Command) -> Refusal {
        let words = match self.perform_one(0, command) {
            Ok(_) => "it goes on".to_string(),
            Err(words) => words,
        };
        self.close();
        words
    }

    /// Reads guest memory.
    pub(super) fn read(&self, ipa: Ipa, into: &mut [u8]) -> Result<(), Refusal> {
        let read = self.stage2().copy_from_guest(cpu(), ipa, into);
        read.map_err(|error| format!("cannot read the guest: {error}"))
    }

    /// Writes guest memory.
    pub(super) fn write(&self, ipa: Ipa, data: &[u8]) -> Result<(), Refusal> {
        let written = self.stage2().copy_to_guest(cpu(), ipa, data);
        written.map_err(|error| format!("cannot write to the guest: {error}"))
    }

    /// How the logged memory is mapped.
    pub(super) fn leaves(&self) -> Vec<(Ipa, Level, Leaf)> {
        let mut leaves = Vec::new();
        self.stage2().for_each_leaf(cpu(), |ipa, level, leaf| {
            if ipa >= Ipa::new(abi::DATA) {
                leaves.push((ipa, level, leaf));
            }
        });
        leaves
    }

    /// A hash of the logged memory (FNV-1a over words, one state a page, then over those).
    pub(super) fn hash(&self) -> Result<u64, Refusal> {
        const BASIS: u64 = 0xcbf2_9ce4_8422_2325;
        const PRIME: u64 = 0x0100_0000_01b3;
        let mix = |hash: u64, word: u64| (hash ^ word).wrapping_mul(PRIME);
        let mut page = vec![0; to_index(PAGE_BYTES)];
        let mut whole = BASIS;
        for number in 0..self.pages() {
            self.read(Ipa::new(abi::DATA + number * PAGE_BYTES), &mut page)?;
            let (words, _) = page.as_chunks::<8>();
            let words = words.iter().map(|bytes| u64::from_le_bytes(*bytes));
            whole = mix(whole, words.fold(BASIS, mix));
        }
        Ok(whole)
    }

    /// Has every vCPU store at random, until [`Scene::end_run`].
    pub(super) fn run_freely(&self, seed: u64) -> Result<(), Refusal> {
        self.run_freely_in(seed, |_| (0, self.cast.region_bytes / PAGE_BYTES))
    }

    /// As [`Scene::run_freely`], each vCPU in a part of its region: first page and how many.
    pub(super) fn run_freely_in(
        &self,
        seed: u64,
        part: impl Fn(usize) -> (u64, u64),
    ) -> Result<(), Refusal> {
        self.set_stop(0)?;
        self.post(|vcpu| {
            let (first, pages) = part(vcpu);
            let start = self.region(vcpu) + first * PAGE_BYTES;
            Command {
                op: op::FREE_RUN,
                args: [start, pages, seed + vcpu as u64, 0, 0],
            }
        });
        Ok(())
    }

    /// Ends what [`Scene::run_freely`] began; how many stores there were.
    pub(super) fn end_run(&self) -> Result<u64, Refusal> {
        self.set_stop(1)?;
        Ok(self
            .wait_all()?
            .iter()
            .map(|outcome| outcome.results[0])
            .sum())
    }

    /// Has every vCPU store to `hot` and load from `warm` of its region, round after round, until [`Scene::end_run`].
    pub(super) fn run_rounds(&self, hot: Part, warm: Part) -> Result<(), Refusal> {
        self.set_stop(0)?;
        for vcpu in 0..self.cast.vcpus {
            let rounds = area_word(vcpu, offset_of!(abi::Area, rounds));
            self.write(rounds, &0_u64.to_le_bytes())?;
        }
        let packed = |part: Part| part.first << 32 | part.pages;
        let pages = self.cast.region_bytes / PAGE_BYTES;
        self.post(|vcpu| Command {
            op: op::ROUNDS,
            args: [self.region(vcpu), pages, packed(hot), packed(warm), 0],
        });
        Ok(())
    }

    /// Rounds that each vCPU has done.
    pub(super) fn rounds(&self) -> Result<Vec<u64>, Refusal> {
        self.words(offset_of!(abi::Area, rounds))
    }

    /// Timer interrupts that each vCPU has taken.
    pub(super) fn timer_ticks(&self) -> Result<Vec<u64>, Refusal> {
        self.words(offset_of!(abi::Area, timer_ticks))
    }

    /// Operations that each vCPU has done.
    pub(super) fn operations(&self) -> Result<Vec<u64>, Refusal> {
        self.words(offset_of!(abi::Area, operations))
    }

    /// The words at `offset` of the areas.
    fn words(&self, offset: usize) -> Result<Vec<u64>, Refusal> {
        (0..self.cast.vcpus)
            .map(|vcpu| self.word(vcpu, offset))
            .collect()
    }

    /// The word at `offset` of the area of `vcpu`.
    pub(super) fn word(&self, vcpu: usize, offset: usize) -> Result<u64, Refusal> {
        let mut bytes = [0; 8];
        self.read(area_word(vcpu, offset), &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Sets that word.
    pub(super) fn write_word(&self, vcpu: usize, offset: usize, value: u64) -> Result<(), Refusal> {
        self.write(area_word(vcpu, offset), &value.to_le_bytes())
    }

    /// Moves `vcpu` to `cpu` and waits until that CPU runs it. No operation of it ends meanwhile.
    pub(super) fn move_to(&self, vcpu: usize, cpu: usize) -> Result<(), Refusal> {
        self.send_to(vcpu, cpu)?;
        while !self
            .vm
            .vcpus()
            .get(vcpu)
            .is_some_and(|it| it.is_held_by(cpu))
        {
            self.nap();
        }
        Ok(())
    }

    /// Sleeps for a moment, which leaves time to others that the same computer emulates.
    pub(super) fn nap(&self) {
        let moment = arch::counter_hz() / NAPS_PER_SECOND;
        run::rest_until(self.host.gic, arch::counter() + moment);
    }

    /// Sends `vcpu` to `cpu`, without waiting.
    pub(super) fn send_to(&self, vcpu: usize, cpu: usize) -> Result<(), Refusal> {
        let moved = self.vm.move_vcpu(self.host, vcpu, cpu);
        moved.map_err(|error| format!("vCPU {vcpu} cannot be moved: {error}"))
    }

    /// Stops the VM and has it go on.
    pub(super) fn pause_and_resume(&self) {
        self.vm.stop(self.host);
        self.vm.start(self.host);
    }

    /// The state of its interrupt controller, for which the VM is stopped.
    pub(super) fn interrupts(&self) -> Result<VmState, Refusal> {
        self.vm.stop(self.host);
        let state = self.vm.save_interrupts();
        self.vm.start(self.host);
        state.ok_or_else(|| "a stopped VM's interrupts cannot be saved".into())
    }

    /// Stops the VM, has its interrupt controller forget everything for `other`, gives it back what it had, and has the VM go
    /// on. False: it does not have what it had, or could be looked into before it was stopped.
    pub(super) fn restore_interrupts(&self, other: &VmState) -> bool {
        let refused = self.vm.save_interrupts().is_none();
        self.vm.stop(self.host);
        let restored = self.vm.save_interrupts().is_some_and(|before| {
            self.vm.restore_interrupts(other)
                && self.vm.restore_interrupts(&before)
                && self.vm.save_interrupts() == Some(before)
        });
        self.vm.start(self.host);
        refused && restored
    }

    /// Takes all vCPUs from their CPUs.
    pub(super) fn stop(&self) {
        self.vm.stop(self.host);
    }

    /// Devices interrupt the VM, whatever it does: by lines and edges, shared and private, also by numbers that do not exist.
    pub(super) fn interrupt(&self) {
        for intid in [0, 31, 33, 40, 127, 128, 1023] {
            self.vm.set_line(intid, true);
            self.vm.pulse_line(intid);
        }
        for vcpu in self.vm.vcpus() {
            for intid in [0, 16, 26, 31, 32, 255] {
                self.vm.set_private_line(vcpu, intid, true);
            }
        }
    }

    /// Resets the VM and starts it again: its first vCPU waits for an operation then.
    pub(super) fn reset(&self) -> Result<(), Refusal> {
        self.vm.reset(self.host).map_err(refused)?;
        self.vm.start(self.host);
        self.outcome(0).map(drop)
    }

    /// Tells all vCPUs to leave their free run, or lets them enter one.
    pub(super) fn set_stop(&self, stop: u64) -> Result<(), Refusal> {
        (0..self.cast.vcpus).try_for_each(|vcpu| {
            let word = area_word(vcpu, offset_of!(abi::Area, stop));
            self.write(word, &stop.to_le_bytes())
        })
    }

    /// The guest's own log: one bit a page of the logged memory. Forgotten by the guest afterwards.
    pub(super) fn take_write_log(&self) -> Result<Vec<u64>, Refusal> {
        let region_pages = self.cast.region_bytes / PAGE_BYTES;
        let mut words = vec![0; to_index(self.pages().div_ceil(64))];
        let mut bytes = vec![0; to_index(self.log_bytes)];
        for vcpu in 0..self.cast.vcpus as u64 {
            let at = Ipa::new(abi::LOGS + vcpu * self.log_bytes);
            self.read(at, &mut bytes)?;
            for page in 0..region_pages {
                let byte = bytes.get(to_index(page / 8)).copied().unwrap_or(0);
                if byte & (1 << (page % 8)) != 0 {
                    let page = vcpu * region_pages + page;
                    if let Some(word) = words.get_mut(to_index(page / 64)) {
                        *word |= 1 << (page % 64);
                    }
                }
            }
            bytes.fill(0);
            self.write(at, &bytes)?;
        }
        Ok(words)
    }

    /// Ends the VM; everything it had is given back.
    pub(super) fn close(self) {
        arch::hint_unmeasured();
        Vm::destroy(self.vm, self.host);
        self.memory.into_iter().for_each(frames::release);
    }
}
