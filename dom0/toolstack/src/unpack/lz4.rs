//! lz4, in its legacy frame format.

use alloc::format;
use alloc::string::String;

/// Bytes of the largest block, unpacked.
const BLOCK: usize = 8 << 20;

/// Unpacks a file: after the magic number come blocks, each after its packed size. The window is the output itself.
pub(super) async fn unpack(packed: &[u8], out: &mut [u8], pause: &impl AsyncFn()) -> Result<usize, String> {
    let mut rest = packed.get(4..).unwrap_or(&[]);
    let mut done = 0;
    while let Some((len, after)) = rest.split_first_chunk() {
        let len = usize::try_from(u32::from_le_bytes(*len)).unwrap_or(usize::MAX);
        let (block, after) = after.split_at_checked(len).ok_or("block cut off")?;
        let end = out.len().min(done + BLOCK);
        let room = out.get_mut(done..end).unwrap_or(&mut []);
        done += lz4_flex::block::decompress_into(block, room).map_err(|error| format!("{error}"))?;
        rest = after;
        pause().await;
    }
    if rest.is_empty() { Ok(done) } else { Err("block size cut off".into()) }
}
