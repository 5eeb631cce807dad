//! What we ask of memory that another domain can read and write at any time.

use core::sync::atomic::{AtomicU32, Ordering, fence};

/// Memory shared with a peer that may change any byte between any two of our accesses.
///
/// Offsets count bytes from the start of the mapping. The code of this crate stays inside
/// `len_bytes`; an implementation must stay memory-safe even when an offset does not (reads give
/// zero bytes or nothing, writes are dropped).
///
/// Ordering contract, which the rings rest on: an index is published with [`store_u32`] after the
/// bytes it covers, and read with [`load_u32`] before them; [`fence`] keeps an earlier store from
/// passing a later load (the only reordering x86 does, and the one that loses wakeups).
///
/// [`store_u32`]: SharedPage::store_u32
/// [`load_u32`]: SharedPage::load_u32
/// [`fence`]: SharedPage::fence
pub trait SharedPage {
    /// Length of the mapping in bytes.
    fn len_bytes(&self) -> usize;
    /// Loads an aligned word with acquire ordering, exactly once.
    fn load_u32(&self, offset: usize) -> u32;
    /// Stores an aligned word with release ordering.
    fn store_u32(&self, offset: usize, value: u32);
    /// Copies bytes out of the page, each shared byte read at most once.
    fn read(&self, offset: usize, into: &mut [u8]);
    /// Copies bytes into the page.
    fn write(&self, offset: usize, from: &[u8]);
    /// A full barrier between what comes before and what follows.
    fn fence(&self) {
        fence(Ordering::SeqCst);
    }
}

impl<P: SharedPage + ?Sized> SharedPage for &P {
    fn len_bytes(&self) -> usize {
        (**self).len_bytes()
    }
    fn load_u32(&self, offset: usize) -> u32 {
        (**self).load_u32(offset)
    }
    fn store_u32(&self, offset: usize, value: u32) {
        (**self).store_u32(offset, value);
    }
    fn read(&self, offset: usize, into: &mut [u8]) {
        (**self).read(offset, into);
    }
    fn write(&self, offset: usize, from: &[u8]) {
        (**self).write(offset, from);
    }
    fn fence(&self) {
        (**self).fence();
    }
}

/// A shared page made of plain atomics: for tests, simulations, and peers in one address space.
///
/// Byte writes change whole words, so two writers must not share a word; the layouts of this crate
/// give every word one writer.
pub struct WordPage<const WORDS: usize = 1024> {
    words: [AtomicU32; WORDS],
}

impl<const WORDS: usize> WordPage<WORDS> {
    /// A page of zeroes.
    #[must_use]
    pub const fn new() -> Self {
        Self { words: [const { AtomicU32::new(0) }; WORDS] }
    }

    fn word(&self, offset: usize) -> Option<&AtomicU32> {
        self.words.get(offset / 4)
    }
}

impl<const WORDS: usize> Default for WordPage<WORDS> {
    fn default() -> Self {
        Self::new()
    }
}

impl<const WORDS: usize> SharedPage for WordPage<WORDS> {
    fn len_bytes(&self) -> usize {
        WORDS * 4
    }

    fn load_u32(&self, offset: usize) -> u32 {
        self.word(offset).map_or(0, |word| word.load(Ordering::Acquire))
    }

    fn store_u32(&self, offset: usize, value: u32) {
        if let Some(word) = self.word(offset) {
            word.store(value, Ordering::Release);
        }
    }

    fn read(&self, offset: usize, into: &mut [u8]) {
        for (at, byte) in (offset..).zip(into) {
            let word = self.word(at).map_or(0, |word| word.load(Ordering::Relaxed));
            *byte = word.to_le_bytes().get(at % 4).copied().unwrap_or(0);
        }
    }

    fn write(&self, offset: usize, from: &[u8]) {
        for (at, byte) in (offset..).zip(from) {
            let Some(word) = self.word(at) else { return };
            let mut bytes = word.load(Ordering::Relaxed).to_le_bytes();
            if let Some(slot) = bytes.get_mut(at % 4) {
                *slot = *byte;
            }
            word.store(u32::from_le_bytes(bytes), Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_words_agree_and_the_end_is_respected() {
        let page: WordPage<4> = WordPage::new();
        page.write(3, &[1, 2, 3]);
        assert_eq!(page.load_u32(0), 0x0100_0000);
        assert_eq!(page.load_u32(4), 0x0302);
        page.write(14, &[9, 9, 9, 9]);
        let mut seen = [7; 6];
        page.read(12, &mut seen);
        assert_eq!(seen, [0, 0, 9, 9, 0, 0]);
        page.store_u32(400, 1);
        assert_eq!(page.load_u32(400), 0);
    }
}
