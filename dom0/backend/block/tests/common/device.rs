//! A device with a volatile cache that fails, has no room, hangs, and forgets unflushed writes when the power is cut.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use disk::{Discard, Full, Operation, Outcome, Piece, Reset, Shape, Ticket};

use super::Machine;
use test_random::Random;

pub const SECTOR: usize = 512;
pub type Sector = [u8; SECTOR];

/// What outlives the machine.
pub struct Media {
    pub sectors: u64,
    /// Sectors that survive a power cut; others are zeroes.
    pub durable: Vec<Sector>,
    /// Sectors that may.
    pub cache: BTreeMap<u64, Sector>,
    pub volatile: bool,
    /// Planted: a flush is answered and not done.
    pub ignores_flushes: bool,
    /// A flush that fails forgets some of what it was to write, and says so only once.
    pub failing_flushes_forget: bool,
    /// The next flushes fail.
    pub failing_flushes: u32,
    pub flushes: u64,
    /// What is in the device, until it is completed.
    pub held: Vec<Held>,
    pub hangs: bool,
    pub asks_for_reset: bool,
    resets_left: u32,
    pub resets: u64,
    pub dead: bool,
    /// What it may have at a time.
    pub room: usize,
    /// First come, first served: else in any order.
    pub ordered: bool,
    /// How many operations may still be completed; for tests that count.
    pub credit: u64,
    pub most_held: usize,
    /// What it claims to have completed, though it was reset since, or never had it.
    pub ghosts: Vec<Ticket>,
}

pub struct Held {
    pub ticket: Ticket,
    pub what: What,
}

pub enum What {
    Read(u64, Vec<Piece>),
    Write(u64, Vec<Piece>),
    Flush,
    Discard(u64, u64),
}

impl Media {
    pub fn new(sectors: u64) -> Rc<RefCell<Self>> {
        Rc::new(RefCell::new(Self {
            sectors,
            durable: vec![[0; SECTOR]; sectors as usize],
            cache: BTreeMap::new(),
            volatile: true,
            ignores_flushes: false,
            failing_flushes_forget: false,
            failing_flushes: 0,
            flushes: 0,
            held: Vec::new(),
            hangs: false,
            asks_for_reset: false,
            resets_left: 0,
            resets: 0,
            dead: false,
            room: 128,
            ordered: false,
            credit: u64::MAX,
            most_held: 0,
            ghosts: Vec::new(),
        }))
    }

    pub fn read(&self, sector: u64) -> Sector {
        self.cache.get(&sector).copied().unwrap_or(self.durable[sector as usize])
    }

    fn write(&mut self, sector: u64, bytes: Sector) {
        if self.volatile {
            self.cache.insert(sector, bytes);
        } else {
            self.durable[sector as usize] = bytes;
        }
    }

    fn flush(&mut self) -> Outcome {
        self.flushes += 1;
        if self.failing_flushes > 0 {
            self.failing_flushes -= 1;
            return Outcome::Failed;
        }
        if !self.ignores_flushes {
            for (sector, bytes) in std::mem::take(&mut self.cache) {
                self.durable[sector as usize] = bytes;
            }
        }
        Outcome::Good
    }

    /// The power is cut: some of what was not flushed reached the disk, in any order.
    pub fn cut(&mut self, random: &mut Random) {
        for (sector, bytes) in std::mem::take(&mut self.cache) {
            if random.below(2) == 0 {
                self.durable[sector as usize] = bytes;
            }
        }
        self.held.clear();
    }
}

pub struct Device {
    pub machine: Machine,
    pub media: Rc<RefCell<Media>>,
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Device")
    }
}

impl Device {
    pub fn new(machine: &Machine, media: &Rc<RefCell<Media>>) -> Self {
        Self { machine: machine.clone(), media: Rc::clone(media) }
    }

    fn fails(&self, of_1000: impl Fn(&super::Faults) -> u64) -> bool {
        let mut state = self.machine.0.borrow_mut();
        let of_1000 = of_1000(&state.faults);
        state.fails(of_1000)
    }

    fn carry_out(&self, media: &mut Media, what: &What) -> Outcome {
        let mut state = self.machine.0.borrow_mut();
        match what {
            What::Flush => media.flush(),
            What::Discard(sector, sectors) => {
                for sector in *sector..sector + sectors {
                    media.write(sector, [0xdd; SECTOR]);
                }
                Outcome::Good
            }
            What::Read(sector, pieces) | What::Write(sector, pieces) => {
                let reads = matches!(what, What::Read(..));
                let mut sector = *sector;
                for piece in pieces {
                    let bytes = state.reach(piece.address, piece.bytes as usize, reads);
                    for part in bytes.chunks_exact_mut(SECTOR) {
                        if reads {
                            part.copy_from_slice(&media.read(sector));
                        } else {
                            media.write(sector, (&*part).try_into().unwrap());
                        }
                        sector += 1;
                    }
                }
                Outcome::Good
            }
        }
    }
}

