//! What an access to the frames of a virtual interrupt controller answers and does.
//!
//! A guest may access registers in any way, so each way has an answer:
//!
//! | access | answer |
//! |---|---|
//! | 32 bits | every register |
//! | 8 bits | priorities, targets and senders of SGIs (IHI 0048B 4.1.4, IHI 0069H 12.1.3); others read as zero and ignore writes |
//! | 64 bits | GICD_IROUTER and GICR_TYPER; others as above |
//! | 16 bits | as above: only registers of message-based SPIs, which do not exist here, have it |
//! | not aligned | the caller answers with an external abort |
//! | reserved registers, interrupts that do not exist | read as zero, ignore writes |
//!
//! # State that another vCPU has listed
//!
//! Pending and active bits of interrupts in another vCPU's list registers are in that vCPU's hands. A read makes it take
//! them back and waits for that. Two vCPUs may do this to each other: each has taken back its own before it waits, and
//! lists nothing meanwhile, so the other need not wait for it. A write is recorded, and carried out when the interrupt comes
//! back; whoever reads later makes it come back first. Disabling interrupts, or a group, waits as reading does: when it is
//! done, which GICD_CTLR.RWP and GICR_CTLR.RWP (always zero) say, the guest takes none of them any more.

use core::sync::atomic::{AtomicU32, Ordering};

use spin::Mutex;

use super::distributor::{self, Receivers, Register};
use super::flight::{VcpuSet, concern};
use super::homes::Homes;
use super::private::{Answer, Private};
use super::registers::{ICENABLER, ICFGR0, IPRIORITYR, ISACTIVER, ISPENDR};
use super::shared::{FIRST, Seen, Shared, Target, WORDS};
use super::shared_registers;

/// GICD_CTLR: EnableGrp0 and EnableGrp1.
const GROUPS: u32 = 0b11;
/// GICD_CTLR of GICv3: DS and ARE, both always one: one security state, affinity routing only.
const FIXED_CONTROL: u32 = 1 << 6 | 1 << 4;

/// Looks for an answer after which whoever owes it is told once more. None is known to be lost; a CPU that waits here is at EL2
/// with interrupts masked, so it must not depend on that.
const POLLS: u32 = 1 << 14;

/// A frame of registers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Frame {
    /// GICD of GICv2.
    DistributorV2,
    /// GICD of GICv3.
    DistributorV3,
    /// Both frames of this vCPU's redistributor.
    Redistributor(usize),
    /// The second page of GICv2's GICC, where GICC_DIR is.
    Deactivation,
}

/// The vCPU that accesses registers, which runs here and has left its guest, and its VM.
pub trait Accessor {
    /// Whether the VM has a GICv3.
    fn is_v3(&self) -> bool;
    /// Number of vCPUs.
    fn vcpus(&self) -> usize;
    /// Which one accesses.
    fn own(&self) -> usize;
    /// GICD_CTLR.
    fn control(&self) -> &AtomicU32;
    /// The private interrupts of a vCPU.
    fn private(&self, vcpu: usize) -> Option<&Mutex<Private>>;
    /// The shared ones.
    fn shared(&self) -> &Mutex<Shared>;
    /// Whether `vcpu` is on.
    fn is_on(&self, vcpu: usize) -> bool;
    /// A shared interrupt may be for `vcpu`.
    fn mark(&self, vcpu: usize);
    /// Makes `vcpu` bring its list registers up to date: the accessing one before it goes on, another at once.
    fn alert(&self, vcpu: usize);
    /// As [`Self::alert`], even if word of it seems to be on its way.
    fn insist(&self, vcpu: usize);
    /// Takes back what the accessing vCPU has listed.
    fn take_back(&mut self);
    /// Gives the interrupt that is linked to hardware back if the accessing vCPU has not taken it and its line has dropped.
    /// Nothing of it is listed.
    fn release(&mut self);
    /// Passes time while another vCPU takes back.
    fn wait(&mut self);
    /// Whether the guest deactivates interrupts apart from dropping their priority (EOImode).
    fn deactivates(&self) -> bool;
}

/// Reads `bytes` (1, 2, 4 or 8) at `offset`, a multiple of them.
#[inline(always)]
pub fn read(it: &mut impl Accessor, frame: Frame, offset: u64, bytes: u8) -> u64 {
    if bytes != 4 {
        return read_odd(it, frame, offset, bytes);
    }
    let (register, of) = decode(it, frame, offset);
    u64::from(read_register(it, register, of))
}

