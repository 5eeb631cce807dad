//! zstd: one frame, whose header we read ourselves, since it says how much memory the decoder takes.
//!
//! The highest levels ask for a window of 128 MiB whatever the size of the file. Nothing lies further back than the file
//! is long, so the decoder is given a header of our own with the window that is really needed.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};
use ruzstd::io::Read;

/// The least window the decoder is given. From here on its buffer, which is taken for a power of two, has room for a block
/// beside the window and never grows.
const LEAST_WINDOW: u64 = 1 << 20;
/// What the decoder's buffer has beside the window.
const BUFFER_SLACK: usize = (256 << 10) + 1;
/// Bytes of a kernel for which one more block is granted: each may make the decoder fill all its tables.
const PER_BLOCK: usize = 256;
/// Blocks granted to any kernel.
const FREE_BLOCKS: usize = 64;
/// The content has a checksum at its end.
const CHECKSUM: u8 = 4;

/// What the header of a frame says.
struct Header {
    /// Bytes it has.
    len: usize,
    descriptor: u8,
    /// How far back the frame refers.
    window: u64,
    /// Bytes the frame unpacks to, if it says so.
    content: Option<u64>,
}

impl Header {
    fn of(packed: &[u8]) -> Option<Self> {
        let descriptor = *packed.get(4)?;
        let single_segment = descriptor & 0x20 != 0;
        let window_len = usize::from(!single_segment);
        let dictionary_len = [0, 1, 2, 4][usize::from(descriptor & 3)];
        let content_len = match descriptor >> 6 {
            0 => usize::from(single_segment),
            bits => 1 << bits,
        };
        let at = 5 + window_len + dictionary_len;
        let mut content = [0; 8];
        content.get_mut(..content_len)?.copy_from_slice(packed.get(at..at + content_len)?);
        // Two bytes begin to count where one byte ends.
        let content = u64::from_le_bytes(content) + if content_len == 2 { 256 } else { 0 };
        let content = (content_len > 0).then_some(content);
        let window = content.filter(|_| single_segment).or_else(|| packed.get(5).map(|byte| window(*byte)))?;
        Some(Self { len: at + content_len, descriptor, window, content })
    }

    /// The window that a kernel of `size` bytes needs.
    fn needed(&self, size: usize) -> u64 {
        self.window.min(size as u64).max(LEAST_WINDOW).next_power_of_two()
    }
}

/// The window that a byte of a header means: five bits of a power of two, and eighths of it.
fn window(byte: u8) -> u64 {
    (8 + u64::from(byte & 7)) << (7 + (byte >> 3))
}

/// Bytes that the decoder needs beside the output of `size` bytes.
pub(super) fn beside(packed: &[u8], size: usize) -> usize {
    let window = Header::of(packed).map_or(size as u64, |header| header.needed(size));
    usize::try_from(window).unwrap_or(usize::MAX).saturating_add(BUFFER_SLACK)
}

/// Bytes that a file unpacks to, if its header says so.
pub(super) fn unpacked_size(file: &[u8]) -> Option<u64> {
    Header::of(file)?.content
}

pub(super) async fn unpack(packed: &[u8], out: &mut [u8], pause: &impl AsyncFn()) -> Result<usize, String> {
    let header = Header::of(packed).ok_or("header cut off")?;
    if header.descriptor & 3 != 0 {
        return Err("it needs a dictionary".into());
    }
    if header.content.is_some_and(|content| content > out.len() as u64) {
        return Err("larger than it claims".into());
    }
    let mut decoder = start(packed, &header, out.len())?;
    let mut input = packed.get(header.len..).unwrap_or_default();
    let (mut done, most) = (0, FREE_BLOCKS + out.len() / PER_BLOCK);
    while !decoder.is_finished() {
        let one = BlockDecodingStrategy::UptoBlocks(1);
        decoder.decode_blocks(&mut input, one).map_err(|error| format!("{error}"))?;
        done += decoder.read(out.get_mut(done..).unwrap_or_default()).map_err(|error| format!("{error}"))?;
        if decoder.can_collect() != 0 {
            return Err("larger than it claims".into());
        }
        if decoder.blocks_decoded() > most {
            return Err(format!("more than {most} blocks for {} bytes", out.len()));
        }
        pause().await;
    }
    if input.is_empty() { Ok(done) } else { Err(format!("{} bytes follow its only frame", input.len())) }
}

/// A decoder that has all of its buffer. It would panic if there were no memory for that.
fn start(packed: &[u8], header: &Header, size: usize) -> Result<FrameDecoder, String> {
    let needed = header.needed(size);
    let byte = (0..=u8::MAX).find(|byte| window(*byte) >= needed).ok_or("a window too large")?;
    let magic = packed.get(..4).unwrap_or_default();
    let ours = [magic, &[header.descriptor & CHECKSUM, byte]].concat();
    let buffer = usize::try_from(needed).ok().and_then(|needed| needed.checked_add(BUFFER_SLACK));
    let mut probe: Vec<u8> = Vec::new();
    buffer.and_then(|buffer| probe.try_reserve_exact(buffer).ok()).ok_or("no memory for its window")?;
    drop(probe);
    let mut decoder = FrameDecoder::new();
    decoder.set_max_window_size(needed);
    // The first time it takes nothing yet, from the second time on the whole window.
    for _ in 0..2 {
        decoder.init(&ours[..]).map_err(|error| format!("{error}"))?;
    }
    Ok(decoder)
}
