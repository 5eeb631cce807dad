//! DHCP messages, and what a server says to a client whose address is settled.
//!
//! Touches: bytes of a message that the caller passes.
//! Guarantees: [`answer`] is a pure function: the same question has the same answer, and the answer is for the one client whose
//! lease the caller passes. Options are read in one pass; a message is parsed whole or not at all.

use crate::Mac;
use crate::build::Frame;
use crate::bytes::{array, be16, be32};
use core::net::Ipv4Addr;

/// The UDP port of servers.
pub(crate) const SERVER: u16 = 67;
/// The UDP port of clients.
pub(crate) const CLIENT: u16 = 68;

/// Offset of the first option, after the magic number.
const OPTIONS: usize = 240;
const MAGIC: u32 = 0x6382_5363;
/// Bytes of the shortest message that every client takes.
const SHORTEST: usize = 300;
/// The maximum number of bytes of a client identifier that is sent back.
const MAX_CLIENT_ID: usize = 64;
/// The maximum number of DNS servers that are handed out or learnt.
pub(crate) const MAX_DNS: usize = 4;

/// Numbers of options (RFC 2132).
mod option {
    pub(super) const MASK: u8 = 1;
    pub(super) const ROUTER: u8 = 3;
    pub(super) const DNS: u8 = 6;
    pub(super) const HOST_NAME: u8 = 12;
    pub(super) const DOMAIN: u8 = 15;
    pub(super) const MTU: u8 = 26;
    pub(super) const BROADCAST: u8 = 28;
    pub(super) const REQUESTED: u8 = 50;
    pub(super) const LEASE: u8 = 51;
    pub(super) const TYPE: u8 = 53;
    pub(super) const SERVER: u8 = 54;
    pub(super) const PARAMETERS: u8 = 55;
    pub(super) const RENEWAL: u8 = 58;
    pub(super) const REBINDING: u8 = 59;
    pub(super) const CLIENT_ID: u8 = 61;
}

/// What a message is for (option 53).
pub(crate) mod message {
    pub(crate) const DISCOVER: u8 = 1;
    pub(crate) const OFFER: u8 = 2;
    pub(crate) const REQUEST: u8 = 3;
    pub(crate) const ACK: u8 = 5;
    pub(crate) const NAK: u8 = 6;
    pub(crate) const INFORM: u8 = 8;
}

/// A message as it was received. Addresses of zero are `None`.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Message<'a> {
    /// Whether a server sent it.
    pub(crate) reply: bool,
    pub(crate) kind: u8,
    pub(crate) transaction: u32,
    pub(crate) broadcast: bool,
    /// The address that the client uses already.
    pub(crate) client: Option<Ipv4Addr>,
    /// The address that the server gives.
    pub(crate) yours: Option<Ipv4Addr>,
    pub(crate) relay: Option<Ipv4Addr>,
    pub(crate) mac: Option<Mac>,
    pub(crate) requested: Option<Ipv4Addr>,
    pub(crate) server: Option<Ipv4Addr>,
    pub(crate) mask: Option<Ipv4Addr>,
    pub(crate) router: Option<Ipv4Addr>,
    pub(crate) dns: [Option<Ipv4Addr>; MAX_DNS],
    pub(crate) lease_seconds: Option<u32>,
    pub(crate) renewal_seconds: Option<u32>,
    pub(crate) rebinding_seconds: Option<u32>,
    pub(crate) client_id: Option<&'a [u8]>,
}

