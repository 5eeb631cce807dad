//! The files of an image as one archive, in which each path is one of real folders, and each file has its final content.

use super::tree::{Id, Kind, Node, ROOT, Tree};
use anyhow::{Context, Result, ensure};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use tar::{Builder, EntryType, Header};

/// Bytes of a path that a header has room for.
const SHORT: usize = 100;
/// The most bytes of a path.
const MAX_PATH: usize = 4000;
/// Bytes of a block of the file system.
const BLOCK: u64 = 4096;

/// What the file system of an image needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Needs {
    /// Files of all kinds.
    pub(super) files: u64,
    /// Bytes of whole blocks with content.
    pub(super) bytes: u64,
    /// Devices that were left out.
    pub(super) devices: u64,
}

/// Writes the archive of the files in a tree, and counts what they need.
pub(super) struct Writer<'a, W: Write> {
    tree: &'a Tree,
    /// The unpacked layers.
    layers: &'a mut [File],
    /// Whether devices are left out, as who unpacks the archive may make none.
    without_devices: bool,
    out: Builder<W>,
    /// The first paths of files, for those with several.
    paths: HashMap<Id, Vec<u8>>,
    needs: Needs,
}

/// Counts what a file system needs for the files of a tree.
pub(super) fn needs(tree: &Tree, without_devices: bool) -> Result<Needs> {
    let mut writer = Writer::new(tree, &mut [], without_devices, io::sink());
    writer.each(ROOT, b".", &mut |_, _| Ok(()))?;
    Ok(writer.needs)
}

impl<'a, W: Write> Writer<'a, W> {
    pub(super) fn new(tree: &'a Tree, layers: &'a mut [File], without_devices: bool, out: W) -> Self {
        let (out, paths, needs) = (Builder::new(out), HashMap::new(), Needs::default());
        Self { tree, layers, without_devices, out, paths, needs }
    }

    /// Writes the whole archive.
    pub(super) fn write(mut self) -> Result<()> {
        self.each(ROOT, b".", &mut |writer, (id, path)| writer.file(id, path))?;
        self.out.into_inner()?.flush()?;
        Ok(())
    }

    /// Calls `act` with each file that is not left out, a folder before what is in it.
    fn each(&mut self, id: Id, path: &[u8], act: &mut Act<'_, 'a, W>) -> Result<()> {
        ensure!(path.len() <= MAX_PATH, "a path of {} bytes: {:?}", path.len(), String::from_utf8_lossy(path));
        let node = self.tree.node(id);
        let known = self.paths.contains_key(&id);
        match &node.kind {
            Kind::Device(..) if self.without_devices => {
                self.needs.devices += 1;
                return Ok(());
            }
            Kind::File { size, .. } if !known => self.needs.bytes += size.next_multiple_of(BLOCK),
            Kind::Link(target) if !known => self.needs.bytes += (target.len() as u64 / 60) * BLOCK,
            // A block at least, and names to which their lengths belong.
            Kind::Folder(entries) => {
                let names: usize = entries.keys().map(|name| 12 + name.len()).sum();
                self.needs.bytes += 2 * (names as u64).next_multiple_of(BLOCK) + BLOCK;
            }
            _ => {}
        }
        self.needs.files += u64::from(!known);
        self.needs.bytes += if node.attributes.is_empty() { 0 } else { BLOCK };
        act(self, (id, path))?;
        self.paths.entry(id).or_insert_with(|| path.to_vec());
        if let Kind::Folder(entries) = &node.kind {
            for (name, entry) in entries {
                self.each(entry.id, &[path, b"/", name].concat(), act)?;
            }
        }
        Ok(())
    }

    /// Writes a file of any kind.
    fn file(&mut self, id: Id, path: &[u8]) -> Result<()> {
        let node = self.tree.node(id);
        let mut header = Header::new_gnu();
        header.set_mode(node.mode);
        header.set_uid(node.uid.into());
        header.set_gid(node.gid.into());
        header.set_mtime(node.mtime);
        header.set_size(0);
        let first = self.paths.get(&id).cloned();
        if first.is_none() && !node.attributes.is_empty() {
            self.attributes(node)?;
        }
        let link = first.as_deref().or(match &node.kind {
            Kind::Link(target) => Some(target),
            _ => None,
        });
        if let Some(link) = link {
            self.name(&mut header, EntryType::GNULongLink, link)?;
        }
        self.name(&mut header, EntryType::GNULongName, path)?;
        let kind = match &node.kind {
            _ if first.is_some() => EntryType::Link,
            Kind::Folder(_) => EntryType::Directory,
            Kind::Link(_) => EntryType::Symlink,
            Kind::Pipe => EntryType::Fifo,
            Kind::Device(character, major, minor) => {
                header.set_device_major(*major)?;
                header.set_device_minor(*minor)?;
                if *character { EntryType::Char } else { EntryType::Block }
            }
            Kind::File { layer, at, size } => {
                header.set_size(*size);
                header.set_entry_type(EntryType::Regular);
                header.set_cksum();
                let file = self.layers.get_mut(*layer).context("no such layer")?;
                file.seek(SeekFrom::Start(*at))?;
                return Ok(self.out.append(&header, file.take(*size))?);
            }
        };
        header.set_entry_type(kind);
        header.set_cksum();
        Ok(self.out.append(&header, io::empty())?)
    }

    /// Writes a name to the header or, if it is too long, before the header. `kind` says which of its names.
    fn name(&mut self, header: &mut Header, kind: EntryType, name: &[u8]) -> Result<()> {
        let gnu = header.as_gnu_mut().context("no header of GNU's")?;
        let field = if kind == EntryType::GNULongName { &mut gnu.name } else { &mut gnu.linkname };
        if let Some(short) = field.get_mut(..name.len()).filter(|_| name.len() < SHORT) {
            short.copy_from_slice(name);
            return Ok(());
        }
        let mut before = Header::new_gnu();
        before.set_path("././@LongLink")?;
        before.set_entry_type(kind);
        before.set_size(name.len() as u64 + 1);
        before.set_cksum();
        Ok(self.out.append(&before, name.chain(&[0][..]))?)
    }

    fn attributes(&mut self, node: &Node) -> Result<()> {
        let keys: Vec<_> = node.attributes.iter().map(|(key, value)| (format!("SCHILY.xattr.{key}"), value)).collect();
        let records = keys.iter().map(|(key, value)| (key.as_str(), value.as_slice()));
        Ok(self.out.append_pax_extensions(records)?)
    }
}

/// What is done with each file.
type Act<'f, 'a, W> = dyn FnMut(&mut Writer<'a, W>, (Id, &[u8])) -> Result<()> + 'f;
