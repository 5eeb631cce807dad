//! Batches of copies and pins for the hypervisor, and the flight that each element belongs to.

use alloc::vec::Vec;

use crate::flight::{Index, Set, Span};
use crate::host::{GrantCopy, Host, PinError, Pinned, Wanted};
use crate::limits::FLIGHTS;

/// The maximum number of copies in one call.
const COPIES: usize = 256;
/// The maximum number of pins in one call: 32 requests of 32 segments, or four of the longest requests.
const PINS: usize = 1024;

/// Copies that are to be done.
#[derive(Debug)]
pub(crate) struct Copies {
    wanted: Vec<GrantCopy>,
    owners: Vec<Index>,
    answers: Vec<bool>,
}

impl Copies {
    pub(crate) fn new() -> Self {
        Self {
            wanted: Vec::with_capacity(COPIES),
            owners: Vec::with_capacity(COPIES),
            answers: Vec::with_capacity(COPIES),
        }
    }

    pub(crate) fn is_full(&self) -> bool {
        self.wanted.len() >= COPIES
    }

    pub(crate) fn add(&mut self, owner: Index, copy: GrantCopy) {
        self.wanted.push(copy);
        self.owners.push(owner);
    }

    /// Does the copies. Returns the flights with a failed copy.
    pub(crate) fn run<H: Host>(&mut self, host: &mut H) -> Set {
        if self.wanted.is_empty() {
            return Set::default();
        }
        self.answers.clear();
        self.answers.resize(self.wanted.len(), false);
        host.copy(&self.wanted, &mut self.answers);
        let answered = self.owners.iter().zip(&self.answers);
        let failed = answered.filter(|(_, done)| !**done).fold(0, |set, (owner, _)| set | owner.bit());
        self.wanted.clear();
        self.owners.clear();
        Set(failed)
    }
}

/// What becomes of a page that is to be pinned.
type Answer = Result<Pinned, PinError>;

/// Pages that are to be pinned.
#[derive(Debug)]
pub(crate) struct PinBatch {
    wanted: Vec<Wanted>,
    spans: Vec<Span>,
    answers: Vec<Answer>,
    /// The flights that want pages, each with the end of its pages in the other lists.
    owners: Vec<(Index, usize)>,
    /// The numbers of answers and of owners that were taken.
    taken: (usize, usize),
}

impl PinBatch {
    pub(crate) fn new() -> Self {
        Self {
            wanted: Vec::with_capacity(PINS),
            spans: Vec::with_capacity(PINS),
            answers: Vec::with_capacity(PINS),
            owners: Vec::with_capacity(FLIGHTS),
            taken: (0, 0),
        }
    }

    /// Returns whether the longest request would no longer fit.
    pub(crate) fn is_full(&self) -> bool {
        self.wanted.len() + ring_protocol::block::INDIRECT_SEGMENTS > PINS
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.wanted.is_empty()
    }

    /// Adds the pages of an owner. An owner without pages gets no answer.
    pub(crate) fn add(&mut self, owner: Index, spans: impl Iterator<Item = (Span, Wanted)>) {
        let before = self.wanted.len();
        for (span, wanted) in spans {
            self.spans.push(span);
            self.wanted.push(wanted);
        }
        if self.wanted.len() > before {
            self.owners.push((owner, self.wanted.len()));
        }
    }

    pub(crate) fn run<H: Host>(&mut self, host: &mut H) {
        self.answers.clear();
        self.answers.resize(self.wanted.len(), Err(PinError::Refused));
        host.pin(&self.wanted, &mut self.answers);
    }

    /// Returns the next owner of a run, its spans, and the answer for each. After the last owner, empties the batch and returns
    /// `None`.
    pub(crate) fn next_owner(&mut self) -> Option<(Index, &[Span], &[Answer])> {
        let (first, owner) = self.taken;
        let Some(&(index, end)) = self.owners.get(owner) else {
            self.wanted.clear();
            self.spans.clear();
            self.owners.clear();
            self.taken = (0, 0);
            return None;
        };
        self.taken = (end, owner + 1);
        let spans = self.spans.get(first..end).unwrap_or_default();
        let answers = self.answers.get(first..end).unwrap_or_default();
        Some((index, spans, answers))
    }
}
