//! Which slots a packet has, and whether it is a packet.

use core::fmt;

use super::{CHAIN_SLOTS, Extra, Gso, GsoProtocol, HOSTILE_SLOTS, MAX_EXTRAS, MAX_SLOTS, MIN_PACKET, MIN_SEGMENT};
use super::{PAGE_BYTES, TxRequest, tx_flag};

/// The slots of the next packet in a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chain {
    /// The number of slots, extra slots among them. Each of these slots is answered.
    pub slots: usize,
    /// The number of extra slots. They follow the first slot.
    pub extras: usize,
    /// The packet, or why it is dropped.
    pub packet: Result<Packet, BadPacket>,
}

impl Chain {
    /// Returns whether the slot with this number, counted from 0, is an extra slot.
    #[must_use]
    pub const fn is_extra(&self, slot: usize) -> bool {
        slot >= 1 && slot <= self.extras
    }
}

/// A packet of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Bytes of the packet.
    pub bytes: u16,
    /// Bytes in the first slot: at least [`MIN_PACKET`].
    pub first_bytes: u16,
    /// The checksum field holds only the sum of the pseudo header.
    pub checksum_blank: bool,
    /// The guest says that the payload is right.
    pub data_validated: bool,
    /// How the packet is cut. `None` if the packet stands for itself.
    pub gso: Option<Gso>,
}

/// Bytes of a packet that lie in one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// The grant reference of the page.
    pub reference: u32,
    /// The first byte in the page.
    pub offset: u16,
    /// The number of bytes, at least 1. They end within the page.
    pub bytes: u16,
}

impl Packet {
    /// Returns where the bytes of the packet lie, in their order. `slots` are the slots that `chain` was gathered from.
    pub fn parts<'a>(&self, chain: &Chain, slots: &'a [TxRequest]) -> impl Iterator<Item = Part> + use<'a> {
        let slots = slots.get(..chain.slots).unwrap_or_default();
        let part = |slot: &TxRequest, bytes| Part { reference: slot.reference, offset: slot.offset, bytes };
        let first = slots.first().map(|slot| part(slot, self.first_bytes));
        let rest = slots.get(1 + chain.extras..).unwrap_or_default();
        first.into_iter().chain(rest.iter().map(move |slot| part(slot, slot.size)))
    }
}

/// Why a packet is dropped. Its slots are answered, and the vif goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadPacket {
    /// The packet has this many data slots.
    TooManySlots(usize),
    /// A slot is empty, or ends beyond its page.
    BadSlot {
        /// The slot's first byte in the page.
        offset: u16,
        /// Bytes of the slot.
        bytes: u16,
    },
    /// The packet's length, or its first slot, is shorter than an Ethernet header.
    TooShort(u16),
    /// The slots after the first hold more bytes than the packet.
    BadSum,
    /// An extra slot of this kind, which was not negotiated, or a second one of a kind.
    BadExtra(u8),
    /// Segments of this many bytes, which is too few, or more than the packet has.
    BadSegment(u16),
    /// Segments of a protocol with this number, which is unknown.
    BadProtocol(u8),
}

impl fmt::Display for BadPacket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooManySlots(count) => write!(f, "a packet of {count} slots"),
            Self::BadSlot { offset, bytes } => write!(f, "a slot of {bytes} bytes at {offset} of a page"),
            Self::TooShort(bytes) => write!(f, "a packet that begins with {bytes} bytes"),
            Self::BadSum => f.write_str("slots with more bytes than their packet"),
            Self::BadExtra(kind) => write!(f, "an extra slot of kind {kind}"),
            Self::BadSegment(bytes) => write!(f, "segments of {bytes} bytes"),
            Self::BadProtocol(number) => write!(f, "segments of protocol {number}"),
        }
    }
}

/// Why a vif ends: no stock front end writes such slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hostile {
    /// A packet has more than [`HOSTILE_SLOTS`] data slots.
    EndlessPacket,
    /// A packet has more than [`MAX_EXTRAS`] extra slots.
    EndlessExtras,
    /// The last slot says that another follows, and none does.
    Unfinished,
}

impl fmt::Display for Hostile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::EndlessPacket => write!(f, "a packet of more than {HOSTILE_SLOTS} slots"),
            Self::EndlessExtras => write!(f, "a packet of more than {MAX_EXTRAS} extra slots"),
            Self::Unfinished => f.write_str("a packet without its last slot"),
        }
    }
}

