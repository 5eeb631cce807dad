//! Frames of another domain, mapped by authority over it. Used to fill a domain before it runs.

use super::window::flush_tlb;
use super::{PAGE, Window, is_linear};
use hypercall_abi::{Errno, domid};

/// A window that shows frames of one domain at a time.
///
/// A frame shown here is in use as writable memory, so the hypervisor refuses to make it a page table.
#[derive(Debug)]
pub struct Foreign {
    window: Window,
    shown: u64,
}

impl Foreign {
    /// Reserves room for `count` frames, without showing any.
    ///
    /// # Errors
    /// `NoMem` if there are not enough addresses.
    pub fn reserve(count: u64) -> Result<Self, Errno> {
        let window = Window::reserve(count)?;
        Ok(Self { window, shown: 0 })
    }

    /// Shows `frames` of `domain`, writable, in place of those shown before.
    ///
    /// # Errors
    /// `Inval` for more frames than reserved, and for frames of this domain; otherwise the hypervisor's error. After an
    /// error no frame is shown.
    pub fn show(&mut self, domain: u16, frames: &[u64]) -> Result<(), Errno> {
        let count = frames.len() as u64;
        let ours = |frame: &u64| is_linear(*frame);
        // A second mapping of an own page could alias memory that Rust uses.
        if domain == domid::SELF || count > self.window.count() || frames.iter().any(ours) {
            return Err(Errno::Inval);
        }
        let before = self.shown;
        self.shown = count.max(before);
        let rest = core::iter::repeat_n(None, usize::try_from(before.saturating_sub(count)).unwrap_or(0));
        let frames = frames.iter().copied().map(Some);
        let written = self.window.remap(frames.chain(rest), domain);
        flush_tlb();
        if written.is_err() {
            self.hide();
        } else {
            self.shown = count;
        }
        written
    }

    /// Unmaps all frames shown.
    pub fn hide(&mut self) {
        if self.shown == 0 {
            return;
        }
        let nothing = core::iter::repeat_n(None, usize::try_from(self.shown).unwrap_or(0));
        let hidden = self.window.remap(nothing, domid::SELF);
        debug_assert!(hidden.is_ok(), "unmapping is refused: {hidden:?}");
        flush_tlb();
        self.shown = 0;
    }

    /// Writes into the `index`-th frame shown.
    ///
    /// # Errors
    /// `Inval` if there is no such frame, or if the bytes reach beyond its end.
    pub fn write(&self, index: u64, offset: usize, bytes: &[u8]) -> Result<(), Errno> {
        let end = offset.checked_add(bytes.len()).ok_or(Errno::Inval)?;
        if index >= self.shown || end as u64 > PAGE {
            return Err(Errno::Inval);
        }
        let to = (self.window.address() + index * PAGE) as *mut u8;
        // SAFETY: the frame is mapped writable at this page of the window until the next `show` or `hide`, both of which
        // need the window exclusively; the bytes stay within the page (checked above); nobody has a reference into
        // it, since the window hands out none.
        unsafe { to.add(offset).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Ok(())
    }
}
