//! A virtio network device: the device's side of registers and queues, honest or not.

use super::Ram;
use drivers::hardware::{DmaMemory, Registers};
use std::cell::RefCell;
use std::collections::{BTreeSet, VecDeque};
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
pub const EVENT_IDX: u64 = 1 << 29;
pub const VERSION_1: u64 = 1 << 32;

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

/// What a device does that it must not.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// Each register reads as anything, once in so many times. 0: never.
    pub registers: usize,
    /// A reset that takes so many reads of the status.
    pub slow_reset: usize,
}

/// A queue, as the device knows it.
#[derive(Clone, Debug, Default)]
struct Queue {
    size: u16,
    vector: u16,
    enabled: bool,
    parts: [u64; 3],
    rung: bool,
    last_available: u16,
    used: u16,
    /// Heads that were taken and not given back, in their order, and all of them.
    taken: VecDeque<u16>,
    held: BTreeSet<u16>,
}

#[derive(Debug)]
pub struct State {
    pub model: Model,
    pub faults: Faults,
    pub random: Random,
    pub memory: Vec<Ram>,
    pub status: u8,
    pub accepted: u64,
    pub interrupts: usize,
    pub notified: [usize; 2],
    /// Registers read as anything since the last reset: what the driver does may be anything, too.
    pub lied: bool,
    /// What was sent: header and frame.
    pub sent: Vec<([u8; 12], Vec<u8>)>,
    select: [u32; 2],
    selected: usize,
    vector: u16,
    queues: [Queue; 2],
    resetting: usize,
    table: [u8; 64],
}

/// The device; copies are the same device.
#[derive(Clone, Debug)]
pub struct Nic(pub Rc<RefCell<State>>);

/// Which registers of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Common,
    Notify,
    Device,
    Table,
}

#[derive(Clone, Debug)]
pub struct View {
    nic: Nic,
    part: Part,
}

impl Nic {
    pub fn new(model: Model, memory: Vec<Ram>, random: Random) -> Self {
        // The firmware has left it running.
        Self(Rc::new(RefCell::new(State {
            model,
            faults: Faults::default(),
            random,
            memory,
            status: 15,
            accepted: 0,
            interrupts: 0,
            notified: [0; 2],
            lied: false,
            sent: Vec::new(),
            select: [0; 2],
            selected: 0,
            vector: 0xffff,
            queues: Default::default(),
            resetting: 0,
            table: [0; 64],
        })))
    }

    pub fn view(&self, part: Part) -> View {
        View { nic: self.clone(), part }
    }
}

impl State {
    fn find(&self, address: u64, bytes: usize) -> (&Ram, usize) {
        let found = self.memory.iter().find_map(|ram| Some((ram, ram.offset(address, bytes)?)));
        found.unwrap_or_else(|| panic!("the device is told of {bytes} bytes at {address:#x}"))
    }

    fn load16(&self, address: u64) -> u16 {
        let (ram, offset) = self.find(address, 2);
        ram.load16(offset)
    }

    fn has(&self, feature: u64) -> bool {
        self.accepted & feature != 0
    }

    pub fn is_set(&self) -> bool {
        self.status == 15 && self.queues.iter().all(|queue| queue.enabled)
    }

    /// Takes what is available in a queue, if the device was told of it.
    fn fetch(&mut self, number: usize) {
        if !self.is_set() || !core::mem::take(&mut self.queues[number].rung) {
            return;
        }
        let queue = self.queues[number].clone();
        let index = self.load16(queue.parts[1] + 2);
        let count = index.wrapping_sub(queue.last_available);
        assert!(count <= queue.size, "more than the queue holds");
        for i in 0..count {
            let entry = queue.last_available.wrapping_add(i) % queue.size;
            let head = self.load16(queue.parts[1] + 4 + 2 * u64::from(entry));
            assert!(head < queue.size);
            assert!(self.queues[number].held.insert(head), "head {head} of queue {number} is given twice");
            self.queues[number].taken.push_back(head);
        }
        self.queues[number].last_available = index;
        if self.has(EVENT_IDX) {
            let (ram, offset) = self.find(queue.parts[2] + 4 + 8 * u64::from(queue.size), 2);
            ram.store16(offset, index);
        }
    }

