//! A driver with its disk, and a caller that submits operations at random and checks each answer.

use super::Ram;
use super::bus::{Bus, Space};
use super::disk::{Disk, Model, State};
use super::virtio::{View, command, plug};
use ::disk::{BusAddress, Device, Operation, Outcome, Piece, Reset, Ticket};
use drivers::Blk;
use drivers::blk::MEMORY_BYTES;
use drivers::virtio::Kind;
use test_random::Random;

/// Operations that the caller has in flight at most, and the sectors of memory of each.
pub const TICKETS: usize = 100;
const REGION: usize = 1024;
/// What a sector reads as that was given back.
const GIVEN_BACK: u64 = 0xdddd_dddd_dddd_dddd;

#[derive(Clone, Debug)]
pub enum Job {
    Read,
    Write(Vec<u64>),
    Flush,
    Discard,
}

#[derive(Clone, Debug)]
pub struct Flight {
    pub job: Job,
    pub first: usize,
    pub sectors: usize,
    pieces: Vec<Piece>,
}

pub struct Rig {
    pub blk: Blk<Bus, View<State>, Ram>,
    pub disk: Disk,
    pub bus: Bus,
    pub random: Random,
    guest: Ram,
    pub flights: Vec<Option<Flight>>,
    /// What each sector has, by its first and last eight bytes.
    content: Vec<u64>,
    busy: Vec<bool>,
    next_tag: u64,
    pub answered: usize,
    /// The most pieces, and the sectors of an operation.
    pub most: usize,
}

impl Rig {
    /// A driver that has not been started.
    pub fn new(model: Model, random: &Random) -> Self {
        let dma = Ram::new(0x1_0000_0000, MEMORY_BYTES);
        let guest = Ram::new(0x8000_0000, TICKETS * REGION * 512);
        let disk = Disk::new(model, vec![dma.clone(), guest.clone()], random.clone());
        let (bus, transport) = plug(&disk.0, Kind::BLOCK, Space::virtio_disk());
        let sectors = usize::try_from(model.sectors).unwrap();
        Self {
            blk: Blk::new(transport, dma.beside(&disk)).unwrap(),
            disk,
            bus,
            random: random.another(),
            guest,
            flights: vec![None; TICKETS],
            content: vec![0; sectors],
            busy: vec![false; sectors],
            next_tag: 1,
            answered: 0,
            most: 64,
        }
    }

    pub fn started(model: Model, random: &Random) -> Self {
        let mut rig = Self::new(model, random);
        assert_eq!(rig.blk.reset(), Reset::Done);
        rig
    }

    pub fn command(&self) -> u32 {
        command(&self.bus)
    }

    pub fn in_flight(&self) -> usize {
        self.flights.iter().flatten().count()
    }

    fn tag_at(&self, address: BusAddress) -> u64 {
        let offset = self.guest.offset(address.number(), 512).unwrap();
        let mut ends = [[0; 8]; 2];
        let [first, last] = &mut ends;
        self.guest.read(offset, first);
        self.guest.read(offset + 504, last);
        assert_eq!(ends[0], ends[1], "half a sector");
        u64::from_le_bytes(ends[0])
    }

    fn put_tag(&self, address: BusAddress, tag: u64) {
        let offset = self.guest.offset(address.number(), 512).unwrap();
        self.guest.write(offset, &tag.to_le_bytes());
        self.guest.write(offset + 504, &tag.to_le_bytes());
    }

    /// Pieces for some sectors, in the memory of a ticket.
    pub fn pieces(&mut self, ticket: usize, sectors: usize) -> Vec<Piece> {
        let base = self.guest.base + (ticket * REGION * 512) as u64;
        let (mut at, mut left, mut pieces) = (0, sectors, Vec::new());
        let scattered = self.random.one_in(4);
        while left > 0 {
            let bound = if scattered { 1 } else { 8 };
            let taken = (1 + self.random.below(bound)).min(left);
            let address = BusAddress::of_pinned(base + (at * 512) as u64);
            pieces.push(Piece { address, bytes: u32::try_from(taken * 512).unwrap() });
            at += taken + if scattered || self.random.one_in(2) { 1 } else { 0 };
            left -= taken;
        }
        assert!(at <= REGION);
        pieces
    }

