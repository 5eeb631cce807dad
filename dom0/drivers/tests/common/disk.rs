//! A virtio disk.

use super::Ram;
use super::virtio::{Device, EVENT_IDX, INDIRECT, Taken, VERSION_1, Virtio};
use drivers::hardware::DmaMemory;
use std::cell::RefCell;
use std::ops::{Deref, DerefMut};
use std::rc::Rc;
use test_random::Random;

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

#[derive(Debug)]
pub struct State {
    virtio: Virtio,
    pub model: Model,
    pub content: Vec<u8>,
    pub flushes: usize,
    /// It works between any two accesses of the driver.
    pub eager: bool,
    /// The next answers are this status.
    pub fail_with: Option<u8>,
    /// Requests that were taken and not answered.
    taken: Vec<Taken>,
}

/// The disk; copies are the same disk.
#[derive(Clone, Debug)]
pub struct Disk(pub Rc<RefCell<State>>);

impl Disk {
    pub fn new(model: Model, memory: Vec<Ram>, random: Random) -> Self {
        Self(Rc::new(RefCell::new(State {
            virtio: Virtio::new(1, memory, random),
            model,
            content: vec![0; usize::try_from(model.sectors).unwrap() * 512],
            flushes: 0,
            eager: false,
            fail_with: None,
            taken: Vec::new(),
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
    const VECTORS: usize = 2;

    fn offer(&self) -> (u64, u16) {
        (self.model.features, self.model.queue)
    }

    fn configuration(&self) -> Vec<u8> {
        let mut bytes = vec![0; 60];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &self.model.sectors.to_le_bytes());
        put(8, &self.model.size_max.to_le_bytes());
        put(12, &self.model.seg_max.to_le_bytes());
        put(20, &self.model.block.to_le_bytes());
        put(36, &self.model.max_discard.to_le_bytes());
        put(40, &1u32.to_le_bytes());
        put(44, &(self.model.block / 512).to_le_bytes());
        bytes
    }

    fn forget(&mut self) {
        self.taken.clear();
    }
}

impl State {
    /// Whether requests are with the disk, taken or waiting behind a notification.
    pub fn is_busy(&self) -> bool {
        self.queues[0].rung || !self.taken.is_empty()
    }

    /// Takes what is available, if it was told of it.
    pub fn fetch(&mut self) {
        let new = self.take(0);
        self.taken.extend(new);
    }

    /// Answers one of the requests it has taken, any of them. False if there is none.
    pub fn answer_one(&mut self) -> bool {
        let count = self.taken.len();
        if count == 0 || self.status != 15 {
            return false;
        }
        let at = self.random.below(count);
        let (head, chain) = self.taken.swap_remove(at);
        let status = self.fail_with.unwrap_or_else(|| self.serve(&chain));
        let (address, bytes, writable) = *chain.last().unwrap();
        assert!(bytes == 1 && writable, "no place for a status");
        let (ram, offset) = self.find(address, 1);
        ram.store8(offset, status);
        self.put_used(0, &[(u32::from(head), 0)]);
        true
    }

    /// How many requests it has answered since its reset.
    pub fn answered(&self) -> u16 {
        self.queues[0].used
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
                    let (ram, offset) = self.virtio.find(*address, bytes);
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