/// Gathers the packet that begins with the first of `slots`. Looks at [`CHAIN_SLOTS`] slots at most.
///
/// # Errors
/// [`Hostile::Unfinished`] if the packet goes on after the last of `slots`: the caller decides whether more slots are there.
/// Any other error ends the vif.
pub fn gather(slots: &[TxRequest]) -> Result<Chain, Hostile> {
    let (first, rest) = slots.split_first().ok_or(Hostile::Unfinished)?;
    let (extras, gso) = gather_extras(first, rest)?;
    let rest = rest.get(extras..).unwrap_or_default();
    let (mut data, mut flags, mut others, mut bad) = (1, first.flags, 0_u32, None);
    while flags & tx_flag::MORE_DATA != 0 {
        if data == HOSTILE_SLOTS {
            return Err(Hostile::EndlessPacket);
        }
        let slot = rest.get(data - 1).ok_or(Hostile::Unfinished)?;
        if bad.is_none() && !lies_in_page(slot.offset, slot.size) {
            bad = Some(BadPacket::BadSlot { offset: slot.offset, bytes: slot.size });
        }
        (others, flags) = (others + u32::from(slot.size), slot.flags);
        data += 1;
    }
    debug_assert!(data + extras <= CHAIN_SLOTS);
    let packet = match bad {
        _ if data > MAX_SLOTS => Err(BadPacket::TooManySlots(data)),
        Some(bad) => Err(bad),
        None => gso.and_then(|gso| judge(first, others, gso)),
    };
    Ok(Chain { slots: data + extras, extras, packet })
}

/// Returns the number of extra slots, and what they say.
fn gather_extras(first: &TxRequest, rest: &[TxRequest]) -> Result<(usize, Result<Option<Gso>, BadPacket>), Hostile> {
    let (mut extras, mut gso) = (0, Ok(None));
    let mut more = first.flags & tx_flag::EXTRA_INFO != 0;
    while more {
        if extras == MAX_EXTRAS {
            return Err(Hostile::EndlessExtras);
        }
        let extra = rest.get(extras).ok_or(Hostile::Unfinished)?.extra();
        gso = match gso {
            Ok(None) if extra.kind == Extra::GSO => parse_gso(&extra).map(Some),
            Ok(_) => Err(BadPacket::BadExtra(extra.kind)),
            bad => bad,
        };
        more = extra.flags & Extra::MORE != 0;
        extras += 1;
    }
    Ok((extras, gso))
}

fn parse_gso(extra: &Extra) -> Result<Gso, BadPacket> {
    let protocol = match extra.protocol {
        1 => GsoProtocol::Tcp4,
        2 => GsoProtocol::Tcp6,
        other => return Err(BadPacket::BadProtocol(other)),
    };
    Ok(Gso { protocol, bytes: extra.size })
}

/// Judges the packet as a whole. `others` is the sum of the bytes of all slots but the first.
fn judge(first: &TxRequest, others: u32, gso: Option<Gso>) -> Result<Packet, BadPacket> {
    let bytes = first.size;
    if bytes < MIN_PACKET {
        return Err(BadPacket::TooShort(bytes));
    }
    let first_bytes = u16::try_from(others).ok().and_then(|others| bytes.checked_sub(others));
    let first_bytes = first_bytes.ok_or(BadPacket::BadSum)?;
    if !lies_in_page(first.offset, first_bytes) {
        return Err(BadPacket::BadSlot { offset: first.offset, bytes: first_bytes });
    }
    if first_bytes < MIN_PACKET {
        return Err(BadPacket::TooShort(first_bytes));
    }
    if let Some(gso) = gso.filter(|gso| !(MIN_SEGMENT..=bytes).contains(&gso.bytes)) {
        return Err(BadPacket::BadSegment(gso.bytes));
    }
    Ok(Packet {
        bytes,
        first_bytes,
        checksum_blank: first.flags & tx_flag::CHECKSUM_BLANK != 0,
        data_validated: first.flags & tx_flag::DATA_VALIDATED != 0,
        gso,
    })
}

