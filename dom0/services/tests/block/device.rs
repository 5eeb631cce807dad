//! A device that works when the machine gives it a round, and can be late or lost.

use std::cell::RefCell;
use std::rc::Rc;

use disk::{BusAddress, Full, Operation, Outcome, Piece, Reset, Shape, Ticket};
use ring_protocol::SharedPage;

use crate::machine::Machine;

/// What it has been asked to do.
enum What {
    Move { write: bool, sector: u64, pieces: Vec<Piece> },
    Nothing,
}

pub struct Media {
    pub bytes: Vec<u8>,
    pub interrupt: u32,
    pub hangs: bool,
    /// It does not come back from its next reset.
    pub dead: bool,
    pub read_only: bool,
    pub resets: usize,
    held: Vec<(Ticket, What)>,
    done: Vec<(Ticket, Outcome)>,
}

impl Media {
    pub fn new(machine: &Machine, sectors: usize, interrupt: u32) -> Rc<RefCell<Self>> {
        let media = Rc::new(RefCell::new(Self {
            bytes: vec![0; sectors * 512],
            interrupt,
            hangs: false,
            dead: false,
            read_only: false,
            resets: 0,
            held: Vec::new(),
            done: Vec::new(),
        }));
        machine.state.borrow_mut().media.push(Rc::clone(&media));
        media
    }

    /// Does what it was asked to do; returns whether anything has ended.
    pub fn work(&mut self, machine: &Machine) -> bool {
        if self.hangs {
            return false;
        }
        for (ticket, what) in std::mem::take(&mut self.held) {
            if let What::Move { write, sector, pieces } = what {
                let mut at = sector as usize * 512;
                for Piece { address, bytes } in pieces {
                    self.move_piece(machine, write, at, (address, bytes as usize));
                    at += bytes as usize;
                }
            }
            self.done.push((ticket, Outcome::Good));
        }
        !self.done.is_empty()
    }

    fn move_piece(&mut self, machine: &Machine, write: bool, at: usize, (address, bytes): (BusAddress, usize)) {
        // A piece of ours may be longer than a page.
        for done in (0..bytes).step_by(512) {
            let (page, offset) = machine.reach(address.plus(done as u64), !write);
            let sector = &mut self.bytes[at + done..at + done + 512];
            if write { page.read(offset, sector) } else { page.write(offset, sector) }
        }
    }

    pub fn is_idle(&self) -> bool {
        self.held.is_empty() && self.done.is_empty()
    }
}

#[derive(Clone)]
pub struct Device(pub Rc<RefCell<Media>>);

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Device")
    }
}

impl disk::Device for Device {
    fn shape(&self) -> Shape {
        let media = self.0.borrow();
        let (sectors, read_only) = (media.bytes.len() as u64 / 512, media.read_only);
        Shape { sectors, block_bytes: 512, physical_bytes: 4096, read_only, volatile: true, discard: None }
    }

    fn submit(&mut self, ticket: Ticket, operation: Operation<'_>) -> Result<(), Full> {
        let mut media = self.0.borrow_mut();
        if media.held.len() >= 80 {
            return Err(Full);
        }
        let what = match operation {
            Operation::Read { sector, pieces } => What::Move { write: false, sector, pieces: pieces.to_vec() },
            Operation::Write { sector, pieces } => What::Move { write: true, sector, pieces: pieces.to_vec() },
            Operation::Flush | Operation::Discard { .. } => What::Nothing,
        };
        media.held.push((ticket, what));
        Ok(())
    }

    fn kick(&mut self) {}

    fn completed(&mut self) -> Option<(Ticket, Outcome)> {
        self.0.borrow_mut().done.pop()
    }

    fn rearm(&mut self) -> bool {
        !self.0.borrow().done.is_empty()
    }

    fn needs_reset(&self) -> bool {
        false
    }

    fn reset(&mut self) -> Reset {
        let mut media = self.0.borrow_mut();
        media.resets += 1;
        if media.dead {
            return Reset::Dead("it was told to be");
        }
        media.held.clear();
        media.done.clear();
        media.hangs = false;
        Reset::Done
    }
}
