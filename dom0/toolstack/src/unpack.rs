//! Finds the ELF file in a bzImage or in a gzip file.
//!
//! A kernel build wraps the ELF file into a loader for bare machines, which a paravirtual domain does not
//! need. The setup header tells where the compressed file is. The last four bytes of that file are its unpacked size,
//! whatever the compression; this holds for a gzip file, too. So the size of the output is known before unpacking, and
//! a kernel larger than the caller has room for is refused.
//!
//! What a decoder allocates is bounded by the size of the file and the unpacked size, whatever else the file claims:
//! windows are no larger than the output needs, and parts whose handling costs more than their output are limited in
//! number.

mod gzip;
mod lz4;
mod xz;
mod zstd;

use alloc::borrow::Cow;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::pin::pin;
use core::task::{Context, Poll, Waker};

const ELF_MAGIC: &[u8] = b"\x7fELF";
/// Offsets in the setup header: size of the setup code, `HdrS`, protocol version, place of the payload.
const SETUP_SECTS: usize = 0x1f1;
const HEADER_MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
/// The first protocol version that tells where the payload is.
const OLDEST_VERSION: u16 = 0x0208;
/// Most bytes that any decoder needs for its own tables.
const SLACK: usize = 4 << 20;
/// Bytes read or unpacked between two pauses, if the format allows it.
const PIECE: usize = 64 << 10;

/// How a kernel may be compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "names of formats")]
pub enum Compression {
    Gzip,
    Bzip2,
    Xz,
    Lzma,
    Lzo,
    Lz4,
    Zstd,
}

impl Compression {
    const MAGIC: [(Self, &'static [u8]); 7] = [
        (Self::Gzip, &[0x1f, 0x8b]),
        (Self::Bzip2, b"BZh"),
        (Self::Xz, &[0xfd, b'7', b'z', b'X', b'Z', 0]),
        (Self::Lzma, &[0x5d, 0]),
        (Self::Lzo, &[0x89, b'L', b'Z', b'O', 0]),
        (Self::Lz4, &[2, 0x21, 0x4c, 0x18]),
        (Self::Zstd, &[0x28, 0xb5, 0x2f, 0xfd]),
    ];

    const fn is_supported(self) -> bool {
        matches!(self, Self::Gzip | Self::Xz | Self::Lz4 | Self::Zstd)
    }

    /// The compression of `file`, recognized by its first bytes.
    pub(crate) fn of(file: &[u8]) -> Option<Self> {
        Self::MAGIC.iter().find(|(_, magic)| file.starts_with(magic)).map(|(format, _)| *format)
    }

    /// Bytes that `file` unpacks to, if the file tells it.
    pub(crate) fn unpacked_size(self, file: &[u8]) -> Option<u64> {
        match self {
            Self::Gzip => gzip::unpacked_size(file),
            Self::Xz => xz::unpacked_size(file),
            Self::Zstd => zstd::unpacked_size(file),
            _ => None,
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gzip => "gzip",
            Self::Bzip2 => "bzip2",
            Self::Xz => "xz",
            Self::Lzma => "lzma",
            Self::Lzo => "lzo",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        })
    }
}

/// What kind of file is unpacked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packed {
    /// The payload of a bzImage.
    Payload(Compression),
    /// A file that is compressed with gzip as a whole.
    File,
}

impl Packed {
    const fn compression(self) -> Compression {
        match self {
            Self::Payload(format) => format,
            Self::File => Compression::Gzip,
        }
    }
}

impl fmt::Display for Packed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Payload(format) => write!(f, "{format} payload of the bzImage"),
            Self::File => write!(f, "gzip'ed file"),
        }
    }
}

