//! Pages that a peer may write at any time. Rust references to them never exist; bytes are only copied.

use core::sync::atomic::{AtomicU32, Ordering};
use ring_protocol::SharedPage;

/// Mapped pages in a row that a peer writes, too.
#[derive(Debug)]
pub(crate) struct PeerPages {
    base: *mut u8,
    bytes: usize,
}

// SAFETY: every access is atomic or volatile, and the pages are the same for every vcpu.
unsafe impl Send for PeerPages {}

impl PeerPages {
    /// # Safety
    /// `bytes` bytes from `base` on are whole pages, mapped writable for as long as this value is used, and no Rust reference
    /// leads to them.
    pub(crate) unsafe fn new(base: *mut u8, bytes: usize) -> Self {
        Self { base, bytes }
    }

    /// The word at `offset`, if `offset` is aligned and inside the pages.
    fn word(&self, offset: usize) -> Option<&AtomicU32> {
        if offset > self.bytes.checked_sub(4)? || !offset.is_multiple_of(4) {
            return None;
        }
        // SAFETY: inside the pages and aligned; mapped, by the contract of `new`; the peer may write it at the same
        // time, hence an atomic.
        Some(unsafe { AtomicU32::from_ptr(self.base.add(offset).cast()) })
    }

    /// How many of `wanted` bytes from `offset` on are inside the pages.
    fn room(&self, offset: usize, wanted: usize) -> usize {
        wanted.min(self.bytes.saturating_sub(offset))
    }
}

/// How many bytes come before the first multiple of 8 from `offset` on.
fn to_word(offset: usize) -> usize {
    offset.wrapping_neg() % 8
}

impl SharedPage for PeerPages {
    fn len_bytes(&self) -> usize {
        self.bytes
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
        let count = self.room(offset, into.len());
        let into = into.get_mut(..count).unwrap_or_default();
        let (head, body) = into.split_at_mut(to_word(offset).min(count));
        let (words, tail) = body.as_chunks_mut::<8>();
        let mut at = self.base.wrapping_add(offset);
        // SAFETY: `room` keeps each address inside the pages, which are mapped by the contract of `new`; a word is read at
        // a multiple of 8; the peer may write at the same time, hence volatile.
        unsafe {
            for byte in head {
                *byte = at.read_volatile();
                at = at.add(1);
            }
            for word in words {
                *word = at.cast::<u64>().read_volatile().to_le_bytes();
                at = at.add(8);
            }
            for byte in tail {
                *byte = at.read_volatile();
                at = at.add(1);
            }
        }
    }

    fn write(&self, offset: usize, from: &[u8]) {
        let from = from.get(..self.room(offset, from.len())).unwrap_or_default();
        let (head, body) = from.split_at(to_word(offset).min(from.len()));
        let (words, tail) = body.as_chunks::<8>();
        let mut at = self.base.wrapping_add(offset);
        // SAFETY: as in `read`.
        unsafe {
            for byte in head {
                at.write_volatile(*byte);
                at = at.add(1);
            }
            for word in words {
                at.cast::<u64>().write_volatile(u64::from_le_bytes(*word));
                at = at.add(8);
            }
            for byte in tail {
                at.write_volatile(*byte);
                at = at.add(1);
            }
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
        let page = unsafe { PeerPages::new(memory.0.as_mut_ptr(), 4096) };
        page.write(4094, b"abcd");
        let mut seen = [7; 4];
        page.read(4094, &mut seen);
        assert_eq!(seen, [b'a', b'b', 7, 7]);
        page.write(5000, b"x");
        page.read(usize::MAX, &mut seen);
        page.store_u32(4092, 5);
        assert_eq!((page.load_u32(4092), page.load_u32(4096), page.load_u32(2)), (5, 0, 0));
        // Every alignment and length.
        let bytes: [u8; 40] = core::array::from_fn(|n| u8::try_from(n).unwrap() + 1);
        for (offset, length) in (0..9).flat_map(|offset| (0..32).map(move |length| (offset, length))) {
            page.write(100, &[0; 48]);
            page.write(100 + offset, &bytes[..length]);
            let mut seen = [9; 48];
            page.read(100, &mut seen);
            let expected = |n: usize| if (offset..offset + length).contains(&n) { bytes[n - offset] } else { 0 };
            assert_eq!(seen, core::array::from_fn(expected), "{offset} {length}");
            let mut part = [0; 40];
            page.read(100 + offset, &mut part[..length]);
            assert_eq!(part[..length], bytes[..length], "{offset} {length}");
        }
    }
}
