//! Which port is raised when a device's message comes with a vector. Each vector has an atomic word, so that an interrupt finds
//! its port without a lock.

use crate::addr::{DomainId, Port, low16, low32, nth};
use crate::machine::{FIRST_MESSAGE, MESSAGES};
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Release};

/// The vector of INT 0x80, which belongs to guests: no device gets it.
const GUESTS: u8 = 0x80;
/// The word of a vector that is reserved, but not joined to a port yet. It names a domain and a port that do not exist.
const RESERVED: u64 = u64::MAX;

with_new! {
    /// Which port each vector raises.
    pub struct Messages {
        /// The words of the vectors from [`FIRST_MESSAGE`] on: domain in bits 32..48, port in the lower half; 0 if the vector
        /// is free.
        words: [AtomicU64; MESSAGES] = [const { AtomicU64::new(0) }; MESSAGES],
    }
}

impl Messages {
    fn word(&self, vector: u8) -> Option<&AtomicU64> {
        nth(&self.words, vector.checked_sub(FIRST_MESSAGE)?)
    }

    /// The domain and port that a vector is joined to; `None` if the vector is free. For a reserved vector they do not exist.
    pub(crate) fn taker(&self, vector: u8) -> Option<(DomainId, Port)> {
        let word = self.word(vector)?.load(Acquire);
        (word != 0).then(|| (DomainId(low16(word >> 32)), Port(low32(word))))
    }

    /// Reserves the first free vector; `None` if none is free.
    pub(super) fn reserve(&self) -> Option<u8> {
        let free = |(vector, word): &(u8, &AtomicU64)| {
            *vector != GUESTS && word.compare_exchange(0, RESERVED, AcqRel, Acquire).is_ok()
        };
        (FIRST_MESSAGE..).zip(&self.words).find(free).map(|(vector, _)| vector)
    }

    /// Joins a reserved vector to a port.
    pub(super) fn join(&self, vector: u8, domain: DomainId, port: Port) {
        if let Some(word) = self.word(vector) {
            word.store(u64::from(domain.0) << 32 | u64::from(port.0), Release);
        }
    }

    /// Frees a vector.
    pub(super) fn free(&self, vector: u8) {
        if let Some(word) = self.word(vector) {
            word.store(0, Release);
        }
    }
}
