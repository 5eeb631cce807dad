//! A virtio device of any kind on the bus: the device's side of registers and queues, honest or not.

use super::Ram;
use super::bus::{Bus, Space};
use drivers::hardware::{DmaMemory, Registers};
use drivers::pci::{Address, Function, Message};
use drivers::virtio::{Kind, Layout, Transport};
use std::cell::RefCell;
use std::fmt::Debug;
use std::ops::DerefMut;
use std::rc::Rc;
use test_random::Random;

pub const INDIRECT: u64 = 1 << 28;
pub const EVENT_IDX: u64 = 1 << 29;
pub const VERSION_1: u64 = 1 << 32;

/// Where the device is.
const PLACE: Address = Address::new(0, 3, 0);

/// What a device does that it must not.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// Each register reads as anything, once in so many times. 0: never.
    pub registers: usize,
    /// A reset that takes so many reads of the status.
    pub slow_reset: usize,
    /// The configuration changes at each read.
    pub restless: bool,
}

/// A queue, as the device knows it.
#[derive(Clone, Debug, Default)]
pub struct Queue {
    pub size: u16,
    vector: u16,
    pub enabled: bool,
    parts: [u64; 3],
    /// The queue was notified.
    pub rung: bool,
    last_available: u16,
    pub used: u16,
}

/// A head that the device has taken from a queue, and what the head leads to: addresses, bytes, and whether the device may
/// write them.
pub type Taken = (u16, Vec<(u64, u32, bool)>);

/// What devices of all kinds have.
#[derive(Debug)]
pub struct Virtio {
    pub faults: Faults,
    pub random: Random,
    /// Memory that the device can reach.
    pub memory: Vec<Ram>,
    pub status: u8,
    pub accepted: u64,
    /// Interrupts sent and not yet seen by the driver.
    pub interrupts: usize,
    pub all_interrupts: usize,
    pub notified: [usize; 2],
    /// Registers read as anything since the last reset: what the driver does may be anything, too.
    pub lied: bool,
    pub queues: Vec<Queue>,
    select: [u32; 2],
    selected: usize,
    vector: u16,
    generation: u8,
    resetting: usize,
    table: [u8; 64],
}

impl Virtio {
    /// A device that the firmware has left running.
    pub fn new(queues: usize, memory: Vec<Ram>, random: Random) -> Self {
        Self {
            faults: Faults::default(),
            random,
            memory,
            status: 15,
            accepted: 0,
            interrupts: 0,
            all_interrupts: 0,
            notified: [0; 2],
            lied: false,
            queues: vec![Queue::default(); queues],
            select: [0; 2],
            selected: 0,
            vector: 0xffff,
            generation: 0,
            resetting: 0,
            table: [0; 64],
        }
    }

    /// The memory at an address, and where in it the address is.
    pub fn find(&self, address: u64, bytes: usize) -> (&Ram, usize) {
        let found = self.memory.iter().find_map(|ram| Some((ram, ram.offset(address, bytes)?)));
        found.unwrap_or_else(|| panic!("the device is told of {bytes} bytes at {address:#x}"))
    }

    fn load16(&self, address: u64) -> u16 {
        let (ram, offset) = self.find(address, 2);
        ram.load16(offset)
    }

    pub fn has(&self, feature: u64) -> bool {
        self.accepted & feature != 0
    }

    /// Whether the device is running, and all its queues have been set.
    pub fn is_set(&self) -> bool {
        self.status == 15 && self.queues.iter().all(|queue| queue.enabled)
    }

    /// Takes the heads that are available in a queue, with what they lead to, if the device was told of them.
    pub fn take(&mut self, number: usize) -> Vec<Taken> {
        let mut taken = Vec::new();
        if !self.is_set() || !core::mem::take(&mut self.queues[number].rung) {
            return taken;
        }
        loop {
            let Queue { size, parts, mut last_available, .. } = self.queues[number];
            let index = self.load16(parts[1] + 2);
            assert!(index.wrapping_sub(last_available) <= size, "more than the queue holds");
            while last_available != index {
                let head = self.load16(parts[1] + 4 + 2 * u64::from(last_available % size));
                taken.push((head, self.chain(number, head)));
                last_available = last_available.wrapping_add(1);
            }
            self.queues[number].last_available = index;
            if self.has(EVENT_IDX) {
                let (ram, offset) = self.find(parts[2] + 4 + 8 * u64::from(size), 2);
                ram.store16(offset, index);
            }
            if self.load16(parts[1] + 2) == index {
                return taken;
            }
        }
    }

