//! Batches of copies for the hypervisor, and the deliveries that the copies belong to.

use alloc::vec::Vec;

use ring_protocol::net::{MAX_SLOTS, MAX_SLOTS_UNPULLED, PAGE_BYTES, PULLED_BYTES, RX_SLOT_BYTES};

use crate::host::{GrantCopy, Host, Side};

/// The maximum number of copies of one batch.
const COPIES: usize = 512;
/// The maximum number of copies of a packet to one receiver and to the linear buffer: on both sides there are at most 19 parts.
const COPIES_EACH: usize = 80;
/// The maximum number of deliveries of one batch.
const DELIVERIES: usize = 256;

/// Bytes of a page that are read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) side: Side,
    pub(crate) offset: u16,
    pub(crate) bytes: u16,
}

/// An answer in the RX ring, prepared.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Prepared {
    pub(crate) id: u16,
    pub(crate) slot: [u8; RX_SLOT_BYTES],
}

/// Where a packet goes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target {
    /// Into the RX ring of the vif at this place.
    Vif(usize),
    /// Into the linear buffer.
    Linear,
}

/// A packet on its way to one receiver.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Delivery {
    pub(crate) target: Target,
    /// The sender's packet among the packets of a visit. `None` if the bytes come from dom0.
    pub(crate) job: Option<usize>,
    pub(crate) bytes: usize,
    /// Where the delivery's copies and answers end in the lists of the batch.
    pub(crate) copies_end: usize,
    pub(crate) prepared_end: usize,
}

/// Copies that are to be done, and what is done once they are.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) copies: Vec<GrantCopy>,
    pub(crate) answers: Vec<bool>,
    pub(crate) deliveries: Vec<Delivery>,
    pub(crate) prepared: Vec<Prepared>,
    /// Where the bytes of the current packet lie.
    pub(crate) pieces: Vec<Piece>,
    /// Offset and bytes of the RX slots that the current packet has slot by slot. Empty: whole pages.
    pub(crate) cuts: Vec<(u16, u16)>,
    /// Where the bytes of the current packet go.
    pub(crate) targets: Vec<Piece>,
}

impl Batch {
    pub(crate) fn new() -> Self {
        Self {
            copies: Vec::with_capacity(COPIES),
            answers: Vec::with_capacity(COPIES),
            deliveries: Vec::with_capacity(DELIVERIES),
            prepared: Vec::with_capacity(DELIVERIES * 2),
            pieces: Vec::with_capacity(2 * MAX_SLOTS),
            cuts: Vec::with_capacity(MAX_SLOTS + 1),
            targets: Vec::with_capacity(2 * MAX_SLOTS),
        }
    }

    /// Returns whether a packet to another receiver and to the linear buffer may not fit.
    pub(crate) fn is_full(&self) -> bool {
        let prepared = self.prepared.len() + MAX_SLOTS + 1 > self.prepared.capacity();
        self.copies.len() + COPIES_EACH > COPIES || self.deliveries.len() + 2 > DELIVERIES || prepared
    }

    /// Forgets the current packet.
    pub(crate) fn clear_packet(&mut self) {
        self.pieces.clear();
        self.cuts.clear();
        self.targets.clear();
    }

    /// Forgets all that is done.
    pub(crate) fn clear(&mut self) {
        self.copies.clear();
        self.deliveries.clear();
        self.prepared.clear();
    }

    /// Adds `bytes` that lie at `offset` of consecutive pages of dom0, of which `page` is the first, to the current packet.
    pub(crate) fn add_own(&mut self, page: u64, offset: usize, bytes: usize) {
        own_pieces(&mut self.pieces, page, offset, bytes);
    }

    /// Makes `bytes` at `offset` of consecutive pages of dom0 the place where the current packet goes.
    pub(crate) fn aim_own(&mut self, page: u64, offset: usize, bytes: usize) {
        self.targets.clear();
        own_pieces(&mut self.targets, page, offset, bytes);
    }

    /// Returns the number of RX slots that the current packet of `bytes` takes. `None` if the receiver does not take as many.
    pub(crate) fn slots(&self, bytes: usize, scatter_gather: bool) -> Option<usize> {
        let slots = if self.goes_slot_by_slot(scatter_gather) { self.cuts.len() } else { bytes.div_ceil(PAGE_BYTES) };
        (slots == 1 || scatter_gather).then_some(slots)
    }

