//! A queue of bytes of a fixed size.

/// At most `BYTES` bytes that wait.
#[derive(Clone, Debug)]
pub struct Fifo<const BYTES: usize> {
    bytes: [u8; BYTES],
    first: usize,
    len: usize,
}

impl<const BYTES: usize> Fifo<BYTES> {
    /// An empty one.
    pub const fn new() -> Self {
        Self {
            bytes: [0; BYTES],
            first: 0,
            len: 0,
        }
    }

    /// Bytes that wait.
    #[inline]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether none wait.
    #[inline]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes that can be added.
    #[inline]
    pub const fn room(&self) -> usize {
        BYTES.saturating_sub(self.len)
    }

    /// Adds `byte` behind the others. False: there is no room.
    #[must_use]
    pub fn push(&mut self, byte: u8) -> bool {
        let at = (self.first + self.len) % BYTES;
        match self.bytes.get_mut(at) {
            Some(place) if self.len < BYTES => *place = byte,
            _ => return false,
        }
        self.len += 1;
        true
    }

    /// The byte that has waited longest; it stays.
    pub fn first(&self) -> Option<u8> {
        self.bytes
            .get(self.first)
            .copied()
            .filter(|_| !self.is_empty())
    }

    /// Takes out the byte that has waited longest.
    pub fn pop(&mut self) -> Option<u8> {
        let byte = self.first()?;
        self.first = (self.first + 1) % BYTES;
        self.len = self.len.saturating_sub(1);
        Some(byte)
    }

    /// Drops all.
    pub fn clear(&mut self) {
        self.len = 0;
    }
}

impl<const BYTES: usize> Default for Fifo<BYTES> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::Fifo;

    #[test]
    fn bytes_come_out_in_order_and_none_is_taken_that_has_no_room() {
        let mut fifo = Fifo::<3>::new();
        for round in 0..5_u8 {
            assert!((0..3).all(|byte| fifo.push(round + byte)));
            assert!(!fifo.push(99));
            assert_eq!((fifo.len(), fifo.room()), (3, 0));
            assert_eq!(fifo.pop(), Some(round));
            assert!(fifo.push(round + 3));
            let out = [fifo.pop(), fifo.pop(), fifo.pop(), fifo.pop()];
            assert_eq!(
                out.map(|byte| byte.map(|it| it - round)),
                [Some(1), Some(2), Some(3), None]
            );
        }
        assert!(fifo.push(1));
        fifo.clear();
        assert_eq!((fifo.first(), fifo.is_empty()), (None, true));
    }
}
