//! A virtio network device.

use super::Ram;
use super::virtio::{Device, EVENT_IDX, Taken, VERSION_1, Virtio};
use std::cell::RefCell;
use std::collections::{BTreeSet, VecDeque};
use std::ops::{Deref, DerefMut};
use std::rc::Rc;
use test_random::Random;

pub const CSUM: u64 = 1 << 0;
pub const GUEST_CSUM: u64 = 1 << 1;
pub const MTU: u64 = 1 << 3;
pub const MAC: u64 = 1 << 5;
pub const GUEST_TSO: u64 = 1 << 7 | 1 << 8;
pub const HOST_TSO: u64 = 1 << 11 | 1 << 12;
pub const MRG_RXBUF: u64 = 1 << 15;
pub const STATUS: u64 = 1 << 16;

/// What a device is like.
#[derive(Clone, Copy, Debug)]
pub struct Model {
    pub features: u64,
    pub mac: [u8; 6],
    pub mtu: u16,
    pub queue: u16,
}

impl Model {
    /// As QEMU's on its user network.
    pub fn usual() -> Self {
        // It offers a control queue and announcements as well.
        let others = 1 << 17 | 1 << 18 | 1 << 21 | 1 << 28;
        let features = MAC | MRG_RXBUF | STATUS | EVENT_IDX | VERSION_1 | others;
        Self { features, mac: [0x52, 0x54, 0, 0x12, 0x34, 0x56], mtu: 0, queue: 256 }
    }

    /// With all offloads.
    pub fn able() -> Self {
        let more = CSUM | GUEST_CSUM | GUEST_TSO | HOST_TSO;
        Self { features: Self::usual().features | more, ..Self::usual() }
    }
}

#[derive(Debug)]
pub struct State {
    virtio: Virtio,
    pub model: Model,
    /// What was sent: header and frame.
    pub sent: Vec<([u8; 12], Vec<u8>)>,
    /// Heads that were taken and not given back, in their order, and all of them.
    taken: [VecDeque<Taken>; 2],
    held: [BTreeSet<u16>; 2],
}

/// The device; copies are the same device.
#[derive(Clone, Debug)]
pub struct Nic(pub Rc<RefCell<State>>);

impl Nic {
    pub fn new(model: Model, memory: Vec<Ram>, random: Random) -> Self {
        Self(Rc::new(RefCell::new(State {
            virtio: Virtio::new(2, memory, random),
            model,
            sent: Vec::new(),
            taken: Default::default(),
            held: Default::default(),
        })))
    }
}

impl Deref for State {
    type Target = Virtio;

    fn deref(&self) -> &Virtio {
        &self.virtio
    }
}

impl DerefMut for State {
    fn deref_mut(&mut self) -> &mut Virtio {
        &mut self.virtio
    }
}

impl Device for State {
    const VECTORS: usize = 4;

    fn offer(&self) -> (u64, u16) {
        (self.model.features, self.model.queue)
    }

    fn configuration(&self) -> Vec<u8> {
        let mut bytes = vec![0; 12];
        bytes[..6].copy_from_slice(&self.model.mac);
        bytes[6] = 1;
        bytes[8] = 1;
        bytes[10..].copy_from_slice(&self.model.mtu.to_le_bytes());
        bytes
    }

    fn forget(&mut self) {
        (self.taken, self.held) = Default::default();
    }
}

impl State {
    /// Takes what is available in a queue, if the device was told of it.
    fn fetch(&mut self, number: usize) {
        for (head, chain) in self.take(number) {
            assert!(chain.iter().all(|(_, _, writable)| *writable == (number == 0)));
            assert!(self.held[number].insert(head), "head {head} of queue {number} is given twice");
            self.taken[number].push_back((head, chain));
        }
    }

    /// Gives heads back, in one step.
    fn give_back(&mut self, number: usize, heads: &[(u16, usize)]) {
        assert!(heads.iter().all(|(head, _)| self.held[number].remove(head)));
        let entry = |(head, bytes): &(u16, usize)| (u32::from(*head), u32::try_from(*bytes).unwrap());
        self.put_used(number, &heads.iter().map(entry).collect::<Vec<_>>());
    }

    /// A head of the queue that the device has. `None` if it has none.
    pub fn head(&self, number: usize) -> Option<u16> {
        self.taken[number].front().map(|(head, _)| *head)
    }

    /// Delivers a frame with a header, whose number of buffers it sets. Returns false if there is no room.
    pub fn deliver(&mut self, mut header: [u8; 12], frame: &[u8]) -> bool {
        self.fetch(0);
        if !self.is_set() {
            return false;
        }
        let whole: Vec<u8> = header.iter().chain(frame).copied().collect();
        let (mut left, mut heads, mut places) = (&whole[..], Vec::new(), Vec::new());
        for (head, chain) in &self.taken[0] {
            assert_eq!(chain.len(), 1, "a receive buffer is one descriptor");
            let (address, room, _) = chain[0];
            let room = usize::try_from(room).unwrap();
            let mtu = if self.has(MTU) { self.model.mtu } else { 1500 };
            assert!(self.has(MRG_RXBUF) || room >= 12 + 18 + usize::from(mtu), "a buffer is too short");
            let bytes = room.min(left.len());
            heads.push((*head, bytes));
            places.push((address, &left[..bytes]));
            left = &left[bytes..];
            if left.is_empty() {
                break;
            }
        }
        if !left.is_empty() || !self.has(MRG_RXBUF) && heads.len() > 1 {
            return false;
        }
        for (address, bytes) in &places {
            let (ram, offset) = self.find(*address, bytes.len());
            ram.write(offset, bytes);
        }
        header[10..].copy_from_slice(&u16::try_from(heads.len()).unwrap().to_le_bytes());
        let (ram, offset) = self.find(places[0].0, 12);
        ram.write(offset, &header);
        self.taken[0].drain(..heads.len());
        self.give_back(0, &heads);
        true
    }

    /// Sends at most so many of the frames that it was told of.
    pub fn send(&mut self, most: usize) {
        self.fetch(1);
        for _ in 0..most {
            let Some((head, chain)) = self.taken[1].pop_front() else { return };
            let mut whole = Vec::new();
            for (address, bytes, _) in chain {
                let bytes = usize::try_from(bytes).unwrap();
                let (ram, offset) = self.find(address, bytes);
                let at = whole.len();
                whole.resize(at + bytes, 0);
                ram.read(offset, &mut whole[at..]);
            }
            let header = *whole.first_chunk().expect("a header");
            self.sent.push((header, whole.split_off(12)));
            self.give_back(1, &[(head, 0)]);
        }
    }
}
