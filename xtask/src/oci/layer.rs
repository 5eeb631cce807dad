//! Layers, unpacked: each becomes a tar file of its own, whose digest is known to be right.

use super::layout::{Descriptor, Digest, Hashing, Layout};
use anyhow::{Context, Result, bail, ensure};
use flate2::read::MultiGzDecoder;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};
use std::fmt::Display;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::Path;

/// The most bytes that all layers of an image unpack to.
pub(super) const MAX_BYTES: u64 = 64 << 30;

/// How a layer is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Packing {
    Plain,
    Gzip,
    Zstd,
}

impl Packing {
    /// What the type of a layer says.
    fn of(media_type: &str) -> Result<Self> {
        let oci = ["application/vnd.oci.image.layer.v1.", "application/vnd.oci.image.layer.nondistributable.v1."];
        let docker = ["application/vnd.docker.image.rootfs.diff.", "application/vnd.docker.image.rootfs.foreign.diff."];
        let kind = oci.into_iter().chain(docker).find_map(|prefix| media_type.strip_prefix(prefix));
        Ok(match kind {
            Some("tar") => Self::Plain,
            Some("tar+gzip" | "tar.gzip") => Self::Gzip,
            Some("tar+zstd" | "tar.zstd") => Self::Zstd,
            _ => bail!("a layer of the type {media_type:?} is not supported"),
        })
    }
}

/// Unpacks a layer to the file `target`. `digest` is that of the unpacked layer, and `left` the most bytes it may have.
/// Returns how many it has.
pub(super) fn unpack(layout: &Layout, layer: &Descriptor, digest: &Digest, left: u64, target: &Path) -> Result<u64> {
    let at = || format!("the layer {}", layer.digest());
    let packing = Packing::of(&layer.media_type).with_context(at)?;
    let blob = BufReader::new(layout.blob(layer).with_context(at)?);
    let plain: Box<dyn Read> = match packing {
        Packing::Plain => Box::new(blob),
        Packing::Gzip => Box::new(MultiGzDecoder::new(blob)),
        Packing::Zstd => Box::new(Zstd::new(blob)),
    };
    let mut hashing = Hashing::new(plain.take(left.saturating_add(1)));
    let mut file = File::create(target)?;
    let bytes = copy(&mut hashing, &mut file).with_context(at)?;
    ensure!(bytes <= left, "{}: the image unpacks to more than {} GiB", at(), MAX_BYTES >> 30);
    let found = hashing.digest();
    ensure!(found == *digest, "{}: unpacked it has the digest {found}, and should have {digest}", at());
    Ok(bytes)
}

/// Copies everything, and tells apart what cannot be read and what cannot be written.
fn copy(from: &mut impl Read, to: &mut impl Write) -> Result<u64> {
    let (mut piece, mut bytes) = (vec![0; 256 << 10], 0);
    loop {
        let count = match from.read(&mut piece) {
            Ok(0) => return Ok(bytes),
            Ok(count) => count,
            Err(why) if why.kind() == io::ErrorKind::Interrupted => continue,
            Err(why) => bail!("cannot be unpacked: {why}"),
        };
        to.write_all(&piece[..count]).context("cannot write what it unpacks to")?;
        bytes += count as u64;
    }
}

/// A reader of zstd: frames, one behind the other, of which some are to be skipped.
struct Zstd<R> {
    source: Source<R>,
    decoder: FrameDecoder,
}

/// The decoder has a trait of its own for what it reads.
struct Source<R>(R);

impl<R: Read> ruzstd::io::Read for Source<R> {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, ruzstd::io::Error> {
        self.0.read(buffer).map_err(|_| ruzstd::io::Error::from(ruzstd::io::ErrorKind::Other))
    }
}

impl<R> Zstd<R> {
    fn new(source: R) -> Self {
        Self { source: Source(source), decoder: FrameDecoder::new() }
    }
}

fn damaged(why: impl Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.to_string())
}

impl<R: BufRead> Read for Zstd<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.decoder.can_collect() == 0 {
            if !self.decoder.is_finished() {
                let strategy = BlockDecodingStrategy::UptoBlocks(1);
                self.decoder.decode_blocks(&mut self.source, strategy).map_err(damaged)?;
            } else if self.source.0.fill_buf()?.is_empty() {
                return Ok(0);
            } else {
                self.begin()?;
            }
        }
        ruzstd::io::Read::read(&mut self.decoder, buffer).map_err(damaged)
    }
}

impl<R: BufRead> Zstd<R> {
    /// Begins the next frame, or skips it.
    fn begin(&mut self) -> io::Result<()> {
        match self.decoder.reset(&mut self.source) {
            Ok(()) => Ok(()),
            Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame { length, .. })) => {
                let length = u64::from(length);
                let skipped = io::copy(&mut (&mut self.source.0).take(length), &mut io::sink())?;
                if skipped == length { Ok(()) } else { Err(damaged("cut off")) }
            }
            Err(why) => Err(damaged(why)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};

    #[test]
    fn frames_of_zstd_follow_each_other() {
        let text: Vec<u8> = (0..300_000_u32).flat_map(|number| number.to_string().into_bytes()).collect();
        let frame = |text: &[u8]| compress_to_vec(text, CompressionLevel::Fastest);
        let skipped = [&[0x53, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"abc"].concat();
        let (one, two) = text.split_at(100_000);
        let packed = [frame(one), skipped, frame(two)].concat();
        let mut out = Vec::new();
        Zstd::new(&packed[..]).read_to_end(&mut out).unwrap();
        assert!(out == text);
        for length in [1, 9, packed.len() / 2, packed.len() - 1] {
            let why = Zstd::new(&packed[..length]).read_to_end(&mut Vec::new());
            assert!(why.is_err(), "{length} bytes are a layer");
        }
    }

    #[test]
    fn the_type_says_how_a_layer_is_packed() {
        let packing = |kind: &str| Packing::of(kind).map_err(|why| why.to_string());
        assert_eq!(packing("application/vnd.oci.image.layer.v1.tar"), Ok(Packing::Plain));
        assert_eq!(packing("application/vnd.oci.image.layer.v1.tar+zstd"), Ok(Packing::Zstd));
        assert_eq!(packing("application/vnd.docker.image.rootfs.diff.tar.gzip"), Ok(Packing::Gzip));
        for kind in ["", "application/vnd.oci.image.layer.v1.tar+gzip+encrypted", "text/plain"] {
            assert!(packing(kind).unwrap_err().contains("is not supported"), "{kind}");
        }
    }
}