impl<'a> Message<'a> {
    /// Parses the payload of a UDP datagram. Returns `None` if it is no DHCP message about Ethernet.
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let [operation, hardware, address_bytes, _] = array(bytes, 0)?;
        let mut options = bytes.get(OPTIONS..)?;
        if !matches!(operation, 1 | 2) || hardware != 1 || address_bytes != 6 || be32(bytes, OPTIONS - 4)? != MAGIC {
            return None;
        }
        let address = |at| array::<4>(bytes, at).map(Ipv4Addr::from).filter(|address| !address.is_unspecified());
        let mut message = Self {
            reply: operation == 2,
            transaction: be32(bytes, 4)?,
            broadcast: be16(bytes, 10)? & 0x8000 != 0,
            client: address(12),
            yours: address(16),
            relay: address(24),
            mac: Some(Mac(array(bytes, 28)?)),
            ..Self::default()
        };
        loop {
            match options {
                // Some clients leave out the end.
                [] | [0xff, ..] => break,
                [0, rest @ ..] => options = rest,
                [number, length, rest @ ..] => {
                    let (value, rest) = rest.split_at_checked(usize::from(*length))?;
                    message.take(*number, value);
                    options = rest;
                }
                [_] => return None,
            }
        }
        (message.kind != 0).then_some(message)
    }

    /// Takes the value of an option. An unknown option or a value of the wrong length is ignored.
    fn take(&mut self, number: u8, value: &'a [u8]) {
        let address = || value.first_chunk::<4>().map(|&octets| Ipv4Addr::from(octets));
        match number {
            option::TYPE => self.kind = value.first().copied().unwrap_or(0),
            option::REQUESTED => self.requested = address(),
            option::SERVER => self.server = address(),
            option::MASK => self.mask = address(),
            option::ROUTER => self.router = address(),
            option::DNS => {
                let (servers, _) = value.as_chunks::<4>();
                self.dns.iter_mut().zip(servers).for_each(|(to, &server)| *to = Some(server.into()));
            }
            option::LEASE => self.lease_seconds = be32(value, 0),
            option::RENEWAL => self.renewal_seconds = be32(value, 0),
            option::REBINDING => self.rebinding_seconds = be32(value, 0),
            option::CLIENT_ID if value.len() <= MAX_CLIENT_ID => self.client_id = Some(value),
            _ => {}
        }
    }
}

/// What a server gives to all of its clients.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms<'a> {
    /// Who the server is. The address is the server's name, also where nothing else answers at the address.
    pub(crate) mac: Mac,
    pub(crate) address: Ipv4Addr,
    pub(crate) network: crate::Network,
    pub(crate) router: Option<Ipv4Addr>,
    pub(crate) dns: [Option<Ipv4Addr>; MAX_DNS],
    pub(crate) lease_seconds: u32,
    pub(crate) mtu: u16,
    pub(crate) domain: &'a str,
}

/// The client of one vif.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lease<'a> {
    pub(crate) mac: Mac,
    pub(crate) address: Ipv4Addr,
    pub(crate) name: &'a str,
}

/// Returns the frame that answers a client's message. `None` if the message asks for no answer of this server's, or is another
/// client's.
pub(crate) fn answer(question: &Message<'_>, lease: &Lease<'_>, terms: &Terms<'_>) -> Option<Frame> {
    if question.reply || question.mac != Some(lease.mac) || question.relay.is_some() {
        return None;
    }
    let kind = match question.kind {
        message::DISCOVER => message::OFFER,
        message::REQUEST => {
            if question.server.is_some_and(|server| server != terms.address) {
                return None;
            }
            // The address that the client wants to have or to keep.
            let wanted = question.requested.or(question.client)?;
            if wanted == lease.address { message::ACK } else { message::NAK }
        }
        message::INFORM => {
            question.client?;
            message::ACK
        }
        // Addresses are fixed, so nothing changes when a client gives one back or declines one.
        _ => return None,
    };
    let informed = question.kind == message::INFORM;
    let yours = if kind == message::NAK || informed { Ipv4Addr::UNSPECIFIED } else { lease.address };
    let to = match question.client {
        Some(client) if kind != message::NAK => client,
        _ if kind == message::NAK || question.broadcast => Ipv4Addr::BROADCAST,
        _ => yours,
    };
    // The switch gives the frame to this client alone, also if all stations are addressed.
    let mac = if to.is_broadcast() { Mac::BROADCAST } else { lease.mac };
    let mut frame = Frame::udp((terms.mac, terms.address, SERVER), (mac, to, CLIENT))?;
    let start = frame.length();
    frame.push(&[2, 1, 6, 0])?;
    frame.push(&question.transaction.to_be_bytes())?;
    frame.push(&[0, 0, if question.broadcast { 0x80 } else { 0 }, 0])?;
    frame.push(&if kind == message::ACK { question.client } else { None }.map_or([0; 4], |client| client.octets()))?;
    frame.push(&yours.octets())?;
    // Neither a next server nor a relay.
    frame.push(&[0; 8])?;
    frame.push(&lease.mac.0)?;
    frame.pad(start + OPTIONS - 4);
    frame.push(&MAGIC.to_be_bytes())?;
    put(&mut frame, option::TYPE, &[kind])?;
    put(&mut frame, option::SERVER, &terms.address.octets())?;
    if let Some(id) = question.client_id {
        put(&mut frame, option::CLIENT_ID, id)?;
    }
    if kind != message::NAK {
        put_terms(&mut frame, lease, terms, informed)?;
    }
    frame.push(&[0xff])?;
    frame.pad(start + SHORTEST);
    frame.finish_udp()?;
    Some(frame)
}

