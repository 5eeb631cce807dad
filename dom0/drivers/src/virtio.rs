//! Virtio over PCI, version 1 and later (Virtio 1.2; sections cited as V).
//!
//! A device is modern if it has the capability that says where its common configuration is, whatever its number.

mod layout;
mod queue;
mod transport;

pub use layout::{Kind, Layout, NotTaken, Region};
pub(crate) use queue::{Descriptor, MOST, Queue, flags};
pub use transport::Transport;

/// Feature bits of any device (V 6).
pub(crate) mod feature {
    /// A descriptor may lead to a table of descriptors.
    pub(crate) const INDIRECT_DESC: u64 = 1 << 28;
    /// Either side says at which index it wants to hear of the other.
    pub(crate) const EVENT_IDX: u64 = 1 << 29;
    /// The device is modern.
    pub(crate) const VERSION_1: u64 = 1 << 32;
    /// Addresses go through the platform's translation, which is none here; some devices refuse to work without it.
    pub(crate) const ACCESS_PLATFORM: u64 = 1 << 33;
    /// The device orders its accesses as the platform's hardware does.
    pub(crate) const ORDER_PLATFORM: u64 = 1 << 36;
    /// What is taken of any device that offers it.
    pub(crate) const WANTED: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1 | ACCESS_PLATFORM | ORDER_PLATFORM;
}
