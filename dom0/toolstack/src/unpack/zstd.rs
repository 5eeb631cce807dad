//! zstd: one frame. Its header is read here, since it determines how much memory the decoder takes.
//!
//! The highest levels ask for a window of 128 MiB whatever the size of the file. But no reference reaches back farther
//! than the file's unpacked size, so the decoder is given another header, with the window that is really needed.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};
use ruzstd::io::Read;

/// The least window that the decoder is given. With at least this window, its buffer (allocated for a power of two) has
/// room for the window and a block, and never grows.
const LEAST_WINDOW: u64 = 1 << 20;
/// Bytes of the decoder's buffer in addition to the window.
const BUFFER_SLACK: usize = (256 << 10) + 1;
/// Bytes of a kernel for which one more block is allowed: each block may make the decoder fill all its tables.
const PER_BLOCK: usize = 256;
/// Blocks allowed in any kernel.
const FREE_BLOCKS: usize = 64;
/// The flag for a checksum after the content.
const CHECKSUM: u8 = 4;

/// The header of a frame.
struct Header {
    /// Bytes of the header.
    len: usize,
    descriptor: u8,
    /// How far back the frame may refer, in bytes.
    window: u64,
    /// Bytes that the frame unpacks to, if the header tells it.
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
        // A size of two bytes is stored less 256, since smaller sizes fit in one byte.
        let content = u64::from_le_bytes(content) + if content_len == 2 { 256 } else { 0 };
        let content = (content_len > 0).then_some(content);
        let window = content.filter(|_| single_segment).or_else(|| packed.get(5).map(|byte| window(*byte)))?;
        Some(Self { len: at + content_len, descriptor, window, content })
    }

    /// The window that a kernel of `size` bytes needs, in bytes.
    fn needed(&self, size: usize) -> u64 {
        self.window.min(size as u64).max(LEAST_WINDOW).next_power_of_two()
    }
}

/// The window that a byte of the header stands for: five bits are an exponent of two, three bits count eighths.
fn window(byte: u8) -> u64 {
    (8 + u64::from(byte & 7)) << (7 + (byte >> 3))
}

/// Bytes that the decoder needs in addition to the output of `size` bytes.
pub(super) fn beside(packed: &[u8], size: usize) -> usize {
    let window = Header::of(packed).map_or(size as u64, |header| header.needed(size));
    usize::try_from(window).unwrap_or(usize::MAX).saturating_add(BUFFER_SLACK)
}

/// Bytes that a file unpacks to, if its header tells it.
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

/// Makes a decoder whose buffer is allocated. The decoder would panic if there were no memory for it, so this is
/// checked before.
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
    // The first `init` allocates nothing, the second allocates the whole window.
    for _ in 0..2 {
        decoder.init(&ours[..]).map_err(|error| format!("{error}"))?;
    }
    Ok(decoder)
}