    fn descriptor(&self, address: u64) -> (u64, u32, u16, u16) {
        let (ram, offset) = self.find(address, 16);
        let rest = ram.load64(offset + 8).to_le_bytes();
        let bytes = u32::from_le_bytes(rest[..4].try_into().unwrap());
        let half = |at: usize| u16::from_le_bytes([rest[at], rest[at + 1]]);
        (ram.load64(offset), bytes, half(4), half(6))
    }

    /// What a head leads to: addresses, bytes, and whether the device may write them.
    fn chain(&self, number: usize, head: u16) -> Vec<(u64, u32, bool)> {
        let Queue { size, parts, .. } = self.queues[number];
        assert!(head < size);
        let (mut table, mut entries, mut next) = (parts[0], u32::from(size), head);
        let mut chain = Vec::new();
        loop {
            assert!(u32::from(next) < entries && chain.len() < usize::from(size));
            let (address, bytes, flags, follows) = self.descriptor(table + 16 * u64::from(next));
            if flags & 4 != 0 {
                assert!(self.has(INDIRECT) && flags == 4 && chain.is_empty() && bytes.is_multiple_of(16));
                (table, entries, next) = (address, bytes / 16, 0);
                continue;
            }
            assert!(bytes > 0 && flags & !3 == 0);
            chain.push((address, bytes, flags & 2 != 0));
            if flags & 1 == 0 {
                return chain;
            }
            next = follows;
        }
    }

    /// Puts entries, heads and bytes, into the used part in one step, and interrupts if the device should.
    pub fn put_used(&mut self, number: usize, entries: &[(u32, u32)]) {
        let Queue { size, parts, used, .. } = self.queues[number];
        for (i, (head, bytes)) in (0..).zip(entries) {
            let entry = u64::from(used.wrapping_add(i) % size);
            let (ram, offset) = self.find(parts[2] + 4 + 8 * entry, 8);
            ram.store64(offset, u64::from(*head) | u64::from(*bytes) << 32);
        }
        let count = u16::try_from(entries.len()).unwrap();
        self.queues[number].used = used.wrapping_add(count);
        self.set_used_index(number, used.wrapping_add(count));
        let wanted = if self.has(EVENT_IDX) {
            let event = self.load16(parts[1] + 4 + 2 * u64::from(size));
            (0..count).any(|i| used.wrapping_add(i) == event)
        } else {
            self.load16(parts[1]) & 1 == 0
        };
        if wanted && self.table[12] & 1 == 0 {
            self.interrupts += 1;
            self.all_interrupts += 1;
        }
    }

    pub fn set_used_index(&self, number: usize, index: u16) {
        let (ram, offset) = self.find(self.queues[number].parts[2] + 2, 2);
        ram.store16(offset, index);
    }
}

/// A device of one kind, around what all devices have.
pub trait Device: Debug + DerefMut<Target = Virtio> {
    /// Entries of the table of interrupts.
    const VECTORS: usize;

    /// The features that the device offers, and the size of its queues.
    fn offer(&self) -> (u64, u16);

    /// The configuration of this kind of device.
    fn configuration(&self) -> Vec<u8>;

    /// Forgets what was taken: the device is reset.
    fn forget(&mut self);
}

/// Which registers of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Common,
    Notify,
    Device,
    Table,
}

/// A window over registers of a device.
#[derive(Debug)]
pub struct View<D> {
    device: Rc<RefCell<D>>,
    part: Part,
}

/// A bus with the device, and the driver's way to the device.
pub fn plug<D: Device>(device: &Rc<RefCell<D>>, kind: Kind, space: Space) -> (Bus, Transport<Bus, View<D>>) {
    let bus = Bus::with([(PLACE, space)]);
    let function = Function::new(bus.clone(), PLACE);
    let layout = Layout::find(&function, kind, &[]).unwrap();
    let mut parts = [Part::Common, Part::Notify, Part::Device, Part::Table].into_iter();
    let map = |_| parts.next().map(|part| View { device: Rc::clone(device), part });
    let message = Message { address: 0xfee0_0000, data: 0x41 };
    let transport = Transport::open(function, &layout, message, map).unwrap();
    (bus, transport)
}

/// The command register of the device on the bus.
pub fn command(bus: &Bus) -> u32 {
    bus.0.borrow()[&PLACE].command()
}