/// Reads what is not a word.
#[inline(never)]
fn read_odd(it: &mut impl Accessor, frame: Frame, offset: u64, bytes: u8) -> u64 {
    let (register, of) = decode(it, frame, offset & !3);
    match bytes {
        1 if has_bytes(register) => {
            u64::from(read_register(it, register, of)) >> (8 * (offset & 3)) & 0xff
        }
        8 if has_double_word(frame, offset) => {
            let (upper, _) = decode(it, frame, offset + 4);
            let low = u64::from(read_register(it, register, of));
            low | u64::from(read_register(it, upper, of)) << 32
        }
        _ => 0,
    }
}

/// Writes `bytes` (1, 2, 4 or 8) at `offset`, a multiple of them.
pub fn write(it: &mut impl Accessor, frame: Frame, offset: u64, bytes: u8, value: u64) {
    let (register, of) = decode(it, frame, offset & !3);
    let [low, ..] = words(value);
    match bytes {
        4 => write_register(it, register, of, low, u32::MAX),
        1 if has_bytes(register) => {
            let shift = 8 * u32::try_from(offset & 3).unwrap_or(0);
            write_register(it, register, of, low << shift, 0xff << shift);
        }
        // The upper word of the one 64-bit register that can be written has nothing to write.
        8 if has_double_word(frame, offset) => write_register(it, register, of, low, u32::MAX),
        _ => {}
    }
}

fn words(value: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    [[a, b, c, d], [e, f, g, h]].map(u32::from_le_bytes)
}

#[inline(always)]
fn decode(it: &impl Accessor, frame: Frame, offset: u64) -> (Register, usize) {
    match frame {
        Frame::DistributorV2 => (distributor::v2(offset, it.vcpus()), it.own()),
        Frame::DistributorV3 => (distributor::v3(offset), it.own()),
        Frame::Redistributor(of) => {
            let affinity = distributor::vmpidr(of);
            let register = distributor::redistributor(offset, of, it.vcpus(), affinity);
            (register, of)
        }
        Frame::Deactivation if offset == 0 => (Register::Deactivate, it.own()),
        Frame::Deactivation => (Register::Constant(0), it.own()),
    }
}

fn has_bytes(register: Register) -> bool {
    match register {
        Register::Private(offset) => (IPRIORITYR..ICFGR0).contains(&offset),
        Register::Shared(offset) => shared_registers::has_bytes(offset),
        Register::OwnTarget | Register::SgiSenders(..) => true,
        _ => false,
    }
}

fn has_double_word(frame: Frame, offset: u64) -> bool {
    const GICR_TYPER: u64 = 8;
    match frame {
        Frame::DistributorV3 => shared_registers::is_route(offset),
        Frame::Redistributor(_) => offset == GICR_TYPER,
        Frame::DistributorV2 | Frame::Deactivation => false,
    }
}

#[inline(always)]
fn read_register(it: &mut impl Accessor, register: Register, of: usize) -> u32 {
    match register {
        Register::Constant(value) => value,
        Register::Control => {
            let fixed = if it.is_v3() { FIXED_CONTROL } else { 0 };
            it.control().load(Ordering::Relaxed) | fixed
        }
        Register::Private(ISPENDR..IPRIORITYR)
        | Register::Shared(ISPENDR..IPRIORITYR)
        | Register::SgiSenders(..) => read_state(it, register, of),
        Register::Private(offset) => it
            .private(of)
            .map_or(0, |private| private.lock().read(offset)),
        Register::Shared(offset) => it.shared().lock().read(offset),
        Register::OwnTarget => 0x0101_0101 << (it.own() & 7),
        Register::Waker => it.private(of).map_or(0, |private| private.lock().waker()),
        Register::SendSgi | Register::Deactivate => 0,
    }
}

/// Reads what may be in list registers.
#[inline(never)]
fn read_state(it: &mut impl Accessor, register: Register, of: usize) -> u32 {
    match register {
        Register::Private(ISPENDR..ISACTIVER) => look(it, of).map_or(0, |found| found.pending),
        Register::Private(_) => look(it, of).map_or(0, |found| found.active),
        Register::Shared(offset @ ISPENDR..ISACTIVER) => {
            look_shared(it, offset).map_or(0, |seen| seen.pending)
        }
        Register::Shared(offset) => look_shared(it, offset).map_or(0, |seen| seen.active),
        Register::SgiSenders(first, _) => {
            it.take_back();
            it.private(of)
                .map_or(0, |private| private.lock().sgi_senders(first))
        }
        _ => 0,
    }
}

