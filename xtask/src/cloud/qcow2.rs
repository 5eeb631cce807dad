//! Reading images in QEMU's format qcow2 (QEMU's docs/interop/qcow2.txt), versions 2 and 3, compressed by zlib or not.

use super::image::Content;
use anyhow::{Context, Result, ensure};
use flate2::read::DeflateDecoder;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

/// The bits of an entry that say where a table or a cluster begins.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
/// The cluster is all zeroes, whatever lies where the entry leads.
const ZEROES: u64 = 1;
/// Incompatible features: the reference counts are old, which makes no difference to a reader; the image is damaged; the data
/// are in another file; clusters are compressed in another way.
const DIRTY: u64 = 1;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
/// The maximum number of bytes of the table of tables, as in QEMU.
const LARGEST_TABLE: u64 = 32 << 20;

/// An image.
#[derive(Debug)]
pub(super) struct Qcow2 {
    file: File,
    cluster_bits: u32,
    bytes: u64,
    /// Where the tables of clusters begin.
    tables: Vec<u64>,
    /// The table that was read last, by its place.
    last: (u64, Vec<u64>),
}

impl Qcow2 {
    /// Opens an image of whole tables, and checks that no cluster lies beyond the end of the file.
    ///
    /// # Errors
    /// What is wrong, or cannot be read.
    pub(super) fn open(file: File) -> Result<Self> {
        let mut header = [0; 104];
        let length = file.metadata()?.len();
        file.read_exact_at(&mut header[..72], 0).context("is cut off")?;
        let word = |header: &[u8; 104], at: usize| {
            header.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_be_bytes)
        };
        let version = word(&header, 4) >> 32;
        ensure!(matches!(version, 2 | 3), "has version {version} of qcow2; there are 2 and 3");
        ensure!(
            word(&header, 8) == 0,
            "is the difference to another file, its backing file; `qemu-img convert` makes one image of both"
        );
        if version == 3 {
            file.read_exact_at(&mut header, 0).context("is cut off")?;
            let features = word(&header, 72);
            ensure!(features & CORRUPT == 0, "is marked as damaged");
            ensure!(features & EXTERNAL == 0, "has its data in another file");
            ensure!(features & COMPRESSION == 0, "is compressed by zstd; `qemu-img convert` makes another one");
            ensure!(features & !DIRTY == 0, "has features of qcow2 that are not known here: {features:#x}");
        }
        let cluster_bits = u32::try_from(word(&header, 16) & 0xffff_ffff)?;
        ensure!((9..=21).contains(&cluster_bits), "has clusters of 2^{cluster_bits} bytes, which cannot be");
        ensure!(word(&header, 32) >> 32 == 0, "is encrypted");
        let bytes = word(&header, 24);
        let tables = u64::from(u32::try_from(word(&header, 32) & 0xffff_ffff)?);
        let covered = u128::from(tables) << (2 * cluster_bits - 3);
        let fits = tables * 8 <= LARGEST_TABLE && covered >= u128::from(bytes) && bytes.is_multiple_of(512);
        ensure!(fits && bytes > 0, "has a damaged header");
        let mut image = Self { file, cluster_bits, bytes, tables: Vec::new(), last: (0, Vec::new()) };
        image.tables = image.table(word(&header, 40), tables * 8).context("is cut off")?;
        image.check(length)?;
        Ok(image)
    }

    /// Reads a table of big-endian numbers.
    fn table(&self, at: u64, bytes: u64) -> io::Result<Vec<u64>> {
        let mut table = vec![0; usize::try_from(bytes).map_err(io::Error::other)?];
        self.file.read_exact_at(&mut table, at)?;
        Ok(table.as_chunks().0.iter().map(|entry| u64::from_be_bytes(*entry)).collect())
    }

    /// Whether all tables and clusters begin within the file's `length` bytes.
    fn check(&self, length: u64) -> Result<()> {
        let tables: Vec<u64> = self.tables.iter().map(|entry| entry & OFFSET).filter(|at| *at != 0).collect();
        // Each table has a cluster of its own, so this does not take longer than reading the file.
        ensure!((tables.len() as u64) << self.cluster_bits <= length, "is cut off, or has a damaged table");
        for at in tables {
            let table = self.table(at, 1 << self.cluster_bits).context("is cut off, or has a damaged table")?;
            for entry in table.into_iter().filter(|entry| *entry & (COMPRESSED | OFFSET) != 0) {
                let at = if entry & COMPRESSED == 0 { entry & OFFSET } else { self.compressed(entry).0 };
                ensure!(at < length, "is cut off: it has {length} bytes, and data at {at}");
            }
        }
        Ok(())
    }

    /// Where a compressed cluster lies, and how many bytes it has at most.
    fn compressed(&self, entry: u64) -> (u64, u64) {
        let bits = 62 - (self.cluster_bits - 8);
        let at = entry & ((1 << bits) - 1);
        let sectors = ((entry & !(COMPRESSED | 1 << 63)) >> bits) + 1;
        (at, sectors * 512 - at % 512)
    }

    /// The whole cluster of this number; `None` if it is all zeroes.
    fn cluster(&mut self, number: u64) -> io::Result<Option<Vec<u8>>> {
        let size = 1 << self.cluster_bits;
        let (table, index) = (number >> (self.cluster_bits - 3), number % (size / 8));
        let at = |number: u64, of: &[u64]| usize::try_from(number).ok().and_then(|number| of.get(number).copied());
        let place = at(table, &self.tables).unwrap_or(0) & OFFSET;
        if place == 0 {
            return Ok(None);
        }
        if self.last.0 != place {
            self.last = (place, self.table(place, size)?);
        }
        let entry = at(index, &self.last.1).unwrap_or(0);
        let mut cluster = Vec::new();
        if entry & COMPRESSED != 0 {
            let (at, length) = self.compressed(entry);
            let mut packed = Vec::new();
            // The last one may end with the file.
            Reading { file: &self.file, at }.take(length).read_to_end(&mut packed)?;
            DeflateDecoder::new(&*packed).take(size).read_to_end(&mut cluster)?;
        } else if entry & ZEROES == 0 && entry & OFFSET != 0 {
            Reading { file: &self.file, at: entry & OFFSET }.take(size).read_to_end(&mut cluster)?;
        } else {
            return Ok(None);
        }
        cluster.resize(usize::try_from(size).map_err(io::Error::other)?, 0);
        Ok(Some(cluster))
    }
}

impl Content for Qcow2 {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read(&mut self, mut at: u64, mut into: &mut [u8]) -> io::Result<()> {
        while !into.is_empty() {
            let within = usize::try_from(at % (1 << self.cluster_bits)).map_err(io::Error::other)?;
            let length = into.len().min((1 << self.cluster_bits) - within);
            let (now, rest) = into.split_at_mut(length);
            match self.cluster(at >> self.cluster_bits)? {
                Some(cluster) => now.copy_from_slice(&cluster[within..within + length]),
                None => now.fill(0),
            }
            (into, at) = (rest, at + length as u64);
        }
        Ok(())
    }
}

/// Reads a file from a place on.
struct Reading<'a> {
    file: &'a File,
    at: u64,
}

impl Read for Reading<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let length = self.file.read_at(into, self.at)?;
        self.at += length as u64;
        Ok(length)
    }
}
