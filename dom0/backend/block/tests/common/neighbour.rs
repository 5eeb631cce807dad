//! An honest guest that knows what each of its sectors may hold, and looks.

use std::collections::BTreeMap;

use ring_protocol::block::{Segment, Slot, operation};

use super::Machine;
use super::front::{Front, segment};
use test_random::Random;

/// Requests it has in flight at most, each with pages of its own.
const AT_A_TIME: usize = 8;
/// Pages of a request at most.
const PAGES_EACH: usize = 4;

enum Asked {
    Read,
    Write(u64),
    Flush,
}

struct Request {
    asked: Asked,
    sector: u64,
    segments: Vec<Segment>,
    lane: usize,
}

pub struct Neighbour {
    pub front: Front,
    /// What each sector may hold: the stamp of its last write, and of those that failed since.
    pub model: Vec<Vec<u64>>,
    /// What each sector may hold after a power cut: what was there at the last flush, and all that was written since.
    pub durable: Vec<Vec<u64>>,
    asked: BTreeMap<u64, Request>,
    /// Sectors in use by a request.
    busy: Vec<bool>,
    stamp: u64,
    pub done: u64,
    pub failed: u64,
    /// What each sector might hold when each flush was sent.
    flushes: BTreeMap<u64, Vec<Vec<u64>>>,
    pub durable_writes: bool,
    /// It does not flush again after a flush that failed, as stock front ends, and takes each answered write for durable.
    pub gives_up_flushes: bool,
    /// It has done so.
    gave_up: bool,
    /// It does not read: a device that forgot a write before it said so may give back the old one.
    pub only_writes: bool,
}

/// A sector full of a stamp.
fn stamped(stamp: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    bytes.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&stamp.to_le_bytes()));
    bytes
}

/// The stamp of a sector that is full of one.
pub fn stamp_of(sector: &[u8]) -> u64 {
    let stamp = u64::from_le_bytes(sector[..8].try_into().unwrap());
    assert_eq!(sector, stamped(stamp), "a torn sector");
    stamp
}

impl Neighbour {
    pub fn new(domain: u16, pages: usize, sectors: usize) -> Self {
        Self {
            front: Front::new(domain, pages),
            model: vec![vec![0]; sectors],
            durable: vec![vec![0]; sectors],
            asked: BTreeMap::new(),
            busy: vec![false; sectors],
            stamp: u64::from(domain) << 56,
            done: 0,
            failed: 0,
            flushes: BTreeMap::new(),
            durable_writes: false,
            gives_up_flushes: false,
            gave_up: false,
            only_writes: false,
        }
    }

    /// Asks for something, if it may.
    pub fn ask(&mut self, machine: &Machine, random: &mut Random) {
        let lanes: Vec<usize> = self.asked.values().map(|request| request.lane).collect();
        let Some(lane) = (0..AT_A_TIME).find(|lane| !lanes.contains(lane)) else { return };
        if random.below(12) == 0 && !self.gave_up {
            return self.flush(lane);
        }
        let mut segments = Vec::new();
        for page in 0..=random.below(PAGES_EACH) {
            let first = random.below(8);
            let last = first + random.below(8 - first);
            segments.push(segment((lane * PAGES_EACH + page) as u32, first, last));
        }
        let sectors: usize = segments.iter().map(|s| usize::from(s.last - s.first) + 1).sum();
        let at = random.below(self.model.len() - sectors + 1);
        if self.busy[at..at + sectors].contains(&true) {
            return;
        }
        let sector = at as u64;
        let writes = self.only_writes || random.below(2) == 0;
        self.stamp += 1;
        let stamp = self.stamp;
        if writes {
            fill(machine, self.front.domain, &segments, stamp);
        }
        let op = match (writes, self.durable_writes && !self.gave_up && random.below(8) == 0) {
            (true, true) => operation::FLUSH,
            (true, false) => operation::WRITE,
            (false, _) => operation::READ,
        };
        let sent = if random.below(4) == 0 && op != operation::FLUSH {
            self.front.indirect(machine, op, sector, &segments, (64 + lane) as u32)
        } else {
            self.front.send(|id| Slot::direct(op, id, sector, &segments))
        };
        let Some(id) = sent else { return };
        self.busy[at..at + sectors].fill(true);
        if writes {
            // From now on it may be there.
            self.model[at..at + sectors].iter_mut().for_each(|allowed| allowed.push(stamp));
            self.durable[at..at + sectors].iter_mut().for_each(|allowed| allowed.push(stamp));
        }
        let asked = if writes { Asked::Write(stamp) } else { Asked::Read };
        self.asked.insert(id, Request { asked, sector, segments, lane });
    }

