//! A model of the stock front end: it sends packets, posts buffers, and checks what a back end may answer (ABI io 6.2).

use std::collections::BTreeMap;

use super::{Machine, PAGE, RX_PAGES, RingPage, mac};
use network::Mac;
use ring_protocol::net::{Extra, Gso, MAX_SLOTS, RX_SLOT_BYTES, RxRequest, RxResponse, TX_SLOT_BYTES};
use ring_protocol::net::{TxRequest, TxResponse, rx_flag, status, tx_flag};
use ring_protocol::ring::{FrontRing, Layout};
use zerocopy::{FromBytes, IntoBytes};

/// A packet that has arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrived {
    pub bytes: Vec<u8>,
    pub blank: bool,
    pub validated: bool,
    /// Bytes of each segment, and the protocol's number.
    pub gso: Option<(u16, u8)>,
    /// Bytes of the first slot, and the number of data slots.
    pub first: usize,
    pub slots: usize,
}

/// How a packet is sent.
#[derive(Clone, Copy, Debug, Default)]
pub struct How {
    pub blank: bool,
    pub validated: bool,
    pub gso: Option<Gso>,
}

pub struct Front {
    pub domain: u16,
    pub mac: Mac,
    pub tx_page: RingPage,
    pub rx_page: RingPage,
    pub tx: FrontRing,
    pub rx: FrontRing,
    /// The ids of slots that are not answered, and whether each is an extra slot.
    pub asked: BTreeMap<u16, bool>,
    /// The slots of the ring in their order, for extra slots have no id.
    order: std::collections::VecDeque<(u16, bool)>,
    next_id: u16,
    /// The next TX page.
    next_page: usize,
    /// The page in each slot of the RX ring.
    posted: [u32; 256],
    free: Vec<u32>,
    /// Answers so far, by status.
    pub okay: u64,
    pub dropped: u64,
    pub errors: u64,
    pub rx_errors: u64,
    /// RX buffers that were used up.
    pub used: u64,
    /// A hostile front end does not care for the answers' ids.
    pub hostile: bool,
}

impl Front {
    pub fn new(domain: u16) -> Self {
        let (tx_page, rx_page) = (RingPage::new(), RingPage::new());
        let tx = FrontRing::init(&tx_page, Layout::new(PAGE, TX_SLOT_BYTES).unwrap());
        let rx = FrontRing::init(&rx_page, Layout::new(PAGE, RX_SLOT_BYTES).unwrap());
        Self {
            domain,
            mac: mac(domain),
            tx_page,
            rx_page,
            tx,
            rx,
            asked: BTreeMap::new(),
            order: std::collections::VecDeque::new(),
            next_id: 0,
            next_page: RX_PAGES,
            posted: [0; 256],
            free: (0..RX_PAGES as u32).rev().collect(),
            okay: 0,
            dropped: 0,
            errors: 0,
            rx_errors: 0,
            used: 0,
            hostile: false,
        }
    }

    /// Makes all further buffers pages that the guest granted for reading alone.
    pub fn only_read_only(&mut self) {
        self.free = (RX_PAGES as u32 + 200..RX_PAGES as u32 + 256).collect();
    }

    /// Posts up to `count` buffers. Returns how many.
    pub fn post(&mut self, count: usize) -> usize {
        let mut done = 0;
        while done < count && self.rx.room() > 0 {
            let Some(page) = self.free.pop() else { break };
            let request = RxRequest { id: page as u16 ^ 0x5a00, padding: 0, reference: page };
            let index = self.rx.submit(&self.rx_page, request.as_bytes()).unwrap().unwrap();
            self.posted[index as usize % 256] = page;
            done += 1;
        }
        let _ = self.rx.publish(&self.rx_page);
        done
    }

    /// Puts any slot into the TX ring. Returns false if the ring is full.
    pub fn put(&mut self, mut slot: TxRequest, extra: bool) -> bool {
        slot.id = self.next_id;
        if self.tx.submit(&self.tx_page, slot.as_bytes()).unwrap().is_none() {
            return false;
        }
        self.order.push_back((self.next_id, extra));
        self.next_id = self.next_id.wrapping_add(1);
        true
    }

    /// Returns whether a packet of this many slots can be sent now.
    pub fn can_send(&self, slots: usize) -> bool {
        self.tx.room() as usize > slots
    }

    /// Sends a packet whose bytes lie in slots of these lengths, each at an offset in a page of its own. Returns false if the
    /// ring is full.
    pub fn send(&mut self, machine: &Machine, bytes: &[u8], parts: &[(usize, usize)], how: How) -> bool {
        assert_eq!(parts.iter().map(|(_, length)| length).sum::<usize>(), bytes.len());
        assert!(parts.len() <= MAX_SLOTS);
        if !self.can_send(parts.len()) {
            return false;
        }
        let mut at = 0;
        for (n, (offset, length)) in parts.iter().enumerate() {
            let page = self.next_page as u32;
            self.next_page = RX_PAGES + (self.next_page + 1 - RX_PAGES) % 256;
            machine.write(self.domain, page, *offset, &bytes[at..at + length]);
            let mut flags = if n + 1 < parts.len() { tx_flag::MORE_DATA } else { 0 };
            let mut size = *length as u16;
            if n == 0 {
                size = bytes.len() as u16;
                flags |= if how.blank { tx_flag::CHECKSUM_BLANK } else { 0 };
                flags |= if how.validated { tx_flag::DATA_VALIDATED } else { 0 };
                flags |= if how.gso.is_some() { tx_flag::EXTRA_INFO } else { 0 };
            }
            assert!(self.put(TxRequest { reference: page, offset: *offset as u16, flags, id: 0, size }, false));
            if let Some(gso) = how.gso.filter(|_| n == 0) {
                assert!(self.put(TxRequest::of_extra(Extra::gso(gso)), true));
            }
            at += length;
        }
        let _ = self.tx.publish(&self.tx_page);
        true
    }

