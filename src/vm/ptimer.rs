//! The physical timer (CNTP) of a vCPU, emulated: its registers trap, and its time comes by the EL2 timer of the CPU that holds
//! the vCPU. Its interrupt is a level PPI that is linked to nothing.
//!
//! The counter itself (CNTPCT_EL0) is the machine's and does not trap, so what the guest reads there and what it compares with
//! are the same. Guests that do not boot at EL2 use the virtual timer; this one is for firmware and test programs.
//!
//! Reference: DDI 0487 issue K.a, D11.2.4 (operation of the timers).

/// Its interrupt in every guest.
pub const INTID: u8 = 30;

const ENABLE: u64 = 1 << 0;
const IMASK: u64 = 1 << 1;
const ISTATUS: u64 = 1 << 2;

/// A register of it, by op2 of the encoding.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Register {
    /// CNTP_TVAL_EL0: the distance to the compare value, 32 bits, signed.
    Value,
    /// CNTP_CTL_EL0.
    Control,
    /// CNTP_CVAL_EL0.
    Compare,
}

/// Its state. Times are ticks of the physical counter.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct PhysicalTimer {
    /// ENABLE and IMASK.
    control: u64,
    compare: u64,
    /// What was last said of its interrupt line.
    line: bool,
}

impl PhysicalTimer {
    /// Reads a register at time `now`.
    pub fn read(&self, register: Register, now: u64) -> u64 {
        match register {
            Register::Value => self.compare.wrapping_sub(now) & u64::from(u32::MAX),
            // ISTATUS is UNKNOWN while the timer is off: zero here.
            Register::Control if self.is_due(now) && self.control & ENABLE != 0 => {
                self.control | ISTATUS
            }
            Register::Control => self.control,
            Register::Compare => self.compare,
        }
    }

    /// Writes a register at time `now`.
    pub fn write(&mut self, register: Register, value: u64, now: u64) {
        match register {
            Register::Value => self.compare = now.wrapping_add(sign_extended(value)),
            Register::Control => self.control = value & (ENABLE | IMASK),
            Register::Compare => self.compare = value,
        }
    }

    /// What its interrupt line is at time `now`; [`PhysicalTimer::changes_at`] tells when to ask again.
    pub fn settle(&mut self, now: u64) -> bool {
        self.line = self.is_armed() && self.is_due(now);
        self.line
    }

    /// When its line will be asserted, unless it is reprogrammed: in the past if that has happened since it was settled. `None`
    /// while it is asserted, or will not be.
    pub fn changes_at(&self) -> Option<u64> {
        (self.is_armed() && !self.line).then_some(self.compare)
    }

    fn is_armed(&self) -> bool {
        self.control & (ENABLE | IMASK) == ENABLE
    }

    fn is_due(&self, now: u64) -> bool {
        now >= self.compare
    }
}

/// The lower 32 bits of `value` as a signed number in 64.
fn sign_extended(value: u64) -> u64 {
    const SIGN: u64 = 1 << 31;
    let low = value & u64::from(u32::MAX);
    (low ^ SIGN).wrapping_sub(SIGN)
}

#[cfg(test)]
mod tests {
    use super::{PhysicalTimer, Register};

    #[test]
    fn it_fires_at_its_compare_value_and_not_before() {
        let mut timer = PhysicalTimer::default();
        timer.write(Register::Compare, 100, 0);
        assert!(!timer.settle(200) && timer.changes_at().is_none(), "off");
        timer.write(Register::Control, 1, 0);
        assert_eq!((timer.settle(99), timer.changes_at()), (false, Some(100)));
        assert_eq!(timer.read(Register::Control, 99), 1);
        assert_eq!(timer.read(Register::Control, 100), 0b101);
        assert_eq!((timer.settle(100), timer.changes_at()), (true, None));
    }

    #[test]
    fn a_time_that_comes_before_anybody_looks_again_is_not_forgotten() {
        let mut timer = PhysicalTimer::default();
        timer.write(Register::Compare, 100, 0);
        timer.write(Register::Control, 1, 0);
        timer.settle(99);
        // It is 101 now.
        assert_eq!(timer.changes_at(), Some(100));
    }

    #[test]
    fn masked_it_tells_and_does_not_interrupt() {
        let mut timer = PhysicalTimer::default();
        timer.write(Register::Control, 0b11, 0);
        assert!(!timer.settle(5) && timer.changes_at().is_none());
        assert_eq!(timer.read(Register::Control, 5), 0b111);
    }

    #[test]
    fn the_value_register_counts_from_now_and_is_signed() {
        let mut timer = PhysicalTimer::default();
        timer.write(Register::Value, 10, 1000);
        assert_eq!(timer.read(Register::Compare, 0), 1010);
        assert_eq!(timer.read(Register::Value, 1000), 10);
        assert_eq!(timer.read(Register::Value, 1011), 0xffff_ffff);
        timer.write(Register::Value, 0xffff_ffff, 1000);
        assert_eq!(timer.read(Register::Compare, 0), 999);
        timer.write(Register::Value, 0x7_0000_0001, 1000);
        assert_eq!(
            timer.read(Register::Compare, 0),
            1001,
            "upper bits count for nothing"
        );
    }

    #[test]
    fn reserved_bits_of_the_control_register_read_as_zero() {
        let mut timer = PhysicalTimer::default();
        timer.write(Register::Compare, u64::MAX, 0);
        timer.write(Register::Control, u64::MAX, 0);
        assert_eq!(timer.read(Register::Control, 0), 0b11);
    }
}
