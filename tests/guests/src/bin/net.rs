//! A front end of network devices, which waits until they are attached. `do=count` sends 50,000 TX slots with any contents from
//! two devices of one network to each other, to the neighbour with the address `peer=`, and to anybody; the slots, pages and
//! grants change while they are served. The answers of both rings are counted, and each connection ends with a rule broken.
//! `seed=` repeats a run. `do=flood` sends packets to the neighbour for ever: `once=` of them at once, every `after=`
//! microseconds. `do=stall` posts no buffers. For tests that dom0 goes on serving others.
#![no_std]
#![no_main]
#![forbid(unsafe_code)]

extern crate alloc;

use alloc::collections::VecDeque;
use alloc::format;
use alloc::vec::Vec;

use guests::abi::domid;
use guests::abi::grant::entry;
use guests::abi::sched::ShutdownReason;
use guests::front::{Device, Granted, PATIENCE_NS, Random, reference};
use guests::granted::IN_USE;
use guests::shared::Shared;
use guests::xenstore::Store;
use guests::{hypercall, own_number};
use ring_protocol::SharedPage;
use ring_protocol::net::{
    Extra, Gso, GsoProtocol, HOSTILE_SLOTS, MAX_EXTRAS, PAGE_BYTES, RING_SLOTS, RX_SLOT_BYTES, RxRequest, RxResponse,
    TX_SLOT_BYTES, TxRequest, TxResponse, rx_flag, status, tx_flag,
};
use ring_protocol::ring::{FrontRing, Layout};
use unikernel::boot::Boot;
use unikernel::{println, time};
use zerocopy::{FromBytes, IntoBytes};

unikernel::entry!(main);

/// Our devices.
const VIFS: u64 = 2;
/// Pages of a device: its rings, and what it sends. Buffers for what comes are used by both, and so is any page now and then.
const TX: u64 = 0;
const RX: u64 = 1;
const SENT: u64 = 2;
const OWN: u64 = 10;
const BUFFERS: u64 = VIFS * OWN;
const PAGES: u64 = BUFFERS + 16;

/// Sent slots that are counted over all connections. (The back end lets a front end connect ten times a minute.)
const COUNTED: usize = 50_000;
const CONNECTIONS: usize = 9;
/// Bytes of an Ethernet address.
type Mac = [u8; 6];

/// What a packet's answers must be.
struct Asked {
    id: u16,
    extra: bool,
}

/// A device: its rings, and what was asked and not yet answered.
struct Vif {
    device: Device,
    number: u64,
    mac: Mac,
    ports: [u32; 2],
    tx: FrontRing,
    rx: FrontRing,
    sent: VecDeque<Asked>,
    posted: VecDeque<u16>,
    /// What follows in the RX ring is an extra slot.
    extra: bool,
    next: u16,
    tx_answers: usize,
    rx_answers: usize,
}

/// The guest.
struct Front {
    store: Store,
    pages: Granted,
    domain: u16,
    macs: [Mac; 2],
    peer: Mac,
}

fn layout(bytes: usize) -> Layout {
    Layout::new(PAGE_BYTES, bytes).expect("a page has slots")
}

