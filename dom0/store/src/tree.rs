//! The committed tree: nodes by path, and how much each owner uses.
//!
//! Keeps: every node but the root and the special names is listed in its parent; every listed child
//! exists; usage per owner equals a recount ([`Tree::audit`]). Every change of a node gives it a new generation,
//! which no node ever had before.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::cmp::Ordering;
use core::ops::Bound;

use crate::domain::DomainId;
use crate::path::{INTRODUCE_DOMAIN, Path, RELEASE_DOMAIN};
use crate::permission::Permissions;
use crate::quota::{heap, map_entry, shared};

/// A place in the tree: it has a value *and* children.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Opaque bytes.
    pub value: Box<[u8]>,
    /// Names of the nodes directly below.
    pub children: Names,
    /// The permissions of the node.
    pub permissions: Permissions,
    /// Stamp of the last change.
    pub generation: u64,
}

impl Node {
    /// A node without children.
    pub(crate) fn leaf(value: &[u8], permissions: Permissions) -> Self {
        Self { value: value.into(), children: Names::default(), permissions, generation: 0 }
    }

    /// Size as the node-size quota counts it.
    pub(crate) fn size(&self) -> usize {
        self.value.len() + self.children.as_bytes().len() + self.permissions.len() * 4
    }

    /// Bytes of the heap that the node uses, charged to its owner: with its path, its places in maps, and its name in
    /// its parent's list. So the owner of the child pays for the name, not the owner of the directory.
    pub(crate) fn cost(&self, path: &Path) -> usize {
        let own = shared(size_of::<Self>()) + heap(self.value.len()) + self.permissions.heap_bytes();
        // The node's own list of names is charged to its children, except what the heap rounds up.
        let entry = map_entry(size_of::<(Path, Arc<Self>)>()) + path.name().len() + 1 + heap(1) + 8;
        own + entry + shared(path.as_str().len())
    }

    /// Bytes of the heap that a copy of the node uses.
    pub(crate) fn copy_bytes(&self) -> usize {
        let lists = heap(self.children.as_bytes().len()) + self.permissions.heap_bytes();
        shared(size_of::<Self>()) + heap(self.value.len()) + lists
    }
}

/// Names of a node's children, sorted by bytes, each followed by a zero byte, as a DIRECTORY reply has them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names(Box<[u8]>);

impl Names {
    /// All names, each with its zero byte.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The names in order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &str> {
        let names = self.0.strip_suffix(b"\0").map(|names| names.split(|byte| *byte == 0));
        names.into_iter().flatten().map(|name| core::str::from_utf8(name).unwrap_or_default())
    }

    /// Whether `name` is in the list.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        self.place(name).1
    }

    /// This list with `name` added.
    #[must_use]
    pub(crate) fn with(&self, name: &str) -> Self {
        match self.place(name) {
            (_, true) => self.clone(),
            (at, false) => self.spliced(at, 0, &[name.as_bytes(), b"\0"]),
        }
    }

    /// This list without `name`.
    #[must_use]
    pub(crate) fn without(&self, name: &str) -> Self {
        match self.place(name) {
            (at, true) => self.spliced(at, name.len() + 1, &[]),
            (_, false) => self.clone(),
        }
    }

    /// The byte offset at which `name` is or would be, and whether it is in the list.
    fn place(&self, name: &str) -> (usize, bool) {
        let mut at = 0;
        for one in self.iter() {
            match one.cmp(name) {
                Ordering::Less => at += one.len() + 1,
                Ordering::Equal => return (at, true),
                Ordering::Greater => break,
            }
        }
        (at, false)
    }

    /// This list with `remove` bytes at offset `at` replaced by `insert`. Allocates exactly what the result needs.
    fn spliced(&self, at: usize, remove: usize, insert: &[&[u8]]) -> Self {
        let (before, after) = (self.0.get(..at).unwrap_or_default(), self.0.get(at + remove..).unwrap_or_default());
        let inserted: usize = insert.iter().map(|piece| piece.len()).sum();
        let mut bytes = Vec::with_capacity(before.len() + inserted + after.len());
        bytes.extend_from_slice(before);
        insert.iter().for_each(|piece| bytes.extend_from_slice(piece));
        bytes.extend_from_slice(after);
        Self(bytes.into_boxed_slice())
    }
}

