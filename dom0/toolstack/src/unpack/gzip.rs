//! gzip: a compression for the payload of a bzImage, or for an ELF file by itself.

use alloc::format;
use alloc::string::String;

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress_with_limit, inflate_flags};

use super::PIECE;

/// Unpacks a gzip file: ten bytes, optional fields according to flags, the deflated data, their checksum and size.
pub(super) async fn unpack(payload: &[u8], out: &mut [u8], pause: &impl AsyncFn()) -> Result<usize, String> {
    const CHECKSUM: u8 = 2;
    const EXTRA: u8 = 4;
    const NAME: u8 = 8;
    const COMMENT: u8 = 16;
    let header = || -> Option<&[u8]> {
        let (fixed, mut rest) = payload.split_first_chunk::<10>()?;
        let flags = fixed[3];
        if flags & EXTRA != 0 {
            let (len, extra) = rest.split_first_chunk()?;
            rest = extra.get(usize::from(u16::from_le_bytes(*len))..)?;
        }
        for _ in 0..(flags & (NAME | COMMENT)).count_ones() {
            let end = rest.iter().position(|byte| *byte == 0)?;
            rest = rest.get(end + 1..)?;
        }
        rest.get(usize::from(flags & CHECKSUM)..)
    };
    let rest = header().ok_or("header cut off")?;
    let (rest, checksum) =
        rest.split_last_chunk::<8>().map(|(rest, end)| (rest, [end[0], end[1], end[2], end[3]])).ok_or("cut off")?;
    let size = inflate(rest, out, pause).await.map_err(|status| format!("{status:?}"))?;
    let crc = crc32(out.get(..size).unwrap_or(out));
    if crc == u32::from_le_bytes(checksum) { Ok(size) } else { Err("wrong checksum".into()) }
}

/// Returns the size in the file's last word, if it is plausible: a file hardly grows, and shrinks at most a
/// thousandfold. An implausible word means that padding or another file follows, or that the size has more than 32
/// bits.
pub(super) fn unpacked_size(file: &[u8]) -> Option<u64> {
    let (_, size) = file.split_last_chunk::<4>()?;
    let size = u64::from(u32::from_le_bytes(*size));
    let len = file.len() as u64;
    (len / 2..=len * 1100).contains(&size).then_some(size)
}

/// Inflates `packed`, with at most one piece read and written between two pauses. The window is the output itself.
async fn inflate(packed: &[u8], out: &mut [u8], pause: &impl AsyncFn()) -> Result<usize, TINFLStatus> {
    use inflate_flags::{
        TINFL_FLAG_HAS_MORE_INPUT, TINFL_FLAG_IGNORE_ADLER32, TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF,
    };
    let flags = TINFL_FLAG_IGNORE_ADLER32 | TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
    let mut decoder = DecompressorOxide::new();
    let (mut done, mut rest) = (0, packed);
    loop {
        let piece = rest.get(..PIECE).unwrap_or(rest);
        let more = if piece.len() < rest.len() { TINFL_FLAG_HAS_MORE_INPUT } else { 0 };
        let (status, read, written) = decompress_with_limit(&mut decoder, piece, out, done, PIECE, flags | more);
        done += written;
        rest = rest.get(read..).unwrap_or_default();
        match status {
            TINFLStatus::NeedsMoreInput => {}
            TINFLStatus::HasMoreOutput if written > 0 => {}
            TINFLStatus::Done => return Ok(done),
            failed => return Err(failed),
        }
        pause().await;
    }
}

/// The CRC-32 of gzip, computed four bits at a time.
fn crc32(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 16] = {
        let mut table = [0; 16];
        let mut i = 0u32;
        while i < 16 {
            let mut crc = i;
            let mut bit = 0;
            while bit < 4 {
                crc = if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
                bit += 1;
            }
            table[i as usize] = crc;
            i += 1;
        }
        table
    };
    let nibble = |crc: u32| crc >> 4 ^ TABLE[(crc & 15) as usize];
    !bytes.iter().fold(u32::MAX, |crc, byte| nibble(nibble(crc ^ u32::from(*byte))))
}