/// The address that a text is. `None` if the text is no address.
fn parse_mac(text: &str) -> Option<Mac> {
    let mut mac = [0; 6];
    let mut parts = text.trim().split(':');
    for byte in &mut mac {
        *byte = u8::from_str_radix(parts.next()?, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}

fn cut(number: u64) -> u16 {
    u16::try_from(number & 0xffff).unwrap_or(0)
}

fn size(number: u64) -> usize {
    usize::try_from(number).unwrap_or(0)
}

impl Vif {
    fn new(number: u32, mac: Mac, front: &Front) -> Self {
        let port = || hypercall::allocate_unbound(domid::SELF, 0).expect("a port is free");
        let first = u64::from(number) * OWN;
        Self {
            device: Device::new("vif", number),
            number: number.into(),
            mac,
            ports: [port(), port()],
            tx: FrontRing::init(&front.pages.page(first + TX), layout(TX_SLOT_BYTES)),
            rx: FrontRing::init(&front.pages.page(first + RX), layout(RX_SLOT_BYTES)),
            sent: VecDeque::new(),
            posted: VecDeque::new(),
            extra: false,
            next: 0,
            tx_answers: 0,
            rx_answers: 0,
        }
    }

    /// The number of one of our pages.
    const fn page(&self, page: u64) -> u64 {
        self.number * OWN + page
    }

    fn ring(&self, front: &Front, page: u64) -> Shared {
        front.pages.page(self.page(page))
    }

    fn notify(&self) {
        for port in self.ports {
            let _ = hypercall::send(port);
        }
    }

    /// Connects with any of the features, and with one channel or two.
    fn connect(&mut self, front: &mut Front, random: &mut Random) {
        let rings = [TX, RX].map(|page| self.ring(front, page));
        rings.iter().for_each(|ring| ring.write(0, &[0; PAGE_BYTES]));
        let [tx, rx] = &rings;
        self.tx = FrontRing::init(tx, layout(TX_SLOT_BYTES));
        self.rx = FrontRing::init(rx, layout(RX_SLOT_BYTES));
        self.sent.clear();
        self.posted.clear();
        self.extra = false;
        let Self { device, ports, .. } = self;
        let store = &mut front.store;
        assert!(device.until(store, &[2]).is_some(), "not offered: B={}", device.back(store));
        let first = self.number * OWN;
        device.put_number(store, "tx-ring-ref", reference(first + TX));
        device.put_number(store, "rx-ring-ref", reference(first + RX));
        let [one, two] = *ports;
        for key in ["event-channel", "event-channel-tx", "event-channel-rx"] {
            device.remove(store, key);
        }
        if random.one_in(2) {
            device.put_number(store, "event-channel-tx", one);
            device.put_number(store, "event-channel-rx", two);
        } else {
            device.put_number(store, "event-channel", one);
        }
        device.put_number(store, "request-rx-copy", 1);
        for key in [
            "feature-sg",
            "feature-gso-tcpv4",
            "feature-gso-tcpv6",
            "feature-no-csum-offload",
            "feature-ipv6-csum-offload",
        ] {
            device.put_number(store, key, random.word() & 1);
        }
        device.put(store, "state", "4");
        assert_eq!(device.until(store, &[4, 5, 6]), Some(4), "not connected");
    }

    /// Closes the device, whatever its back end has come to.
    fn close(&self, store: &mut Store) {
        self.device.put(store, "state", "6");
        assert_eq!(self.device.until(store, &[6]), Some(6), "the device is not let go of");
    }

    /// A packet with any contents in a ring that stays sound: all its slots say truly which is the last.
    fn any_packet(&mut self, front: &Front, random: &mut Random) -> Vec<(TxRequest, bool)> {
        let data = match random.below(32) {
            0..16 => 1,
            16..24 => 2 + random.below(3),
            24..30 => 2 + random.below(17),
            30 => 19,
            _ => 20,
        };
        let extras = match random.below(32) {
            0..22 => 0,
            22..31 => 1,
            _ => 1 + random.below(MAX_EXTRAS as u64),
        };
        let (head, protocol) = (SENT + random.below(OWN - SENT), random.one_in(2));
        let protocol = if protocol { GsoProtocol::Tcp4 } else { GsoProtocol::Tcp6 };
        // Half of the packets are such as anybody sends.
        let sound = random.one_in(2);
        let mut slots: Vec<(TxRequest, bool)> = Vec::new();
        let mut total = 0_u16;
        // Most packets have a length that is carried.
        let most = if extras > 0 { 60_000 } else { 9_000 };
        let most = if random.one_in(16) { 4096 } else { (most / data).min(4096) };
        for at in 0..data {
            let bytes = if random.one_in(4) { cut(most) } else { 14 + cut(random.below(most - 14)) };
            let room = u64::from(4097 - bytes);
            let offset = if at == 0 { 0 } else { cut(random.below(room)) };
            total = total.wrapping_add(bytes);
            let more = if at + 1 < data { tx_flag::MORE_DATA } else { 0 };
            let flags = random.half() & (tx_flag::CHECKSUM_BLANK | tx_flag::DATA_VALIDATED) | more;
            let flags = if !sound && random.one_in(8) { flags | random.half() & 0xfff0 } else { flags };
            let extra = if at == 0 && extras > 0 { tx_flag::EXTRA_INFO } else { 0 };
            let reference = match random.below(32) {
                0 if !sound => random.word(),
                1 if !sound => reference(PAGES) + random.word() % 400,
                2 if !sound => reference(random.below(PAGES)),
                _ if at == 0 => reference(self.page(head)),
                _ => reference(self.page(SENT + random.below(OWN - SENT))),
            };
            slots.push((TxRequest { reference, offset, flags: flags | extra, id: 0, size: bytes }, false));
        }
        if let Some((first, _)) = slots.first_mut() {
            first.size = total;
        }
        self.write_head(front, random, head, protocol, total);
        if !sound
            && random.one_in(4)
            && let Some((slot, _)) = slots.get_mut(size(random.below(data)))
        {
            (slot.offset, slot.size) = (random.half(), random.half());
        }
        for at in 0..extras {
            let bytes = if !sound && random.one_in(2) { random.half() } else { 500 + random.half() % 1000 };
            let mut extra = Extra::gso(Gso { protocol, bytes });
            if !sound && random.one_in(4) {
                extra = Extra::read_from_bytes(&random.long().to_le_bytes()).expect("the size of an extra slot");
            }
            extra.flags = u8::from(at + 1 < extras);
            slots.insert(1 + size(at), (TxRequest::of_extra(extra), true));
        }
        for (slot, _) in &mut slots {
            slot.id = self.next;
            self.next = self.next.wrapping_add(1);
        }
        slots
    }

    /// Writes the first bytes of a packet of `total` bytes to a page: an Ethernet header, and what may be one of IP.
    fn write_head(&self, front: &Front, random: &mut Random, page: u64, protocol: GsoProtocol, total: u16) {
        let mut head = [0_u8; 128];
        head.chunks_mut(8).for_each(|chunk| chunk.copy_from_slice(&random.long().to_le_bytes()));
        let other = if self.number == 0 { front.macs[1] } else { front.macs[0] };
        let to = match random.below(32) {
            0 => [0xff; 6],
            1 => [2, 0x16, 0x3e, 0, 0, 1],
            2 => [0x33, 0x33, 0, 0, 0, 1],
            3 => random_mac(random),
            4..8 => front.peer,
            _ => other,
        };
        let from = if random.one_in(32) { random_mac(random) } else { self.mac };
        head[..6].copy_from_slice(&to);
        head[6..12].copy_from_slice(&from);
        let any = |random: &mut Random, kinds: &[u8]| kinds[size(random.below(kinds.len() as u64))];
        match (random.below(8), protocol) {
            // ARP, with any of its operations.
            (0, _) => {
                head[12..22].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1 + u8::from(random.one_in(2))]);
                head[22..28].copy_from_slice(&self.mac);
            }
            (1, _) => {}
            (_, GsoProtocol::Tcp4) => {
                head[12..15].copy_from_slice(&[8, 0, 0x45]);
                head[16..18].copy_from_slice(&total.saturating_sub(14).to_be_bytes());
                head[20..24].copy_from_slice(&[0, 0, 64, any(random, &[6, 6, 6, 17, 1])]);
                head[46] = 0x50;
            }
            (_, GsoProtocol::Tcp6) => {
                head[12..15].copy_from_slice(&[0x86, 0xdd, 0x60]);
                head[18..20].copy_from_slice(&total.saturating_sub(54).to_be_bytes());
                head[20] = any(random, &[6, 6, 6, 17, 58, 0, 43, 44]);
                head[66] = 0x50;
            }
        }
        if random.one_in(8) {
            let at = 12 + size(random.below(60));
            head[at] = random.long().to_le_bytes()[0];
        }
        self.ring(front, page).write(0, &head);
    }

    /// Puts packets into the ring until it has no room, or for `count` slots.
    fn send(&mut self, front: &Front, random: &mut Random, count: u64) {
        let ring = self.ring(front, TX);
        let mut put = 0;
        while put < count && self.tx.room() as usize >= HOSTILE_SLOTS + MAX_EXTRAS {
            for (slot, extra) in self.any_packet(front, random) {
                assert!(self.tx.submit(&ring, slot.as_bytes()).is_ok_and(|at| at.is_some()), "the ring has room");
                self.sent.push_back(Asked { id: slot.id, extra });
                put += 1;
            }
        }
        let _ = self.tx.publish(&ring);
    }

    /// Posts buffers, some of which nobody can write.
    fn post(&mut self, front: &Front, random: &mut Random) {
        let ring = self.ring(front, RX);
        while self.rx.room() > 0 {
            let reference = match random.below(64) {
                0 => random.word() | 1 << 16,
                1 => reference(self.page(SENT + random.below(OWN - SENT))),
                _ => reference(BUFFERS + random.below(PAGES - BUFFERS)),
            };
            let slot = RxRequest { id: random.half(), padding: random.half(), reference };
            assert!(self.rx.submit(&ring, slot.as_bytes()).is_ok_and(|at| at.is_some()), "the ring has room");
            self.posted.push_back(slot.id);
        }
        let _ = self.rx.publish(&ring);
    }

    /// Takes the answers that are there. Returns how many there were.
    fn take(&mut self, front: &Front) -> usize {
        let [tx, rx] = [TX, RX].map(|page| self.ring(front, page));
        let before = self.tx_answers + self.rx_answers;
        self.tx.look(&tx).expect("no more answers than slots");
        let mut answer = TxResponse::default();
        while self.tx.take(&tx, answer.as_mut_bytes()).is_some() {
            let asked = self.sent.pop_front().expect("no more answers than slots");
            assert_eq!(answer.id, asked.id, "an answer out of order");
            let known = [status::OKAY, status::ERROR, status::DROPPED].contains(&answer.status);
            assert!(if asked.extra { answer.status == status::NULL } else { known }, "status {}", answer.status);
            self.tx_answers += 1;
        }
        self.rx.look(&rx).expect("no more answers than buffers");
        let mut filled = RxResponse::default();
        while self.rx.take(&rx, filled.as_mut_bytes()).is_some() {
            let id = self.posted.pop_front().expect("no more answers than buffers");
            self.rx_answers += 1;
            if core::mem::take(&mut self.extra) {
                let extra = Extra::read_from_bytes(filled.as_bytes()).expect("the size of a slot");
                assert_eq!((extra.kind, extra.flags), (Extra::GSO, 0), "an extra slot");
                continue;
            }
            assert_eq!(filled.id, id, "a buffer out of order");
            if let Ok(bytes) = usize::try_from(filled.status) {
                assert!(bytes > 0 && usize::from(filled.offset) + bytes <= PAGE_BYTES, "{filled:?}");
                self.extra = filled.flags & rx_flag::EXTRA_INFO != 0;
            } else {
                assert_eq!((filled.status, filled.flags & 0xff), (status::ERROR, 0), "{filled:?}");
            }
        }
        self.tx_answers + self.rx_answers - before
    }

    /// Changes what the back end may be looking at, but not where a packet ends, and no id.
    fn meddle(&self, front: &Front, random: &mut Random) {
        match random.below(8) {
            // Offset or length. In an extra slot these are nothing, or which protocol.
            0 => {
                let at = 64 + size(random.below(RING_SLOTS as u64)) * TX_SLOT_BYTES;
                let at = at + if random.one_in(2) { 4 } else { 10 };
                self.ring(front, TX).write(at, &random.half().to_le_bytes());
            }
            // The second byte of a reference. In an answer this byte says nothing.
            1 => {
                let at = 64 + size(random.below(RING_SLOTS as u64)) * RX_SLOT_BYTES;
                self.ring(front, RX).write(at + 5, &[u8::from(random.one_in(2))]);
            }
            2 => {
                let (page, total) = (SENT + random.below(OWN - SENT), random.half());
                self.write_head(front, random, page, GsoProtocol::Tcp4, total);
            }
            // Without the marks that tell a use, which are to be those of real uses at the end.
            3 => {
                let page = BUFFERS + random.below(PAGES - BUFFERS);
                front.pages.table.set(reference(page), random.long() & !IN_USE);
            }
            4 => {
                let page = self.page(SENT + random.below(OWN - SENT));
                front.pages.table.set(reference(page), random.long() & !IN_USE);
            }
            _ => front.grant_data(if random.one_in(4) { entry::READONLY } else { 0 }),
        }
    }
}