/// Returns whether a part has bytes and ends within its page.
fn lies_in_page(offset: u16, bytes: u16) -> bool {
    bytes > 0 && usize::from(offset) + usize::from(bytes) <= PAGE_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(flags: u16, offset: u16, size: u16) -> TxRequest {
        TxRequest { reference: 7, offset, flags, id: 1, size }
    }

    /// A packet of `count` slots of 100 bytes.
    fn chain(count: u16) -> [TxRequest; 24] {
        let mut slots = [slot(tx_flag::MORE_DATA, 0, 100); 24];
        slots[0].size = 100 * count;
        slots[usize::from(count) - 1].flags = 0;
        slots
    }

    fn gso(size: u16, protocol: u8, flags: u8) -> TxRequest {
        TxRequest::of_extra(Extra { kind: Extra::GSO, flags, size, protocol, ..Extra::default() })
    }

    #[test]
    fn the_first_slot_has_what_the_others_leave() {
        let slots = [slot(tx_flag::MORE_DATA | tx_flag::CHECKSUM_BLANK, 4000, 1066), slot(0, 10, 1000)];
        let chain = gather(&slots).unwrap();
        let packet = chain.packet.unwrap();
        assert_eq!((chain.slots, chain.extras, packet.first_bytes, packet.checksum_blank), (2, 0, 66, true));
        let mut parts = packet.parts(&chain, &slots).map(|part| (part.offset, part.bytes));
        assert_eq!([parts.next(), parts.next(), parts.next()], [Some((4000, 66)), Some((10, 1000)), None]);
    }

    #[test]
    fn extra_slots_stand_after_the_first_and_hold_no_bytes() {
        let slots = [slot(tx_flag::EXTRA_INFO | tx_flag::MORE_DATA, 0, 3066), gso(1448, 1, 0), slot(0, 0, 3000)];
        let chain = gather(&slots).unwrap();
        let packet = chain.packet.unwrap();
        assert_eq!(packet.gso, Some(Gso { protocol: GsoProtocol::Tcp4, bytes: 1448 }));
        assert_eq!((chain.slots, chain.extras, packet.parts(&chain, &slots).count()), (3, 1, 2));
        assert_eq!([0, 1, 2].map(|at| chain.is_extra(at)), [false, true, false]);
    }

    #[test]
    fn eighteen_slots_are_served_twenty_dropped_and_more_end_the_vif() {
        assert!(gather(&chain(18)).unwrap().packet.is_ok());
        for count in [19, 20] {
            let chain = gather(&chain(count)).unwrap();
            assert_eq!(chain.packet, Err(BadPacket::TooManySlots(count.into())));
            assert_eq!(chain.slots, usize::from(count));
        }
        assert_eq!(gather(&chain(21)), Err(Hostile::EndlessPacket));
        let mut endless = [gso(100, 1, Extra::MORE); 8];
        endless[0] = slot(tx_flag::EXTRA_INFO, 0, 100);
        assert_eq!(gather(&endless), Err(Hostile::EndlessExtras));
        assert_eq!(gather(&endless[..3]), Err(Hostile::Unfinished));
        assert_eq!(gather(&chain(4)[..3]), Err(Hostile::Unfinished));
        assert_eq!(gather(&[]), Err(Hostile::Unfinished));
    }

    #[test]
    fn lengths_that_contradict_each_other_drop_the_packet_alone() {
        let bad = |slots: &[TxRequest]| gather(slots).unwrap().packet.unwrap_err();
        assert_eq!(bad(&[slot(0, 0, 13)]), BadPacket::TooShort(13));
        assert_eq!(bad(&[slot(0, 4083, 14)]), BadPacket::BadSlot { offset: 4083, bytes: 14 });
        assert_eq!(bad(&[slot(4, 0, 100), slot(0, 4095, 2)]), BadPacket::BadSlot { offset: 4095, bytes: 2 });
        assert_eq!(bad(&[slot(4, 0, 100), slot(0, 5, 0)]), BadPacket::BadSlot { offset: 5, bytes: 0 });
        assert_eq!(bad(&[slot(4, 0, 100), slot(0, 0, 101)]), BadPacket::BadSum);
        assert_eq!(bad(&[slot(4, 0, 100), slot(0, 0, 90)]), BadPacket::TooShort(10));
    }

    #[test]
    fn what_was_not_negotiated_or_makes_no_sense_is_dropped() {
        let with = |extra| gather(&[slot(tx_flag::EXTRA_INFO, 0, 200), extra]).unwrap().packet.map(|packet| packet.gso);
        assert_eq!(with(gso(47, 1, 0)), Err(BadPacket::BadSegment(47)));
        assert_eq!(with(gso(201, 1, 0)), Err(BadPacket::BadSegment(201)));
        assert_eq!(with(gso(100, 3, 0)), Err(BadPacket::BadProtocol(3)));
        assert_eq!(with(gso(200, 2, 0)), Ok(Some(Gso { protocol: GsoProtocol::Tcp6, bytes: 200 })));
        let multicast = TxRequest::of_extra(Extra { kind: 2, ..Extra::default() });
        assert_eq!(with(multicast), Err(BadPacket::BadExtra(2)));
        let twice = [slot(tx_flag::EXTRA_INFO, 0, 200), gso(100, 1, Extra::MORE), gso(100, 1, 0)];
        assert_eq!(gather(&twice).unwrap().packet, Err(BadPacket::BadExtra(1)));
    }
}
