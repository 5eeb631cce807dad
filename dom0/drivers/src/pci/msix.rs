//! Message interrupts, MSI-X (PCI 3.0, section 6.8.2).

use super::{Bytes, Function};
use crate::hardware::{ConfigurationPorts, Registers};

/// The ID of the capability.
const ID: u8 = 0x11;
/// In its first register: message interrupts are on; all messages are masked.
const ENABLE: u32 = 1 << 31;
const MASK_ALL: u32 = 1 << 30;
/// Bytes of an entry of the table.
const ENTRY: usize = 16;

/// A message interrupt: what a device writes, and where. The hypervisor supplies both (`BindMessage`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// The machine address that the device writes to.
    pub address: u64,
    /// The value that the device writes.
    pub data: u32,
}

/// Where the message interrupts of a function are configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Msix {
    /// The first register of the capability.
    at: u8,
    /// The number of messages in the table, at least one.
    pub entries: u16,
    /// The BAR with the table, and the table's offset in it.
    pub table: (u8, u32),
}

impl<C: ConfigurationPorts> Function<C> {
    /// Returns the function's message interrupts. `None` if it has no MSI-X.
    pub fn msix(&self) -> Option<Msix> {
        let at = self.capabilities().find(|capability| capability.id == ID)?.at;
        let entries = (Bytes(self.read(at)).high() & 0x7ff) + 1;
        Some(Msix { at, entries, table: self.place(at.checked_add(4)?) })
    }

    /// Sets `message` as the first entry of the table, masks all other entries, and turns message interrupts on.
    pub fn enable_msix(&self, msix: &Msix, table: &impl Registers, message: Message) {
        let control = self.read(msix.at) | ENABLE;
        self.write(msix.at, control | MASK_ALL);
        for entry in 0..usize::from(msix.entries) {
            msix_mask(table, entry, true);
        }
        table.write64(0, message.address);
        table.write32(8, message.data);
        msix_mask(table, 0, false);
        self.write(msix.at, control & !MASK_ALL);
    }
}

/// Masks or unmasks an entry of the table. If its interrupt came due while masked, the device sends it when it is unmasked.
pub(crate) fn msix_mask(table: &impl Registers, entry: usize, masked: bool) {
    table.write32(entry * ENTRY + 12, u32::from(masked));
}
