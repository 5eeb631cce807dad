//! Pages of segment descriptors: what a guest may have in its GDT and LDT (ABI core 3.10).

use super::{Outcome, Refused, Session};
use crate::addr::Frame;
use crate::fault::{Fault, planted};
use crate::frame::{Taken, Use};
use crate::machine::{Cpus, Frames};
use core::sync::atomic::Ordering::SeqCst;

const PRESENT: u64 = 1 << 47;
const DPL_3: u64 = 3 << 45;
const CODE_OR_DATA: u64 = 1 << 44;
const TYPE: u64 = 0xf << 40;
const ACCESSED: u64 = 1 << 40;

/// Checks a descriptor; returns it as it may be stored in a table: usable from ring 3, and with the accessed bit set,
/// so that the CPU need not set it.
///
/// # Errors
/// [`Refused::BadDescriptor`] for system segments and gates.
pub(super) fn check(descriptor: u64) -> Result<u64, Refused> {
    if descriptor & PRESENT == 0 {
        Ok(descriptor)
    } else if descriptor & CODE_OR_DATA != 0 {
        Ok(descriptor | DPL_3 | ACCESSED)
    } else if descriptor & TYPE == 0 {
        Ok(descriptor) // the upper half of a gate; of type 0 it is nothing to a CPU
    } else {
        Err(Refused::BadDescriptor)
    }
}

impl<M: Frames + Cpus> Session<'_, M> {
    /// Takes a use of a frame of this domain as a page of descriptors, correcting the page in place. The caller ends
    /// the use by [`drop_use`](crate::frame::FrameTable::drop_use), once no CPU's GDT or LDT shows the frame any more.
    ///
    /// # Errors
    /// [`Refused::BadDescriptor`], and those of a frame that is not the domain's or is mapped writable.
    pub fn take_descriptors(&mut self, frame: Frame) -> Outcome<()> {
        self.ready()?;
        Ok(self.hold_descriptors(frame)?)
    }

    /// Takes uses of the pages of a GDT, at most 14. This is one step even if the budget is too small: the work is
    /// bounded, and a caller that had to start over would not get farther the next time.
    ///
    /// # Errors
    /// [`Stop::More`](super::Stop::More) if no page has been taken. Else as [`Session::take_descriptors`]; the pages
    /// taken before the error are in `slots`.
    pub fn take_gdt(&mut self, numbers: &[u64], slots: &mut [Option<Frame>; 14]) -> Outcome<()> {
        self.ready()?;
        for (number, slot) in numbers.iter().zip(slots) {
            if planted(Fault::StartOver) {
                self.ready()?;
            }
            let frame = Frame::new(*number).ok_or(Refused::NoSuchFrame)?;
            self.hold_descriptors(frame)?;
            *slot = Some(frame);
        }
        Ok(())
    }

    fn hold_descriptors(&mut self, frame: Frame) -> Result<(), Refused> {
        if self.table.take_use(self.m, frame, Use::Descriptors, self.taker(self.id()))? == Taken::Ready {
            return Ok(());
        }
        self.budget = self.budget.saturating_sub(512);
        for word in self.m.page(frame) {
            match check(word.load(SeqCst)) {
                Ok(good) => word.store(good, SeqCst),
                Err(why) => {
                    self.table.demoted(frame, self.id());
                    return Err(why);
                }
            }
        }
        self.table.promoted(frame);
        Ok(())
    }

    /// update_descriptor (ABI core 3.10): stores one descriptor at a machine address of this domain's memory.
    ///
    /// # Errors
    /// [`Refused::Misaligned`], [`Refused::BadDescriptor`], and those of a frame that can be used neither for
    /// descriptors nor as writable.
    pub fn update_descriptor(&mut self, address: u64, descriptor: u64) -> Outcome<()> {
        self.ready()?;
        let slot = super::Slot::at(address)?;
        let descriptor = check(descriptor)?;
        let info = self.table.info(slot.table).ok_or(Refused::NoSuchFrame)?;
        if info.kind.used_as == Use::Descriptors && info.kind.count > 0 {
            self.hold_descriptors(slot.table)?;
        } else {
            self.table.take_use(self.m, slot.table, Use::Writable, self.taker(self.id()))?;
        }
        slot.word(self.m)?.store(descriptor, SeqCst);
        self.table.drop_use(slot.table, self.id());
        Ok(())
    }
}

#[cfg(feature = "planted-fault")]
impl crate::frame::FrameTable {
    /// Whether a frame may be shown in a GDT or LDT window now.
    #[must_use]
    pub fn holds_descriptors(&self, frame: Frame) -> bool {
        self.info(frame).is_some_and(|i| i.kind.used_as == Use::Descriptors && i.kind.validated && i.kind.count > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_segments_for_ring_3_pass() {
        for kind in 0..16u64 {
            for dpl in 0..4u64 {
                let d = 0x00cf_0000_0000_ffff | kind << 40 | dpl << 45;
                assert_eq!(check(d), Ok(d), "not present");
                assert_eq!(check(d | PRESENT | CODE_OR_DATA), Ok(d | PRESENT | CODE_OR_DATA | DPL_3 | ACCESSED));
                let system = check(d | PRESENT);
                assert_eq!(system, if kind == 0 { Ok(d | PRESENT) } else { Err(Refused::BadDescriptor) });
            }
        }
    }
}