fn random_mac(random: &mut Random) -> Mac {
    let [a, b, c, d, e, f, ..] = random.long().to_le_bytes();
    [a, b, c, d, e, f]
}

/// How a connection is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Harm {
    TxJump,
    TxBack,
    RxJump,
    EndlessPacket,
    EndlessExtras,
    Unfinished,
    /// Slots of random words.
    Anything,
}

impl Harm {
    const ALL: [Self; 7] = [
        Self::TxJump,
        Self::TxBack,
        Self::RxJump,
        Self::EndlessPacket,
        Self::EndlessExtras,
        Self::Unfinished,
        Self::Anything,
    ];

    /// How the reason begins that the back end tells.
    const fn reason(self) -> &'static str {
        match self {
            Self::TxJump | Self::TxBack => "TX ring: peer index ",
            Self::RxJump => "RX ring: peer index ",
            Self::EndlessPacket => "TX ring: a packet of more than 20 slots",
            Self::EndlessExtras => "TX ring: a packet of more than 5 extra slots",
            Self::Unfinished => "TX ring: a packet without its last slot",
            Self::Anything => "TX ring: a packet ",
        }
    }
}

impl Front {
    fn new(boot: &Boot, vifs: usize) -> Self {
        let mut store = Store::new(boot);
        let mut macs = [[0; 6]; 2];
        macs.iter_mut().zip(0..).take(vifs).for_each(|(mac, number)| *mac = mac_of(&mut store, number));
        let peer = boot.argument("peer").and_then(parse_mac).unwrap_or([0xff; 6]);
        Self { store, pages: Granted::new(PAGES), domain: own_number(), macs, peer }
    }

