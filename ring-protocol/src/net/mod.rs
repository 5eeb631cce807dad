//! Network devices: what stands in the slots of a vif's two rings, and how the slots of a packet are gathered (ABI io 6).
//!
//! ```text
//! slots of the TX ring --copied once--> [TxRequest] --gather--> Chain: how many slots, and a Packet or why it is dropped
//!                                                              Hostile: the vif ends
//! Packet::parts --> which bytes of which grants the packet has
//! ```
//!
//! TX leads from the guest into the back end, RX into the guest. Slots are judged from copies that the guest cannot change.
//! Each slot that was taken is answered once: an extra slot with [`status::NULL`], any other with the packet's status.

mod gather;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub use gather::{BadPacket, Chain, Hostile, Packet, Part, gather};

/// Bytes of a slot of the TX ring.
pub const TX_SLOT_BYTES: usize = 12;
/// Bytes of a slot of the RX ring.
pub const RX_SLOT_BYTES: usize = 8;
/// The number of slots of each ring. A ring has one page.
pub const RING_SLOTS: usize = 256;
/// Bytes of a page of a guest.
pub const PAGE_BYTES: usize = 4096;
/// The maximum number of data slots of a packet, in either direction.
pub const MAX_SLOTS: usize = 18;
/// The maximum number of RX slots of a packet whose first slot holds more than [`PULLED_BYTES`].
pub const MAX_SLOTS_UNPULLED: usize = 17;
/// A front end copies a first RX slot of at most this many bytes out of its page, so that the page is no fragment of the
/// packet.
pub const PULLED_BYTES: u16 = 256;
/// A TX packet with more data slots ends the vif. A packet with more than [`MAX_SLOTS`] and at most this many is dropped.
pub const HOSTILE_SLOTS: usize = 20;
/// The maximum number of extra slots of a packet: one of each kind. A packet with more ends the vif.
pub const MAX_EXTRAS: usize = 5;
/// The maximum number of slots of a packet that does not end the vif.
pub const CHAIN_SLOTS: usize = HOSTILE_SLOTS + MAX_EXTRAS;
/// Bytes of the shortest packet: an Ethernet header.
pub const MIN_PACKET: u16 = 14;
/// The minimum number of bytes of TCP payload in a segment, as far as a guest may choose it.
pub const MIN_SEGMENT: u16 = 48;

/// Flags of a TX request.
pub mod tx_flag {
    /// The checksum field holds only the sum of the pseudo header.
    pub const CHECKSUM_BLANK: u16 = 1;
    /// The payload is known to be right.
    pub const DATA_VALIDATED: u16 = 2;
    /// Another data slot follows.
    pub const MORE_DATA: u16 = 4;
    /// Extra slots follow the first slot.
    pub const EXTRA_INFO: u16 = 8;
}

/// Flags of an RX response.
pub mod rx_flag {
    /// The payload is known to be right.
    pub const DATA_VALIDATED: u16 = 1;
    /// The checksum field holds only the sum of the pseudo header.
    pub const CHECKSUM_BLANK: u16 = 2;
    /// Another data slot follows.
    pub const MORE_DATA: u16 = 4;
    /// Extra slots follow the first slot.
    pub const EXTRA_INFO: u16 = 8;
}

/// Statuses of responses. A status of 0 or more in an RX response is the number of bytes in the slot.
pub mod status {
    /// The packet was taken.
    pub const OKAY: i16 = 0;
    /// The packet, or the slot, is bad.
    pub const ERROR: i16 = -1;
    /// The packet was dropped.
    pub const DROPPED: i16 = -2;
    /// The answer to an extra slot of the TX ring.
    pub const NULL: i16 = 1;
}

/// A slot of the TX ring that holds a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TxRequest {
    /// The grant reference of the page.
    pub reference: u32,
    /// The first byte in the page.
    pub offset: u16,
    /// Flags of [`tx_flag`].
    pub flags: u16,
    /// The guest's name of the slot.
    pub id: u16,
    /// Bytes of the slot; in the first slot of a packet, bytes of the whole packet.
    pub size: u16,
}

/// The answer to a slot of the TX ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TxResponse {
    /// The guest's name of the slot.
    pub id: u16,
    /// A number of [`status`].
    pub status: i16,
}

/// A slot of the RX ring that holds a request: a page for the next bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RxRequest {
    /// The guest's name of the slot.
    pub id: u16,
    /// Unused.
    pub padding: u16,
    /// The grant reference of the page.
    pub reference: u32,
}