    /// Submits an operation on sectors that nobody else uses. False if the device is full.
    pub fn submit(&mut self, block: usize, discards: bool) -> bool {
        let Some(ticket) = self.flights.iter().position(Option::is_none) else { return false };
        let blocks = self.content.len() / block;
        let first = self.random.below(blocks) * block;
        let most = if self.random.one_in(50) { 256 } else { self.most };
        let wanted = (1 + self.random.below((most / block).max(1))) * block;
        let free = self.busy[first..].iter().take(wanted).take_while(|busy| !**busy).count();
        let sectors = free.min(self.content.len() / block * block - first) / block * block;
        let kind = if sectors == 0 { 9 } else { self.random.below(10) };
        let mut pieces = Vec::new();
        let job = match kind {
            9 => Job::Flush,
            8 if discards => Job::Discard,
            4.. => {
                pieces = self.pieces(ticket, sectors);
                let tags: Vec<u64> = (self.next_tag..).take(sectors).collect();
                self.next_tag += sectors as u64;
                sectors_of(&pieces).zip(&tags).for_each(|(address, tag)| self.put_tag(address, *tag));
                Job::Write(tags)
            }
            _ => {
                pieces = self.pieces(ticket, sectors);
                sectors_of(&pieces).for_each(|address| self.put_tag(address, 0xbad));
                Job::Read
            }
        };
        let sector = first as u64;
        let operation = match &job {
            Job::Read => Operation::Read { sector, pieces: &pieces },
            Job::Write(_) => Operation::Write { sector, pieces: &pieces },
            Job::Flush => Operation::Flush,
            Job::Discard => Operation::Discard { sector, sectors: sectors as u64 },
        };
        let name = Ticket(u32::try_from(ticket).unwrap());
        if self.blk.submit(name, operation).is_err() {
            return false;
        }
        let sectors = if matches!(job, Job::Flush) { 0 } else { sectors };
        self.busy[first..first + sectors].fill(true);
        self.flights[ticket] = Some(Flight { job, first, sectors, pieces });
        true
    }

    /// Takes one answer, if there is one.
    pub fn take(&mut self) -> Option<(Flight, Outcome)> {
        let (Ticket(ticket), outcome) = self.blk.completed()?;
        let flight = self.flights[usize::try_from(ticket).unwrap()].take().expect("a ticket is answered twice");
        self.busy[flight.first..flight.first + flight.sectors].fill(false);
        self.answered += 1;
        Some((flight, outcome))
    }

    /// Checks an answer of a disk that is honest, against what the sectors have.
    pub fn check(&mut self, flight: &Flight) {
        let Flight { job, first, sectors, pieces } = flight;
        let range = *first..first + sectors;
        match job {
            Job::Read => {
                let seen: Vec<u64> = sectors_of(pieces).map(|address| self.tag_at(address)).collect();
                assert_eq!(seen, self.content[range]);
            }
            Job::Write(tags) => self.content[range].copy_from_slice(tags),
            Job::Discard => self.content[range].fill(GIVEN_BACK),
            Job::Flush => {}
        }
    }

    /// Forgets what is in flight, as after a reset.
    pub fn forget(&mut self) {
        self.flights.fill(None);
        self.busy.fill(false);
    }

    /// Takes what the disk really has for what its sectors have.
    pub fn look_again(&mut self) {
        let state = self.disk.0.borrow();
        for (tag, sector) in self.content.iter_mut().zip(state.content.chunks(512)) {
            *tag = u64::from_le_bytes(sector[..8].try_into().unwrap());
        }
    }
}

fn sectors_of(pieces: &[Piece]) -> impl Iterator<Item = BusAddress> {
    pieces.iter().flat_map(|piece| (0..u64::from(piece.bytes)).step_by(512).map(|at| piece.address.plus(at)))
}