    /// Lets the back end use all pages but the rings, with these flags too.
    fn grant_data(&self, flags: u16) {
        let is_ring = |page: u64| page < BUFFERS && page % OWN < SENT;
        let pages = (0..PAGES).filter(|page| !is_ring(*page));
        pages.for_each(|page| self.pages.grant(page, page, entry::PERMIT_ACCESS | flags));
    }

    /// Sends slots with any contents by both devices until so many were answered.
    fn count(&self, vifs: &mut [Vif], random: &mut Random, wanted: usize) {
        let mut deadline = time::now_ns() + PATIENCE_NS;
        loop {
            let (sent, filled) = totals(vifs);
            let outstanding = vifs.iter().any(|vif| !vif.sent.is_empty());
            let enough = sent >= wanted;
            if enough && !outstanding {
                return;
            }
            let mut came = 0;
            for vif in &mut *vifs {
                if !enough {
                    vif.send(self, random, 1 + random.0 % 64);
                }
                // A receiver without buffers holds its senders up for a while.
                if !random.one_in(64) {
                    vif.post(self, random);
                }
                vif.notify();
                vif.meddle(self, random);
                hypercall::yield_now();
                vif.meddle(self, random);
                came += vif.take(self);
            }
            if came > 0 {
                deadline = time::now_ns() + PATIENCE_NS;
            }
            let waiting = || vifs.iter().map(|vif| vif.sent.len()).sum::<usize>();
            assert!(time::now_ns() < deadline, "{sent} and {filled} answers, {} slots wait", waiting());
        }
    }

