//! Which Ethernet address a station of the uplink's network has.
//!
//! Guarantees: at most [`MAX_NEIGHBOURS`] are known or asked for, each with one waiting frame of at most [`MAX_WAITING`] bytes;
//! an answer to no question changes nothing; the router, once known, is not displaced by others; a guest's questions cost other
//! guests no question of theirs.

use crate::bucket::{Bucket, SECOND};
use crate::{FrameInfo, Mac};
use alloc::vec::Vec;
use core::net::Ipv4Addr;

/// The maximum number of neighbours.
pub(crate) const MAX_NEIGHBOURS: usize = 64;
/// The maximum number of bytes of a frame that waits for an answer.
pub(crate) const MAX_WAITING: usize = 2_048;
/// How long an answer is good.
const GOOD_NS: u64 = 120 * SECOND;
/// How long before its end an answer is asked for again.
const AGAIN_NS: u64 = 30 * SECOND;
/// How many questions stay without answer.
const TRIES: u8 = 3;

#[derive(Debug)]
struct Neighbour {
    address: Ipv4Addr,
    mac: Option<Mac>,
    /// When the answer, or the wait for the next one, ends.
    until_ns: u64,
    asked_ns: u64,
    tries: u8,
    waiting: Option<(Vec<u8>, FrameInfo)>,
}

/// What is known of a neighbour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Known {
    /// The Ethernet address; `None` if the neighbour has not answered yet.
    pub(crate) mac: Option<Mac>,
    /// Whether a question is to be sent now.
    pub(crate) ask: bool,
}

/// The neighbours on the uplink.
#[derive(Debug)]
pub(crate) struct Neighbours {
    all: Vec<Neighbour>,
}

impl Neighbours {
    pub(crate) const fn new() -> Self {
        Self { all: Vec::new() }
    }

    pub(crate) fn clear(&mut self) {
        self.all.clear();
    }

    /// Returns what is known of a neighbour. `router` is never displaced. A question about a further neighbour is taken from
    /// `questions`. Returns `None` if there is no room to ask for the neighbour, or there were too many questions.
    pub(crate) fn find(
        &mut self,
        address: Ipv4Addr,
        router: Option<Ipv4Addr>,
        questions: &mut Bucket,
        now_ns: u64,
    ) -> Option<Known> {
        if let Some(neighbour) = self.all.iter_mut().find(|neighbour| neighbour.address == address) {
            if neighbour.mac.is_some() && neighbour.until_ns <= now_ns {
                (neighbour.mac, neighbour.tries) = (None, 0);
            }
            let due = match neighbour.mac {
                Some(_) => neighbour.until_ns < now_ns + AGAIN_NS,
                None => neighbour.tries == 0,
            };
            let ask = due && neighbour.asked_ns + SECOND <= now_ns;
            if ask {
                neighbour.asked_ns = now_ns;
                if neighbour.mac.is_none() {
                    (neighbour.tries, neighbour.until_ns) = (1, now_ns + SECOND);
                }
            }
            return Some(Known { mac: neighbour.mac, ask });
        }
        // Only questions about further neighbours count: nobody can keep those in use from being asked again.
        if Some(address) != router && !questions.take(now_ns) {
            return None;
        }
        if self.all.len() >= MAX_NEIGHBOURS {
            // Who has not answered leaves first.
            let mut others = self.all.iter().filter(|neighbour| Some(neighbour.address) != router);
            let leaves = others.clone().find(|neighbour| neighbour.mac.is_none()).or_else(|| others.next())?.address;
            self.all.retain(|neighbour| neighbour.address != leaves);
        }
        self.all.try_reserve(1).ok()?;
        let until_ns = now_ns + SECOND;
        self.all.push(Neighbour { address, mac: None, until_ns, asked_ns: now_ns, tries: 1, waiting: None });
        Some(Known { mac: None, ask: true })
    }

    /// Keeps a frame until the neighbour answers. Returns false if another one waits, or the frame is too long.
    pub(crate) fn wait(&mut self, address: Ipv4Addr, frame: &[u8], info: FrameInfo) -> bool {
        let Some(neighbour) = self.all.iter_mut().find(|neighbour| neighbour.address == address) else { return false };
        let mut copy = Vec::new();
        if neighbour.waiting.is_some() || frame.len() > MAX_WAITING || copy.try_reserve_exact(frame.len()).is_err() {
            return false;
        }
        copy.extend_from_slice(frame);
        neighbour.waiting = Some((copy, info));
        true
    }

    /// Takes what a station says of itself. Returns the frame that waited for it; `None` if none did, or nobody asked.
    pub(crate) fn learn(&mut self, address: Ipv4Addr, mac: Mac, now_ns: u64) -> Option<(Vec<u8>, FrameInfo)> {
        let neighbour = self.all.iter_mut().find(|neighbour| neighbour.address == address)?;
        if mac.is_group() {
            return None;
        }
        (neighbour.mac, neighbour.until_ns) = (Some(mac), now_ns + GOOD_NS);
        neighbour.waiting.take()
    }

    /// Finds a neighbour that is to be asked again. Drops those who did not answer, and returns how many frames waited for
    /// them.
    pub(crate) fn turn(&mut self, now_ns: u64, mut ask: impl FnMut(Ipv4Addr)) -> u64 {
        let mut dropped = 0;
        self.all.retain_mut(|neighbour| {
            if neighbour.mac.is_some() || neighbour.until_ns > now_ns {
                return true;
            }
            if neighbour.tries >= TRIES {
                dropped += u64::from(neighbour.waiting.is_some());
                return false;
            }
            neighbour.tries += 1;
            (neighbour.asked_ns, neighbour.until_ns) = (now_ns, now_ns + SECOND);
            ask(neighbour.address);
            true
        });
        dropped
    }

    /// Returns when [`turn`](Self::turn) has something to do; `None` if nobody is asked for.
    pub(crate) fn next_ns(&self) -> Option<u64> {
        self.all.iter().filter(|neighbour| neighbour.mac.is_none()).map(|neighbour| neighbour.until_ns).min()
    }
}
