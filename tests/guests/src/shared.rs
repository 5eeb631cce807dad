//! Pages that a test guest shares with dom0.

use ring_protocol::SharedPage;
use unikernel::memory::{Pages, Window, linear, page_of_frame};
use unikernel::probe;

/// Bytes of a page.
const PAGE: usize = 4096;

/// A page of our own, of which dom0 knows.
#[derive(Debug)]
pub struct Shared {
    address: u64,
}

impl Shared {
    /// The page with a machine frame, which the hypervisor has told us (ABI core 2.2).
    ///
    /// # Panics
    /// If it is not ours.
    #[must_use]
    pub fn of_frame(mfn: u64) -> Self {
        Self { address: linear(page_of_frame(mfn).expect("the page is ours")) }
    }

    /// Page `i` of these, which must outlive the value.
    #[must_use]
    pub fn of_pages(pages: &Pages, i: u64) -> Self {
        Self { address: pages.address() + i * PAGE as u64 }
    }

    /// Page `i` of a window, which must outlive the value.
    #[must_use]
    pub fn of_window(window: &Window, i: u64) -> Self {
        Self { address: window.address() + i * PAGE as u64 }
    }

    fn at(&self, offset: usize, bytes: usize) -> u64 {
        assert!(offset + bytes <= PAGE, "{bytes} bytes at {offset} of a page");
        self.address + offset as u64
    }
}

impl SharedPage for Shared {
    fn len_bytes(&self) -> usize {
        PAGE
    }

    fn load_u32(&self, offset: usize) -> u32 {
        probe::load_word(self.at(offset, 4))
    }

    fn store_u32(&self, offset: usize, value: u32) {
        probe::store_word(self.at(offset, 4), value);
    }

    fn read(&self, offset: usize, into: &mut [u8]) {
        probe::load_bytes(self.at(offset, into.len()), into);
    }

    fn write(&self, offset: usize, from: &[u8]) {
        probe::store_bytes(self.at(offset, from.len()), from);
    }
}
