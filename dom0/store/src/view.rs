//! Changes over the committed tree: what every request works on.
//!
//! [`Changes`] remember each node a transaction touched with the generation it had, private copies
//! of those it changed, and in which order. A [`View`] reads and writes through them. A request
//! outside any transaction gets fresh `Changes` that are committed at once, so a request that is
//! refused half-way leaves nothing behind. No function here recurses: depth is the client's choice.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;

use crate::domain::{Caller, DomainId};
use crate::error::StoreError;
use crate::path::Path;
use crate::permission::{Permissions, Rights};
use crate::quota::Quotas;
use crate::tree::{Node, OVERHEAD, Tree, Usage};

/// One node as a transaction sees it.
#[derive(Clone, Debug)]
struct Touched {
    /// The node at first touch, kept: what a transaction read stays true for it. Looking at the
    /// tree again instead could mix two states that never were one.
    first: Option<Arc<Node>>,
    copy: Private,
}

#[derive(Clone, Debug)]
enum Private {
    Unchanged,
    Present(Arc<Node>),
    Removed,
}

/// A change that watches hear of.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Change {
    pub(crate) path: Path,
    /// Only watches on exactly this path hear of it: it vanished with an ancestor.
    pub(crate) exact: bool,
}

/// A committed change, with the node as it was before.
#[derive(Clone, Debug)]
pub(crate) struct Fired {
    pub(crate) change: Change,
    pub(crate) before: Option<Arc<Node>>,
}

/// What an owner gains and loses when the changes are committed.
#[derive(Clone, Copy, Debug, Default)]
struct Delta {
    added: Usage,
    removed: Usage,
}

/// What a transaction has done so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct Changes {
    touched: BTreeMap<Path, Touched>,
    log: Vec<Change>,
    logged: BTreeSet<Change>,
    deltas: BTreeMap<DomainId, Delta>,
    /// Bytes this transaction costs while it is open.
    bytes: usize,
    /// Whether the client named it: only then do the limits of transactions apply.
    explicit: bool,
    doomed: Option<StoreError>,
}

impl Changes {
    /// Changes of a transaction the client opened.
    pub(crate) fn explicit() -> Self {
        Self { explicit: true, ..Self::default() }
    }

    /// A transaction whose contents were lost: it goes on, and ends with "again".
    pub(crate) fn lost() -> Self {
        Self { doomed: Some(StoreError::Again), ..Self::explicit() }
    }

    /// The commit will be refused with this, whatever follows.
    pub(crate) fn doom(&mut self, why: StoreError) {
        self.doomed.get_or_insert(why);
    }

    /// Bytes held while the transaction is open.
    pub(crate) const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether there is anything to commit.
    fn changes_anything(&self) -> bool {
        !self.log.is_empty()
    }

    /// Checks everything that can refuse a commit.
    pub(crate) fn check(&self, tree: &Tree, caller: &Caller, quotas: &Quotas) -> Result<(), StoreError> {
        if let Some(why) = self.doomed {
            return Err(why);
        }
        let generation = |node: &Arc<Node>| node.generation;
        let conflict = self
            .touched
            .iter()
            .any(|(path, touched)| tree.get(path).map(generation) != touched.first.as_ref().map(generation));
        if conflict {
            return Err(StoreError::Again);
        }
        self.check_usage(tree, caller, quotas, 0)
    }

    /// Checks what the caller's own domain would use after a commit.
    fn check_usage(&self, tree: &Tree, caller: &Caller, quotas: &Quotas, other_bytes: usize) -> Result<(), StoreError> {
        if caller.privileged {
            return Ok(());
        }
        let now = tree.usage(caller.domain);
        let Delta { added, removed } = self.deltas.get(&caller.domain).copied().unwrap_or_default();
        if added.nodes > removed.nodes && now.nodes + added.nodes - removed.nodes > quotas.nodes {
            return Err(StoreError::NoSpace);
        }
        // An open transaction holds copies of all it adds; after the commit only these are left.
        let grown = added.bytes.saturating_sub(removed.bytes);
        let more = if self.explicit { self.bytes } else { grown };
        if more > 0 && now.bytes + more + other_bytes > quotas.memory_bytes {
            return Err(StoreError::NoMemory);
        }
        Ok(())
    }

    /// Puts everything into the tree; [`check`](Self::check) came first. Gives what watches hear.
    pub(crate) fn commit(self, tree: &mut Tree) -> Vec<Fired> {
        if !self.changes_anything() {
            return Vec::new();
        }
        let with_past = |change: Change| {
            let before = tree.get(&change.path).cloned();
            Fired { change, before }
        };
        let fired = self.log.into_iter().map(with_past).collect();
        for (path, touched) in self.touched {
            match touched.copy {
                Private::Unchanged => {}
                Private::Present(node) => tree.insert(path, Arc::unwrap_or_clone(node)),
                Private::Removed => tree.remove(&path),
            }
        }
        fired
    }
}

