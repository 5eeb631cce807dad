//! A domain's memory as it is filled: blocks of pages are mapped, a few at a time, and written.

use alloc::vec::Vec;

use guest_image::MachineFrame;
use hypercall_abi::Errno;

/// Pages mapped at once: a call costs as much as copying a page.
const BLOCK: usize = 64;
/// Blocks mapped at once: page tables are written in the order of their levels, each with pages of its own.
const BLOCKS: usize = 4;

/// Addresses at which frames of one domain are mapped.
pub trait View: Sized {
    /// Reserves addresses for `count` frames.
    ///
    /// # Errors
    /// `NoMem` if there are not enough addresses.
    fn reserve(count: u64) -> Result<Self, Errno>;

    /// Maps these frames of `domain` in place of those that were mapped before.
    ///
    /// # Errors
    /// The hypervisor's error; no frame is mapped then.
    fn show(&mut self, domain: u16, frames: &[u64]) -> Result<(), Errno>;

    /// Writes into the `index`-th frame that is mapped.
    ///
    /// # Errors
    /// `Inval` if there is no such frame, or if the bytes reach beyond its end.
    fn write(&self, index: u64, offset: usize, bytes: &[u8]) -> Result<(), Errno>;
}

/// The memory of a domain that is being filled. Dropping the value unmaps all.
#[derive(Debug)]
pub struct Blocks<V> {
    domain: u16,
    blocks: Vec<Block<V>>,
    clock: u64,
}

#[derive(Debug)]
struct Block<V> {
    view: V,
    /// What is mapped, if anything is.
    shown: Option<Shown>,
    /// When the block was last used, by the clock.
    used: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shown {
    /// The pages from this one on.
    Pages(u64),
    /// A frame that is none of the domain's pages.
    Frame(u64),
}

impl<V: View> Blocks<V> {
    /// The memory of `domain`; nothing is mapped yet.
    #[must_use]
    pub const fn new(domain: u16) -> Self {
        Self { domain, blocks: Vec::new(), clock: 0 }
    }

    /// The domain.
    #[must_use]
    pub const fn domain(&self) -> u16 {
        self.domain
    }

    /// Writes into page `pfn`; `frames` are those of all pages.
    ///
    /// # Errors
    /// Why the page cannot be mapped or written.
    pub fn fill(&mut self, frames: &[MachineFrame], pfn: u64, offset: usize, bytes: &[u8]) -> Result<(), Errno> {
        const SIZE: u64 = BLOCK as u64;
        let first = pfn - pfn % SIZE;
        let view = self.view(Shown::Pages(first), || {
            let first = usize::try_from(first).map_err(|_| Errno::Inval)?;
            let frames = frames.get(first..).unwrap_or_default();
            Ok(frames.iter().take(BLOCK).map(|frame| frame.0))
        })?;
        view.write(pfn % SIZE, offset, bytes)
    }

    /// Writes into a frame.
    ///
    /// # Errors
    /// Why the frame cannot be mapped or written.
    pub fn write(&mut self, frame: u64, offset: usize, bytes: &[u8]) -> Result<(), Errno> {
        self.view(Shown::Frame(frame), || Ok([frame].into_iter()))?.write(0, offset, bytes)
    }

    /// The view that shows what is wanted, in place of the one not used for the longest time if none does.
    fn view<F: Iterator<Item = u64>>(
        &mut self,
        wanted: Shown,
        frames: impl FnOnce() -> Result<F, Errno>,
    ) -> Result<&V, Errno> {
        let found = self.blocks.iter().position(|block| block.shown == Some(wanted));
        let index = match found {
            Some(index) => index,
            None => self.show(wanted, frames()?)?,
        };
        self.clock += 1;
        let block = self.blocks.get_mut(index).ok_or(Errno::Inval)?;
        block.used = self.clock;
        Ok(&block.view)
    }

    fn show(&mut self, wanted: Shown, frames: impl Iterator<Item = u64>) -> Result<usize, Errno> {
        if self.blocks.len() < BLOCKS {
            let view = V::reserve(BLOCK as u64)?;
            self.blocks.push(Block { view, shown: None, used: 0 });
        }
        let oldest = (0..).zip(&self.blocks).min_by_key(|(_, block)| block.used);
        let index = oldest.map_or(0, |(index, _)| index);
        let block = self.blocks.get_mut(index).ok_or(Errno::NoMem)?;
        block.shown = None;
        let (mut numbers, mut count) = ([0; BLOCK], 0);
        for (slot, frame) in numbers.iter_mut().zip(frames) {
            *slot = frame;
            count += 1;
        }
        block.view.show(self.domain, numbers.get(..count).unwrap_or_default())?;
        block.shown = Some(wanted);
        Ok(index)
    }
}
