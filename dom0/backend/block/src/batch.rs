//! Batches of copies and pins for the hypervisor, and the flight that each element belongs to.

use alloc::vec::Vec;

use crate::flight::{Index, Set, Span};
use crate::host::{GrantCopy, Host, PinError, Pinned, Wanted};

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

/// Pages that are to be pinned.
#[derive(Debug)]
pub(crate) struct PinBatch {
    wanted: Vec<Wanted>,
    owners: Vec<(Index, Span)>,
    answers: Vec<Result<Pinned, PinError>>,
}

impl PinBatch {
    pub(crate) fn new() -> Self {
        Self { wanted: Vec::with_capacity(PINS), owners: Vec::with_capacity(PINS), answers: Vec::with_capacity(PINS) }
    }

    /// Returns whether the longest request would no longer fit.
    pub(crate) fn is_full(&self) -> bool {
        self.wanted.len() + ring_protocol::block::INDIRECT_SEGMENTS > PINS
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.wanted.is_empty()
    }

    pub(crate) fn add(&mut self, owner: Index, span: Span, wanted: Wanted) {
        self.wanted.push(wanted);
        self.owners.push((owner, span));
    }

    pub(crate) fn run<H: Host>(&mut self, host: &mut H) {
        self.answers.clear();
        self.answers.resize(self.wanted.len(), Err(PinError::Refused));
        host.pin(&self.wanted, &mut self.answers);
        self.wanted.clear();
    }

    /// Takes the answers of a run, each with its flight and its bytes in the guest's page.
    pub(crate) fn answers(&mut self) -> impl Iterator<Item = (Index, Span, Result<Pinned, PinError>)> {
        let answers = self.owners.drain(..).zip(self.answers.drain(..));
        answers.map(|((owner, span), answer)| (owner, span, answer))
    }
}