fn write_register(it: &mut impl Accessor, register: Register, of: usize, value: u32, lanes: u32) {
    match register {
        Register::Private(offset) => write_private(it, offset, of, value, lanes),
        Register::Shared(offset) => write_shared(it, offset, value, lanes),
        Register::SgiSenders(first, pending) => {
            it.take_back();
            if let Some(private) = it.private(of) {
                let mut private = private.lock();
                private.change_sgi_senders(first, value & lanes, pending);
            }
            it.alert(of);
        }
        Register::SendSgi => {
            let (intid, receivers) = distributor::sgi_v2(value, it.own());
            send(it, intid, receivers, None);
        }
        Register::Control => set_control(it, value),
        Register::Waker => {
            if let Some(private) = it.private(of) {
                private.lock().set_waker(value);
            }
        }
        Register::Deactivate => deactivate(it, value & 0x3ff),
        Register::Constant(_) | Register::OwnTarget => {}
    }
}

fn write_private(it: &mut impl Accessor, offset: u64, of: usize, value: u32, lanes: u32) {
    let Some(private) = it.private(of) else {
        return;
    };
    let mut private = private.lock();
    if it.is_v3() {
        private.write_v3(offset, value, lanes);
    } else {
        private.write(offset, value, lanes);
    }
    let stops = offset == ICENABLER && private.listed & value != 0;
    drop(private);
    it.alert(of);
    if stops {
        look(it, of);
    }
}

fn write_shared(it: &mut impl Accessor, offset: u64, value: u32, lanes: u32) {
    let concerned = {
        let homes = homes(it);
        let home = |target| homes.of(target);
        let mut shared = it.shared().lock();
        shared.write(offset, value, lanes, home);
        let intids = shared_registers::interrupts(offset, shared.routing());
        concern(&shared, intids, home, |vcpu| it.mark(vcpu))
    };
    concerned.for_each(|vcpu| it.alert(vcpu));
    if (ICENABLER..ISPENDR).contains(&offset) {
        look_shared(it, offset);
    }
}

fn homes(it: &impl Accessor) -> Homes<impl Fn(usize) -> bool> {
    Homes::new(it.vcpus(), |vcpu| it.is_on(vcpu))
}

fn set_control(it: &mut impl Accessor, value: u32) {
    let before = it.control().swap(value & GROUPS, Ordering::Relaxed);
    if before & !value != 0 {
        return withdraw(it);
    }
    for vcpu in 0..it.vcpus() {
        it.alert(vcpu);
    }
}

/// A group is off now: waits until every vCPU has taken back what it listed before. All are asked before the first is waited for.
#[inline(never)]
fn withdraw(it: &mut impl Accessor) {
    it.take_back();
    let mut last = [None; VcpuSet::MOST];
    for (vcpu, last) in (0..it.vcpus()).zip(&mut last) {
        let private = it.private(vcpu).map(Mutex::lock);
        *last = private.and_then(|mut private| match private.look() {
            Some(_) => None,
            None => Some(private.ask().number),
        });
    }
    let words = (1..=shared_registers::WORDS_OF_SPIS).map(|word| ISPENDR + 4 * word);
    let mut questions = [None; WORDS];
    for (offset, question) in words.zip(&mut questions) {
        *question = Question::ask(it, offset);
    }
    for vcpu in 0..it.vcpus() {
        it.alert(vcpu);
    }
    for (vcpu, last) in (0..).zip(last) {
        if let Some(last) = last {
            await_answer(it, vcpu, last);
        }
    }
    for question in questions.into_iter().flatten() {
        question.await_answer(it);
    }
}

/// What is pending and active of vCPU `of`.
fn look(it: &mut impl Accessor, of: usize) -> Option<Answer> {
    let own = of == it.own();
    if own {
        it.take_back();
        it.release();
    }
    let mut private = it.private(of)?.lock();
    if let Some(found) = private.look() {
        let may_have_dropped = !own && private.holds_untaken();
        drop(private);
        if may_have_dropped {
            // Not waited for: that vCPU may itself wait for this one, and gives back nothing meanwhile.
            it.alert(of);
        }
        return Some(found);
    }
    let last = private.ask().number;
    drop(private);
    it.take_back();
    it.alert(of);
    await_answer(it, of, last)
}

/// The answer of vCPU `of`, which has been asked and alerted, behind the one of number `last`.
fn await_answer(it: &mut impl Accessor, of: usize, last: u32) -> Option<Answer> {
    let mut polls = 0_u32;
    loop {
        let private = it.private(of)?.lock();
        let answer = private.answer();
        let new = Some(answer).filter(|answer| answer.number != last);
        if let Some(found) = new.or_else(|| private.look()) {
            return Some(found);
        }
        drop(private);
        it.wait();
        polls = polls.wrapping_add(1);
        if polls.is_multiple_of(POLLS) {
            it.insist(of);
        }
    }
}