    fn flush(&mut self, lane: usize) {
        let Some(id) = self.front.flush() else { return };
        // What may be there once it is answered: what the last write before left, and all that comes after.
        self.flushes.insert(id, self.model.clone());
        self.asked.insert(id, Request { asked: Asked::Flush, sector: 0, segments: Vec::new(), lane });
    }

    /// Looks at the answers.
    pub fn collect(&mut self, machine: &Machine) {
        for (id, status) in self.front.answers() {
            assert_ne!(status, -2, "nothing that it asks is unknown");
            let request = self.asked.remove(&id).unwrap();
            *(if status == 0 { &mut self.done } else { &mut self.failed }) += 1;
            let mut at = request.sector as usize;
            for segment in &request.segments {
                for sector in segment.first..=segment.last {
                    self.busy[at] = false;
                    match request.asked {
                        Asked::Write(stamp) if status == 0 => {
                            self.model[at] = vec![stamp];
                            if self.gave_up {
                                self.durable[at].retain(|older| *older >= stamp);
                            }
                        }
                        Asked::Read if status == 0 => self.check(machine, segment.reference, sector, at),
                        _ => {}
                    }
                    at += 1;
                }
            }
            match self.flushes.remove(&id) {
                Some(before) if status == 0 => self.flushed(before),
                Some(_) => {
                    assert_eq!(status, -5, "a flush fails so that the guest learns of it");
                    self.gave_up |= self.gives_up_flushes;
                    self.flush_failed();
                }
                None => {}
            }
        }
    }

    fn check(&mut self, machine: &Machine, page: u32, sector: u8, at: usize) {
        let state = machine.0.borrow();
        let from = usize::from(sector) * 512;
        let found = stamp_of(&state.guests[usize::from(self.front.domain)][page as usize][from..from + 512]);
        let allowed = &self.model[at];
        assert!(allowed.contains(&found), "sector {at} holds {found:#x}, and may hold {allowed:x?}");
        self.model[at] = vec![found];
    }

    /// A flush is answered: what the writes before it left is durable, or overwritten by a later one.
    fn flushed(&mut self, before: Vec<Vec<u64>>) {
        for (allowed, before) in self.durable.iter_mut().zip(before) {
            let oldest = before.iter().min().copied().unwrap_or(0);
            allowed.retain(|stamp| *stamp >= oldest);
        }
    }

    /// A flush failed: nothing is known of what was written since the last one, until it is written and flushed again.
    fn flush_failed(&mut self) {
        if self.only_writes {
            self.model.clone_from(&self.durable);
            self.flushes.values_mut().for_each(|before| before.clone_from(&self.durable));
        }
    }

    /// After a power cut: each sector holds something that a flush did not promise away.
    pub fn lost(&self, read: impl Fn(u64) -> [u8; 512]) -> Option<String> {
        (0..self.durable.len()).find_map(|at| {
            let found = stamp_of(&read(at as u64));
            let allowed = &self.durable[at];
            (!allowed.contains(&found)).then(|| format!("sector {at} holds {found:#x}, and may hold {allowed:x?}"))
        })
    }

    pub fn is_idle(&self) -> bool {
        self.asked.is_empty()
    }
}

fn fill(machine: &Machine, domain: u16, segments: &[Segment], stamp: u64) {
    let mut state = machine.0.borrow_mut();
    for segment in segments {
        for sector in segment.first..=segment.last {
            let from = usize::from(sector) * 512;
            let page = &mut state.guests[usize::from(domain)][segment.reference as usize];
            page[from..from + 512].copy_from_slice(&stamped(stamp));
        }
    }
}