    fn chain(&self, number: usize, head: u16) -> Vec<(u64, usize)> {
        let (queue, mut next, mut chain) = (&self.queues[number], head, Vec::new());
        loop {
            assert!(next < queue.size && chain.len() < usize::from(queue.size));
            let (ram, offset) = self.find(queue.parts[0] + 16 * u64::from(next), 16);
            let (address, rest) = (ram.load64(offset), ram.load64(offset + 8));
            let (bytes, flags, follows) = (rest & 0xffff_ffff, rest >> 32 & 0xffff, rest >> 48);
            assert!(flags & !3 == 0 && (flags & 2 != 0) == (number == 0) && bytes > 0);
            chain.push((address, usize::try_from(bytes).unwrap()));
            if flags & 1 == 0 {
                return chain;
            }
            next = u16::try_from(follows).unwrap();
        }
    }

    /// Gives heads back, in one step, and interrupts if it should.
    fn give_back(&mut self, number: usize, heads: &[(u16, usize)]) {
        let queue = self.queues[number].clone();
        for (i, (head, bytes)) in (0..).zip(heads) {
            assert!(self.queues[number].held.remove(head));
            let entry = u64::from(queue.used.wrapping_add(i) % queue.size);
            let (ram, offset) = self.find(queue.parts[2] + 4 + 8 * entry, 8);
            ram.store64(offset, u64::from(*head) | (*bytes as u64) << 32);
        }
        let now = queue.used.wrapping_add(u16::try_from(heads.len()).unwrap());
        self.queues[number].used = now;
        self.set_used_index(number, now);
        let wanted = if self.has(EVENT_IDX) {
            let event = self.load16(queue.parts[1] + 4 + 2 * u64::from(queue.size));
            (0..heads.len()).any(|i| queue.used.wrapping_add(u16::try_from(i).unwrap()) == event)
        } else {
            self.load16(queue.parts[1]) & 1 == 0
        };
        if wanted && self.table[12] & 1 == 0 {
            self.interrupts += 1;
        }
    }

    pub fn set_used_index(&self, number: usize, index: u16) {
        let (ram, offset) = self.find(self.queues[number].parts[2] + 2, 2);
        ram.store16(offset, index);
    }

    /// Puts anything into the used part, as the next entry.
    pub fn put_used(&mut self, number: usize, head: u32, bytes: u32) {
        let queue = self.queues[number].clone();
        let (ram, offset) = self.find(queue.parts[2] + 4 + 8 * u64::from(queue.used % queue.size), 8);
        ram.store64(offset, u64::from(head) | u64::from(bytes) << 32);
        self.queues[number].used = queue.used.wrapping_add(1);
        self.set_used_index(number, queue.used.wrapping_add(1));
    }

    /// A head of the queue that the device has. `None` if it has none.
    pub fn head(&self, number: usize) -> Option<u16> {
        self.queues[number].taken.front().copied()
    }

