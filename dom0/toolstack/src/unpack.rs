//! From a bzImage to the ELF file inside.
//!
//! A kernel build wraps the ELF file into a loader for bare machines, which a paravirtual domain does not
//! need. The setup header says where the compressed file is; its last four bytes are its unpacked size,
//! whatever the compression. So the output has a known size before we start, and is refused if it is larger
//! than the caller has room for.

use alloc::borrow::Cow;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::pin::pin;
use core::task::{Context, Poll, Waker};

use lzma_rust2::{Read, XzReader};
use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress, inflate_flags};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};
use ruzstd::io::Read as _;

const ELF_MAGIC: &[u8] = b"\x7fELF";
/// Setup header: where it says `HdrS`, the protocol's version, the size of the setup code, the place of the payload.
const SETUP_SECTS: usize = 0x1f1;
const HEADER_MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
/// The first protocol that says where the payload is.
const OLDEST_VERSION: u16 = 0x0208;
/// Bytes any decoder may need for tables of its own.
const SLACK: usize = 4 << 20;
/// The largest block of a legacy lz4 frame, unpacked.
const LZ4_BLOCK: usize = 8 << 20;
/// Bytes unpacked between pauses, or with gzip read, if the format lets us choose.
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

    fn of(payload: &[u8]) -> Option<Self> {
        Self::MAGIC.iter().find(|(_, magic)| payload.starts_with(magic)).map(|(format, _)| *format)
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

/// Why there is no ELF file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UnpackError {
    /// Neither an ELF file nor a bzImage.
    NotAKernel,
    /// A bzImage so old that it does not say where its payload is: its boot protocol.
    OldProtocol(u16),
    /// The file ends before the payload does.
    Truncated {
        /// Bytes the file should have.
        needed: u64,
        /// Bytes it has.
        given: usize,
    },
    /// A compression nobody knows: the first bytes of the payload.
    UnknownCompression([u8; 4]),
    /// A known compression that we cannot undo.
    UnsupportedCompression(Compression),
    /// The unpacked file would be too large.
    TooLarge {
        /// Bytes it claims to have.
        size: usize,
        /// Bytes there is room for.
        limit: usize,
    },
    /// There is no memory to unpack to.
    NoMemory {
        /// Bytes it claims to have.
        size: usize,
    },
    /// The payload cannot be unpacked.
    Corrupt(Compression, String),
    /// The payload unpacks to another number of bytes than it says.
    WrongSize {
        /// Bytes it claims to have.
        claimed: usize,
        /// Bytes it has.
        unpacked: usize,
    },
    /// What comes out is not an ELF file.
    NotElf(Compression),
}

impl fmt::Display for UnpackError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAKernel => write!(f, "neither an ELF file nor a bzImage"),
            Self::OldProtocol(version) => {
                write!(f, "bzImage with boot protocol {version:#06x}, older than {OLDEST_VERSION:#06x}")
            }
            Self::Truncated { needed, given } => write!(f, "bzImage cut off: needs {needed} bytes, has {given}"),
            Self::UnknownCompression(magic) => write!(f, "bzImage with an unknown compression, magic {magic:02x?}"),
            Self::UnsupportedCompression(format) => write!(f, "bzImage compressed with {format}, which we cannot undo"),
            Self::TooLarge { size, limit } => write!(f, "the kernel unpacks to {size} bytes, limit is {limit}"),
            Self::NoMemory { size } => write!(f, "no memory for the {size} bytes the kernel unpacks to"),
            Self::Corrupt(format, why) => write!(f, "the {format} payload of the bzImage is corrupt: {why}"),
            Self::WrongSize { claimed, unpacked } => {
                write!(f, "the payload of the bzImage claims {claimed} bytes and unpacks to {unpacked}")
            }
            Self::NotElf(format) => write!(f, "the {format} payload of the bzImage is not an ELF file"),
        }
    }
}

impl core::error::Error for UnpackError {}

