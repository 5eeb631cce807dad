//! Pages other domains granted to us, mapped (io 1).

use crate::hypercall;
use crate::memory::Window;
use core::sync::atomic::{AtomicU32, Ordering};
use hypercall_abi::Errno;
use hypercall_abi::grant::{MapGrantRef, UnmapGrantRef, map, status};
use ring_protocol::SharedPage;

/// Bytes of a page.
const LENGTH: usize = 4096;

/// A page of another domain, mapped writable until this is dropped.
#[derive(Debug)]
pub struct GrantedPage {
    window: Window,
    handle: u32,
}

impl GrantedPage {
    /// Maps reference `gref` of `domain`.
    ///
    /// # Errors
    /// `NoMem` without room for it, `Inval` for a grant that does not exist or is not for us, and what the hypervisor
    /// says of the call as a whole.
    pub fn map(domain: u16, gref: u32) -> Result<Self, Errno> {
        let window = Window::reserve(1)?;
        let mut grant = [MapGrantRef {
            host_addr: window.address(),
            flags: map::HOST,
            gref,
            dom: domain,
            ..MapGrantRef::default()
        }];
        // SAFETY: the address belongs to a window of ours that nobody refers to.
        unsafe { hypercall::map_grants(&mut grant) }?;
        if grant[0].status != status::OKAY {
            return Err(match grant[0].status {
                status::BAD_DOMAIN => Errno::Srch,
                status::NO_SPACE | status::NO_DEVICE_SPACE => Errno::NoSpc,
                _ => Errno::Inval,
            });
        }
        Ok(Self { window, handle: grant[0].handle })
    }

    /// The word at an offset, if it is one.
    fn word(&self, offset: usize) -> Option<&AtomicU32> {
        if offset > LENGTH - 4 || !offset.is_multiple_of(4) {
            return None;
        }
        // SAFETY: inside the page and aligned; the page stays mapped while `self` lives; the other side is another
        // domain, hence an atomic.
        Some(unsafe { AtomicU32::from_ptr(self.window.pointer().add(offset).cast()) })
    }

    /// How many of `wanted` bytes there are from `offset` on.
    fn room(offset: usize, wanted: usize) -> usize {
        wanted.min(LENGTH.saturating_sub(offset))
    }
}

impl Drop for GrantedPage {
    fn drop(&mut self) {
        let mut grant =
            [UnmapGrantRef { host_addr: self.window.address(), handle: self.handle, ..UnmapGrantRef::default() }];
        // SAFETY: nobody refers to the page: its accesses borrow `self`.
        let result = unsafe { hypercall::unmap_grants(&mut grant) };
        if result.is_err() || grant[0].status != status::OKAY {
            log::warn!("a granted page is not unmapped: {result:?}, status {}", grant[0].status);
        }
    }
}

impl SharedPage for GrantedPage {
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
        let base = self.window.pointer().wrapping_add(offset);
        for (i, byte) in into.iter_mut().take(count).enumerate() {
            // SAFETY: `room` keeps it inside the page, which is mapped while `self` lives; the other side may write it
            // meanwhile, hence volatile.
            *byte = unsafe { base.add(i).read_volatile() };
        }
    }

    fn write(&self, offset: usize, from: &[u8]) {
        let count = Self::room(offset, from.len());
        let base = self.window.pointer().wrapping_add(offset);
        for (i, byte) in from.iter().take(count).enumerate() {
            // SAFETY: as in `read`.
            unsafe { base.add(i).write_volatile(*byte) };
        }
    }
}
