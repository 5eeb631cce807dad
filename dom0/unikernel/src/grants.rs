//! Mapped pages that other domains granted (io 1).

use crate::hypercall;
use crate::memory::Window;
use crate::shared::PeerPage;
use hypercall_abi::Errno;
use hypercall_abi::grant::{MapGrantRef, UnmapGrantRef, map, status};
use ring_protocol::SharedPage;

/// A page of another domain, mapped writable until this value is dropped.
#[derive(Debug)]
pub struct GrantedPage {
    page: PeerPage,
    window: Window,
    handle: u32,
}

impl GrantedPage {
    /// Maps reference `gref` of `domain`.
    ///
    /// # Errors
    /// `NoMem` if no address is free, `Inval` for a grant that does not exist or is for another domain, and the
    /// hypervisor's error for the call as a whole.
    pub fn map(domain: u16, gref: u32) -> Result<Self, Errno> {
        let window = Window::reserve(1)?;
        let mut grant = [MapGrantRef {
            host_addr: window.address(),
            flags: map::HOST,
            gref,
            dom: domain,
            ..MapGrantRef::default()
        }];
        // SAFETY: the address belongs to a window of ours, which holds no Rust references.
        unsafe { hypercall::map_grants(&mut grant) }?;
        if grant[0].status != status::OKAY {
            return Err(match grant[0].status {
                status::BAD_DOMAIN => Errno::Srch,
                status::NO_SPACE | status::NO_DEVICE_SPACE => Errno::NoSpc,
                _ => Errno::Inval,
            });
        }
        // SAFETY: the window shows the page until it is unmapped in `drop`.
        let page = unsafe { PeerPage::new(window.pointer()) };
        Ok(Self { page, window, handle: grant[0].handle })
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
        self.page.len_bytes()
    }

    fn load_u32(&self, offset: usize) -> u32 {
        self.page.load_u32(offset)
    }

    fn store_u32(&self, offset: usize, value: u32) {
        self.page.store_u32(offset, value);
    }

    fn read(&self, offset: usize, into: &mut [u8]) {
        self.page.read(offset, into);
    }

    fn write(&self, offset: usize, from: &[u8]) {
        self.page.write(offset, from);
    }
}
