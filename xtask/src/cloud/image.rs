//! What is on the disk of an image: its partitions, and the ext4 file systems on them.

use super::qcow2::Qcow2;
use crate::disk::SECTOR;
use ::disk::Shape;
use ::disk::table::{NoTable, Reader};
use anyhow::{Context, Result, anyhow, ensure};
use ext4_view::{Ext4, Ext4Read};
use std::cell::RefCell;
use std::error::Error;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::rc::Rc;

/// The content of a disk.
pub(super) trait Content {
    /// Its size.
    fn bytes(&self) -> u64;

    /// Reads all of `into` from a place on.
    fn read(&mut self, at: u64, into: &mut [u8]) -> io::Result<()>;
}

impl Content for File {
    fn bytes(&self) -> u64 {
        self.metadata().map_or(0, |metadata| metadata.len())
    }

    fn read(&mut self, at: u64, into: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(into, at)
    }
}

/// A disk that several file systems are read from.
#[derive(Clone)]
pub(super) struct Image(Rc<RefCell<dyn Content>>);

/// A part of a disk: partition `number`, or the whole disk without a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) number: Option<u32>,
    /// Bytes.
    at: u64,
    bytes: u64,
}

impl Part {
    /// The device's name in a guest whose disk is `disk`.
    pub(super) fn device(&self, disk: &str) -> String {
        match self.number {
            Some(number) if disk.ends_with(|c: char| c.is_ascii_digit()) => format!("/dev/{disk}p{number}"),
            Some(number) => format!("/dev/{disk}{number}"),
            None => format!("/dev/{disk}"),
        }
    }

    pub(super) fn name(&self) -> String {
        self.number.map_or_else(|| "its file system".into(), |number| format!("partition {number}"))
    }
}

impl Image {
    /// Opens an image, raw or qcow2.
    ///
    /// # Errors
    /// What is wrong with a qcow2 file.
    pub(super) fn open(file: File, qcow2: bool) -> Result<Self> {
        Ok(Self(if qcow2 { Rc::new(RefCell::new(Qcow2::open(file)?)) } else { Rc::new(RefCell::new(file)) }))
    }

    fn read(&self, at: u64, bytes: usize) -> io::Result<Vec<u8>> {
        let mut content = vec![0; bytes];
        self.0.borrow_mut().read(at, &mut content)?;
        Ok(content)
    }

    /// The partitions, or the whole disk if it has no table.
    ///
    /// # Errors
    /// A table that is damaged.
    pub(super) fn parts(&self) -> Result<Vec<Part>> {
        let bytes = self.0.borrow().bytes();
        let whole = Part { number: None, at: 0, bytes };
        // A file system leaves its first two sectors alone, so there may be something that looks like a table.
        if self.is_ext4(&whole) {
            return Ok(vec![whole]);
        }
        let shape = Shape {
            sectors: bytes / SECTOR,
            block_bytes: 512,
            physical_bytes: 512,
            read_only: true,
            volatile: false,
            discard: None,
        };
        let mut reader = Reader::new(shape).map_err(|why| anyhow!("{why}"))?;
        while let Some((first, sectors)) = reader.wants() {
            let bytes = usize::try_from(u64::from(sectors) * SECTOR)?;
            reader.give(&self.read(first * SECTOR, bytes).unwrap_or_default());
        }
        let table = match reader.finish() {
            Ok(table) => table,
            Err(why @ NoTable::Missing) => return Err(anyhow!("{why}, and is no ext4 file system")),
            Err(why) => return Err(anyhow!("{why}: is the file complete?")),
        };
        let mut parts = Vec::new();
        for number in table.numbers() {
            let interval = table.partition(number).map_err(|why| anyhow!("partition {number}: {why}"))?;
            parts.push(Part { number: Some(number), at: interval.first * SECTOR, bytes: interval.sectors * SECTOR });
        }
        ensure!(!parts.is_empty(), "the partition table is empty");
        Ok(parts)
    }

    fn is_ext4(&self, part: &Part) -> bool {
        part.bytes > 4096 && self.read(part.at + 1024 + 56, 2).is_ok_and(|magic| magic == [0x53, 0xef])
    }

    /// The file system of a part; `None` if it is another one than ext2, ext3 or ext4.
    ///
    /// # Errors
    /// What is wrong with the file system.
    pub(super) fn file_system(&self, part: &Part) -> Result<Option<Ext4>> {
        if !self.is_ext4(part) {
            return Ok(None);
        }
        let block = self.read(part.at + 1024, 1024)?;
        let number =
            |at: usize| block.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes);
        // Below 2^32 blocks, the upper half of their number is 0, or means nothing.
        let upper = if number(0x60) & 0x80 == 0 { 0 } else { u64::from(number(0x150)) };
        let blocks = upper << 32 | u64::from(number(4));
        let bytes = u128::from(blocks) << (10 + number(24).min(16));
        ensure!(
            bytes <= u128::from(part.bytes),
            "{} has {} bytes, and its file system {bytes}: it is cut off",
            part.name(),
            part.bytes
        );
        let slice = Slice { image: self.clone(), part: part.clone() };
        let system = Ext4::load(Box::new(slice)).map_err(|why| anyhow!("{why}"));
        system.map(Some).with_context(|| format!("{} cannot be read", part.name()))
    }
}

/// A part as the file system reads it.
struct Slice {
    image: Image,
    part: Part,
}

impl Ext4Read for Slice {
    fn read(&mut self, start: u64, into: &mut [u8]) -> Result<(), Box<dyn Error + Send + Sync>> {
        let end = start.checked_add(into.len() as u64);
        if end.is_none_or(|end| end > self.part.bytes) {
            return Err("beyond the end".into());
        }
        Ok(self.image.0.borrow_mut().read(self.part.at + start, into)?)
    }
}
