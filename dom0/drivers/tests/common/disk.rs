//! A virtio disk: the device's side of registers and queue, honest or not.

mod registers;

use super::Ram;
use drivers::hardware::DmaMemory;
use std::cell::RefCell;
use std::rc::Rc;
use test_random::Random;

/// Which registers of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Common,
    Notify,
    Device,
    Table,
}

/// What a disk is like.
#[derive(Clone, Copy, Debug)]
pub struct Model {
    pub features: u64,
    pub sectors: u64,
    pub size_max: u32,
    pub seg_max: u32,
    pub block: u32,
    pub max_discard: u32,
    pub queue: u16,
}

pub const SIZE_MAX: u64 = 1 << 1;
pub const SEG_MAX: u64 = 1 << 2;
pub const RO: u64 = 1 << 5;
pub const BLK_SIZE: u64 = 1 << 6;
pub const FLUSH: u64 = 1 << 9;
pub const DISCARD: u64 = 1 << 13;
pub const INDIRECT: u64 = 1 << 28;
pub const EVENT_IDX: u64 = 1 << 29;
pub const VERSION_1: u64 = 1 << 32;

impl Model {
    /// As QEMU's.
    pub fn usual() -> Self {
        Self {
            features: SEG_MAX | BLK_SIZE | FLUSH | DISCARD | INDIRECT | EVENT_IDX | VERSION_1,
            sectors: 512,
            size_max: 0,
            seg_max: 254,
            block: 512,
            max_discard: 16,
            queue: 256,
        }
    }
}

/// What a disk does that it must not.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// Each register reads as anything, once in so many times. 0: never.
    pub registers: usize,
    /// Instead of an answer, nonsense in the used part, once in so many times.
    pub used: usize,
    /// Requests that are never answered.
    pub silent: usize,
    /// A reset that takes so many reads of the status.
    pub slow_reset: usize,
    /// The configuration changes at each read.
    pub restless: bool,
}

/// A request that the disk has taken and not answered.
#[derive(Clone, Debug)]
struct Taken {
    head: u16,
    chain: Vec<(u64, u32, bool)>,
}

#[derive(Debug)]
pub struct State {
    pub model: Model,
    pub faults: Faults,
    pub random: Random,
    /// Memory that the disk can reach.
    pub memory: Vec<Ram>,
    pub content: Vec<u8>,
    pub status: u8,
    pub accepted: u64,
    /// The queue was notified.
    pub rung: bool,
    /// Interrupts sent and not yet seen by the driver.
    pub interrupts: usize,
    pub all_interrupts: usize,
    pub notified: usize,
    pub flushes: usize,
    /// Registers read as anything since the last reset: what the driver does may be anything, too.
    pub lied: bool,
    /// It works between any two accesses of the driver.
    pub eager: bool,
    /// The next answers are this status.
    pub fail_with: Option<u8>,
    select: [u32; 2],
    vectors: [u16; 2],
    queue_size: u16,
    enabled: bool,
    parts: [u64; 3],
    generation: u8,
    resetting: usize,
    taken: Vec<Taken>,
    last_available: u16,
    used: u16,
    table: [u8; 32],
}

/// The disk; copies are the same disk.
#[derive(Clone, Debug)]
pub struct Disk(pub Rc<RefCell<State>>);

/// A window over registers of the disk.
#[derive(Clone, Debug)]
pub struct View {
    disk: Disk,
    part: Part,
}

impl Disk {
    pub fn new(model: Model, memory: Vec<Ram>, random: Random) -> Self {
        let content = vec![0; usize::try_from(model.sectors).unwrap() * 512];
        // The firmware has left it running.
        let state = State {
            model,
            faults: Faults::default(),
            random,
            memory,
            content,
            status: 15,
            accepted: 0,
            rung: false,
            interrupts: 0,
            all_interrupts: 0,
            notified: 0,
            flushes: 0,
            lied: false,
            eager: false,
            fail_with: None,
            select: [0; 2],
            vectors: [0xffff; 2],
            queue_size: model.queue,
            enabled: false,
            parts: [0; 3],
            generation: 0,
            resetting: 0,
            taken: Vec::new(),
            last_available: 0,
            used: 0,
            table: [0; 32],
        };
        Self(Rc::new(RefCell::new(state)))
    }

