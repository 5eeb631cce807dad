//! The registers of the disk.

use super::{Part, State, View};
use drivers::hardware::Registers;

impl State {
    fn reset(&mut self) {
        self.status = 0;
        self.lied = self.faults.registers > 0;
        self.accepted = 0;
        self.enabled = false;
        self.vectors = [0xffff; 2];
        self.queue_size = self.model.queue;
        self.taken.clear();
        (self.last_available, self.used, self.rung) = (0, 0, false);
        self.resetting = self.faults.slow_reset;
    }

    /// The device's own configuration.
    fn configuration(&self) -> [u8; 60] {
        let mut bytes = [0; 60];
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

    fn common(&mut self, offset: usize, width: usize) -> u64 {
        let half = |word: u64, select: u32| if select > 1 { 0 } else { word >> (32 * select) & 0xffff_ffff };
        match (offset, width) {
            (4, 4) => half(self.model.features, self.select[0]),
            (16, 2) => self.vectors[0].into(),
            (18, 2) => 1,
            (20, 1) if self.resetting > 0 => {
                self.resetting -= 1;
                15
            }
            (20, 1) => self.status.into(),
            (21, 1) => {
                self.generation = self.generation.wrapping_add(u8::from(self.faults.restless));
                self.generation.into()
            }
            (24, 2) => self.queue_size.into(),
            (26, 2) => self.vectors[1].into(),
            (30, 2) => 3,
            _ => panic!("a read of {width} bytes at {offset}"),
        }
    }

    fn set_common(&mut self, offset: usize, width: usize, value: u64) {
        let small = u16::try_from(value & 0xffff).unwrap();
        let word = u32::try_from(value & 0xffff_ffff).unwrap();
        match (offset, width) {
            (0, 4) => self.select[0] = word,
            (8, 4) => self.select[1] = word,
            (12, 4) => {
                let shift = 32 * self.select[1];
                self.accepted = self.accepted & !(0xffff_ffff << shift) | value << shift;
                assert!(self.lied || self.accepted & !self.model.features == 0, "features that were not offered");
            }
            (16, 2) => self.vectors[0] = small,
            (20, 1) if value == 0 => self.reset(),
            (20, 1) => self.status = u8::try_from(value).unwrap(),
            (22, 2) => assert_eq!(value, 0, "the queue"),
            (24, 2) => self.queue_size = small,
            (26, 2) => self.vectors[1] = small,
            (28, 2) => {
                assert!(self.lied || self.status & 8 != 0);
                assert!(self.table[12] & 1 == 0 && self.table[8] == 0x41);
                self.enabled = value == 1;
            }
            (32..56, 4) => {
                let part = &mut self.parts[(offset - 32) / 8];
                let shift = (offset % 8) * 8;
                *part = *part & !(0xffff_ffff << shift) | value << shift;
            }
            _ => panic!("a write of {width} bytes at {offset}"),
        }
    }
}

impl View {
    fn read(&self, offset: usize, width: usize) -> u64 {
        let state = &mut *self.disk.0.borrow_mut();
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
        let state = &mut *self.disk.0.borrow_mut();
        assert!(offset.is_multiple_of(width));
        match self.part {
            Part::Common => state.set_common(offset, width, value),
            Part::Notify => {
                assert!(state.lied || (offset, width, value) == (12, 2, 0));
                state.rung = true;
                state.notified += 1;
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
            Part::Device => 60,
            Part::Table => 32,
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
