//! The committed tree: nodes by path, and what each owner uses.
//!
//! Keeps: every node but the root and the special names is listed in its parent; every listed child
//! exists; usage per owner equals a recount ([`Tree::audit`]). A node's generation changes with every
//! change of the node, and is never given twice.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::domain::DomainId;
use crate::path::{INTRODUCE_DOMAIN, Path, RELEASE_DOMAIN};
use crate::permission::Permissions;

/// What one entry of a map costs us beside its contents, roughly.
pub(crate) const OVERHEAD: usize = 64;

/// A place in the tree: it has a value *and* children.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Opaque bytes.
    pub value: Vec<u8>,
    /// Names of the nodes below.
    pub children: BTreeSet<Arc<str>>,
    /// Who may do what.
    pub permissions: Permissions,
    /// Stamp of the last change.
    pub generation: u64,
}

impl Node {
    /// A node without children.
    pub(crate) const fn leaf(value: Vec<u8>, permissions: Permissions) -> Self {
        Self { value, children: BTreeSet::new(), permissions, generation: 0 }
    }

    /// Size as the node-size quota counts it.
    pub(crate) fn size(&self) -> usize {
        let names: usize = self.children.iter().map(|name| name.len() + 1).sum();
        self.value.len() + names + self.permissions.len() * 4
    }

    /// Size as the memory quota counts it.
    pub(crate) fn cost(&self, path: &Path) -> usize {
        OVERHEAD + path.as_str().len() + self.size()
    }
}

/// What a domain's nodes use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Number of nodes.
    pub nodes: usize,
    /// Bytes: paths, values, names of children, permissions, and a little for each node.
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
            let node = Node::leaf(Vec::new(), Permissions::private(owner));
            tree.insert(Path::literal(path), node);
        }
        tree
    }

    /// The node at this path.
    #[must_use]
    pub fn get(&self, path: &Path) -> Option<&Arc<Node>> {
        self.nodes.get(path)
    }

    /// All nodes in the order of their paths: a directory before what lies in it.
    pub fn iter(&self) -> impl Iterator<Item = (&Path, &Arc<Node>)> {
        self.nodes.iter()
    }

    /// Number of nodes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Never: there is a root.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// What the nodes of this domain use.
    #[must_use]
    pub fn usage(&self, owner: DomainId) -> Usage {
        self.usage.get(&owner).copied().unwrap_or_default()
    }

    /// Puts a node, with a new generation. The caller keeps parent and child consistent.
    pub(crate) fn insert(&mut self, path: Path, mut node: Node) {
        self.remove(&path);
        self.generation += 1;
        node.generation = self.generation;
        let usage = self.usage.entry(node.permissions.owner()).or_default();
        usage.nodes += 1;
        usage.bytes += node.cost(&path);
        self.nodes.insert(path, Arc::new(node));
    }

    /// Takes a node away.
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

    /// Recomputes what this type promises.
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