    /// Breaks a rule with the first of the devices until the back end closes it, and requires the reason that the back end
    /// tells.
    fn break_rule(&mut self, vifs: &mut [Vif], random: &mut Random, harm: Harm) {
        self.pages.grant_all();
        let [vif, other] = vifs else { return };
        let [tx, rx] = [TX, RX].map(|page| vif.ring(self, page));
        let put = |vif: &mut Vif, slot: TxRequest| {
            let _ = vif.tx.submit(&tx, slot.as_bytes());
        };
        let slot = |flags| TxRequest { reference: reference(SENT), offset: 0, flags, id: 0, size: 100 };
        let jump = |random: &mut Random| 300 + random.word() % (1 << 30);
        match harm {
            Harm::TxJump => tx.store_u32(0, tx.load_u32(0).wrapping_add(jump(random))),
            Harm::TxBack => tx.store_u32(0, tx.load_u32(0).wrapping_sub(1 + random.word() % 64)),
            Harm::RxJump => rx.store_u32(0, rx.load_u32(0).wrapping_add(jump(random))),
            Harm::EndlessPacket => (0..30).for_each(|_| put(vif, slot(tx_flag::MORE_DATA))),
            Harm::EndlessExtras => {
                put(vif, slot(tx_flag::EXTRA_INFO));
                let extra = Extra { kind: Extra::GSO, flags: Extra::MORE, ..Extra::default() };
                (0..9).for_each(|_| put(vif, TxRequest::of_extra(extra)));
            }
            Harm::Unfinished => put(vif, slot(tx_flag::MORE_DATA)),
            Harm::Anything => {}
        }
        if !matches!(harm, Harm::TxJump | Harm::TxBack) {
            let _ = vif.tx.publish(&tx);
        }
        // An RX ring is looked at when its buffers are used up, which takes many packets.
        let deadline = time::now_ns() + 3 * PATIENCE_NS;
        while vif.device.back(&mut self.store) == 4 {
            assert!(time::now_ns() < deadline, "nothing comes of {harm:?}");
            if harm == Harm::Anything {
                for _ in 0..8 {
                    let mut slot = TxRequest::default();
                    let words = [random.long().to_le_bytes(), random.long().to_le_bytes()];
                    slot.as_mut_bytes().iter_mut().zip(words.as_flattened()).for_each(|(byte, any)| *byte = *any);
                    put(vif, slot);
                }
                let _ = vif.tx.publish(&tx);
                // The answers are not looked at: nobody knows what was asked.
                let _ = vif.tx.look(&tx);
                while vif.tx.take(&tx, &mut [0; 4]).is_some() {}
            }
            // The back end looks at the RX ring when there is something for it.
            other.send(self, random, 200);
            other.post(self, random);
            vif.notify();
            other.notify();
            hypercall::yield_now();
            other.take(self);
        }
        let told = format!("/local/domain/0/error/backend/vif/{}/{}/error", self.domain, vif.number);
        let told = self.store.read(&told).unwrap_or_default();
        assert!(told.starts_with(harm.reason()), "{harm:?}: the back end tells {told:?}");
        println!("net: vif {}: {harm:?}: {told}", vif.number);
    }
}

