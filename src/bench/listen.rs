//! What suites about exits and interrupts need of a scene: vCPUs that listen, samples, and a VM beside.

use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;

use crate::addr::{Ipa, to_index};
use crate::guest::abi::{self, op};
use crate::vm::{Command, Host, Vm};

use super::Refusal;
use super::scene::{Cast, Scene, Stage};

/// A VM without memory, whose vCPUs hold no CPU.
pub(super) struct Bystander {
    vm: Arc<Vm>,
    host: &'static Host,
}

impl Bystander {
    /// Number of its vCPUs.
    pub(super) fn vcpus(&self) -> usize {
        self.vm.vcpus().len()
    }

    /// Ends it.
    pub(super) fn close(self) {
        Vm::destroy(self.vm, self.host);
    }
}

/// What vCPUs do that wait for interrupts.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Listening {
    Running,
    Asleep,
    /// They give the CPU to another vCPU whenever they have it.
    HandingOn,
}

impl Listening {
    /// The guest's number of it.
    const fn number(self) -> u64 {
        match self {
            Self::Running => abi::listen::RUNNING,
            Self::Asleep => abi::listen::ASLEEP,
            Self::HandingOn => abi::listen::HANDING_ON,
        }
    }
}

impl Stage<'_> {
    /// A VM that exists beside the one that is measured, and is never started.
    pub(super) fn bystander(&self, cast: Cast) -> Result<Bystander, Refusal> {
        Ok(Bystander {
            vm: self.create(cast)?,
            host: self.host,
        })
    }
}

impl Scene {
    /// Version of the interrupt controller.
    pub(super) fn gic_version(&self) -> u32 {
        self.vm.gic_version()
    }

    /// What the last [`op::MEASURE`] stored, `count` words.
    pub(super) fn samples(&self, count: u64) -> Result<Vec<u64>, Refusal> {
        let mut bytes = vec![0; to_index(8 * count)];
        self.read(Ipa::new(abi::SAMPLES), &mut bytes)?;
        let (words, _) = bytes.as_chunks::<8>();
        Ok(words.iter().map(|word| u64::from_le_bytes(*word)).collect())
    }

    /// Has vCPUs from 1 to `last` let interrupts in until [`Scene::hear_out`].
    pub(super) fn listen(&self, last: usize, how: Listening) -> Result<(), Refusal> {
        self.set_stop(0)?;
        let listen = Command {
            op: op::LISTEN,
            args: [how.number(), 0, 0, 0, 0],
        };
        (1..=last).for_each(|vcpu| self.vm.post(vcpu, listen));
        Ok(())
    }

    /// Ends [`Scene::listen`]; the IPIs that the listeners took. One that sleeps is woken to see that it is to end.
    pub(super) fn hear_out(&self, last: usize) -> Result<u64, Refusal> {
        self.set_stop(1)?;
        let mut taken = 0;
        for vcpu in 1..=last {
            let poke = Command {
                op: op::MEASURE,
                args: [abi::measure::POKE, 1, vcpu as u64, 0, 0],
            };
            self.perform_one(0, poke)?;
            taken += self.outcome(vcpu)?.results[0];
        }
        Ok(taken)
    }
}
