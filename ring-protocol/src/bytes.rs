//! A stream of bytes one way: free-running indices over a power-of-two buffer (ABI io 2.1, 3.1, 4.5).
//!
//! The sender owns `prod`, the receiver owns `cons`; both count bytes modulo 2^32. A byte is present
//! while `cons != prod`; `prod - cons` above the buffer's size is corruption, never wrapped away.
//! Each end keeps its own index privately: a peer that scribbles over both words of the page gains
//! nothing but its own [`BadIndices`].

use core::cmp::min;
use core::fmt;

use crate::page::SharedPage;

/// Where a byte ring lies in its page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteRing {
    /// Offset of the first data byte.
    data: usize,
    /// Number of data bytes, a power of two.
    size: u32,
    /// Offset of the receiver's index.
    cons: usize,
    /// Offset of the sender's index.
    prod: usize,
}

/// The two indices lie further apart than the ring is long: the peer is broken or hostile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadIndices {
    /// The receiver's index.
    pub cons: u32,
    /// The sender's index.
    pub prod: u32,
    /// Size of the ring.
    pub size: u32,
}

impl fmt::Display for BadIndices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cons, prod, size } = self;
        write!(f, "ring indices cons={cons:#x} prod={prod:#x} span more than {size} bytes")
    }
}

/// A pair of indices that has been checked: it cannot describe more than the ring holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    pending: u32,
    room: u32,
}

impl Window {
    /// Checks one snapshot of the indices.
    ///
    /// # Errors
    /// `prod - cons` modulo 2^32 exceeds `size`.
    pub const fn new(cons: u32, prod: u32, size: u32) -> Result<Self, BadIndices> {
        let pending = prod.wrapping_sub(cons);
        match size.checked_sub(pending) {
            Some(room) => Ok(Self { pending, room }),
            None => Err(BadIndices { cons, prod, size }),
        }
    }

    /// Entries sent and not yet received.
    #[must_use]
    pub const fn pending(self) -> u32 {
        self.pending
    }

    /// Entries that can still be sent.
    #[must_use]
    pub const fn room(self) -> u32 {
        self.room
    }
}

impl ByteRing {
    /// Describes a ring; `size` is rounded down to a power of two (zero stays unusable).
    #[must_use]
    pub const fn new(data: usize, size: u32, cons: usize, prod: usize) -> Self {
        let size = if size == 0 { 0 } else { 1 << size.ilog2() };
        Self { data, size, cons, prod }
    }

    /// Number of bytes the ring holds.
    #[must_use]
    pub const fn size(&self) -> u32 {
        self.size
    }

    /// Takes the indices of the page as they are, checked.
    ///
    /// # Errors
    /// They contradict each other.
    pub fn window<P: SharedPage>(&self, page: &P) -> Result<Window, BadIndices> {
        Window::new(page.load_u32(self.cons), page.load_u32(self.prod), self.size)
    }

    /// Sets both indices to zero: only before the peer has seen the page, or agreed to start anew.
    pub fn reset<P: SharedPage>(&self, page: &P) {
        page.store_u32(self.cons, 0);
        page.store_u32(self.prod, 0);
    }

    /// Offset of the byte with this index, and how many follow before the ring wraps.
    const fn locate(&self, index: u32) -> (usize, usize) {
        let slot = index & self.size.wrapping_sub(1);
        (self.data + slot as usize, (self.size - slot) as usize)
    }
}

/// The receiving end of a byte ring.
#[derive(Clone, Debug)]
pub struct Reader {
    ring: ByteRing,
    cons: u32,
}

impl Reader {
    /// Takes the receiving end where the page says the last receiver stopped.
    ///
    /// # Errors
    /// The indices in the page contradict each other.
    pub fn attach<P: SharedPage>(ring: ByteRing, page: &P) -> Result<Self, BadIndices> {
        let cons = page.load_u32(ring.cons);
        Window::new(cons, page.load_u32(ring.prod), ring.size)?;
        Ok(Self { ring, cons })
    }

    /// How many bytes wait. Ask again after the last [`read`](Self::read) and before sleeping: a
    /// peer notifies only when it saw us catch up.
    ///
    /// # Errors
    /// The sender's index is impossible.
    pub fn available<P: SharedPage>(&self, page: &P) -> Result<u32, BadIndices> {
        let prod = page.load_u32(self.ring.prod);
        Window::new(self.cons, prod, self.ring.size).map(Window::pending)
    }

    /// Copies up to `into.len()` waiting bytes out, publishes the new index, returns how many.
    /// The peer must be notified when the answer is not zero.
    ///
    /// # Errors
    /// The sender's index is impossible; nothing was read.
    pub fn read<P: SharedPage>(&mut self, page: &P, into: &mut [u8]) -> Result<usize, BadIndices> {
        let pending = self.available(page)?;
        let take = pending.min(u32::try_from(into.len()).unwrap_or(u32::MAX));
        if take == 0 {
            return Ok(0);
        }
        let (start, until_wrap) = self.ring.locate(self.cons);
        let wanted = into.get_mut(..take as usize).unwrap_or_default();
        let (first, second) = wanted.split_at_mut(min(until_wrap, take as usize));
        page.read(start, first);
        page.read(self.ring.data, second);
        self.cons = self.cons.wrapping_add(take);
        page.store_u32(self.ring.cons, self.cons);
        page.fence();
        Ok(take as usize)
    }
}

