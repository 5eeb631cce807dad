//! What arguments are made of: values that are often right and sometimes wrong, and where they go.

use super::Model;
use crate::rng::Rng;
use crate::world::Context;
use crate::world::build::{self, SLOTS, at, page};
use hv_core::addr::{Frame, GuestVirt, HOLE_START, Port};
use hv_core::domain::{Domain, Life};
use hv_core::event::port::Binding;
use hv_core::machine::Frames;
use hypercall_abi::domid;
use hypercall_abi::event::PORTS;
use hypercall_abi::mmu::pte;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Invents for one vcpu.
pub struct Pen<'p, 'c> {
    /// Dice.
    pub rng: &'p mut Rng,
    /// The vcpu.
    pub ctx: &'p Context<'c>,
    /// Its domain.
    pub model: &'p Model,
}

impl Pen<'_, '_> {
    /// A number hypervisors have stumbled over.
    pub fn edge(&mut self) -> u64 {
        const EDGES: [u64; 26] = [
            0,
            1,
            2,
            3,
            7,
            8,
            15,
            16,
            31,
            32,
            63,
            64,
            511,
            512,
            4095,
            4096,
            0x7fff,
            0x8000,
            0xffff,
            0x7fff_ffff,
            0x8000_0000,
            0xffff_ffff,
            1 << 40,
            1 << 52,
            i64::MAX as u64,
            u64::MAX,
        ];
        match self.rng.below(3) {
            0 => self.rng.word(),
            1 => self.rng.word() & 0xff,
            _ => self.rng.pick(&EDGES).unwrap_or(0),
        }
    }

    pub(super) fn edge32(&mut self) -> u32 {
        (self.edge() & 0xffff_ffff) as u32
    }

    /// One of `usual`, or an edge value once in eight times.
    pub(super) fn mostly(&mut self, usual: &[u64]) -> u64 {
        if self.rng.one_in(8) { self.edge() } else { self.rng.pick(usual).unwrap_or(0) }
    }

    /// A number below `n`, or an edge value once in twelve times.
    pub(super) fn below(&mut self, n: u64) -> u64 {
        if self.rng.one_in(12) { self.edge() } else { self.rng.below(n as usize) as u64 }
    }

    pub(super) fn small32(&mut self, n: u64) -> u32 {
        (self.below(n) & 0xffff_ffff) as u32
    }

    /// An address a guest should not pass.
    pub fn evil(&mut self) -> u64 {
        let odd = self.rng.word() & 0xfff;
        let usual = [
            0,
            8,
            at(page::KERNEL_ROOT) + (odd & !7),
            at(page::L1) + (odd & !7),
            at(page::GDT),
            at(SLOTS - 1) + odd,
            at(page::MORE_ARGS) + 4096 - (odd & 15),
            HOLE_START,
            HOLE_START - 1,
            HOLE_START + (4 << 39),
            HOLE_START + (16 << 39) - 4,
            1 << 47,
            (1 << 47) - 4,
            u64::MAX,
            u64::MAX - 7,
            u64::MAX << 47,
        ];
        self.mostly(&usual)
    }

    /// Where an argument of so many bytes goes.
    pub(super) fn place(&mut self, length: usize) -> u64 {
        let room = 4096usize.saturating_sub(length);
        match self.rng.below(24) {
            0 => at(page::MORE_ARGS) - self.rng.below(length.max(1)) as u64, // crosses
            1 => at(page::ARGS) + self.rng.below(room + 1) as u64,           // is not aligned
            2 => self.evil(),
            _ if length > 4096 => at(page::ARGS),
            _ => at(page::ARGS) + (self.rng.below(room / 8 + 1) * 8) as u64,
        }
    }

    /// Writes bytes where the guest can write.
    pub fn write(&mut self, to: u64, bytes: &[u8]) {
        _ = self.ctx.memory().map(|view| view.write_bytes(GuestVirt(to), bytes));
    }

    /// Reads a value at an address of the guest.
    pub fn read<T: FromBytes + IntoBytes>(&self, from: u64) -> Option<T> {
        self.ctx.memory().ok()?.read(GuestVirt(from)).ok()
    }

    /// Puts an argument into memory, often a bit wrong; says where.
    pub(super) fn put<T: IntoBytes + Immutable>(&mut self, value: &T) -> u64 {
        let to = self.place(size_of::<T>());
        self.put_at(to, value);
        to
    }

    pub(super) fn put_at<T: IntoBytes + Immutable>(&mut self, to: u64, value: &T) {
        let mut bytes = value.as_bytes().to_vec();
        if self.rng.one_in(12) && !bytes.is_empty() {
            let width = [1, 2, 4, 8][self.rng.below(4)].min(bytes.len());
            let slot = self.rng.below(bytes.len() / width) * width;
            let edge = self.edge().to_le_bytes();
            bytes[slot..slot + width].copy_from_slice(&edge[..width]);
        }
        self.write(to, &bytes);
    }

