//! A stock front end (ABI io 3.11): sends and receives frames through its two rings.

use std::collections::VecDeque;
use std::rc::Rc;

use ring_protocol::WordPage;
use ring_protocol::net::{RING_SLOTS, RX_SLOT_BYTES, RxRequest, RxResponse, TX_SLOT_BYTES, TxRequest, TxResponse};
use ring_protocol::net::{rx_flag, status, tx_flag};
use ring_protocol::ring::{FrontRing, Layout};
use zerocopy::{FromBytes, IntoBytes};

use crate::common::front::FrontEnd;
use crate::common::guest::Rounds;
use crate::machine::{Machine, NOT_GRANTED, PAGE};

pub type Guest = crate::common::guest::Guest<Machine>;

/// What the back end offers at B=2.
const OFFERED: [&str; 2] = ["feature-rx-copy", "feature-sg"];

struct Rings {
    tx_page: Rc<WordPage>,
    rx_page: Rc<WordPage>,
    tx: FrontRing,
    rx: FrontRing,
    /// The slots that are not answered, in the order of the ring.
    asked: VecDeque<u16>,
    sent: u16,
}

/// A front end of one vif.
pub struct Front {
    pub device: u32,
    /// One channel serves both rings.
    pub one_channel: bool,
    /// The address and the network, as read when the front end connected.
    pub mac: [u8; 6],
    pub network: String,
    /// A frame that is in the ring when the front end connects, without an event.
    pub early: Vec<u8>,
    rings: Option<Rings>,
    connections: u32,
    /// It has written what no stock driver writes.
    pub odd: bool,
}

impl FrontEnd<Machine> for Front {
    const KIND: &'static str = "vif";

    fn device(&self) -> u32 {
        self.device
    }

    fn step(&mut self, guest: &mut Guest) {
        match (self.state(guest), self.back_state(guest)) {
            (1, 2) => {
                for key in OFFERED {
                    assert_eq!(self.back(guest, key).as_deref(), Some("1"), "{key} at B=2");
                }
                self.publish(guest);
            }
            (2..=5, 5 | 6) => self.close(guest),
            _ => {}
        }
    }

    fn close(&mut self, guest: &mut Guest) {
        self.rings = None;
        self.set_state(guest, 6);
    }
}

impl Front {
    pub const fn new(device: u32) -> Self {
        let network = String::new();
        Self {
            device,
            one_channel: false,
            mac: [0; 6],
            network,
            early: Vec::new(),
            rings: None,
            connections: 0,
            odd: false,
        }
    }

    /// The ports of both rings.
    const fn ports(&self) -> [u32; 2] {
        let tx = 20 + self.device * 2;
        [tx, if self.one_channel { tx } else { tx + 1 }]
    }

    /// The first reference of the pages with frames.
    const fn pages(&self) -> u32 {
        1_000 * (self.device + 1)
    }

    /// The keys that it publishes for the rings at these references.
    pub fn keys(&self, tx: u32) -> Vec<(&'static str, String)> {
        let [tx_port, rx_port] = self.ports();
        let mut keys = vec![("tx-ring-ref", tx.to_string()), ("rx-ring-ref", (tx + 1).to_string())];
        if self.one_channel {
            keys.push(("event-channel", tx_port.to_string()));
        } else {
            keys.extend([("event-channel-tx", tx_port.to_string()), ("event-channel-rx", rx_port.to_string())]);
        }
        for key in ["request-rx-copy", "feature-rx-notify", "feature-sg", "feature-gso-tcpv4", "feature-gso-tcpv6"] {
            keys.push((key, "1".into()));
        }
        keys.push(("feature-ipv6-csum-offload", "1".into()));
        keys
    }

    pub fn publish(&mut self, guest: &mut Guest) {
        let mac = self.back(guest, "mac").unwrap_or_default();
        self.mac = mac.parse::<network::Mac>().map_or([0; 6], |mac| mac.0);
        self.network = self.back(guest, "bridge").unwrap_or_default();
        let tx = 100 + 400 * self.device + 2 * (self.connections % 200);
        self.connections += 1;
        let page = |reference| guest.machine.fake.page(guest.domain, reference);
        let (tx_page, rx_page) = (page(tx), page(tx + 1));
        let layout = |bytes| Layout::new(PAGE, bytes).unwrap();
        let tx_ring = FrontRing::init(&*tx_page, layout(TX_SLOT_BYTES));
        let mut rx_ring = FrontRing::init(&*rx_page, layout(RX_SLOT_BYTES));
        for id in 0..RING_SLOTS as u16 {
            post(&mut rx_ring, &rx_page, id, self.pages());
        }
        self.rings = Some(Rings { tx_page, rx_page, tx: tx_ring, rx: rx_ring, asked: VecDeque::new(), sent: 0 });
        let early = std::mem::take(&mut self.early);
        if !early.is_empty() {
            self.send(guest, &early);
        }
        let mut nodes: Vec<_> = self.keys(tx).into_iter().map(|(key, value)| (self.path(key), value)).collect();
        nodes.push((self.path("state"), "4".into()));
        guest.put_all(&nodes);
    }