fn reset<D: Device>(device: &mut D) {
    let (_, size) = device.offer();
    device.forget();
    device.status = 0;
    device.lied = device.faults.registers > 0;
    device.accepted = 0;
    device.vector = 0xffff;
    device.queues.fill(Queue { size, vector: 0xffff, ..Queue::default() });
    device.resetting = device.faults.slow_reset;
}

fn common<D: Device>(device: &mut D, offset: usize, width: usize) -> u64 {
    let half = |word: u64, select: u32| if select > 1 { 0 } else { word >> (32 * select) & 0xffff_ffff };
    let (features, _) = device.offer();
    let queue = &device.queues[device.selected];
    match (offset, width) {
        (4, 4) => half(features, device.select[0]),
        (16, 2) => device.vector.into(),
        (18, 2) => device.queues.len() as u64,
        (20, 1) if device.resetting > 0 => {
            device.resetting -= 1;
            15
        }
        (20, 1) => device.status.into(),
        (21, 1) => {
            device.generation = device.generation.wrapping_add(u8::from(device.faults.restless));
            device.generation.into()
        }
        (24, 2) => queue.size.into(),
        (26, 2) => queue.vector.into(),
        (30, 2) => 3 + device.selected as u64,
        _ => panic!("a read of {width} bytes at {offset}"),
    }
}

fn set_common<D: Device>(device: &mut D, offset: usize, width: usize, value: u64) {
    let small = u16::try_from(value & 0xffff).unwrap();
    let word = u32::try_from(value & 0xffff_ffff).unwrap();
    let (features, _) = device.offer();
    let selected = device.selected;
    match (offset, width) {
        (0, 4) => device.select[0] = word,
        (8, 4) => device.select[1] = word,
        (12, 4) => {
            let shift = 32 * device.select[1];
            device.accepted = device.accepted & !(0xffff_ffff << shift) | value << shift;
            assert!(device.lied || device.accepted & !features == 0, "features that were not offered");
        }
        (16, 2) => device.vector = small,
        (20, 1) if value == 0 => reset(device),
        (20, 1) => device.status = u8::try_from(value).unwrap(),
        (22, 2) => {
            assert!(usize::from(small) < device.queues.len(), "there is no queue {small}");
            device.selected = usize::from(small);
        }
        (24, 2) => device.queues[selected].size = small,
        (26, 2) => device.queues[selected].vector = small,
        (28, 2) => {
            assert!(device.lied || device.status & 8 != 0);
            assert!(device.table[12] & 1 == 0 && device.table[8] == 0x41);
            device.queues[selected].enabled = value == 1;
        }
        (32..56, 4) => {
            let part = &mut device.queues[selected].parts[(offset - 32) / 8];
            let shift = (offset % 8) * 8;
            *part = *part & !(0xffff_ffff << shift) | value << shift;
        }
        _ => panic!("a write of {width} bytes at {offset}"),
    }
}

impl<D: Device> View<D> {
    fn read(&self, offset: usize, width: usize) -> u64 {
        let device = &mut *self.device.borrow_mut();
        assert!(offset.is_multiple_of(width));
        let registers = device.faults.registers;
        if registers > 0 && device.random.one_in(registers) {
            return device.random.next() >> (64 - 8 * width);
        }
        let number = |bytes: &[u8]| {
            let taken = (0..width).map(|i| u64::from(bytes.get(offset + i).copied().unwrap_or(0xff)) << (8 * i));
            taken.sum()
        };
        match self.part {
            Part::Common => common(device, offset, width),
            Part::Notify => panic!("a notification is read"),
            Part::Device => number(&device.configuration()),
            Part::Table => number(&device.table),
        }
    }

    fn write(&self, offset: usize, width: usize, value: u64) {
        let device = &mut *self.device.borrow_mut();
        assert!(offset.is_multiple_of(width));
        match self.part {
            Part::Common => set_common(device, offset, width, value),
            Part::Notify => {
                let queue = usize::try_from(value).unwrap();
                assert!(queue < device.queues.len(), "there is no queue {queue}");
                // If registers lied, the doorbell may be anywhere.
                assert!(device.lied || (offset, width) == (12 + 4 * queue, 2));
                device.queues[queue].rung = true;
                device.notified[queue] += 1;
            }
            Part::Device => panic!("the configuration is written"),
            Part::Table => device.table[offset..offset + width].copy_from_slice(&value.to_le_bytes()[..width]),
        }
    }
}

impl<D: Device> Registers for View<D> {
    fn bytes(&self) -> usize {
        match self.part {
            Part::Common | Part::Notify => 4096,
            Part::Device => self.device.borrow().configuration().len(),
            Part::Table => 16 * D::VECTORS,
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
