//! Cuts the pieces of an operation into parts, one for each request: whole blocks, in at most as many segments, each at most as
//! long, as the device allows.

use alloc::vec::Vec;
use disk::{BusAddress, Piece};

/// The maximum number of bytes of a part: whole blocks, whatever the size of a block.
const MOST_BYTES: u32 = 4 << 20;

/// A run of memory of a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) address: BusAddress,
    pub(super) bytes: u32,
}

/// How far an operation has been cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Cursor {
    /// The piece that comes next, and the number of its bytes that are done.
    piece: usize,
    done: u32,
}

/// The limits of a part.
#[derive(Clone, Copy, Debug)]
pub(super) struct Most {
    pub(super) segments: usize,
    /// The maximum number of bytes of a segment: whole sectors.
    pub(super) segment_bytes: u32,
    /// Bytes of a block: a part has whole blocks.
    pub(super) block: u32,
}

impl Cursor {
    /// Returns the part of the next piece that is not done. `None` if no piece is left.
    fn rest(self, pieces: &[Piece]) -> Option<Segment> {
        let piece = pieces.get(self.piece)?;
        let address = piece.address.plus(u64::from(self.done));
        Some(Segment { address, bytes: piece.bytes.saturating_sub(self.done) })
    }

    fn advance(&mut self, pieces: &[Piece], bytes: u32) {
        self.done += bytes;
        if pieces.get(self.piece).is_none_or(|piece| self.done >= piece.bytes) {
            *self = Self { piece: self.piece + 1, done: 0 };
        }
    }

    fn go_back(&mut self, pieces: &[Piece], mut bytes: u32) {
        while bytes > self.done {
            bytes -= self.done;
            self.piece = self.piece.saturating_sub(1);
            self.done = pieces.get(self.piece).map_or(bytes, |piece| piece.bytes);
        }
        self.done -= bytes;
    }

    /// Returns whether all bytes of the pieces are done.
    pub(super) fn is_at_end(self, pieces: &[Piece]) -> bool {
        pieces.iter().skip(self.piece).all(|piece| piece.bytes == 0)
    }

    /// Cuts the next part off `pieces`, each of which has whole sectors. Writes the part's segments to `segments`, which must
    /// have room. Returns the bytes of the part: 0 if not even one block fits.
    pub(super) fn cut(&mut self, pieces: &[Piece], most: &Most, segments: &mut Vec<Segment>) -> u32 {
        segments.clear();
        let mut total = 0;
        let mut last: Option<Segment> = None;
        while let Some(rest) = self.rest(pieces).filter(|_| total < MOST_BYTES) {
            let room = rest.bytes.min(MOST_BYTES - total);
            let grown = last.as_mut().filter(|last| is_next(last, &rest) && last.bytes < most.segment_bytes);
            let taken = if let Some(last) = grown {
                let taken = room.min(most.segment_bytes - last.bytes);
                last.bytes += taken;
                taken
            } else if room == 0 {
                0
            } else if segments.len() + usize::from(last.is_some()) >= most.segments {
                break;
            } else {
                let bytes = room.min(most.segment_bytes);
                segments.extend(last.replace(Segment { bytes, ..rest }));
                bytes
            };
            total += taken;
            self.advance(pieces, taken);
        }
        segments.extend(last);
        // An incomplete block at the end goes into the next part.
        let excess = total % most.block;
        self.go_back(pieces, excess);
        shorten(segments, excess);
        total - excess
    }
}

fn is_next(last: &Segment, next: &Segment) -> bool {
    last.address.number().checked_add(u64::from(last.bytes)) == Some(next.address.number())
}