/// The sending end of a byte ring.
#[derive(Clone, Debug)]
pub struct Writer {
    ring: ByteRing,
    prod: u32,
}

impl Writer {
    /// Takes the sending end where the page says the last sender stopped.
    ///
    /// # Errors
    /// The indices in the page contradict each other.
    pub fn attach<P: SharedPage>(ring: ByteRing, page: &P) -> Result<Self, BadIndices> {
        let prod = page.load_u32(ring.prod);
        Window::new(page.load_u32(ring.cons), prod, ring.size)?;
        Ok(Self { ring, prod })
    }

    /// How many bytes can be sent now.
    ///
    /// # Errors
    /// The receiver's index is impossible.
    pub fn room<P: SharedPage>(&self, page: &P) -> Result<u32, BadIndices> {
        let cons = page.load_u32(self.ring.cons);
        Window::new(cons, self.prod, self.ring.size).map(Window::room)
    }

    /// Copies as much of `from` as fits, publishes the new index, returns how many bytes went.
    /// The peer must be notified when the answer is not zero.
    ///
    /// # Errors
    /// The receiver's index is impossible; nothing was written.
    pub fn write<P: SharedPage>(&mut self, page: &P, from: &[u8]) -> Result<usize, BadIndices> {
        let room = self.room(page)?;
        let put = room.min(u32::try_from(from.len()).unwrap_or(u32::MAX));
        if put == 0 {
            return Ok(0);
        }
        let (start, until_wrap) = self.ring.locate(self.prod);
        let wanted = from.get(..put as usize).unwrap_or_default();
        let (first, second) = wanted.split_at(min(until_wrap, put as usize));
        page.write(start, first);
        page.write(self.ring.data, second);
        self.prod = self.prod.wrapping_add(put);
        page.store_u32(self.ring.prod, self.prod);
        page.fence();
        Ok(put as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::WordPage;

    const RING: ByteRing = ByteRing::new(0, 8, 8, 12);

    #[test]
    fn bytes_cross_the_wrap_of_the_buffer_and_of_the_index() {
        let page: WordPage<4> = WordPage::new();
        page.store_u32(8, u32::MAX - 2);
        page.store_u32(12, u32::MAX - 2);
        let mut writer = Writer::attach(RING, &page).unwrap();
        let mut reader = Reader::attach(RING, &page).unwrap();
        let mut seen = [0; 16];
        for round in 0..10u8 {
            let sent = [round, round + 1, round + 2, round + 3, round + 4];
            assert_eq!(writer.write(&page, &sent), Ok(5));
            assert_eq!(reader.read(&page, &mut seen), Ok(5));
            assert_eq!(&seen[..5], &sent);
        }
    }

    #[test]
    fn a_full_ring_takes_no_more_and_loses_nothing() {
        let page: WordPage<4> = WordPage::new();
        let mut writer = Writer::attach(RING, &page).unwrap();
        let mut reader = Reader::attach(RING, &page).unwrap();
        assert_eq!(writer.write(&page, b"0123456789"), Ok(8));
        assert_eq!(writer.write(&page, b"x"), Ok(0));
        let mut seen = [0; 3];
        assert_eq!(reader.read(&page, &mut seen), Ok(3));
        assert_eq!(&seen, b"012");
        assert_eq!(writer.room(&page), Ok(3));
    }

    #[test]
    fn impossible_indices_are_refused_by_both_ends() {
        let page: WordPage<4> = WordPage::new();
        let mut writer = Writer::attach(RING, &page).unwrap();
        let mut reader = Reader::attach(RING, &page).unwrap();
        page.store_u32(12, 9);
        assert_eq!(reader.read(&page, &mut [0; 4]), Err(BadIndices { cons: 0, prod: 9, size: 8 }));
        page.store_u32(8, 1);
        assert_eq!(writer.write(&page, b"a"), Err(BadIndices { cons: 1, prod: 0, size: 8 }));
        assert!(Reader::attach(RING, &page).is_ok(), "cons 1, prod 9 is a full ring");
        page.store_u32(8, 0);
        assert!(Reader::attach(RING, &page).is_err());
        assert!(Writer::attach(RING, &page).is_err());
    }

    #[test]
    fn a_ring_without_size_carries_nothing() {
        let ring = ByteRing::new(0, 0, 8, 12);
        let page: WordPage<4> = WordPage::new();
        assert_eq!(Writer::attach(ring, &page).unwrap().write(&page, b"a"), Ok(0));
        assert_eq!(Reader::attach(ring, &page).unwrap().read(&page, &mut [0]), Ok(0));
    }
}