    /// Delivers a frame with a header, whose number of buffers it sets. Returns false if there is no room.
    pub fn deliver(&mut self, mut header: [u8; 12], frame: &[u8]) -> bool {
        self.fetch(0);
        if !self.is_set() {
            return false;
        }
        let whole: Vec<u8> = header.iter().chain(frame).copied().collect();
        let (mut left, mut heads, mut places) = (&whole[..], Vec::new(), Vec::new());
        for head in self.queues[0].taken.iter().copied() {
            let chain = self.chain(0, head);
            assert_eq!(chain.len(), 1, "a receive buffer is one descriptor");
            let (address, room) = chain[0];
            let mtu = if self.has(MTU) { self.model.mtu } else { 1500 };
            assert!(self.has(MRG_RXBUF) || room >= 12 + 18 + usize::from(mtu), "a buffer is too short");
            let bytes = room.min(left.len());
            heads.push((head, bytes));
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
        self.queues[0].taken.drain(..heads.len());
        self.give_back(0, &heads);
        true
    }

    /// Sends at most so many of the frames that it was told of.
    pub fn send(&mut self, most: usize) {
        self.fetch(1);
        for _ in 0..most {
            let Some(head) = self.queues[1].taken.pop_front() else { return };
            let mut whole = Vec::new();
            for (address, bytes) in self.chain(1, head) {
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

    fn reset(&mut self) {
        self.status = 0;
        self.lied = self.faults.registers > 0;
        self.accepted = 0;
        self.vector = 0xffff;
        let queue = Queue { size: self.model.queue, vector: 0xffff, ..Queue::default() };
        self.queues = [queue.clone(), queue];
        self.resetting = self.faults.slow_reset;
    }

    fn configuration(&self) -> [u8; 12] {
        let mut bytes = [0; 12];
        bytes[..6].copy_from_slice(&self.model.mac);
        bytes[6] = 1;
        bytes[8] = 1;
        bytes[10..].copy_from_slice(&self.model.mtu.to_le_bytes());
        bytes
    }

    fn common(&mut self, offset: usize, width: usize) -> u64 {
        let half = |word: u64, select: u32| if select > 1 { 0 } else { word >> (32 * select) & 0xffff_ffff };
        let none = Queue::default();
        let queue = self.queues.get(self.selected).unwrap_or(&none);
        match (offset, width) {
            (4, 4) => half(self.model.features, self.select[0]),
            (16, 2) => self.vector.into(),
            (20, 1) if self.resetting > 0 => {
                self.resetting -= 1;
                15
            }
            (20, 1) => self.status.into(),
            (21, 1) => 0,
            (24, 2) => queue.size.into(),
            (26, 2) => queue.vector.into(),
            (30, 2) => 3 + self.selected as u64,
            _ => panic!("a read of {width} bytes at {offset}"),
        }
    }

    fn set_common(&mut self, offset: usize, width: usize, value: u64) {
        let small = u16::try_from(value & 0xffff).unwrap();
        let word = u32::try_from(value & 0xffff_ffff).unwrap();
        let queue = &mut self.queues[self.selected];
        match (offset, width) {
            (0, 4) => self.select[0] = word,
            (8, 4) => self.select[1] = word,
            (12, 4) => {
                let shift = 32 * self.select[1];
                self.accepted = self.accepted & !(0xffff_ffff << shift) | value << shift;
                assert!(self.lied || self.accepted & !self.model.features == 0, "features that were not offered");
            }
            (16, 2) => self.vector = small,
            (20, 1) if value == 0 => self.reset(),
            (20, 1) => self.status = u8::try_from(value).unwrap(),
            (22, 2) => self.selected = usize::from(small),
            (24, 2) => queue.size = small,
            (26, 2) => queue.vector = small,
            (28, 2) => {
                assert!(self.lied || self.status & 8 != 0);
                queue.enabled = value == 1;
            }
            (32..56, 4) => {
                let part = &mut queue.parts[(offset - 32) / 8];
                let shift = (offset % 8) * 8;
                *part = *part & !(0xffff_ffff << shift) | value << shift;
            }
            _ => panic!("a write of {width} bytes at {offset}"),
        }
    }
}

impl View {
    fn read(&self, offset: usize, width: usize) -> u64 {
        let state = &mut *self.nic.0.borrow_mut();
        assert!(offset.is_multiple_of(width));
        if state.faults.registers > 0 && state.random.one_in(state.faults.registers) {
            return state.random.next() >> (64 - 8 * width);
        }
        let number = |bytes: &[u8]| {
            let taken = (0..width).map(|i| u64::from(bytes.get(offset + i).copied().unwrap_or(0xff)) << (8 * i));
            taken.sum()
        };
        match self.part {
            Part::Common => state.common(offset, width),
            Part::Notify => panic!("a notification is read"),
            Part::Device => number(&state.configuration()),
            Part::Table => number(&state.table),
        }
    }

    fn write(&self, offset: usize, width: usize, value: u64) {
        let state = &mut *self.nic.0.borrow_mut();
        assert!(offset.is_multiple_of(width));
        match self.part {
            Part::Common => state.set_common(offset, width, value),
            Part::Notify => {
                // If registers lied, the doorbell may be anywhere.
                let Some(queue) = usize::try_from(value).ok().filter(|queue| *queue < 2) else { panic!("{value}") };
                assert!(state.lied || (offset, width) == (12 + 4 * queue, 2));
                state.queues[queue].rung = true;
                state.notified[queue] += 1;
            }
            Part::Device => panic!("the configuration is written"),
            Part::Table => state.table[offset..offset + width].copy_from_slice(&value.to_le_bytes()[..width]),
        }
    }
}

impl Registers for View {
    fn bytes(&self) -> usize {
        match self.part {
            Part::Common | Part::Notify => 4096,
            Part::Device => 12,
            Part::Table => 64,
        }
    }

    fn read8(&self, offset: usize) -> u8 {
        u8::try_from(self.read(offset, 1)).unwrap()
    }

    fn read16(&self, offset: usize) -> u16 {
        u16::try_from(self.read(offset, 2)).unwrap()
    }

    fn read32(&self, offset: usize) -> u32 {
        u32::try_from(self.read(offset, 4)).unwrap()
    }

    fn write8(&self, offset: usize, value: u8) {
        self.write(offset, 1, value.into());
    }

    fn write16(&self, offset: usize, value: u16) {
        self.write(offset, 2, value.into());
    }

    fn write32(&self, offset: usize, value: u32) {
        self.write(offset, 4, value.into());
    }
}