    /// Puts a slot into the TX ring; false if there is no ring, or no room in it.
    fn put(&mut self, guest: &Guest, slot: TxRequest) -> bool {
        let [port, _] = self.ports();
        let Some(rings) = &mut self.rings else { return false };
        let slot = TxRequest { id: rings.sent, ..slot };
        if rings.tx.submit(&*rings.tx_page, slot.as_bytes()).unwrap().is_none() {
            return false;
        }
        rings.asked.push_back(rings.sent);
        rings.sent = rings.sent.wrapping_add(1);
        let _ = rings.tx.publish(&*rings.tx_page);
        guest.machine.fake.raise_from(guest.domain, port);
        true
    }

    /// Sends a frame; false if there is no ring, or no room in it.
    pub fn send(&mut self, guest: &Guest, frame: &[u8]) -> bool {
        let Some(rings) = &self.rings else { return false };
        let reference = self.pages() + u32::from(rings.sent % RING_SLOTS as u16);
        guest.machine.write(guest.domain, reference, frame);
        let size = frame.len() as u16;
        self.put(guest, TxRequest { reference, offset: 0, flags: 0, id: 0, size })
    }

    /// Sends a frame whose page is not granted.
    pub fn send_nothing(&mut self, guest: &Guest) -> bool {
        self.put(guest, TxRequest { reference: NOT_GRANTED, offset: 0, flags: 0, id: 0, size: 60 })
    }

    /// Sends a packet that never ends.
    pub fn send_endless(&mut self, guest: &Guest) {
        let slot = TxRequest { reference: self.pages(), offset: 0, flags: tx_flag::MORE_DATA, id: 0, size: 60 };
        for _ in 0..40 {
            self.put(guest, slot);
        }
    }

    /// Writes an index into the TX or the RX ring that no front end writes.
    pub fn break_ring(&mut self, guest: &Guest, tx: bool) {
        if let Some(rings) = &self.rings {
            let page = if tx { &rings.tx_page } else { &rings.rx_page };
            ring_protocol::SharedPage::store_u32(&**page, 0, 0x8000_0000);
            guest.machine.fake.raise_from(guest.domain, self.ports()[usize::from(!tx)]);
        }
    }

    /// Takes the answers to what was sent.
    pub fn answers(&mut self) -> Vec<i16> {
        let (mut statuses, odd) = (Vec::new(), self.odd);
        let Some(rings) = &mut self.rings else { return statuses };
        let mut answer = TxResponse::default();
        rings.tx.look(&*rings.tx_page).expect("more answers than frames");
        while rings.tx.take(&*rings.tx_page, answer.as_mut_bytes()).is_some() {
            let asked = rings.asked.pop_front();
            assert!(odd || asked == Some(answer.id), "an answer to nothing");
            statuses.push(answer.status);
        }
        let _ = rings.tx.rearm(&*rings.tx_page, 1);
        statuses
    }

    /// Takes the frames that have arrived, and posts their pages again.
    pub fn take(&mut self, guest: &Guest) -> Vec<Vec<u8>> {
        let (mut frames, first, [_, port]) = (Vec::new(), self.pages(), self.ports());
        let Some(rings) = &mut self.rings else { return frames };
        rings.rx.look(&*rings.rx_page).expect("more answers than pages");
        let mut bytes = [0; RX_SLOT_BYTES];
        let mut ids = Vec::new();
        while rings.rx.take(&*rings.rx_page, &mut bytes).is_some() {
            let answer = RxResponse::read_from_bytes(&bytes).unwrap();
            assert_eq!(answer.flags & (rx_flag::MORE_DATA | rx_flag::EXTRA_INFO), 0, "frames here have one slot");
            assert!(answer.status > 0, "{answer:?}");
            let reference = first + 300 + u32::from(answer.id);
            let count = usize::try_from(answer.status).unwrap();
            frames.push(guest.machine.read(guest.domain, reference, answer.offset.into(), count));
            ids.push(answer.id);
        }
        let any = !ids.is_empty();
        ids.into_iter().for_each(|id| post(&mut rings.rx, &rings.rx_page, id, first));
        if any {
            guest.machine.fake.raise_from(guest.domain, port);
        }
        let _ = rings.rx.rearm(&*rings.rx_page, 1);
        frames
    }

    /// Sends a frame, and returns its status. Answers to other frames are not looked at.
    pub fn ask(&mut self, guest: &Guest, frame: &[u8]) -> i16 {
        self.answers();
        assert!(self.send(guest, frame));
        for _ in 0..100 {
            guest.machine.round();
            if let [status] = self.answers()[..] {
                return status;
            }
        }
        panic!("the frame is never answered");
    }

    /// Sends a frame that is taken, and returns what has arrived after that.
    pub fn exchange(&mut self, guest: &Guest, frame: &[u8]) -> Vec<Vec<u8>> {
        assert_eq!(self.ask(guest, frame), status::OKAY);
        guest.machine.rounds(5);
        self.take(guest)
    }
}

fn post(ring: &mut FrontRing, page: &WordPage, id: u16, first: u32) {
    let request = RxRequest { id, padding: 0, reference: first + 300 + u32::from(id) };
    assert!(ring.submit(page, request.as_bytes()).unwrap().is_some());
    let _ = ring.publish(page);
}
