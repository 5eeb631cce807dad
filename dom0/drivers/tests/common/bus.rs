//! Configuration space: functions with registers, BARs that can be measured, and a list of capabilities.

use drivers::hardware::ConfigurationPorts;
use drivers::pci::Address;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

/// The registers of one function.
#[derive(Clone, Debug)]
pub struct Space {
    pub words: [u32; 64],
    /// For each BAR register, the bits that can be set.
    pub masks: [u32; 6],
    /// Where the next capability goes, and the register that leads to it.
    next: u8,
    link: u8,
}

impl Space {
    pub fn new(vendor: u16, device: u16, class: [u8; 3], header: u8) -> Self {
        let mut words = [0; 64];
        words[0] = u32::from(device) << 16 | u32::from(vendor);
        words[2] = u32::from(class[0]) << 24 | u32::from(class[1]) << 16 | u32::from(class[2]) << 8;
        words[3] = u32::from(header) << 16;
        Self { words, masks: [0; 6], next: 0x40, link: 0x34 }
    }

    pub fn bridge(secondary: u8) -> Self {
        let mut space = Self::new(0x8086, 0x1234, [6, 4, 0], 1);
        space.words[6] = u32::from(secondary) << 8;
        space
    }

    /// A BAR of 64 bits.
    pub fn bar64(&mut self, index: usize, address: u64, bytes: u64) {
        let low = |value: u64| u32::try_from(value & 0xffff_ffff).unwrap();
        let mask = bytes.wrapping_neg();
        self.words[4 + index] = low(address) | 4;
        self.words[5 + index] = low(address >> 32);
        (self.masks[index], self.masks[index + 1]) = (low(mask), low(mask >> 32));
    }

    /// A BAR of 32 bits.
    pub fn bar32(&mut self, index: usize, address: u32, bytes: u32) {
        self.words[4 + index] = address;
        self.masks[index] = bytes.wrapping_neg();
    }

    pub fn capability(&mut self, words: &[u32]) -> u8 {
        let at = self.next;
        self.words[1] |= 1 << 20;
        let link = usize::from(self.link / 4);
        let shift = if self.link == 0x34 { 0 } else { 8 };
        self.words[link] |= u32::from(at) << shift;
        for (i, word) in words.iter().enumerate() {
            self.words[usize::from(at / 4) + i] = *word;
        }
        (self.link, self.next) = (at, at + 4 * u8::try_from(words.len()).unwrap());
        at
    }

    /// A capability that says where registers of virtio are.
    pub fn registers(&mut self, kind: u32, bar: u32, offset: u32, bytes: u32, more: &[u32]) {
        let mut words = vec![kind << 24 | 16 << 16 | 9, bar, offset, bytes];
        words.extend(more);
        self.capability(&words);
    }

    /// The words of a virtio disk as QEMU makes it.
    pub fn virtio_disk() -> Self {
        Self::virtio(0x1001, [1, 0, 0], 2)
    }

    /// The words of a virtio network device as QEMU makes it.
    pub fn virtio_net() -> Self {
        Self::virtio(0x1000, [2, 0, 0], 4)
    }

    fn virtio(device: u16, class: [u8; 3], messages: u32) -> Self {
        let mut space = Self::new(0x1af4, device, class, 0);
        space.bar32(1, 0xfebd_5000, 4096);
        space.bar64(4, 0xfe00_0000, 16384);
        space.capability(&[(messages - 1) << 16 | 0x11, 1, 0x801]);
        space.registers(5, 0, 0, 0, &[0]);
        space.registers(2, 4, 0x3000, 0x1000, &[4]);
        space.registers(4, 4, 0x2000, 0x1000, &[]);
        space.registers(3, 4, 0x1000, 0x1000, &[]);
        space.registers(1, 4, 0, 0x1000, &[]);
        space
    }

    pub fn command(&self) -> u32 {
        self.words[1] & 0xffff
    }
}

/// All functions of a machine.
#[derive(Clone, Debug, Default)]
pub struct Bus(pub Rc<RefCell<BTreeMap<Address, Space>>>);

impl Bus {
    pub fn with(functions: impl IntoIterator<Item = (Address, Space)>) -> Self {
        Self(Rc::new(RefCell::new(functions.into_iter().collect())))
    }
}

impl ConfigurationPorts for Bus {
    fn read(&self, function: Address, register: u8) -> u32 {
        assert!(register.is_multiple_of(4));
        self.0.borrow().get(&function).map_or(!0, |space| space.words[usize::from(register / 4)])
    }

    fn write(&self, function: Address, register: u8, value: u32) {
        assert!(register.is_multiple_of(4));
        let mut functions = self.0.borrow_mut();
        let Some(space) = functions.get_mut(&function) else { return };
        let index = usize::from(register / 4);
        match index {
            // The status half is cleared by ones.
            1 => space.words[1] = (space.words[1] & 0xffff_0000 & !(value & 0xf900_0000)) | (value & 0xffff),
            4..10 if space.words[3] & 0x7f_0000 == 0 => {
                assert_eq!(space.command() & 3, 0, "a BAR is changed while the device answers");
                let mask = space.masks[index - 4];
                space.words[index] = (space.words[index] & !mask & 0xf) | (value & mask);
            }
            _ => space.words[index] = value,
        }
    }
}