/// Why there is no ELF file in an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UnpackError {
    /// Neither an ELF file, nor one compressed with gzip, nor a bzImage.
    NotAKernel,
    /// A bzImage whose boot protocol (the number) is too old to tell where its payload is.
    OldProtocol(u16),
    /// The file ends before the payload does.
    Truncated {
        /// Bytes the file should have.
        needed: u64,
        /// Bytes it has.
        given: usize,
    },
    /// An unknown compression: the first bytes of the payload.
    UnknownCompression([u8; 4]),
    /// A known compression that is not supported here.
    UnsupportedCompression(Compression),
    /// The unpacked file would be too large.
    TooLarge {
        /// The size it claims, in bytes.
        size: usize,
        /// The most bytes allowed.
        limit: usize,
    },
    /// There is too little memory to unpack it.
    NoMemory {
        /// The size it claims, in bytes.
        size: usize,
    },
    /// The decoder failed; why.
    Corrupt(Packed, String),
    /// It unpacks to another size than it claims.
    WrongSize {
        /// What was unpacked.
        packed: Packed,
        /// The size it claims, in bytes.
        claimed: usize,
        /// The size it has, in bytes.
        unpacked: usize,
    },
    /// The unpacked file is not an ELF file.
    NotElf(Packed),
}

impl fmt::Display for UnpackError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAKernel => write!(f, "neither an ELF file, gzip'ed or not, nor a bzImage"),
            Self::OldProtocol(version) => {
                write!(f, "bzImage with boot protocol {version:#06x}, older than {OLDEST_VERSION:#06x}")
            }
            Self::Truncated { needed, given } => write!(f, "bzImage cut off: needs {needed} bytes, has {given}"),
            Self::UnknownCompression(magic) => write!(f, "bzImage with an unknown compression, magic {magic:02x?}"),
            Self::UnsupportedCompression(format) => write!(f, "bzImage compressed with {format}, which we cannot undo"),
            Self::TooLarge { size, limit } => write!(f, "the kernel unpacks to {size} bytes, limit is {limit}"),
            Self::NoMemory { size } => write!(f, "no memory for the {size} bytes the kernel unpacks to"),
            Self::Corrupt(packed, why) => write!(f, "the {packed} is corrupt: {why}"),
            Self::WrongSize { packed, claimed, unpacked } => {
                write!(f, "the {packed} claims {claimed} bytes and unpacks to {unpacked}")
            }
            Self::NotElf(packed) => write!(f, "the {packed} is not an ELF file"),
        }
    }
}

impl core::error::Error for UnpackError {}

/// Returns the ELF file in `image`: an ELF file, one compressed with gzip, or a bzImage. At most `limit` bytes are
/// unpacked; the dictionary of xz and the window of zstd need up to three times as much again meanwhile.
///
/// # Errors
/// What is wrong with the file. A kernel larger than `limit` is refused before it is unpacked.
pub fn unpack(image: &[u8], limit: usize) -> Result<Cow<'_, [u8]>, UnpackError> {
    at_once(unpack_within(image, limit, usize::MAX, async || {}))
}

/// Polls a future until it is ready, and returns its value. For futures that never wait for long.
pub fn at_once<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return value;
        }
    }
}