/// What is pending and active of the word of SPIs that the register at `offset` is of.
fn look_shared(it: &mut impl Accessor, offset: u64) -> Option<Seen> {
    it.take_back();
    let question = Question::ask(it, offset)?;
    question.concerned.for_each(|vcpu| it.alert(vcpu));
    Some(question.await_answer(it))
}

/// A word of SPIs that was asked for, and who has some of them listed.
#[derive(Clone, Copy)]
struct Question {
    word: usize,
    seen: Seen,
    concerned: VcpuSet,
}

impl Question {
    /// Asks for the word that the register at `offset` is of. Who is concerned is to be alerted.
    fn ask(it: &impl Accessor, offset: u64) -> Option<Self> {
        let word = shared_registers::word_of(offset)?;
        let mut shared = it.shared().lock();
        Some(Self {
            word,
            seen: shared.ask(word),
            concerned: holders(&shared, offset),
        })
    }

    /// What was seen, completed by what comes back.
    fn await_answer(self, it: &mut impl Accessor) -> Seen {
        let mut polls = 0_u32;
        loop {
            let found = it.shared().lock().found(self.word, self.seen);
            if let Some(found) = found {
                return found;
            }
            it.wait();
            polls = polls.wrapping_add(1);
            if polls.is_multiple_of(POLLS) {
                self.concerned.for_each(|vcpu| it.insist(vcpu));
            }
        }
    }
}

fn holders(shared: &Shared, offset: u64) -> VcpuSet {
    let intids = shared_registers::interrupts(offset, shared.routing());
    let home = |target| match target {
        Target::Home(vcpu) => Some(vcpu),
        _ => None,
    };
    concern(shared, intids, home, |_| ())
}

/// ICC_SGI1R_EL1 or ICC_SGI0R_EL1.
pub fn send_v3(it: &impl Accessor, value: u64, group1: bool) {
    let (intid, receivers) = distributor::sgi_v3(value);
    send(it, intid, receivers, Some(group1));
}

/// Sends `intid`; to receivers that have it in the given group, if one is given.
fn send(it: &impl Accessor, intid: u8, receivers: Receivers, group1: Option<bool>) {
    match receivers {
        Receivers::Some { first, bits } => {
            let mut left = bits;
            while let Some(others) = left.checked_sub(1) {
                send_to(it, first + left.trailing_zeros() as usize, intid, group1);
                left &= others;
            }
        }
        Receivers::Others => {
            for vcpu in (0..it.vcpus()).filter(|vcpu| *vcpu != it.own()) {
                send_to(it, vcpu, intid, group1);
            }
        }
    }
}

#[inline]
fn send_to(it: &impl Accessor, vcpu: usize, intid: u8, group1: Option<bool>) {
    let Some(private) = it.private(vcpu) else {
        return;
    };
    let mut private = private.lock();
    if group1.is_some_and(|group1| group1 != private.is_group1(intid)) {
        return;
    }
    // GICv3 has no senders: all SGIs of one number merge.
    let sender = if group1.is_some() {
        0
    } else {
        u8::try_from(it.own() & 7).unwrap_or(0)
    };
    private.send(intid, sender);
    drop(private);
    it.alert(vcpu);
}

/// ICC_DIR_EL1 or GICC_DIR, which come here because the interrupt may be one that another vCPU took, or that has no list
/// register any more, and the CPU interface would only count it. With EOImode 0 it does nothing.
///
/// A GICv3 CPU whose ICC_DIR_EL1 cannot be trapped by itself (ICH_VTR_EL2.TDS is 0: Cortex-A72 and others of its time) sends only
/// GICC_DIR here. There the CPU interface ends what the vCPU itself has listed and counts the others, without their numbers: an
/// SPI that another vCPU took stays active, and with more active interrupts than list registers the most urgent of those that are
/// not listed is ended, whichever the guest named. Guests that choose EOImode 0, as Linux does at EL1, never write the register.
pub fn deactivate(it: &mut impl Accessor, intid: u32) {
    let Some(intid) = u16::try_from(intid).ok().filter(|_| it.deactivates()) else {
        return;
    };
    it.take_back();
    match u8::try_from(intid) {
        Ok(private) if intid < FIRST => {
            if let Some(own) = it.private(it.own()) {
                own.lock().deactivate(private);
            }
            it.alert(it.own());
        }
        _ => {
            let homes = homes(it);
            let mut shared = it.shared().lock();
            shared.deactivate(intid);
            let ids = core::iter::once(intid);
            let concerned = concern(
                &shared,
                ids,
                |target| homes.of(target),
                |vcpu| it.mark(vcpu),
            );
            drop(shared);
            concerned.for_each(|vcpu| it.alert(vcpu));
        }
    }
}