/// The ELF file in `image`, which is a bzImage or already an ELF file. At most `limit` bytes are unpacked;
/// the dictionary of xz and the window of zstd need as many again meanwhile.
///
/// # Errors
/// Says what is wrong with the file. A kernel is refused before unpacking if it is larger than `limit`.
pub fn unpack(image: &[u8], limit: usize) -> Result<Cow<'_, [u8]>, UnpackError> {
    at_once(unpack_within(image, limit, usize::MAX, async || {}))
}

/// The value of a future that never waits for long.
pub fn at_once<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return value;
        }
    }
}

/// As [`unpack`], where `room` bytes can be had for all of it. `pause` is called after every piece.
///
/// # Errors
/// As [`unpack`], and [`UnpackError::NoMemory`] if it takes more than there is room for.
pub async fn unpack_within(
    image: &[u8],
    limit: usize,
    room: usize,
    pause: impl AsyncFn(),
) -> Result<Cow<'_, [u8]>, UnpackError> {
    if image.starts_with(ELF_MAGIC) {
        return Ok(Cow::Borrowed(image));
    }
    let payload = payload(image)?;
    let magic = payload.first_chunk().copied().unwrap_or_default();
    let format = Compression::of(payload).ok_or(UnpackError::UnknownCompression(magic))?;
    let cut = || UnpackError::Corrupt(format, "too short".into());
    let (packed, size) = payload.split_last_chunk::<4>().ok_or_else(cut)?;
    let size = usize::try_from(u32::from_le_bytes(*size)).unwrap_or(usize::MAX);
    if size > limit {
        return Err(UnpackError::TooLarge { size, limit });
    }
    let no_memory = || UnpackError::NoMemory { size };
    // The decoders take their share without asking whether it is there.
    if needs(format, packed, size) > room {
        return Err(no_memory());
    }
    let mut out = Vec::new();
    out.try_reserve_exact(size).map_err(|_| no_memory())?;
    out.resize(size, 0);
    let unpacked = match format {
        Compression::Gzip => gzip(payload, &mut out, &pause).await,
        Compression::Xz => xz(packed, &mut out, limit, &pause).await,
        Compression::Lz4 => lz4(packed, &mut out, &pause).await,
        Compression::Zstd => zstd(packed, &mut out, limit, &pause).await,
        other => return Err(UnpackError::UnsupportedCompression(other)),
    };
    match unpacked.map_err(|why| UnpackError::Corrupt(format, why))? {
        unpacked if unpacked != size => Err(UnpackError::WrongSize { claimed: size, unpacked }),
        _ if !out.starts_with(ELF_MAGIC) => Err(UnpackError::NotElf(format)),
        _ => Ok(Cow::Owned(out)),
    }
}

/// Bytes that unpacking a kernel takes; 0 for what is no bzImage, or a damaged one.
#[must_use]
pub fn room_for(image: &[u8]) -> usize {
    let payload = payload(image).unwrap_or_default();
    let Some((format, (packed, size))) = Compression::of(payload).zip(payload.split_last_chunk::<4>()) else {
        return 0;
    };
    needs(format, packed, usize::try_from(u32::from_le_bytes(*size)).unwrap_or(usize::MAX))
}

/// Bytes for the output, and for what a decoder needs beside it.
fn needs(format: Compression, packed: &[u8], size: usize) -> usize {
    let beside = match format {
        Compression::Xz => xz_dictionary(packed).unwrap_or(0),
        // Its window grows with what has been unpacked, in steps that double it.
        Compression::Zstd => size.saturating_mul(3),
        _ => 0,
    };
    size.saturating_add(beside).saturating_add(SLACK)
}