fn put_terms(frame: &mut Frame, lease: &Lease<'_>, terms: &Terms<'_>, informed: bool) -> Option<()> {
    if !informed {
        let seconds = terms.lease_seconds;
        put(frame, option::LEASE, &seconds.to_be_bytes())?;
        put(frame, option::RENEWAL, &(seconds / 2).to_be_bytes())?;
        put(frame, option::REBINDING, &(seconds / 8 * 7).to_be_bytes())?;
    }
    put(frame, option::MASK, &terms.network.mask().octets())?;
    put(frame, option::BROADCAST, &terms.network.broadcast().octets())?;
    if let Some(router) = terms.router {
        put(frame, option::ROUTER, &router.octets())?;
    }
    let count = terms.dns.iter().flatten().count();
    if count > 0 {
        frame.push(&[option::DNS, u8::try_from(count * 4).ok()?])?;
        terms.dns.iter().flatten().try_for_each(|server| frame.push(&server.octets()))?;
    }
    put(frame, option::MTU, &terms.mtu.to_be_bytes())?;
    for (number, text) in [(option::HOST_NAME, lease.name), (option::DOMAIN, terms.domain)] {
        // A name of more bytes is none that DNS knows.
        if !text.is_empty() && text.len() <= 63 {
            put(frame, number, text.as_bytes())?;
        }
    }
    Some(())
}

fn put(frame: &mut Frame, number: u8, value: &[u8]) -> Option<()> {
    frame.push(&[number, u8::try_from(value.len()).ok()?])?;
    frame.push(value)
}

/// What a client says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Question {
    pub(crate) kind: u8,
    pub(crate) mac: Mac,
    pub(crate) transaction: u32,
    /// The address in use. `None` before the first acknowledgement.
    pub(crate) client: Option<Ipv4Addr>,
    /// The address that was offered, and who offered it.
    pub(crate) offered: Option<(Ipv4Addr, Ipv4Addr)>,
    /// Who is asked: the server's Ethernet address and address, or all.
    pub(crate) to: (Mac, Ipv4Addr),
}

/// Returns the frame with which a client asks.
pub(crate) fn ask(question: &Question) -> Option<Frame> {
    let from = question.client.unwrap_or(Ipv4Addr::UNSPECIFIED);
    let mut frame = Frame::udp((question.mac, from, CLIENT), (question.to.0, question.to.1, SERVER))?;
    let start = frame.length();
    frame.push(&[1, 1, 6, 0])?;
    frame.push(&question.transaction.to_be_bytes())?;
    frame.push(&[0; 4])?;
    frame.push(&from.octets())?;
    frame.push(&[0; 12])?;
    frame.push(&question.mac.0)?;
    frame.pad(start + OPTIONS - 4);
    frame.push(&MAGIC.to_be_bytes())?;
    put(&mut frame, option::TYPE, &[question.kind])?;
    if let Some((address, server)) = question.offered {
        put(&mut frame, option::REQUESTED, &address.octets())?;
        put(&mut frame, option::SERVER, &server.octets())?;
    }
    let wanted = [option::MASK, option::ROUTER, option::DNS, option::LEASE, option::RENEWAL, option::REBINDING];
    put(&mut frame, option::PARAMETERS, &wanted)?;
    frame.push(&[0xff])?;
    frame.pad(start + SHORTEST);
    frame.finish_udp()?;
    Some(frame)
}
