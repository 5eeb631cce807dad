//! xz. The claims of a file are checked before the decoder sees it: blocks and the chunks in them can be counted
//! without unpacking them.

use alloc::format;
use alloc::string::String;

use lzma_rust2::{Read, XzReader};

use super::PIECE;

/// Bytes before the first block.
const STREAM_HEADER: usize = 12;
const LZMA2: u64 = 0x21;
/// Bytes of a kernel for which one more block is allowed: each block needs buffers and a dictionary of its own.
const PER_BLOCK: usize = 256 << 10;
/// Bytes of a kernel for which one more reset is allowed: each reset clears, or allocates, 28 KiB.
const PER_RESET: usize = 16 << 10;
/// Resets allowed in any kernel.
const FREE_RESETS: usize = 16;
/// The most chunks that are counted, since this is done without a pause. Encoders end a chunk after 64 KiB packed or 2
/// MiB unpacked.
const MOST_CHUNKS: usize = 1 << 16;

/// The structure of an xz file.
#[derive(Default)]
struct Outline {
    /// Bytes it unpacks to.
    unpacked: usize,
    blocks: usize,
    chunks: usize,
    /// Chunks that reset the decoder's state.
    resets: usize,
    /// Bytes of the largest dictionary.
    dictionary: u64,
}

/// Bytes that the decoder needs in addition to the output of `size` bytes. Its dictionary grows with the output, by
/// doubling, and is copied to grow.
pub(super) fn beside(packed: &[u8], size: usize) -> usize {
    let dictionary = Outline::of(packed).map_or(u64::MAX, |outline| outline.dictionary);
    let dictionary = usize::try_from(dictionary).unwrap_or(usize::MAX).min(size.saturating_mul(2));
    dictionary.saturating_add(dictionary / 2)
}

/// Bytes that a file unpacks to, if its structure can be read.
pub(super) fn unpacked_size(file: &[u8]) -> Option<u64> {
    Outline::of(file).ok().map(|outline| outline.unpacked as u64)
}

/// Unpacks a file. Kernels use the x86 filter; the reader handles filters and checks.
pub(super) async fn unpack(packed: &[u8], out: &mut [u8], pause: &impl AsyncFn()) -> Result<usize, String> {
    let outline = Outline::of(packed)?;
    outline.check(out.len())?;
    let mut reader = XzReader::new(packed, false);
    let mut done = 0;
    loop {
        // Room for one byte more than expected shows a payload that is larger than it claims.
        let mut surplus = [0; 1];
        let end = out.len().min(done + PIECE);
        let room = out.get_mut(done..end).filter(|room| !room.is_empty()).unwrap_or(&mut surplus);
        match reader.read(room).map_err(|error| format!("{error:?}"))? {
            0 => return Ok(done),
            n => done += n,
        }
        if done > out.len() {
            return Err("larger than it claims".into());
        }
        pause().await;
    }
}

impl Outline {
    /// Reads the headers of all blocks and chunks.
    fn of(packed: &[u8]) -> Result<Self, String> {
        let mut outline = Self::default();
        let cut = |at: usize| format!("the block at byte {at:#x} is damaged, cut off or in too many chunks");
        let check = check_len(*packed.get(7).ok_or_else(|| cut(0))?);
        let mut at = STREAM_HEADER;
        // After the blocks comes the index, which begins with a zero.
        while *packed.get(at).ok_or_else(|| cut(at))? != 0 {
            let block = packed.get(at..).unwrap_or_default();
            let len = outline.add_block(block).ok_or_else(|| cut(at))?;
            at += len.next_multiple_of(4) + check;
        }
        Ok(outline)
    }

    /// Adds the block at the start of `bytes`. Returns its length without padding.
    fn add_block(&mut self, bytes: &[u8]) -> Option<usize> {
        let header = (usize::from(*bytes.first()?) + 1) * 4;
        self.dictionary = self.dictionary.max(dictionary(bytes.get(1..header)?)?);
        self.blocks += 1;
        let mut at = header;
        loop {
            let chunk = bytes.get(at..).filter(|_| self.chunks < MOST_CHUNKS)?;
            self.chunks += 1;
            let word = |at: usize| Some(usize::from(u16::from_be_bytes(*chunk.get(at..)?.first_chunk()?)) + 1);
            match *chunk.first()? {
                0 => return Some(at + 1),
                // A chunk that is not compressed.
                1 | 2 => {
                    self.unpacked = self.unpacked.checked_add(word(1)?)?;
                    at += 3 + word(1)?;
                }
                // A compressed chunk: the low bits belong to the size; the others tell what is reset and whether
                // properties follow.
                control @ 0x80.. => {
                    let size = (usize::from(control & 0x1f) << 16) + word(1)?;
                    self.unpacked = self.unpacked.checked_add(size)?;
                    self.resets += usize::from(control >= 0xa0);
                    at += 5 + usize::from(control >= 0xc0) + word(3)?;
                }
                _ => return None,
            }
        }
    }

    /// Checks that the structure is plausible for a kernel of `size` bytes.
    fn check(&self, size: usize) -> Result<(), String> {
        let Self { unpacked, blocks, resets, .. } = *self;
        if unpacked > size {
            return Err("larger than it claims".into());
        }
        if blocks > 1 + size / PER_BLOCK {
            return Err(format!("{blocks} blocks for {size} bytes"));
        }
        if resets > FREE_RESETS + size / PER_RESET {
            return Err(format!("its state is reset {resets} times for {size} bytes"));
        }
        Ok(())
    }
}

/// Bytes of the check after each block, by the stream's flags.
fn check_len(flags: u8) -> usize {
    match flags & 15 {
        0 => 0,
        kind => 4 << ((kind - 1) / 3),
    }
}

/// Returns the size of the dictionary that a block needs. In `header`, which begins after the header's size, come flags
/// (2 bits: number of filters less one; then whether sizes follow), sizes, filters (number, bytes of properties,
/// properties).
fn dictionary(header: &[u8]) -> Option<u64> {
    let mut rest = header.iter();
    let number = |bytes: &mut core::slice::Iter<'_, u8>| -> Option<u64> {
        let mut value = 0;
        for shift in (0..63).step_by(7) {
            let byte = *bytes.next()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    };
    let flags = *rest.next()?;
    for size in [0x40, 0x80] {
        if flags & size != 0 {
            number(&mut rest)?;
        }
    }
    for _ in 0..=flags & 3 {
        let (filter, properties) = (number(&mut rest)?, number(&mut rest)?);
        let first = rest.clone().next();
        if filter == LZMA2 {
            // 2 or 3 times a power of two, from 4 KiB on.
            let bits = u32::from(*first?);
            return (bits <= 40).then(|| (2 | u64::from(bits & 1 == 1)) << (bits / 2 + 11));
        }
        match usize::try_from(properties).ok()? {
            0 => {}
            more => _ = rest.nth(more - 1)?,
        }
    }
    None
}
