//! The unikernel as the domain that networks of guests are served from.

use net_backend::{GrantCopy, Side};
use services::net::NetHost;
use unikernel::grants::{self, SideCopy};
use unikernel::{hypercall, pages};

use crate::host::Unikernel;

/// Memory that frames are copied into and from.
pub(crate) struct Buffer(pages::Buffer);

impl AsMut<pages::Buffer> for Buffer {
    fn as_mut(&mut self) -> &mut pages::Buffer {
        &mut self.0
    }
}

impl net_backend::Buffer for Buffer {
    fn page(&self) -> u64 {
        self.0.page()
    }

    fn bytes(&self) -> &[u8] {
        self.0.bytes()
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        self.0.bytes_mut()
    }
}

impl NetHost for Unikernel {
    type Buffer = Buffer;

    fn buffer(&self, pages: usize) -> Option<Buffer> {
        pages::Buffer::take(pages).map(Buffer)
    }

    fn copy_packets(&self, copies: &[GrantCopy], answers: &mut [bool], own: &mut [&mut Buffer]) {
        let side = |side| match side {
            Side::Guest { domain, reference } => grants::Side::Granted { domain, reference },
            Side::Own { page } => grants::Side::Own(page),
        };
        let copy = |it: &GrantCopy| SideCopy {
            from: side(it.from),
            from_offset: it.from_offset,
            to: side(it.to),
            to_offset: it.to_offset,
            bytes: it.bytes,
        };
        grants::copy_sides(copies.iter().map(copy), own, |place, done| {
            answers.get_mut(place).into_iter().for_each(|slot| *slot = done);
        });
    }

    fn send(&self, port: u32) {
        // If the other end is gone, nobody is to be told.
        let _ = hypercall::send(port);
    }
}