/// The answer in a slot of the RX ring. The answer to a request stands in the slot of that request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RxResponse {
    /// The guest's name of the slot.
    pub id: u16,
    /// The first byte in the page.
    pub offset: u16,
    /// Flags of [`rx_flag`].
    pub flags: u16,
    /// Bytes in the page, or a negative number of [`status`].
    pub status: i16,
}

/// A slot of either ring that describes the packet. In the TX ring the slot has four more bytes, which are not used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Extra {
    /// What the slot describes: [`Extra::GSO`] or another kind, which nobody negotiates here.
    pub kind: u8,
    /// [`Extra::MORE`], or 0.
    pub flags: u8,
    /// For [`Extra::GSO`], the payload of each segment in bytes.
    pub size: u16,
    /// For [`Extra::GSO`], the protocol: 1 for TCP over IPv4, 2 for TCP over IPv6.
    pub protocol: u8,
    /// Unused.
    pub padding: u8,
    /// For [`Extra::GSO`], zero.
    pub features: u16,
}

impl Extra {
    /// The packet is to be cut into segments.
    pub const GSO: u8 = 1;
    /// Another extra slot follows.
    pub const MORE: u8 = 1;

    /// Makes the slot that describes how a packet is cut.
    #[must_use]
    pub const fn gso(gso: Gso) -> Self {
        Self { kind: Self::GSO, flags: 0, size: gso.bytes, protocol: gso.protocol as u8, padding: 0, features: 0 }
    }
}

const _: () = assert!(size_of::<TxRequest>() == TX_SLOT_BYTES && size_of::<TxResponse>() == 4);
const _: () = assert!(size_of::<RxRequest>() == RX_SLOT_BYTES && size_of::<RxResponse>() == RX_SLOT_BYTES);
const _: () = assert!(size_of::<Extra>() == RX_SLOT_BYTES);

/// How a packet is cut into segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gso {
    /// The protocol of the packet.
    pub protocol: GsoProtocol,
    /// Bytes of payload in each segment but the last.
    pub bytes: u16,
}

/// A protocol that is cut into segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum GsoProtocol {
    /// TCP over IPv4.
    Tcp4 = 1,
    /// TCP over IPv6.
    Tcp6 = 2,
}

impl TxRequest {
    /// Returns the slot read as an extra slot.
    #[must_use]
    pub const fn extra(&self) -> Extra {
        let [kind, flags, low, high] = self.reference.to_le_bytes();
        let [protocol, padding] = self.offset.to_le_bytes();
        Extra { kind, flags, size: u16::from_le_bytes([low, high]), protocol, padding, features: self.flags }
    }

    /// Returns a slot of the TX ring that holds an extra slot.
    #[must_use]
    pub const fn of_extra(extra: Extra) -> Self {
        let [low, high] = extra.size.to_le_bytes();
        let reference = u32::from_le_bytes([extra.kind, extra.flags, low, high]);
        let offset = u16::from_le_bytes([extra.protocol, extra.padding]);
        Self { reference, offset, flags: extra.features, id: 0, size: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_have_the_abi_s_bytes() {
        let request = TxRequest { reference: 0x0403_0201, offset: 0x0605, flags: 0x0807, id: 0x0a09, size: 0x0c0b };
        assert_eq!(request.as_bytes(), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
        assert_eq!(TxResponse { id: 0x0201, status: -2 }.as_bytes(), [1, 2, 0xfe, 0xff]);
        assert_eq!(RxRequest { id: 0x0201, padding: 0, reference: 0x0403_0201 }.as_bytes(), [1, 2, 0, 0, 1, 2, 3, 4]);
        let response = RxResponse { id: 1, offset: 2, flags: rx_flag::MORE_DATA, status: -1 };
        assert_eq!(response.as_bytes(), [1, 0, 2, 0, 4, 0, 0xff, 0xff]);
        let extra = Extra::gso(Gso { protocol: GsoProtocol::Tcp6, bytes: 1448 });
        assert_eq!(extra.as_bytes(), [1, 0, 0xa8, 5, 2, 0, 0, 0]);
    }

    #[test]
    fn an_extra_slot_is_the_first_eight_bytes_of_a_tx_slot() {
        let bytes = [1, 1, 0xa8, 5, 2, 9, 7, 8, 1, 2, 3, 4];
        let slot = TxRequest::read_from_bytes(&bytes).unwrap();
        assert_eq!(slot.extra().as_bytes(), &bytes[..8]);
        assert_eq!(TxRequest::of_extra(slot.extra()).as_bytes()[..8], bytes[..8]);
    }
}
