//! Virtio over PCI, version 1 and later. `V 4.1` cites section 4.1 of Virtio 1.2.
//!
//! A device is modern if it has the capability that locates its common configuration, whatever its device number is.

mod layout;
mod life;
mod queue;
mod transport;

pub use layout::{Kind, Layout, NotTaken, Region};
pub(crate) use life::Life;
pub use life::RESET_ASKED;
pub(crate) use queue::{Broken, Descriptor, MOST, QUEUE_BYTES, Queue, descriptor, flags};
pub use transport::Transport;

/// Feature bits of any device (V 6).
pub(crate) mod feature {
    /// A descriptor may lead to a table of descriptors.
    pub(crate) const INDIRECT_DESC: u64 = 1 << 28;
    /// Each side names the index at which it wants an interrupt or a notification from the other side.
    pub(crate) const EVENT_IDX: u64 = 1 << 29;
    /// The device is modern.
    pub(crate) const VERSION_1: u64 = 1 << 32;
    /// Addresses go through the platform's translation. Here that is the identity, but some devices require the feature.
    pub(crate) const ACCESS_PLATFORM: u64 = 1 << 33;
    /// The device orders its accesses as the platform's hardware does.
    pub(crate) const ORDER_PLATFORM: u64 = 1 << 36;
    /// The features that are taken from any device that offers them.
    pub(crate) const WANTED: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1 | ACCESS_PLATFORM | ORDER_PLATFORM;
}
