//! Message interrupts, MSI-X (PCI 3.0, section 6.8.2).

use super::{Bytes, Function};
use crate::hardware::{ConfigurationPorts, Registers};

/// The capability's number.
const ID: u8 = 0x11;
/// In its first register: messages are sent, and none of them for now.
const ENABLE: u32 = 1 << 31;
const MASK_ALL: u32 = 1 << 30;
/// Bytes of an entry of the table.
const ENTRY: usize = 16;

/// What a device writes, and where, to interrupt: as the hypervisor says (`BindMessage`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// The machine address.
    pub address: u64,
    /// What is written there.
    pub data: u32,
}

/// Where the message interrupts of a function are set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Msix {
    /// The first register of the capability.
    at: u8,
    /// How many messages the table has, at least one.
    pub entries: u16,
    /// The BAR with the table, and the table's offset in it.
    pub table: (u8, u32),
}

impl<C: ConfigurationPorts> Function<C> {
    /// The message interrupts, if the function has any.
    pub fn msix(&self) -> Option<Msix> {
        let at = self.capabilities().find(|capability| capability.id == ID)?.at;
        let entries = (Bytes(self.read(at)).high() & 0x7ff) + 1;
        Some(Msix { at, entries, table: self.place(at.checked_add(4)?) })
    }

    /// Sets `message` as the first of the table, masks all others, and turns message interrupts on.
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

/// Masks an entry of the table, or lets it be sent again, at once if it has been raised meanwhile.
pub(crate) fn msix_mask(table: &impl Registers, entry: usize, masked: bool) {
    table.write32(entry * ENTRY + 12, u32::from(masked));
}
