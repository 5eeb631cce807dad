//! The files of an image: its layers, applied in their order to a tree in memory. Nothing is unpacked here, so no path of an
//! image leads to a file of this machine; links lead to places in the tree, as they would for a process in the container.
//!
//! A layer takes away what lower layers have by files with certain names (OCI image-spec, "Whiteouts"): `.wh.NAME`
//! hides NAME, `.wh..wh..opq` everything that is in its folder. What the same layer adds stays, wherever it stands.

use anyhow::{Context, Result, bail, ensure};
use std::collections::{BTreeMap, VecDeque};
use std::io::Read;
use tar::EntryType;

/// The most files that an image has.
const MAX_NODES: usize = 4 << 20;
/// How deep folders may be in each other.
const MAX_DEPTH: usize = 256;
/// The most bytes of a path, and of a name in it (Linux' PATH_MAX and NAME_MAX).
const MAX_PATH: usize = 4095;
const MAX_NAME: usize = 255;
/// How many links a path may lead over, as in Linux.
const MAX_LINKS: usize = 40;
/// The most bytes of all attributes of a file: ext4 keeps them in a block.
const MAX_ATTRIBUTES: usize = 3072;

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Names that begin so are no files: they are notes of whoever made the layer.
const NOTE: &[u8] = b".wh..wh.";
/// How an archive names an extended attribute.
const ATTRIBUTE: &str = "SCHILY.xattr.";

/// The number of a file in the tree.
pub(super) type Id = usize;
/// The number of the topmost folder.
pub(super) const ROOT: Id = 0;

/// A file of any kind.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) kind: Kind,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// When it was changed, in seconds since 1970.
    pub(super) mtime: u64,
    /// Extended attributes: `user.*` and `security.capability`.
    pub(super) attributes: BTreeMap<String, Vec<u8>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Folder(BTreeMap<Vec<u8>, Entry>),
    /// The content, in the unpacked layer of this number.
    File {
        layer: usize,
        at: u64,
        size: u64,
    },
    Link(Vec<u8>),
    /// A character device if true, or a block device.
    Device(bool, u32, u32),
    Pipe,
}

/// What a folder has under a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) id: Id,
    /// The layer that added it.
    layer: usize,
}

/// The files of an image.
#[derive(Clone, Debug)]
pub(super) struct Tree {
    nodes: Vec<Node>,
}

impl Default for Tree {
    fn default() -> Self {
        Self { nodes: vec![Node::folder()] }
    }
}

impl Node {
    /// A folder that no layer describes.
    fn folder() -> Self {
        let kind = Kind::Folder(BTreeMap::new());
        Self { kind, mode: 0o755, uid: 0, gid: 0, mtime: 0, attributes: BTreeMap::new() }
    }

    /// Owner, mode, time and attributes of an entry of an archive.
    fn of(entry: &mut tar::Entry<'_, impl Read>) -> Result<Self> {
        let header = entry.header();
        let number = |value: u64| u32::try_from(value).context("an owner whose number is too large");
        let (mode, uid, gid) = (header.mode()? & 0o7777, number(header.uid()?)?, number(header.gid()?)?);
        let mut node = Self { mode, uid, gid, mtime: header.mtime()?, ..Self::folder() };
        let mut bytes = 0;
        for extension in entry.pax_extensions()?.into_iter().flatten() {
            let extension = extension?;
            let key = extension.key().context("an extension whose name is no text")?;
            ensure!(!key.starts_with("GNU.sparse."), "sparse files are not supported");
            let Some(name) = key.strip_prefix(ATTRIBUTE) else { continue };
            if name.starts_with("user.") || name == "security.capability" {
                bytes += name.len() + extension.value_bytes().len();
                node.attributes.insert(name.to_owned(), extension.value_bytes().to_vec());
            }
        }
        ensure!(bytes <= MAX_ATTRIBUTES, "{bytes} bytes of extended attributes, and a file can have {MAX_ATTRIBUTES}");
        Ok(node)
    }
}

impl Tree {
    /// The file with this number.
    pub(super) fn node(&self, id: Id) -> &Node {
        &self.nodes[id]
    }

    /// Applies the layer of number `layer`, a tar file that `reader` reads.
    pub(super) fn apply(&mut self, layer: usize, reader: impl Read) -> Result<()> {
        let mut archive = tar::Archive::new(reader);
        for entry in archive.entries().context("no tar file")? {
            let mut entry = entry.context("a damaged tar file")?;
            let path = entry.path_bytes().into_owned();
            self.add(layer, &path, &mut entry).with_context(|| format!("{:?}", String::from_utf8_lossy(&path)))?;
        }
        Ok(())
    }