    pub fn view(&self, part: Part) -> View {
        View { disk: self.clone(), part }
    }
}

impl State {
    fn find(&self, address: u64, bytes: usize) -> (&Ram, usize) {
        let found = self.memory.iter().find_map(|ram| Some((ram, ram.offset(address, bytes)?)));
        found.unwrap_or_else(|| panic!("the disk is told of {bytes} bytes at {address:#x}"))
    }

    fn load16(&self, address: u64) -> u16 {
        let (ram, offset) = self.find(address, 2);
        ram.load16(offset)
    }

    fn descriptor(&self, address: u64) -> (u64, u32, u16, u16) {
        let (ram, offset) = self.find(address, 16);
        let rest = ram.load64(offset + 8).to_le_bytes();
        let bytes = u32::from_le_bytes(rest[..4].try_into().unwrap());
        let half = |at: usize| u16::from_le_bytes([rest[at], rest[at + 1]]);
        (ram.load64(offset), bytes, half(4), half(6))
    }

    fn has(&self, feature: u64) -> bool {
        self.accepted & feature != 0
    }

    /// Whether requests are with the disk, taken or waiting behind a notification.
    pub fn is_busy(&self) -> bool {
        self.rung || !self.taken.is_empty()
    }

    /// Takes what is available, if it was told of it.
    pub fn fetch(&mut self) {
        if !core::mem::take(&mut self.rung) || !self.enabled || self.status != 15 {
            return;
        }
        loop {
            let index = self.load16(self.parts[1] + 2);
            assert!(index.wrapping_sub(self.last_available) <= self.queue_size, "more than the queue holds");
            while self.last_available != index {
                let entry = u64::from(self.last_available % self.queue_size);
                let head = self.load16(self.parts[1] + 4 + 2 * entry);
                let chain = self.chain(head);
                self.taken.push(Taken { head, chain });
                self.last_available = self.last_available.wrapping_add(1);
            }
            if self.has(EVENT_IDX) {
                let at = self.parts[2] + 4 + 8 * u64::from(self.queue_size);
                let (ram, offset) = self.find(at, 2);
                ram.store16(offset, self.last_available);
            }
            if self.load16(self.parts[1] + 2) == self.last_available {
                return;
            }
        }
    }

    fn chain(&self, head: u16) -> Vec<(u64, u32, bool)> {
        assert!(head < self.queue_size);
        let (mut table, mut entries, mut next) = (self.parts[0], u32::from(self.queue_size), head);
        let mut chain = Vec::new();
        loop {
            assert!(u32::from(next) < entries && chain.len() < usize::from(self.queue_size));
            let (address, bytes, flags, follows) = self.descriptor(table + 16 * u64::from(next));
            if flags & 4 != 0 {
                assert!(self.has(INDIRECT) && flags == 4 && chain.is_empty() && bytes.is_multiple_of(16));
                (table, entries, next) = (address, bytes / 16, 0);
                continue;
            }
            assert!(bytes > 0);
            chain.push((address, bytes, flags & 2 != 0));
            if flags & 1 == 0 {
                return chain;
            }
            next = follows;
        }
    }

    /// Answers one of the requests it has taken, any of them. False if there is none.
    pub fn answer_one(&mut self) -> bool {
        if self.taken.is_empty() || self.status != 15 {
            return false;
        }
        let at = self.random.below(self.taken.len());
        let Taken { head, chain } = self.taken.swap_remove(at);
        let status = self.fail_with.unwrap_or_else(|| self.serve(&chain));
        let (address, bytes, writable) = *chain.last().unwrap();
        assert!(bytes == 1 && writable, "no place for a status");
        let (ram, offset) = self.find(address, 1);
        ram.store8(offset, status);
        self.put_used(u32::from(head), 0);
        true
    }