/// The tree as one caller sees it inside one transaction.
#[derive(Debug)]
pub(crate) struct View<'a> {
    pub(crate) tree: &'a Tree,
    pub(crate) changes: &'a mut Changes,
    pub(crate) caller: &'a Caller,
    pub(crate) quotas: &'a Quotas,
    /// What the caller holds elsewhere: watches and other transactions.
    pub(crate) other_bytes: usize,
}

impl View<'_> {
    /// The node at `path`, if the caller may read it.
    ///
    /// # Errors
    /// `NotFound`, or `Access` where the caller may not even know that.
    pub(crate) fn node(&mut self, path: &Path) -> Result<Arc<Node>, StoreError> {
        match self.get(path)? {
            Some(node) if node.permissions.allow(self.caller, Rights::READ) => Ok(node),
            Some(_) => Err(StoreError::Access),
            None => Err(self.why_missing(path, Rights::READ)?),
        }
    }

    /// Sets a value; creates the node, and what is missing above it.
    ///
    /// # Errors
    /// `Access`, or a quota (`NoSpace`, `NoMemory`).
    pub(crate) fn write(&mut self, path: &Path, value: &[u8]) -> Result<(), StoreError> {
        match self.get(path)? {
            Some(node) => {
                self.require_write(&node)?;
                let mut changed = Arc::unwrap_or_clone(node);
                changed.value = value.to_vec();
                self.put(path, changed)?;
            }
            None => self.create(path, value)?,
        }
        self.log(path, false);
        Ok(())
    }

    /// Creates a node without value, and what is missing above it. An existing node stays as it is.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub(crate) fn mkdir(&mut self, path: &Path) -> Result<(), StoreError> {
        match self.get(path)? {
            Some(node) => self.require_write(&node),
            None => {
                self.create(path, &[])?;
                self.log(path, false);
                Ok(())
            }
        }
    }

    /// Removes a node and everything below it. Removing what is not there succeeds if the
    /// directory it would lie in exists.
    ///
    /// # Errors
    /// `Invalid` for the root, `Access`, `NotFound` without a parent.
    pub(crate) fn remove(&mut self, path: &Path) -> Result<(), StoreError> {
        let parent_path = path.parent().ok_or(StoreError::Invalid)?;
        let Some(node) = self.get(path)? else {
            if self.why_missing(path, Rights::WRITE)? == StoreError::Access {
                return Err(StoreError::Access);
            }
            return self.get(&parent_path)?.map(|_| ()).ok_or(StoreError::NotFound);
        };
        self.require_write(&node)?;
        if let Some(parent) = self.get(&parent_path)? {
            let mut smaller = Arc::unwrap_or_clone(parent);
            smaller.children.remove(path.name());
            self.put(&parent_path, smaller)?;
        }
        self.log(path, false);
        let mut doomed = vec![(path.clone(), node)];
        while let Some((at, node)) = doomed.pop() {
            for name in node.children.iter().rev() {
                let below = at.child(name);
                if let Some(child) = self.get(&below)? {
                    doomed.push((below, child));
                }
            }
            self.take(&at);
            if at != *path {
                self.log(&at, true);
            }
        }
        Ok(())
    }

    /// Replaces a permission list.
    ///
    /// # Errors
    /// `Access` unless the caller owns the node, `NotPermitted` when an unprivileged caller names
    /// another owner, `NoSpace` for too long a list.
    pub(crate) fn set_permissions(&mut self, path: &Path, list: Permissions) -> Result<(), StoreError> {
        let Some(node) = self.get(path)? else {
            return Err(self.why_missing(path, Rights::WRITE)?);
        };
        if !node.permissions.controlled_by(self.caller) {
            return Err(StoreError::Access);
        }
        if !self.caller.privileged {
            if list.owner() != node.permissions.owner() {
                return Err(StoreError::NotPermitted);
            }
            if list.len() > self.quotas.permissions {
                return Err(StoreError::NoSpace);
            }
        }
        let mut changed = Arc::unwrap_or_clone(node);
        changed.permissions = list;
        self.put(path, changed)?;
        self.log(path, false);
        Ok(())
    }

    /// Looks a node up and remembers that we did.
    fn get(&mut self, path: &Path) -> Result<Option<Arc<Node>>, StoreError> {
        if let Some(touched) = self.changes.touched.get(path) {
            return Ok(match &touched.copy {
                Private::Unchanged => touched.first.clone(),
                Private::Present(node) => Some(Arc::clone(node)),
                Private::Removed => None,
            });
        }
        let node = self.tree.get(path).cloned();
        let touched = Touched { first: node.clone(), copy: Private::Unchanged };
        self.changes.touched.insert(path.clone(), touched);
        let held = node.as_ref().map_or(0, |node| node.size());
        self.changes.bytes += OVERHEAD + path.as_str().len() + held;
        if self.changes.explicit && !self.caller.privileged {
            if self.changes.touched.len() > self.quotas.transaction_nodes {
                return Err(StoreError::NoSpace);
            }
            self.check_usage()?;
        }
        Ok(node)
    }

    /// What to say about a missing node: its nearest existing ancestor decides (ABI 3.5).
    fn why_missing(&mut self, path: &Path, wanted: Rights) -> Result<StoreError, StoreError> {
        if self.caller.privileged {
            return Ok(StoreError::NotFound);
        }
        for ancestor in path.and_ancestors().skip(1) {
            if let Some(node) = self.get(&ancestor)? {
                let known = node.permissions.allow(self.caller, wanted);
                return Ok(if known { StoreError::NotFound } else { StoreError::Access });
            }
        }
        Ok(StoreError::NotFound)
    }

    fn require_write(&self, node: &Node) -> Result<(), StoreError> {
        let may = node.permissions.allow(self.caller, Rights::WRITE);
        if may { Ok(()) } else { Err(StoreError::Access) }
    }

    /// Creates a node and its missing ancestors; they inherit from the nearest existing one.
    fn create(&mut self, path: &Path, value: &[u8]) -> Result<(), StoreError> {
        let mut missing = Vec::new();
        let mut base = None;
        for at in path.and_ancestors() {
            match self.get(&at)? {
                Some(node) => {
                    base = Some((at, node));
                    break;
                }
                None => missing.push(at),
            }
        }
        // Only a special name nobody made has no existing ancestor.
        let (mut parent_path, mut parent) = base.ok_or(StoreError::NotFound)?;
        self.require_write(&parent)?;
        let inherited = if self.caller.privileged {
            parent.permissions.clone()
        } else {
            parent.permissions.owned_by(self.caller.domain)
        };
        while let Some(at) = missing.pop() {
            let mut grown = Arc::unwrap_or_clone(parent);
            grown.children.insert(at.name().into());
            self.put(&parent_path, grown)?;
            let value = if missing.is_empty() { value.to_vec() } else { Vec::new() };
            let node = Node::leaf(value, inherited.clone());
            self.put(&at, node.clone())?;
            (parent_path, parent) = (at, Arc::new(node));
        }
        Ok(())
    }

    /// Stores a private copy, and checks what it costs the caller.
    fn put(&mut self, path: &Path, node: Node) -> Result<(), StoreError> {
        if !self.caller.privileged && node.size() > self.quotas.node_bytes {
            return Err(StoreError::NoSpace);
        }
        self.take(path);
        let added = &mut self.delta(node.permissions.owner()).added;
        added.nodes += 1;
        added.bytes += node.cost(path);
        self.changes.bytes += node.cost(path);
        if let Some(touched) = self.changes.touched.get_mut(path) {
            touched.copy = Private::Present(Arc::new(node));
        }
        self.check_usage()
    }

    /// Makes a node absent, and gives back what it costs its owner.
    fn take(&mut self, path: &Path) {
        let Some(touched) = self.changes.touched.get_mut(path) else {
            return;
        };
        let present = match core::mem::replace(&mut touched.copy, Private::Removed) {
            Private::Unchanged => touched.first.clone(),
            Private::Removed => None,
            Private::Present(copy) => {
                self.changes.bytes -= copy.cost(path);
                Some(copy)
            }
        };
        if let Some(node) = present {
            let removed = &mut self.delta(node.permissions.owner()).removed;
            removed.nodes += 1;
            removed.bytes += node.cost(path);
        }
    }

    fn delta(&mut self, owner: DomainId) -> &mut Delta {
        self.changes.deltas.entry(owner).or_default()
    }

    fn check_usage(&self) -> Result<(), StoreError> {
        self.changes.check_usage(self.tree, self.caller, self.quotas, self.other_bytes)
    }

    /// Notes a change for the watches, once, at its first place.
    fn log(&mut self, path: &Path, exact: bool) {
        let change = Change { path: path.clone(), exact };
        if self.changes.logged.insert(change.clone()) {
            self.changes.bytes += OVERHEAD;
            self.changes.log.push(change);
        }
    }
}