    /// An array with a few elements, one of four times many; its address and a count that usually fits. A list is done
    /// only if every element is, so most of them are short.
    pub(super) fn list<T: IntoBytes + Immutable>(
        &mut self,
        most: usize,
        mut one: impl FnMut(&mut Self) -> T,
    ) -> (u64, u64) {
        let most = if self.rng.one_in(4) { most } else { most.min(2) };
        let count = 1 + self.rng.below(most);
        let to = self.place(count * size_of::<T>());
        for n in 0..count {
            let element = one(self);
            self.put_at(to.wrapping_add((n * size_of::<T>()) as u64), &element);
        }
        let claimed = if self.rng.one_in(15) { self.edge() } else { count as u64 };
        (to, claimed)
    }

    fn own_page(&mut self) -> u64 {
        self.model.pages.get(self.rng.below(self.model.pages.len())).map_or(0, |frame| frame.number())
    }

    pub(in crate::world) fn page(&self, n: usize) -> u64 {
        self.model.pages.get(n).map_or(0, |frame| frame.number())
    }

    /// A frame number: usually the guest's own.
    pub(super) fn frame(&mut self) -> u64 {
        match self.rng.below(16) {
            0 => self.rng.below(self.ctx.m.frame_limit() as usize) as u64,
            1 => self.ctx.m.frame_limit() + self.rng.below(3) as u64 - 1,
            2 => self.ctx.domain.shared_info().map_or(0, Frame::number),
            3 => self.edge(),
            4 => self.ctx.state.traps.map_or(0, Frame::number),
            5..=9 => {
                let n = page::DATA + self.rng.below(build::PAGES - page::DATA);
                self.page(n)
            }
            _ => self.own_page(),
        }
    }

    pub(super) fn data_page(&mut self) -> u64 {
        if self.rng.one_in(8) {
            return self.frame();
        }
        let n = page::DATA + self.rng.below(build::PAGES - page::DATA);
        self.page(n)
    }

    pub(super) fn entry(&mut self) -> u64 {
        let frame = self.data_page() << 12;
        let usual = pte::PRESENT | pte::USER | pte::ACCESSED;
        match self.rng.below(12) {
            0 => 0,
            1 => self.rng.word(),
            2 => frame | usual | 1 << self.rng.below(64),
            3 => self.frame() << 12 | usual | pte::WRITE,
            4..=6 => frame | usual,
            7 => frame | usual | pte::NX,
            _ => frame | usual | pte::WRITE | pte::DIRTY,
        }
    }

    /// An address whose entry is free for play.
    pub(super) fn play(&mut self) -> u64 {
        if self.rng.one_in(10) {
            return self.evil();
        }
        at(build::PAGES + self.rng.below(SLOTS - build::PAGES))
    }

    pub(super) fn others(&self) -> Vec<&Domain> {
        self.ctx.world.domains.iter().filter(|d| d.life() != Life::Free && d.id() != self.ctx.domain.id()).collect()
    }

    pub(super) fn other(&mut self) -> u16 {
        let others: Vec<u16> = self.others().iter().map(|domain| domain.id().0).collect();
        if others.is_empty() || self.rng.one_in(12) { self.domid() } else { self.rng.pick(&others).unwrap_or(0) }
    }

    /// A domain id: usually the caller.
    pub(super) fn domid(&mut self) -> u16 {
        let roles = [domid::IO, domid::XEN, domid::COW, domid::INVALID, domid::IDLE, 0, 0xffff];
        let others: Vec<u16> = self.others().iter().map(|domain| domain.id().0).collect();
        match self.rng.below(12) {
            0 => self.rng.pick(&roles).unwrap_or(0),
            1 => (self.edge() & 0xffff) as u16,
            2 | 3 => self.rng.pick(&others).unwrap_or(0),
            4 => self.ctx.domain.id().0,
            _ => domid::SELF,
        }
    }

    /// A port of the caller: usually one in use.
    pub(super) fn port(&mut self) -> u32 {
        let ctx = self.ctx;
        let used: Vec<u32> = (1..64u32)
            .filter(|port| ctx.world.port(ctx.m, ctx.domain, Port(*port)).binding != Binding::Closed)
            .collect();
        if used.is_empty() || self.rng.one_in(8) {
            return self.small32(u64::from(PORTS) + 2);
        }
        self.rng.pick(&used).unwrap_or(0)
    }

    pub(super) fn vcpu(&mut self) -> u32 {
        self.small32(self.ctx.world.vcpus_of(self.ctx.domain).count() as u64 + 1)
    }

    /// Any operation of a family, or a number that is none.
    pub(super) fn op<T: Copy>(&mut self, all: &[T], number: impl Fn(T) -> u64) -> (Option<T>, u64) {
        if self.rng.one_in(40) {
            return (None, self.edge());
        }
        let one = self.rng.pick(all);
        (one, one.map_or(0, number))
    }
}