/// How much a domain's nodes use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Number of nodes.
    pub nodes: usize,
    /// Bytes of the heap that these nodes use.
    pub bytes: usize,
}

/// The committed state.
#[derive(Clone, Debug)]
pub struct Tree {
    nodes: BTreeMap<Path, Arc<Node>>,
    usage: BTreeMap<DomainId, Usage>,
    generation: u64,
}

impl Tree {
    /// A tree with a root and the special names, all private to `owner`.
    pub(crate) fn new(owner: DomainId) -> Self {
        let mut tree = Self { nodes: BTreeMap::new(), usage: BTreeMap::new(), generation: 0 };
        for path in ["/", INTRODUCE_DOMAIN, RELEASE_DOMAIN] {
            let node = Node::leaf(&[], Permissions::private(owner));
            tree.insert(Path::literal(path), node);
        }
        tree
    }

    /// The node at this path.
    #[must_use]
    pub fn get(&self, path: &Path) -> Option<&Arc<Node>> {
        self.nodes.get(path)
    }

    /// All nodes sorted by path: a directory before the nodes below it.
    pub fn iter(&self) -> impl Iterator<Item = (&Path, &Arc<Node>)> {
        self.nodes.iter()
    }

    /// The nodes after `path` in the order of paths; all nodes if `path` is `None`.
    pub(crate) fn after(&self, path: Option<&Path>) -> impl Iterator<Item = (&Path, &Arc<Node>)> {
        let from = path.map_or(Bound::Unbounded, Bound::Excluded);
        self.nodes.range::<Path, _>((from, Bound::Unbounded))
    }

    /// The paths below `path`, in reverse order: each comes before the directory it lies in.
    pub(crate) fn below(&self, path: &Path) -> impl Iterator<Item = &Path> {
        let base = if path.as_str() == "/" { "" } else { path.as_str() };
        // The paths below begin with `base/`; the character after `/` is `0`.
        let (first, end) = (format!("{base}/"), format!("{base}0"));
        let range = (Bound::Excluded(first.as_str()), Bound::Excluded(end.as_str()));
        self.nodes.range::<str, _>(range).rev().map(|(path, _)| path)
    }

    /// Number of nodes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Always false: there is a root.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// How much the nodes of this domain use.
    #[must_use]
    pub fn usage(&self, owner: DomainId) -> Usage {
        self.usage.get(&owner).copied().unwrap_or_default()
    }

    /// Stores a node under a new generation. The caller keeps the parent's list of names in step.
    pub(crate) fn insert(&mut self, path: Path, mut node: Node) {
        self.remove(&path);
        self.generation += 1;
        node.generation = self.generation;
        let usage = self.usage.entry(node.permissions.owner()).or_default();
        usage.nodes += 1;
        usage.bytes += node.cost(&path);
        self.nodes.insert(path.compact(), Arc::new(node));
    }

    /// Removes a node. The caller keeps the parent's list of names in step.
    pub(crate) fn remove(&mut self, path: &Path) {
        let Some(node) = self.nodes.remove(path) else { return };
        let owner = node.permissions.owner();
        let usage = self.usage.entry(owner).or_default();
        usage.nodes -= 1;
        usage.bytes -= node.cost(path);
        if usage.nodes == 0 {
            self.usage.remove(&owner);
        }
    }

    /// Recomputes what the module's head says this type keeps.
    ///
    /// # Errors
    /// The first contradiction found, in words.
    pub fn audit(&self) -> Result<(), String> {
        let mut usage: BTreeMap<DomainId, Usage> = BTreeMap::new();
        for (path, node) in &self.nodes {
            let entry = usage.entry(node.permissions.owner()).or_default();
            entry.nodes += 1;
            entry.bytes += node.cost(path);
            if node.generation > self.generation {
                return Err(format!("{path} has a generation from the future"));
            }
            if let Some(parent) = path.parent() {
                let listed = self.get(&parent).is_some_and(|p| p.children.contains(path.name()));
                if !listed {
                    return Err(format!("{path} is not listed in its parent"));
                }
            }
            if let Some(name) = node.children.iter().find(|name| self.get(&path.child(name)).is_none()) {
                return Err(format!("{path} lists {name}, which does not exist"));
            }
        }
        if usage == self.usage { Ok(()) } else { Err("usage differs from a recount".into()) }
    }
}