/// The compressed file with its size at the end.
fn payload(image: &[u8]) -> Result<&[u8], UnpackError> {
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

/// Ten bytes, optional fields by flags, the deflated file, its checksum and size.
async fn gzip(payload: &[u8], out: &mut [u8], pause: &impl AsyncFn()) -> Result<usize, String> {
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

async fn inflate(packed: &[u8], out: &mut [u8], pause: &impl AsyncFn()) -> Result<usize, TINFLStatus> {
    use inflate_flags::{
        TINFL_FLAG_HAS_MORE_INPUT, TINFL_FLAG_IGNORE_ADLER32, TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF,
    };
    let flags = TINFL_FLAG_IGNORE_ADLER32 | TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
    let mut decoder = DecompressorOxide::new();
    let (mut done, mut pieces) = (0, packed.chunks(PIECE).peekable());
    while let Some(piece) = pieces.next() {
        let more = pieces.peek().map_or(0, |_| TINFL_FLAG_HAS_MORE_INPUT);
        let (status, _, written) = decompress(&mut decoder, piece, out, done, flags | more);
        done += written;
        match status {
            TINFLStatus::NeedsMoreInput => pause().await,
            TINFLStatus::Done => return Ok(done),
            failed => return Err(failed),
        }
    }
    Err(TINFLStatus::FailedCannotMakeProgress)
}

/// The CRC of gzip, four bits at a time.
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

/// The size of the dictionary that the first block of an xz file asks for, if it has one. After the file's header of 12
/// bytes comes the block's: its size, flags (2 bits: number of filters less one; then whether sizes follow), sizes,
/// filters (number, bytes of properties, properties).
fn xz_dictionary(packed: &[u8]) -> Option<usize> {
    const LZMA2: u64 = 0x21;
    let mut rest = packed.get(13..)?.iter();
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
            return (bits <= 40).then(|| (2 | usize::from(bits & 1 == 1)) << (bits / 2 + 11));
        }
        rest.nth(usize::try_from(properties).ok()?.checked_sub(1)?)?;
    }
    None
}

/// Kernels use the x86 filter; blocks and checks are the reader's business.
async fn xz(packed: &[u8], out: &mut [u8], limit: usize, pause: &impl AsyncFn()) -> Result<usize, String> {
    // The dictionary is never larger than it needs to be by more than a factor of two, and at least 8 MiB by habit.
    let memory_kb = u32::try_from((2 * limit).max(64 << 20) >> 10).unwrap_or(u32::MAX);
    let mut reader = XzReader::new_mem_limit(packed, false, memory_kb);
    let mut done = 0;
    loop {
        // One byte more than expected shows a payload that is larger than it claims.
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

/// The legacy frame: after the magic number, blocks of up to 8 MiB, each behind its packed size.
async fn lz4(packed: &[u8], out: &mut [u8], pause: &impl AsyncFn()) -> Result<usize, String> {
    let mut rest = packed.get(4..).unwrap_or(&[]);
    let mut done = 0;
    while let Some((len, after)) = rest.split_first_chunk() {
        let len = usize::try_from(u32::from_le_bytes(*len)).unwrap_or(usize::MAX);
        let (block, after) = after.split_at_checked(len).ok_or("block cut off")?;
        let end = out.len().min(done + LZ4_BLOCK);
        let room = out.get_mut(done..end).unwrap_or(&mut []);
        done += lz4_flex::block::decompress_into(block, room).map_err(|error| format!("{error}"))?;
        rest = after;
        pause().await;
    }
    if rest.is_empty() { Ok(done) } else { Err("block size cut off".into()) }
}

async fn zstd(packed: &[u8], out: &mut [u8], limit: usize, pause: &impl AsyncFn()) -> Result<usize, String> {
    let mut decoder = FrameDecoder::new();
    // The highest levels use windows of 128 MiB whatever the size of the file; memory is taken as it fills.
    decoder.set_max_window_size((limit as u64).max(128 << 20));
    let (mut input, mut done) = (packed, 0);
    while !input.is_empty() {
        decoder.init(&mut input).map_err(|error| format!("{error}"))?;
        while !decoder.is_finished() {
            let piece = BlockDecodingStrategy::UptoBytes(PIECE);
            decoder.decode_blocks(&mut input, piece).map_err(|error| format!("{error}"))?;
            done += decoder.read(out.get_mut(done..).unwrap_or_default()).map_err(|error| format!("{error}"))?;
            if decoder.can_collect() != 0 {
                return Err("larger than it claims".into());
            }
            pause().await;
        }
    }
    Ok(done)
}
