//! Whom an SPI's target means: of the vCPUs that it names, the first that is on.

use core::cell::Cell;

use super::distributor::index_of;
use super::shared::Target;

/// The vCPUs of a VM as targets name them, while the lock of the shared interrupts is held. Each is asked at most once whether it
/// is on, however many interrupts there are: a guest chooses both numbers. Whoever is turned on or off meanwhile has the shared
/// interrupts looked at once more, behind the lock.
pub struct Homes<F> {
    vcpus: usize,
    is_on: F,
    /// One bit each: it has been asked.
    asked: Cell<u128>,
    /// Of those, it is on.
    on: Cell<u128>,
}

impl<F: Fn(usize) -> bool> Homes<F> {
    /// Of a VM of `vcpus`, as `is_on` knows them.
    pub const fn new(vcpus: usize, is_on: F) -> Self {
        Self {
            vcpus,
            is_on,
            asked: Cell::new(0),
            on: Cell::new(0),
        }
    }

    /// The one vCPU that `target` means now: of several the first that is on, or the first if none is.
    pub fn of(&self, target: Target) -> Option<usize> {
        match target {
            Target::Home(vcpu) => Some(vcpu),
            Target::Affinity(affinity) => index_of(affinity).filter(|it| *it < self.vcpus),
            Target::OneOf(bits) => self.first_on(u128::from(bits)),
            Target::Any => self.first_on(u128::MAX),
        }
    }

    fn first_on(&self, bits: u128) -> Option<usize> {
        let none = u128::MAX.unbounded_shl(u32::try_from(self.vcpus).unwrap_or(u32::MAX));
        let candidates = bits & !none;
        loop {
            let may_be_on = candidates & (self.on.get() | !self.asked.get());
            let Some(vcpu) = first(may_be_on) else {
                return first(candidates);
            };
            let it = 1_u128 << vcpu;
            if self.on.get() & it != 0 {
                return Some(vcpu);
            }
            self.asked.set(self.asked.get() | it);
            if (self.is_on)(vcpu) {
                self.on.set(self.on.get() | it);
            }
        }
    }
}

fn first(bits: u128) -> Option<usize> {
    let first = usize::try_from(bits.trailing_zeros()).ok();
    first.filter(|_| bits != 0)
}

#[cfg(test)]
mod tests {
    use core::cell::Cell;

    use super::{Homes, Target};

    #[test]
    fn of_several_the_first_that_is_on_is_meant_or_the_first() {
        for on in 0..=0xff_u8 {
            let homes = Homes::new(5, |vcpu| on >> vcpu & 1 != 0);
            for bits in (0..=0xff_u8).rev() {
                let named = || (0..5).filter(|vcpu| bits >> vcpu & 1 != 0);
                let first_on = named().find(|vcpu| on >> vcpu & 1 != 0);
                let expected = first_on.or(named().next());
                assert_eq!(homes.of(Target::OneOf(bits)), expected, "{bits:#b} {on:#b}");
            }
            let expected = (0..5).find(|vcpu| on >> vcpu & 1 != 0).or(Some(0));
            assert_eq!(homes.of(Target::Any), expected, "{on:#b}");
        }
    }

    #[test]
    fn each_vcpu_is_asked_once_however_many_interrupts_there_are() {
        for on in [0, 122, usize::MAX] {
            let asked = Cell::new(0);
            let homes = Homes::new(123, |vcpu| {
                asked.set(asked.get() + 1);
                vcpu == on
            });
            for _ in 0..96 {
                assert_eq!(
                    homes.of(Target::Any),
                    Some(on).filter(|on| *on < 123).or(Some(0))
                );
            }
            assert!(asked.get() <= 123, "{}", asked.get());
        }
    }

    #[test]
    fn what_names_one_vcpu_asks_nobody() {
        let homes = Homes::new(20, |_| unreachable!());
        assert_eq!(homes.of(Target::Home(7)), Some(7));
        assert_eq!(homes.of(Target::Affinity(3)), Some(3));
        assert_eq!(homes.of(Target::Affinity(0xff_ff00)), None);
    }
}