impl disk::Device for Device {
    fn shape(&self) -> Shape {
        let media = self.media.borrow();
        let discard = Some(Discard { granularity: 4096, alignment: 0 });
        let (sectors, volatile) = (media.sectors, media.volatile);
        Shape { sectors, block_bytes: 512, physical_bytes: 4096, read_only: false, volatile, discard }
    }

    fn submit(&mut self, ticket: Ticket, operation: Operation<'_>) -> Result<(), Full> {
        super::death::mortal();
        let media = &mut *self.media.borrow_mut();
        assert!(!media.dead, "a device that is lost is given an operation");
        assert!(media.held.iter().all(|held| held.ticket != ticket), "a ticket is used twice");
        if media.held.len() >= media.room || self.fails(|faults| faults.full) {
            return Err(Full);
        }
        let check = |sector: u64, pieces: &[Piece]| {
            let sectors: u64 = pieces.iter().map(|piece| u64::from(piece.bytes / 512)).sum();
            assert!(!pieces.is_empty() && pieces.len() <= 256 && sectors > 0);
            assert!(sector + sectors <= media.sectors, "beyond the device");
            pieces.to_vec()
        };
        let what = match operation {
            Operation::Read { sector, pieces } => What::Read(sector, check(sector, pieces)),
            Operation::Write { sector, pieces } => What::Write(sector, check(sector, pieces)),
            Operation::Flush => {
                let other = media.held.iter().any(|held| matches!(held.what, What::Flush));
                assert!(!other, "two flushes at a time");
                What::Flush
            }
            Operation::Discard { sector, sectors } => {
                assert!(sector + sectors <= media.sectors && sectors > 0);
                What::Discard(sector, sectors)
            }
        };
        media.held.push(Held { ticket, what });
        media.most_held = media.most_held.max(media.held.len());
        Ok(())
    }

    fn kick(&mut self) {
        if self.fails(|faults| faults.hang) {
            self.media.borrow_mut().hangs = true;
        }
        if self.fails(|faults| faults.needs_reset) {
            self.media.borrow_mut().asks_for_reset = true;
        }
    }

    fn completed(&mut self) -> Option<(Ticket, Outcome)> {
        super::death::mortal();
        let media = &mut *self.media.borrow_mut();
        if let Some(ghost) = media.ghosts.pop() {
            return Some((ghost, Outcome::Good));
        }
        if media.hangs || media.asks_for_reset || media.dead || media.held.is_empty() || media.credit == 0 {
            return None;
        }
        let at = if media.ordered { 0 } else { self.machine.below(media.held.len() as u64 + 1) as usize };
        if at == media.held.len() {
            return None;
        }
        media.credit -= 1;
        let held = if media.ordered { media.held.remove(at) } else { media.held.swap_remove(at) };
        // What failed may have been done.
        let failed = self.fails(|faults| faults.device);
        let done = !failed || self.machine.below(2) == 0;
        if !done && media.failing_flushes_forget && matches!(held.what, What::Flush) {
            media.cache.retain(|_, _| self.machine.below(2) == 0);
            // Taken together with the notes of what it means: a death in between is not survived.
            super::death::spare(4);
        }
        let outcome = if done { self.carry_out(media, &held.what) } else { Outcome::Failed };
        Some((held.ticket, if failed { Outcome::Failed } else { outcome }))
    }

    fn rearm(&mut self) -> bool {
        let media = self.media.borrow();
        !(media.hangs || media.asks_for_reset || media.dead || media.held.is_empty() || media.credit == 0)
    }

    fn needs_reset(&self) -> bool {
        self.media.borrow().asks_for_reset
    }

    fn reset(&mut self) -> Reset {
        let media = &mut *self.media.borrow_mut();
        assert!(!media.dead, "a device that is lost is reset");
        if media.resets_left == 0 {
            media.resets_left = 1 + self.machine.below(4) as u32;
        }
        media.resets_left -= 1;
        if media.resets_left > 0 {
            return Reset::Pending;
        }
        // Some of what it had is done before it stops.
        for held in std::mem::take(&mut media.held) {
            media.ghosts.push(held.ticket);
            if self.machine.below(2) == 0 && !matches!(held.what, What::Flush) {
                self.carry_out(media, &held.what);
            }
        }
        (media.hangs, media.asks_for_reset) = (false, false);
        media.resets += 1;
        if self.fails(|faults| faults.dead) {
            media.dead = true;
            return Reset::Dead("it was told to be");
        }
        Reset::Done
    }
}
