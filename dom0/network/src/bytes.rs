//! Numbers in network byte order within the bytes of a frame. Every access is checked.

/// Returns the `N` bytes at `at`; `None` if they are not all there.
pub(crate) fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

/// Returns the byte at `at`; `None` if it is not there.
pub(crate) fn byte(bytes: &[u8], at: usize) -> Option<u8> {
    bytes.get(at).copied()
}

/// Returns the 16-bit number at `at`; `None` if it is not there.
pub(crate) fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    array(bytes, at).map(u16::from_be_bytes)
}

/// Returns the 32-bit number at `at`; `None` if it is not there.
pub(crate) fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    array(bytes, at).map(u32::from_be_bytes)
}

/// Writes `value` at `at`. Returns `None`, and writes nothing, if there is no room.
pub(crate) fn put<const N: usize>(bytes: &mut [u8], at: usize, value: [u8; N]) -> Option<()> {
    *bytes.get_mut(at..)?.first_chunk_mut()? = value;
    Some(())
}

/// Writes a 16-bit number at `at`. Returns `None`, and writes nothing, if there is no room.
pub(crate) fn put16(bytes: &mut [u8], at: usize, value: u16) -> Option<()> {
    put(bytes, at, value.to_be_bytes())
}