/// Like [`unpack`], but all allocations together take at most `room` bytes, and `pause` is called after every piece.
///
/// # Errors
/// As [`unpack`], and [`UnpackError::NoMemory`] if unpacking takes more than `room`.
pub async fn unpack_within(
    image: &[u8],
    limit: usize,
    room: usize,
    pause: impl AsyncFn(),
) -> Result<Cow<'_, [u8]>, UnpackError> {
    if image.starts_with(ELF_MAGIC) {
        return Ok(Cow::Borrowed(image));
    }
    let (packed, payload) = payload(image)?;
    let cut = || UnpackError::Corrupt(packed, "too short".into());
    let (content, size) = payload.split_last_chunk::<4>().ok_or_else(cut)?;
    let size = usize::try_from(u32::from_le_bytes(*size)).unwrap_or(usize::MAX);
    if size > limit {
        return Err(UnpackError::TooLarge { size, limit });
    }
    let format = packed.compression();
    if !format.is_supported() {
        return Err(UnpackError::UnsupportedCompression(format));
    }
    let no_memory = || UnpackError::NoMemory { size };
    // The decoders allocate without checking whether there is memory.
    if needs(format, content, size) > room {
        return Err(no_memory());
    }
    let mut out = Vec::new();
    out.try_reserve_exact(size).map_err(|_| no_memory())?;
    out.resize(size, 0);
    let unpacked = match format {
        Compression::Gzip => gzip::unpack(payload, &mut out, &pause).await,
        Compression::Xz => xz::unpack(content, &mut out, &pause).await,
        Compression::Lz4 => lz4::unpack(content, &mut out, &pause).await,
        Compression::Zstd => zstd::unpack(content, &mut out, &pause).await,
        other => return Err(UnpackError::UnsupportedCompression(other)),
    };
    match unpacked.map_err(|why| UnpackError::Corrupt(packed, why))? {
        unpacked if unpacked != size => Err(UnpackError::WrongSize { packed, claimed: size, unpacked }),
        _ if !out.starts_with(ELF_MAGIC) => Err(UnpackError::NotElf(packed)),
        _ => Ok(Cow::Owned(out)),
    }
}

/// Bytes that unpacking a kernel takes; 0 if it need not be unpacked or is damaged.
#[must_use]
pub fn room_for(image: &[u8]) -> usize {
    let found = payload(image).ok().and_then(|(packed, payload)| Some((packed, payload.split_last_chunk::<4>()?)));
    found.map_or(0, |(packed, (content, size))| {
        needs(packed.compression(), content, usize::try_from(u32::from_le_bytes(*size)).unwrap_or(usize::MAX))
    })
}

/// Bytes for the output, and for what a decoder needs in addition.
fn needs(format: Compression, content: &[u8], size: usize) -> usize {
    let beside = match format {
        Compression::Xz => xz::beside(content, size),
        Compression::Zstd => zstd::beside(content, size),
        _ => 0,
    };
    size.saturating_add(beside).saturating_add(SLACK)
}

/// The compressed file in `image`, with its unpacked size in the last four bytes.
fn payload(image: &[u8]) -> Result<(Packed, &[u8]), UnpackError> {
    if Compression::of(image) == Some(Compression::Gzip) {
        return Ok((Packed::File, image));
    }
    let payload = bzimage_payload(image)?;
    let magic = payload.first_chunk().copied().unwrap_or_default();
    let format = Compression::of(payload).ok_or(UnpackError::UnknownCompression(magic))?;
    Ok((Packed::Payload(format), payload))
}

/// The compressed file in a bzImage.
fn bzimage_payload(image: &[u8]) -> Result<&[u8], UnpackError> {
    if bytes::<4>(image, HEADER_MAGIC) != Some(*b"HdrS") {
        return Err(UnpackError::NotAKernel);
    }
    let truncated = |needed| UnpackError::Truncated { needed, given: image.len() };
    let header_cut = || truncated(PAYLOAD_LENGTH as u64 + 4);
    let version = bytes(image, VERSION).map(u16::from_le_bytes).ok_or_else(header_cut)?;
    if version < OLDEST_VERSION {
        return Err(UnpackError::OldProtocol(version));
    }
    let word = |at| bytes(image, at).map(u32::from_le_bytes).map(u64::from).ok_or_else(header_cut);
    let sectors = match image.get(SETUP_SECTS) {
        None | Some(0) => 4,
        Some(sectors) => u64::from(*sectors),
    };
    let start = (sectors + 1) * 512 + word(PAYLOAD_OFFSET)?;
    let end = start + word(PAYLOAD_LENGTH)?;
    let range = usize::try_from(start).ok().zip(usize::try_from(end).ok());
    range.and_then(|(start, end)| image.get(start..end)).ok_or_else(|| truncated(end))
}

fn bytes<const N: usize>(image: &[u8], at: usize) -> Option<[u8; N]> {
    image.get(at..)?.first_chunk().copied()
}