    /// Adds an entry of an archive.
    fn add(&mut self, layer: usize, path: &[u8], entry: &mut tar::Entry<'_, impl Read>) -> Result<()> {
        let kind = entry.header().entry_type();
        if kind == EntryType::XGlobalHeader {
            return Ok(());
        }
        let path_names = names(path)?;
        let Some((name, folders)) = path_names.split_last() else {
            ensure!(kind.is_dir(), "no folder, but the topmost");
            let node = Node::of(entry)?;
            self.nodes[ROOT] = Node { kind: self.nodes[ROOT].kind.clone(), ..node };
            return Ok(());
        };
        if name.starts_with(WHITEOUT) {
            return match self.find(folders, true)? {
                Some(folder) => self.take_away(layer, folder, name),
                None => Ok(()),
            };
        }
        let parent = self.make_folders(layer, folders)?;
        let mut node = Node::of(entry)?;
        let device = |number: std::io::Result<Option<u32>>| number.map(Option::unwrap_or_default);
        let header = entry.header();
        node.kind = match kind {
            EntryType::Directory => Kind::Folder(BTreeMap::new()),
            // In old archives, a folder is a file whose name ends so.
            EntryType::Regular if path.ends_with(b"/") => Kind::Folder(BTreeMap::new()),
            EntryType::Regular | EntryType::Continuous => {
                Kind::File { layer, at: entry.raw_file_position(), size: entry.size() }
            }
            EntryType::Symlink => Kind::Link(target(entry)?),
            EntryType::Char | EntryType::Block => {
                let (major, minor) = (device(header.device_major())?, device(header.device_minor())?);
                Kind::Device(kind == EntryType::Char, major, minor)
            }
            EntryType::Fifo => Kind::Pipe,
            EntryType::Link => {
                let target = target(entry)?;
                let id = self.find(&names(&target)?, false)?.context("a hard link to a file that is not there")?;
                ensure!(!matches!(self.nodes[id].kind, Kind::Folder(_)), "a hard link to a folder");
                return self.set(parent, name, Entry { id, layer });
            }
            EntryType::GNUSparse => bail!("sparse files are not supported"),
            other => bail!("a file of the unknown kind {:?}", char::from(other.as_byte())),
        };
        let known = self.entries(parent)?.get(*name).map(|entry| entry.id);
        let id = match (&node.kind, known.map(|id| (id, &self.nodes[id].kind))) {
            // What the folder has stays.
            (Kind::Folder(_), Some((id, kind @ Kind::Folder(_)))) => {
                self.nodes[id] = Node { kind: kind.clone(), ..node };
                id
            }
            _ => self.push(node)?,
        };
        self.set(parent, name, Entry { id, layer })
    }

    fn push(&mut self, node: Node) -> Result<Id> {
        ensure!(self.nodes.len() < MAX_NODES, "more than {MAX_NODES} files");
        self.nodes.push(node);
        Ok(self.nodes.len() - 1)
    }

    fn set(&mut self, folder: Id, name: &[u8], entry: Entry) -> Result<()> {
        self.entries_mut(folder)?.insert(name.to_vec(), entry);
        Ok(())
    }

    /// What is in a folder.
    pub(super) fn entries(&self, folder: Id) -> Result<&BTreeMap<Vec<u8>, Entry>> {
        match &self.nodes[folder].kind {
            Kind::Folder(entries) => Ok(entries),
            _ => bail!("below a file that is no folder"),
        }
    }

    fn entries_mut(&mut self, folder: Id) -> Result<&mut BTreeMap<Vec<u8>, Entry>> {
        match &mut self.nodes[folder].kind {
            Kind::Folder(entries) => Ok(entries),
            _ => bail!("below a file that is no folder"),
        }
    }

    /// Carries out a whiteout.
    fn take_away(&mut self, layer: usize, folder: Id, whiteout: &[u8]) -> Result<()> {
        if whiteout == OPAQUE {
            return self.hide(folder, layer);
        }
        if whiteout.starts_with(NOTE) {
            return Ok(());
        }
        let name = &whiteout[WHITEOUT.len()..];
        ensure!(!matches!(name, b"" | b"." | b".."), "a whiteout of no name");
        let Some(entry) = self.entries(folder)?.get(name).copied() else { return Ok(()) };
        if !self.keeps(entry, layer)? {
            self.entries_mut(folder)?.remove(name);
        }
        Ok(())
    }

    /// Takes away from a folder what lower layers have added.
    fn hide(&mut self, folder: Id, layer: usize) -> Result<()> {
        for (name, entry) in self.entries(folder)?.clone() {
            if !self.keeps(entry, layer)? {
                self.entries_mut(folder)?.remove(&name);
            }
        }
        Ok(())
    }