/// Takes `bytes` bytes off the end of the segments.
fn shorten(segments: &mut Vec<Segment>, mut bytes: u32) {
    while bytes > 0 {
        let Some(last) = segments.last_mut() else { return };
        if last.bytes > bytes {
            last.bytes -= bytes;
            return;
        }
        bytes -= last.bytes;
        segments.pop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(address: u64, bytes: u32) -> Piece {
        Piece { address: BusAddress::of_pinned(address), bytes }
    }

    /// All parts of some pieces, as (address, bytes); checks that they are the bytes of the pieces in order.
    fn parts(pieces: &[Piece], most: &Most) -> Vec<Vec<(u64, u32)>> {
        let (mut cursor, mut segments, mut all) = (Cursor::default(), Vec::new(), Vec::new());
        while !cursor.is_at_end(pieces) {
            let bytes = cursor.cut(pieces, most, &mut segments);
            assert_eq!(bytes, segments.iter().map(|segment| segment.bytes).sum::<u32>());
            assert!(bytes > 0 && bytes.is_multiple_of(most.block) && segments.len() <= most.segments);
            assert!(segments.iter().all(|segment| (1..=most.segment_bytes).contains(&segment.bytes)));
            all.push(segments.iter().map(|segment| (segment.address.number(), segment.bytes)).collect::<Vec<_>>());
        }
        let sectors = |runs: Vec<(u64, u32)>| -> Vec<u64> {
            runs.into_iter().flat_map(|(start, bytes)| (start..start + u64::from(bytes)).step_by(512)).collect()
        };
        let given = pieces.iter().map(|piece| (piece.address.number(), piece.bytes)).collect();
        assert_eq!(sectors(all.concat()), sectors(given));
        all
    }

    #[test]
    fn neighbours_are_one_segment() {
        let most = Most { segments: 4, segment_bytes: u32::MAX, block: 512 };
        let pieces = [piece(0x1000, 4096), piece(0x2000, 4096), piece(0x9000, 512), piece(0x9200, 512)];
        assert_eq!(parts(&pieces, &most), [[(0x1000, 8192), (0x9000, 1024)]]);
        let most = Most { segment_bytes: 6144, ..most };
        assert_eq!(parts(&pieces, &most), [[(0x1000, 6144), (0x2800, 2048), (0x9000, 1024)]]);
    }

    #[test]
    fn a_part_ends_with_a_whole_block() {
        let most = Most { segments: 3, segment_bytes: 4096, block: 2048 };
        let pieces: Vec<Piece> = (0..8).map(|i| piece(i << 16, 1024)).collect();
        let cut = parts(&pieces, &most);
        assert_eq!(cut.len(), 4);
        assert!(cut.iter().all(|part| part.len() == 2));
        // A block of more segments than the device takes cannot be moved.
        let (mut cursor, mut segments) = (Cursor::default(), Vec::new());
        let pieces: Vec<Piece> = (0..4).map(|i| piece(i << 16, 512)).collect();
        assert_eq!(cursor.cut(&pieces, &most, &mut segments), 0);
        assert_eq!((cursor, segments.len()), (Cursor::default(), 0));
    }

    #[test]
    fn pieces_of_any_length_are_cut_without_a_gap() {
        let mut state = 7u64;
        let mut below = |bound: u64| {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            (state >> 33) % bound
        };
        for _ in 0..3000 {
            let block = 512 << below(3);
            let segments = usize::try_from(u64::from(block) / 512 + below(8)).unwrap();
            let most = Most { segments, segment_bytes: 512 * u32::try_from(1 + below(20)).unwrap(), block };
            let mut pieces: Vec<Piece> = Vec::new();
            let (mut at, mut sectors) = (0x10_0000, 0);
            for _ in 0..1 + below(40) {
                let count = below(9);
                pieces.push(piece(at, u32::try_from(count * 512).unwrap()));
                at += count * 512 + if below(2) == 0 { 0 } else { 0x1_0000 };
                sectors += count;
            }
            let unit = u64::from(block) / 512;
            let missing = (unit - sectors % unit) % unit;
            pieces.push(piece(at, u32::try_from(missing * 512).unwrap()));
            parts(&pieces, &most);
        }
    }
}