    /// Returns whether each slot of the current packet gets an RX slot of its own. Otherwise the packet is packed into pages.
    pub(crate) fn goes_slot_by_slot(&self, scatter_gather: bool) -> bool {
        let limit = match self.cuts.first() {
            None => return false,
            Some((_, first)) if *first <= PULLED_BYTES => MAX_SLOTS,
            Some(_) => MAX_SLOTS_UNPULLED,
        };
        self.cuts.len() <= if scatter_gather { limit } else { 1 }
    }

    /// Adds the copies from the pieces of the current packet to its targets.
    pub(crate) fn add_copies(&mut self) {
        let mut targets = self.targets.iter().copied();
        let mut to = targets.next();
        for piece in &self.pieces {
            let mut from = *piece;
            while from.bytes > 0 {
                let Some(place) = &mut to else { return };
                let bytes = from.bytes.min(place.bytes);
                self.copies.push(GrantCopy {
                    from: from.side,
                    from_offset: from.offset,
                    to: place.side,
                    to_offset: place.offset,
                    bytes,
                });
                (from.offset, from.bytes) = (from.offset + bytes, from.bytes - bytes);
                (place.offset, place.bytes) = (place.offset + bytes, place.bytes - bytes);
                if place.bytes == 0 {
                    to = targets.next();
                }
            }
        }
    }

    /// Adds a delivery that has the copies and the answers which were added since the last delivery.
    pub(crate) fn add_delivery(&mut self, target: Target, job: Option<usize>, bytes: usize) {
        let (copies_end, prepared_end) = (self.copies.len(), self.prepared.len());
        self.deliveries.push(Delivery { target, job, bytes, copies_end, prepared_end });
    }

    /// Does the copies. `own` are the buffers whose pages they name.
    pub(crate) fn run<H: Host>(&mut self, host: &mut H, own: &mut [&mut H::Buffer]) {
        self.answers.clear();
        self.answers.resize(self.copies.len(), false);
        if !self.copies.is_empty() {
            host.copy(&self.copies, &mut self.answers, own);
        }
    }

    /// Returns the first copy in this range that has failed. `None` if all are done.
    pub(crate) fn failed(&self, from: usize, end: usize) -> Option<GrantCopy> {
        let answers = self.answers.get(from..end)?;
        let place = answers.iter().position(|done| !done)?;
        self.copies.get(from + place).copied()
    }
}

fn own_pieces(pieces: &mut Vec<Piece>, page: u64, offset: usize, bytes: usize) {
    let (mut at, end) = (offset, offset + bytes);
    while at < end {
        let within = at % PAGE_BYTES;
        let bytes = (PAGE_BYTES - within).min(end - at);
        let side = Side::Own { page: page + (at / PAGE_BYTES) as u64 };
        // Both numbers are at most a page's bytes.
        pieces.push(Piece { side, offset: cut(within), bytes: cut(bytes) });
        at += bytes;
    }
}

/// Returns a number that is known to fit 16 bits.
pub(crate) fn cut(number: usize) -> u16 {
    debug_assert!(u16::try_from(number).is_ok());
    u16::try_from(number).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest(offset: u16, bytes: u16) -> Piece {
        Piece { side: Side::Guest { domain: 1, reference: 2 }, offset, bytes }
    }

    #[test]
    fn pieces_and_targets_need_not_have_the_same_bounds() {
        let mut batch = Batch::new();
        batch.pieces.extend([guest(10, 100), guest(0, 50)]);
        batch.targets.extend([guest(7, 30), guest(1000, 120)]);
        batch.add_copies();
        let copies: Vec<_> = batch.copies.iter().map(|copy| (copy.from_offset, copy.to_offset, copy.bytes)).collect();
        assert_eq!(copies, [(10, 7, 30), (40, 1000, 70), (0, 1070, 50)]);
    }

    #[test]
    fn own_bytes_are_cut_at_pages() {
        let mut batch = Batch::new();
        batch.add_own(7, 4000, 5000);
        let piece = |page, offset, bytes| Piece { side: Side::Own { page }, offset, bytes };
        assert_eq!(batch.pieces, [piece(7, 4000, 96), piece(8, 0, 4096), piece(9, 0, 808)]);
    }

    #[test]
    fn a_packet_with_too_many_slots_is_packed() {
        let mut batch = Batch::new();
        batch.cuts.extend([(0, 256); 18]);
        assert_eq!(batch.slots(18 * 256, true), Some(18));
        batch.cuts[0].1 = 257;
        assert_eq!(batch.slots(17 * 256 + 257, true), Some(2));
        batch.cuts.truncate(17);
        assert_eq!(batch.slots(16 * 256 + 257, true), Some(17));
        assert_eq!((batch.slots(4096, false), batch.slots(4097, false)), (Some(1), None));
    }
}