    /// Whether the entry, or something below it, is of this layer. The rest below it is taken away.
    fn keeps(&mut self, entry: Entry, layer: usize) -> Result<bool> {
        if !matches!(self.nodes[entry.id].kind, Kind::Folder(_)) {
            return Ok(entry.layer == layer);
        }
        self.hide(entry.id, layer)?;
        Ok(entry.layer == layer || !self.entries(entry.id)?.is_empty())
    }

    /// Finds the file with this path. `None` if there is none. `follow` says whether a link at the end is followed.
    fn find(&self, path: &[&[u8]], follow: bool) -> Result<Option<Id>> {
        let mut walk = Walk::new(path);
        while let Some(name) = walk.next() {
            let Some(entry) = self.entries(walk.here())?.get(&name).copied() else { return Ok(None) };
            match &self.nodes[entry.id].kind {
                Kind::Link(target) if follow || !walk.is_over() => walk.follow(target)?,
                _ => walk.enter(entry.id)?,
            }
        }
        Ok(Some(walk.here()))
    }

    /// Finds the folder with this path, and makes what is missing of it.
    fn make_folders(&mut self, layer: usize, path: &[&[u8]]) -> Result<Id> {
        let mut walk = Walk::new(path);
        while let Some(name) = walk.next() {
            let here = walk.here();
            match self.entries(here)?.get(&name).copied() {
                Some(entry) => match &self.nodes[entry.id].kind {
                    Kind::Link(target) => walk.follow(target)?,
                    Kind::Folder(_) => walk.enter(entry.id)?,
                    _ => bail!("below a file that is no folder"),
                },
                None => {
                    let id = self.push(Node::folder())?;
                    self.set(here, &name, Entry { id, layer })?;
                    walk.enter(id)?;
                }
            }
        }
        Ok(walk.here())
    }

    /// Finds the regular file with this path, wherever links lead. Returns the number of its layer, its first byte there, and
    /// its size.
    pub(super) fn regular(&self, path: &str) -> Result<Option<(usize, u64, u64)>> {
        let Some(id) = self.find(&names(path.as_bytes())?, true)? else { return Ok(None) };
        match self.nodes[id].kind {
            Kind::File { layer, at, size } => Ok(Some((layer, at, size))),
            _ => bail!("{path} is no file"),
        }
    }
}

/// A path that is being walked: folders that were entered, and names that are left.
struct Walk {
    folders: Vec<Id>,
    left: VecDeque<Vec<u8>>,
    links: usize,
}

impl Walk {
    fn new(path: &[&[u8]]) -> Self {
        Self { folders: Vec::new(), left: path.iter().map(|name| name.to_vec()).collect(), links: 0 }
    }

    fn here(&self) -> Id {
        self.folders.last().copied().unwrap_or(ROOT)
    }

    fn is_over(&self) -> bool {
        self.left.is_empty()
    }

    /// The next name. Above the topmost folder there is nothing, so `..` leads to it again.
    fn next(&mut self) -> Option<Vec<u8>> {
        loop {
            let name = self.left.pop_front()?;
            match name.as_slice() {
                b"" | b"." => {}
                b".." => drop(self.folders.pop()),
                _ => return Some(name),
            }
        }
    }

    fn enter(&mut self, folder: Id) -> Result<()> {
        ensure!(self.folders.len() < MAX_DEPTH, "folders that are {MAX_DEPTH} deep in each other");
        self.folders.push(folder);
        Ok(())
    }

    fn follow(&mut self, target: &[u8]) -> Result<()> {
        self.links += 1;
        ensure!(self.links <= MAX_LINKS, "links that lead to links without end");
        if target.starts_with(b"/") {
            self.folders.clear();
        }
        for name in target.split(|byte| *byte == b'/').rev() {
            self.left.push_front(name.to_vec());
        }
        Ok(())
    }
}

/// The names in the path of an entry. Paths start at the topmost folder, also with `/` at the beginning.
fn names(path: &[u8]) -> Result<Vec<&[u8]>> {
    ensure!(path.len() <= MAX_PATH, "a path of {} bytes", path.len());
    let names: Vec<_> = path.split(|byte| *byte == b'/').filter(|name| !matches!(*name, b"" | b".")).collect();
    for name in &names {
        ensure!(*name != b"..", "a path that leads out of the image");
        ensure!(name.len() <= MAX_NAME && !name.contains(&0), "a path with a name that no file can have");
    }
    Ok(names)
}

/// Where a link leads.
fn target(entry: &tar::Entry<'_, impl Read>) -> Result<Vec<u8>> {
    let target = entry.link_name_bytes().unwrap_or_default().into_owned();
    ensure!(!target.is_empty() && target.len() <= MAX_PATH && !target.contains(&0), "a link that leads nowhere");
    Ok(target)
}