    /// Puts an entry into the used part, and interrupts if it should.
    pub fn put_used(&mut self, head: u32, bytes: u32) {
        let before = self.used;
        let entry = u64::from(self.used % self.queue_size);
        let (ram, offset) = self.find(self.parts[2] + 4 + 8 * entry, 8);
        ram.store64(offset, u64::from(head) | u64::from(bytes) << 32);
        self.used = self.used.wrapping_add(1);
        self.set_used_index(self.used);
        let wanted = if self.has(EVENT_IDX) {
            self.load16(self.parts[1] + 4 + 2 * u64::from(self.queue_size)) == before
        } else {
            self.load16(self.parts[1]) & 1 == 0
        };
        let masked = self.table[12] & 1 != 0;
        if wanted && !masked {
            self.interrupts += 1;
            self.all_interrupts += 1;
        }
    }

    pub fn set_used_index(&self, index: u16) {
        let (ram, offset) = self.find(self.parts[2] + 2, 2);
        ram.store16(offset, index);
    }

    /// How many requests it has answered since its reset.
    pub fn answered(&self) -> u16 {
        self.used
    }

    /// Whether the queue has been set.
    pub fn is_set(&self) -> bool {
        self.enabled && self.status == 15
    }

    /// Does what a request says; answers its status.
    fn serve(&mut self, chain: &[(u64, u32, bool)]) -> u8 {
        let (address, bytes, writable) = chain[0];
        assert!(bytes == 16 && !writable, "no header");
        let (ram, offset) = self.find(address, 16);
        let (kind, sector) = (ram.load64(offset), ram.load64(offset + 8));
        let data = &chain[1..chain.len() - 1];
        if self.has(SEG_MAX) {
            assert!(data.len() <= usize::try_from(self.model.seg_max).unwrap());
        }
        let total: u64 = data.iter().map(|(_, bytes, _)| u64::from(*bytes)).sum();
        match kind {
            0 | 1 => {
                assert!(total > 0 && total.is_multiple_of(u64::from(self.model.block)));
                assert!((sector * 512).is_multiple_of(u64::from(self.model.block)));
                let mut at = usize::try_from(sector * 512).unwrap();
                for (address, bytes, writable) in data {
                    let bytes = usize::try_from(*bytes).unwrap();
                    assert!(!self.has(SIZE_MAX) || bytes <= usize::try_from(self.model.size_max).unwrap());
                    assert_eq!(*writable, kind == 0);
                    let (ram, offset) = self.find(*address, bytes);
                    let ram = ram.clone();
                    if kind == 0 {
                        ram.write(offset, &self.content[at..at + bytes]);
                    } else {
                        ram.read(offset, &mut self.content[at..at + bytes]);
                    }
                    at += bytes;
                }
            }
            4 => {
                assert!(self.has(FLUSH) && sector == 0 && data.is_empty());
                self.flushes += 1;
            }
            8 => {
                assert!(data.len() == 1 && data[0].1 == 20 && data[0].2);
                let (ram, offset) = self.find(data[0].0, 20);
                ram.write(offset, b"tenon-disk-0\0\0\0\0\0\0\0\0");
            }
            11 => {
                assert!(self.has(DISCARD) && data.len() == 1 && data[0].1 == 16 && !data[0].2);
                let (ram, offset) = self.find(data[0].0, 16);
                let (first, rest) = (ram.load64(offset), ram.load64(offset + 8));
                assert!(rest <= u64::from(self.model.max_discard), "{rest} sectors, or flags, in a discard");
                let range = usize::try_from(first * 512).unwrap()..usize::try_from((first + rest) * 512).unwrap();
                self.content[range].fill(0xdd);
            }
            kind => panic!("a request of kind {kind}"),
        }
        0
    }
}
