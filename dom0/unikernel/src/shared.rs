//! Pages that a peer may write at any time. Rust references to them never exist; bytes are only copied.

use core::sync::atomic::{AtomicU32, Ordering};
use ring_protocol::SharedPage;

/// Bytes of a page.
const LENGTH: usize = 4096;

/// A mapped page that a peer writes, too.
#[derive(Debug)]
pub(crate) struct PeerPage {
    base: *mut u8,
}

// SAFETY: every access is atomic or volatile, and the page is the same for every vcpu.
unsafe impl Send for PeerPage {}

impl PeerPage {
    /// # Safety
    /// `base` is a page, mapped writable for as long as this value is used, to which no Rust reference leads.
    pub(crate) unsafe fn new(base: *mut u8) -> Self {
        Self { base }
    }

    /// The word at `offset`, if `offset` is aligned and inside the page.
    fn word(&self, offset: usize) -> Option<&AtomicU32> {
        if offset > LENGTH - 4 || !offset.is_multiple_of(4) {
            return None;
        }
        // SAFETY: inside the page and aligned; mapped, by the contract of `new`; the peer may write it at the same
        // time, hence an atomic.
        Some(unsafe { AtomicU32::from_ptr(self.base.add(offset).cast()) })
    }

    /// How many of `wanted` bytes from `offset` on are inside the page.
    fn room(offset: usize, wanted: usize) -> usize {
        wanted.min(LENGTH.saturating_sub(offset))
    }
}

impl SharedPage for PeerPage {
    fn len_bytes(&self) -> usize {
        LENGTH
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
        let count = Self::room(offset, into.len());
        let base = self.base.wrapping_add(offset);
        for (i, byte) in into.iter_mut().take(count).enumerate() {
            // SAFETY: `room` keeps the address inside the page, which is mapped by the contract of `new`; the peer may
            // write it at the same time, hence volatile.
            *byte = unsafe { base.add(i).read_volatile() };
        }
    }

    fn write(&self, offset: usize, from: &[u8]) {
        let count = Self::room(offset, from.len());
        let base = self.base.wrapping_add(offset);
        for (i, byte) in from.iter().take(count).enumerate() {
            // SAFETY: as in `read`.
            unsafe { base.add(i).write_volatile(*byte) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accesses_stay_inside_the_page() {
        #[repr(align(4096))]
        struct Page([u8; 4096]);
        let mut memory = Page([0; 4096]);
        // SAFETY: the array outlives the page and is not touched meanwhile.
        let page = unsafe { PeerPage::new(memory.0.as_mut_ptr()) };
        page.write(4094, b"abcd");
        let mut seen = [7; 4];
        page.read(4094, &mut seen);
        assert_eq!(seen, [b'a', b'b', 7, 7]);
        page.write(5000, b"x");
        page.read(usize::MAX, &mut seen);
        page.store_u32(4092, 5);
        assert_eq!((page.load_u32(4092), page.load_u32(4096), page.load_u32(2)), (5, 0, 0));
    }
}
