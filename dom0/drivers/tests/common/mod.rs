//! A machine in memory: a bus with functions, memory that a device shares, and a virtio disk and a virtio network device that
//! can misbehave.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

pub mod bus;
pub mod disk;
pub mod net_rig;
pub mod nic;
pub mod rig;
pub mod virtio;

use ::disk::BusAddress;
use drivers::hardware::DmaMemory;
use std::cell::RefCell;
use std::rc::Rc;

/// Memory at an address of the bus.
#[derive(Clone, Debug)]
pub struct Ram {
    pub base: u64,
    bytes: Rc<RefCell<Vec<u8>>>,
    /// A disk that goes on between any two accesses of the driver, as a real one does.
    beside: Option<disk::Disk>,
}

impl Ram {
    pub fn new(base: u64, bytes: usize) -> Self {
        Self { base, bytes: Rc::new(RefCell::new(vec![0; bytes])), beside: None }
    }

    /// The same memory, as the driver of a disk sees it that works meanwhile.
    pub fn beside(&self, disk: &disk::Disk) -> Self {
        Self { beside: Some(disk.clone()), ..self.clone() }
    }

    fn let_others_work(&self) {
        let disk = self.beside.as_ref().and_then(|disk| disk.0.try_borrow_mut().ok());
        if let Some(mut disk) = disk.filter(|disk| disk.eager) {
            if disk.random.one_in(4) {
                disk.fetch();
            }
            if disk.random.one_in(4) {
                disk.answer_one();
            }
        }
    }

    pub fn len(&self) -> usize {
        self.bytes.borrow().len()
    }

    /// Where `bytes` bytes at an address of the bus are in it.
    pub fn offset(&self, address: u64, bytes: usize) -> Option<usize> {
        let offset = usize::try_from(address.checked_sub(self.base)?).ok()?;
        (offset + bytes <= self.len()).then_some(offset)
    }

    pub fn read(&self, offset: usize, into: &mut [u8]) {
        into.copy_from_slice(&self.bytes.borrow()[offset..offset + into.len()]);
    }

    pub fn write(&self, offset: usize, from: &[u8]) {
        self.bytes.borrow_mut()[offset..offset + from.len()].copy_from_slice(from);
    }

    fn load<const N: usize>(&self, offset: usize) -> [u8; N] {
        let bytes = self.bytes.borrow();
        assert!(offset.is_multiple_of(N), "a load of {N} bytes at {offset}");
        bytes[offset..offset + N].try_into().unwrap()
    }
}

impl DmaMemory for Ram {
    fn bytes(&self) -> usize {
        self.len()
    }

    fn bus_address(&self, offset: usize) -> BusAddress {
        BusAddress::of_pinned(self.base + offset as u64)
    }

    fn load8(&self, offset: usize) -> u8 {
        u8::from_le_bytes(self.load(offset))
    }

    fn load16(&self, offset: usize) -> u16 {
        self.let_others_work();
        u16::from_le_bytes(self.load(offset))
    }

    fn load64(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.load(offset))
    }

    fn store8(&self, offset: usize, value: u8) {
        self.write(offset, &[value]);
    }

    fn store16(&self, offset: usize, value: u16) {
        assert!(offset.is_multiple_of(2));
        self.let_others_work();
        self.write(offset, &value.to_le_bytes());
    }

    fn store64(&self, offset: usize, value: u64) {
        assert!(offset.is_multiple_of(8));
        self.write(offset, &value.to_le_bytes());
    }

    fn read_bytes(&self, offset: usize, into: &mut [u8]) {
        self.read(offset, into);
    }

    fn write_bytes(&self, offset: usize, from: &[u8]) {
        self.write(offset, from);
    }
}