/// Waits for a device of ours, and returns its address.
fn mac_of(store: &mut Store, number: u32) -> Mac {
    let (device, deadline) = (Device::new("vif", number), time::now_ns() + 10 * PATIENCE_NS);
    loop {
        let mac = device.get(store, "mac").as_deref().and_then(parse_mac);
        if let Some(mac) = mac {
            return mac;
        }
        assert!(time::now_ns() < deadline, "no device {number} comes");
        let _ = hypercall::poll(&[], time::now_ns() + 50_000_000);
    }
}

/// Answers to sent slots, and filled buffers, of all devices and connections.
fn totals(vifs: &[Vif]) -> (usize, usize) {
    let sum = |each: fn(&Vif) -> usize| vifs.iter().map(each).sum();
    (sum(|vif| vif.tx_answers), sum(|vif| vif.rx_answers))
}

/// Connects both devices again and again: counts the answers, and breaks a rule.
fn count(front: &mut Front, random: &mut Random) -> ! {
    let [first, second] = front.macs;
    let mut vifs = [Vif::new(0, first, front), Vif::new(1, second, front)];
    for connection in 1..=CONNECTIONS {
        front.pages.grant_all();
        vifs.iter_mut().for_each(|vif| vif.connect(front, random));
        front.count(&mut vifs, random, COUNTED * connection / CONNECTIONS);
        let harm = Harm::ALL[(connection - 1) % Harm::ALL.len()];
        front.break_rule(&mut vifs, random, harm);
        vifs.iter().for_each(|vif| vif.close(&mut front.store));
        front.pages.require_unused();
        vifs.iter().for_each(|vif| vif.device.put(&mut front.store, "state", "1"));
        vifs.reverse();
    }
    let (sent, filled) = totals(&vifs);
    println!("net: counted {sent} slots and {filled} buffers");
    idle()
}