    /// Sends a packet as a stock kernel does: `linear` bytes in the first slot, the rest in whole pages.
    pub fn send_stock(&mut self, machine: &Machine, bytes: &[u8], linear: usize, how: How) -> bool {
        let linear = linear.min(bytes.len());
        let mut parts = vec![(0, linear)];
        let mut left = bytes.len() - linear;
        while left > 0 {
            let length = left.min(PAGE);
            parts.push((0, length));
            left -= length;
        }
        self.send(machine, bytes, &parts, how)
    }

    /// Sends a short packet in one slot.
    pub fn send_small(&mut self, machine: &Machine, bytes: &[u8]) -> bool {
        self.send(machine, bytes, &[(2, bytes.len())], How::default())
    }

    /// Looks at the answers to what was sent: each slot once, in the order of the ring.
    pub fn collect_sent(&mut self) -> usize {
        let count = self.tx.look(&self.tx_page).expect("more answers than requests");
        let mut answer = TxResponse::default();
        while self.tx.take(&self.tx_page, answer.as_mut_bytes()).is_some() {
            let (id, extra) = self.order.pop_front().expect("an answer too many");
            assert_eq!(answer.id, id, "answers out of order");
            match answer.status {
                status::NULL => assert!(extra || self.hostile, "a data slot is answered as an extra slot"),
                other => {
                    assert!(!extra || self.hostile, "an extra slot is answered with {other}");
                    match other {
                        status::OKAY => self.okay += 1,
                        status::DROPPED => self.dropped += 1,
                        status::ERROR => self.errors += 1,
                        other => panic!("a status {other}"),
                    }
                }
            }
        }
        let _ = self.tx.rearm(&self.tx_page, 1);
        count as usize
    }

    /// Returns how many slots are not answered.
    pub fn unanswered(&self) -> usize {
        self.order.len()
    }

    /// Looks at what has arrived, and frees the buffers.
    pub fn collect(&mut self, machine: &Machine) -> Vec<Arrived> {
        let _ = self.rx.look(&self.rx_page).expect("more answers than buffers");
        let (mut all, mut now): (Vec<Arrived>, Option<Arrived>) = (Vec::new(), None);
        let mut expects_extra = false;
        let mut slot = [0; 8];
        while let Some(index) = self.rx.take(&self.rx_page, &mut slot) {
            let page = self.posted[index as usize % 256];
            self.free.push(page);
            self.used += 1;
            if expects_extra {
                let extra = Extra::read_from_bytes(&slot).unwrap();
                assert_eq!((extra.kind, extra.flags, extra.features), (Extra::GSO, 0, 0));
                let packet = now.as_mut().unwrap();
                packet.gso = Some((extra.size, extra.protocol));
                expects_extra = false;
                // The flag of the first slot says whether more follows.
                if packet.slots == usize::MAX {
                    packet.slots = 1;
                    all.extend(now.take());
                }
                continue;
            }
            let response = RxResponse::read_from_bytes(&slot).unwrap();
            assert_eq!(response.id, page as u16 ^ 0x5a00, "an answer in another slot");
            let Ok(length) = usize::try_from(response.status) else {
                assert_eq!((response.flags, response.status), (0, status::ERROR));
                assert!(now.is_none(), "an error within a packet");
                self.rx_errors += 1;
                continue;
            };
            let offset = usize::from(response.offset);
            assert!(length > 0 && offset + length <= PAGE, "{response:?}");
            let bytes = machine.read(self.domain, page, offset, length);
            let more = response.flags & rx_flag::MORE_DATA != 0;
            match &mut now {
                None => {
                    assert!(length >= 14, "a first slot without an Ethernet header");
                    let [blank, validated] = [rx_flag::CHECKSUM_BLANK, rx_flag::DATA_VALIDATED];
                    let [blank, validated] = [blank, validated].map(|flag| response.flags & flag != 0);
                    expects_extra = response.flags & rx_flag::EXTRA_INFO != 0;
                    let mut packet = Arrived { bytes, blank, validated, gso: None, first: length, slots: 1 };
                    if more {
                        now = Some(packet);
                    } else if expects_extra {
                        packet.slots = usize::MAX;
                        now = Some(packet);
                    } else {
                        all.push(packet);
                    }
                }
                Some(packet) => {
                    assert_eq!(response.flags & !rx_flag::MORE_DATA, 0, "flags in a later slot");
                    packet.bytes.extend(bytes);
                    packet.slots += 1;
                    if !more {
                        all.extend(now.take());
                    }
                }
            }
        }
        assert!(now.is_none(), "a packet was published in part");
        for packet in &all {
            let limit = if packet.first <= 256 { 18 } else { 17 };
            assert!(packet.slots <= limit, "{} slots, the first of {} bytes", packet.slots, packet.first);
            assert!(packet.first >= packet.bytes.len().min(256), "a first slot of {} bytes", packet.first);
            assert!(!packet.blank || packet.validated, "a blank checksum is not said to be validated");
        }
        let _ = self.rx.rearm(&self.rx_page, 1);
        all
    }
}