/// Does nothing for ever.
fn idle() -> ! {
    loop {
        let _ = hypercall::poll(&[], time::now_ns() + 1_000_000_000);
    }
}

/// Sends packets to the neighbour for ever: so many at once, and again after so many microseconds.
fn flood(front: &mut Front, random: &mut Random, (at_once, after_us): (u32, u64)) -> ! {
    let mut vif = Vif::new(0, front.macs[0], front);
    vif.connect(front, random);
    let (tx, mut head) = (vif.ring(front, TX), [0; 64]);
    head[..6].copy_from_slice(&front.peer);
    head[6..12].copy_from_slice(&vif.mac);
    // Of a protocol for experiments.
    head[12..14].copy_from_slice(&[0x88, 0xb5]);
    vif.ring(front, SENT).write(0, &head);
    let slot = TxRequest { reference: reference(SENT), offset: 0, flags: 0, id: 0, size: 1000 };
    loop {
        for _ in 0..at_once.min(vif.tx.room()) {
            let _ = vif.tx.submit(&tx, slot.as_bytes());
        }
        if vif.tx.publish(&tx) {
            vif.notify();
        }
        let _ = hypercall::poll(&[], time::now_ns() + after_us * 1000);
        vif.tx.look(&tx).expect("no more answers than slots");
        while vif.tx.take(&tx, &mut [0; 4]).is_some() {}
    }
}

fn main(boot: &Boot) {
    let seed = boot.argument("seed").and_then(|seed| seed.parse().ok()).unwrap_or_else(time::counter);
    println!("net: seed={seed}");
    let mut random = Random(seed);
    match boot.argument("do") {
        Some("count") => count(&mut Front::new(boot, 2), &mut random),
        Some("flood") => {
            let word = |name| boot.argument(name).and_then(|text| text.parse().ok());
            let (at_once, after_us) = (word("once").unwrap_or(RING_SLOTS as u64), word("after").unwrap_or(200));
            flood(&mut Front::new(boot, 1), &mut random, (u32::try_from(at_once).unwrap_or(u32::MAX), after_us))
        }
        Some("stall") => {
            let mut front = Front::new(boot, 1);
            Vif::new(0, front.macs[0], &front).connect(&mut front, &mut random);
            idle()
        }
        _ => println!("net: do=count, do=flood or do=stall"),
    }
    hypercall::shutdown(ShutdownReason::Crash);
}
