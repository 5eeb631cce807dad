//! Changes over the committed tree: what every request works on.
//!
//! [`Changes`] record each node that a transaction touched, with the generation it had then; private copies of the
//! nodes it changed; and the order of these changes. A [`View`] reads and writes through them. A request outside any
//! transaction gets fresh `Changes` that are committed at once, so a request that is refused half-way leaves nothing
//! behind. No function here recurses, because clients choose the depth of paths.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;

use crate::connection::Connection;
use crate::domain::{Caller, ConnectionId, DomainId};
use crate::error::StoreError;
use crate::path::Path;
use crate::permission::{Permissions, Rights};
use crate::quota::{Quotas, heap, map_entry, shared};
use crate::tree::{Names, Node, Tree, Usage};
use crate::watch::Watches;

/// One node as a transaction sees it.
#[derive(Clone, Debug)]
struct Touched {
    /// The node as it was when it was first touched. It is kept because a later look at the tree could show another
    /// state, and the transaction must see only one.
    first: Option<Arc<Node>>,
    copy: Private,
    /// Whether the change is logged already: `[0]` for watches at or above this path, `[1]` for those on exactly this
    /// path.
    logged: [bool; 2],
}

#[derive(Clone, Debug)]
enum Private {
    Unchanged,
    Present(Arc<Node>),
    Removed,
}

/// A change that watches are told of.
#[derive(Clone, Debug)]
struct Change {
    path: Path,
    /// Whether only watches on exactly this path are told: the node was removed together with an ancestor.
    exact: bool,
}

/// A committed change, with the permissions that decide who is told of it: those of the node and of its directory after
/// the commit, and those of the node before.
#[derive(Clone, Debug)]
pub(crate) struct Fired {
    pub(crate) path: Path,
    pub(crate) exact: bool,
    witnesses: [Option<Permissions>; 3],
}

impl Fired {
    /// Whether `caller` may be told of the change: it may read the node or the node's directory, or could read the node
    /// before (XSA-115).
    pub(crate) fn may_be_heard_by(&self, caller: &Caller) -> bool {
        self.witnesses.iter().flatten().any(|rights| rights.allow(caller, Rights::READ))
    }

    /// Bytes of the heap that the change uses until all watchers have been told.
    pub(crate) fn cost(&self) -> usize {
        told_cost(&self.path)
    }
}

/// Bytes of the heap that a change uses until watchers have been told of it; no more than the changed node uses.
fn told_cost(path: &Path) -> usize {
    size_of::<Fired>() + shared(path.as_str().len()) + shared(64)
}

/// Bytes of the heap that a touched node uses, including its place among the changes and one change to be told.
fn touched_cost(path: &Path, first: Option<&Arc<Node>>) -> usize {
    let places = map_entry(size_of::<(Path, Touched)>()) + 2 * size_of::<Change>();
    let kept = first.map_or(0, |node| node.copy_bytes());
    places + kept + shared(path.as_str().len()) + told_cost(path) + heap(1)
}

/// Bytes of the heap that a private copy of a node uses: at least what the node uses once it is committed.
fn copy_cost(path: &Path, node: &Node) -> usize {
    node.cost(path) + node.children.as_bytes().len()
}

/// How an owner's usage changes at the commit.
#[derive(Clone, Copy, Debug, Default)]
struct Delta {
    added: Usage,
    removed: Usage,
}

/// What domains use in addition to their nodes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ledger<'a> {
    pub(crate) watches: &'a Watches,
    /// All connections. The transaction that is asked about has been taken out of its connection.
    pub(crate) connections: &'a BTreeMap<ConnectionId, Connection>,
}

impl Ledger<'_> {
    /// Bytes of watches, of open transactions, and of changes not told; `None` if the domain has no limits.
    pub(crate) fn held(&self, domain: DomainId) -> Option<usize> {
        let id = ConnectionId::Domain(domain);
        let connection = self.connections.get(&id).filter(|connection| !connection.caller.privileged)?;
        Some(self.watches.held(id).bytes + connection.held())
    }
}

/// The changes a transaction made so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct Changes {
    touched: BTreeMap<Path, Touched>,
    log: Vec<Change>,
    /// Bytes that the log uses until watchers have been told of it.
    told_bytes: usize,
    deltas: BTreeMap<DomainId, Delta>,
    /// Bytes that this transaction uses while it is open.
    bytes: usize,
    /// Whether the client opened the transaction; the limits for transactions apply only then.
    explicit: bool,
    /// Why the commit will be refused, if that is known already.
    doomed: Option<StoreError>,
    /// How many nodes have been looked up in the tree, plus how many have been copied, since
    /// [`take_work`](Self::take_work): the measure for the length of a turn.
    work: usize,
}

impl Changes {
    /// Changes of a transaction the client opened.
    pub(crate) fn explicit() -> Self {
        Self { explicit: true, bytes: OPEN, ..Self::default() }
    }

    /// A transaction whose contents were lost in a restart of the server. It can go on, but its commit returns `Again`.
    pub(crate) fn lost() -> Self {
        Self { doomed: Some(StoreError::Again), ..Self::explicit() }
    }

    /// Makes the commit fail with `why` (or with an earlier `why`), whatever follows.
    pub(crate) fn doom(&mut self, why: StoreError) {
        self.doomed.get_or_insert(why);
    }

    /// Bytes held while the transaction is open.
    pub(crate) const fn bytes(&self) -> usize {
        self.bytes
    }

    /// How many nodes the transaction touched.
    pub(crate) fn len(&self) -> usize {
        self.touched.len()
    }

    /// Returns the work done since the last call.
    pub(crate) const fn take_work(&mut self) -> usize {
        core::mem::replace(&mut self.work, 0)
    }

    /// Makes all the checks that can refuse a commit.
    pub(crate) fn check(
        &self,
        tree: &Tree,
        caller: &Caller,
        quotas: &Quotas,
        ledger: Ledger<'_>,
    ) -> Result<(), StoreError> {
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
        self.check_usage(tree, caller, quotas, ledger)
    }

    /// Checks that after a commit the caller, and the owners of the nodes it changed, would be within their quotas.
    fn check_usage(&self, tree: &Tree, caller: &Caller, quotas: &Quotas, ledger: Ledger<'_>) -> Result<(), StoreError> {
        if caller.privileged {
            return Ok(());
        }
        for (owner, Delta { added, removed }) in &self.deltas {
            let now = tree.usage(*owner);
            let own = *owner == caller.domain;
            if own && added.nodes > removed.nodes && now.nodes + added.nodes - removed.nodes > quotas.nodes {
                return Err(StoreError::NoSpace);
            }
            let grown = added.bytes.saturating_sub(removed.bytes);
            let held = ledger.held(*owner).filter(|_| !own && grown > 0);
            if held.is_some_and(|held| now.bytes + grown + held > quotas.memory_bytes) {
                return Err(StoreError::NoMemory);
            }
        }
        let Delta { added, removed } = self.deltas.get(&caller.domain).copied().unwrap_or_default();
        // An open transaction holds copies of all it adds; after the commit only the nodes are left, and changes to be
        // told. One change may exceed the quota, so that a domain whose quota is used up can still write and remove.
        let told = self.told_bytes.saturating_sub(ONE_CHANGE);
        let grown = (added.bytes + told).saturating_sub(removed.bytes);
        let more = if self.explicit { self.bytes } else { grown };
        let held = ledger.held(caller.domain).unwrap_or(0);
        if more > 0 && tree.usage(caller.domain).bytes + more + held > quotas.memory_bytes {
            return Err(StoreError::NoMemory);
        }
        Ok(())
    }

    /// Puts all changes into the tree; the caller has called [`check`](Self::check). Returns the changes to tell
    /// watches of.
    pub(crate) fn commit(self, tree: &mut Tree) -> Vec<Fired> {
        if self.log.is_empty() {
            return Vec::new();
        }
        let before = |tree: &Tree, path: &Path| tree.get(path).map(|node| node.permissions.clone());
        let with_past = |Change { path, exact }| {
            let past = before(tree, &path);
            Fired { path, exact, witnesses: [None, None, past] }
        };
        let mut fired: Vec<Fired> = self.log.into_iter().map(with_past).collect();
        for (path, touched) in self.touched {
            match touched.copy {
                Private::Unchanged => {}
                Private::Present(node) => tree.insert(path, Arc::unwrap_or_clone(node)),
                Private::Removed => tree.remove(&path),
            }
        }
        for Fired { path, witnesses: [now, parent, _], .. } in &mut fired {
            *now = before(tree, path);
            *parent = path.parent().and_then(|parent| before(tree, &parent));
        }
        fired
    }
}

/// Bytes of the longest change: how much may be told beyond a quota.
const ONE_CHANGE: usize = 4096;
/// Bytes that an open transaction uses before it touches any node: the least that its maps allocate.
const OPEN: usize = 2048;

/// The tree as one caller sees it inside one transaction.
#[derive(Debug)]
pub(crate) struct View<'a> {
    pub(crate) tree: &'a Tree,
    pub(crate) changes: &'a mut Changes,
    pub(crate) caller: &'a Caller,
    pub(crate) quotas: &'a Quotas,
    pub(crate) ledger: Ledger<'a>,
}

impl View<'_> {
    /// The node at `path`, if the caller may read it.
    ///
    /// # Errors
    /// `NotFound`; `Access` if the caller may not read the node, or may not know whether it exists.
    pub(crate) fn node(&mut self, path: &Path) -> Result<Arc<Node>, StoreError> {
        match self.get(path)? {
            Some(node) if node.permissions.allow(self.caller, Rights::READ) => Ok(node),
            Some(_) => Err(StoreError::Access),
            None => Err(self.why_missing(path, Rights::READ)?),
        }
    }

    /// Sets a value. Creates the node and its missing ancestors if needed.
    ///
    /// # Errors
    /// `Access`, or `NoSpace` or `NoMemory` if a quota is used up.
    pub(crate) fn write(&mut self, path: &Path, value: &[u8]) -> Result<(), StoreError> {
        match self.get(path)? {
            Some(node) => {
                self.require_write(&node)?;
                let mut changed = Arc::unwrap_or_clone(node);
                changed.value = value.into();
                self.put(path, changed)?;
            }
            None => self.create(path, value)?,
        }
        self.log(path, false);
        Ok(())
    }

    /// Creates a node without value, and its missing ancestors. An existing node stays as it is.
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

    /// Removes a node and everything below it. Removing a node that does not exist succeeds if its
    /// directory exists.
    ///
    /// # Errors
    /// `Invalid` for the root; `Access`; `NotFound` if even the directory does not exist; `NoSpace` if more nodes would go than
    /// a transaction may touch.
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
            let children = parent.children.without(path.name());
            self.put_children(&parent_path, &parent, children)?;
        }
        self.log(path, false);
        let mut doomed = vec![(path.clone(), node)];
        let mut count = 0;
        while let Some((at, node)) = doomed.pop() {
            // A domain cannot own this many nodes, so some have other owners: they are not removed in one go, whoever asks.
            count += 1;
            if count + doomed.len() > self.quotas.transaction_nodes {
                return Err(StoreError::NoSpace);
            }
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
        self.check_usage()
    }

    /// Removes a node that has no children. If `exact`, only watches on exactly its path are told.
    ///
    /// # Errors
    /// `Invalid` for the root and special names; `NotFound`.
    pub(crate) fn remove_leaf(&mut self, path: &Path, exact: bool) -> Result<(), StoreError> {
        let parent_path = path.parent().ok_or(StoreError::Invalid)?;
        self.get(path)?.ok_or(StoreError::NotFound)?;
        if let Some(parent) = self.get(&parent_path)? {
            let children = parent.children.without(path.name());
            self.put_children(&parent_path, &parent, children)?;
        }
        self.take(path);
        self.log(path, exact);
        Ok(())
    }

    /// Replaces a permission list.
    ///
    /// # Errors
    /// `NotFound`; `Access` unless the caller owns the node; `NotPermitted` if an unprivileged caller names
    /// another owner; `NoSpace` if the list is too long.
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

    /// Looks up a node, and records it as touched.
    fn get(&mut self, path: &Path) -> Result<Option<Arc<Node>>, StoreError> {
        if let Some(touched) = self.changes.touched.get(path) {
            return Ok(match &touched.copy {
                Private::Unchanged => touched.first.clone(),
                Private::Present(node) => Some(Arc::clone(node)),
                Private::Removed => None,
            });
        }
        let node = self.tree.get(path).cloned();
        let cost = touched_cost(path, node.as_ref());
        if self.changes.explicit && !self.caller.privileged {
            if self.changes.touched.len() >= self.quotas.transaction_nodes {
                return Err(StoreError::NoSpace);
            }
            self.check_room(cost, 0)?;
        }
        let touched = Touched { first: node.clone(), copy: Private::Unchanged, logged: [false; 2] };
        self.changes.work += 1;
        self.changes.bytes += cost;
        self.changes.touched.insert(path.clone(), touched);
        Ok(node)
    }

    /// Checks that an open transaction may use `more` bytes after it freed `less`. The check comes before the change,
    /// since the transaction stays open when a request is refused.
    fn check_room(&self, more: usize, less: usize) -> Result<(), StoreError> {
        let Some(held) = self.ledger.held(self.caller.domain) else { return Ok(()) };
        let all = self.tree.usage(self.caller.domain).bytes + held + self.changes.bytes + more;
        if all.saturating_sub(less) > self.quotas.memory_bytes { Err(StoreError::NoMemory) } else { Ok(()) }
    }

    /// Returns the error for a missing node: its nearest existing ancestor decides (ABI io 3.5).
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

    /// Creates a node and its missing ancestors; they inherit permissions from the nearest existing ancestor.
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
        // Only a special name that does not exist has no existing ancestor.
        let (mut parent_path, mut parent) = base.ok_or(StoreError::NotFound)?;
        self.require_write(&parent)?;
        let inherited = if self.caller.privileged {
            parent.permissions.clone()
        } else {
            parent.permissions.owned_by(self.caller.domain)
        };
        while let Some(at) = missing.pop() {
            let children = parent.children.with(at.name());
            self.put_children(&parent_path, &parent, children)?;
            let value = if missing.is_empty() { value } else { &[] };
            let node = Node::leaf(value, inherited.clone());
            self.put(&at, node.clone())?;
            (parent_path, parent) = (at, Arc::new(node));
        }
        Ok(())
    }

    /// Stores a private copy of `node` with other `children`.
    fn put_children(&mut self, path: &Path, node: &Node, children: Names) -> Result<(), StoreError> {
        let Node { value, permissions, generation, .. } = node;
        let node = Node { children, value: value.clone(), permissions: permissions.clone(), generation: *generation };
        self.put(path, node)
    }

    /// Stores a private copy of a node, and checks the caller's quotas.
    fn put(&mut self, path: &Path, node: Node) -> Result<(), StoreError> {
        if !self.caller.privileged && node.size() > self.quotas.node_bytes {
            return Err(StoreError::NoSpace);
        }
        let cost = copy_cost(path, &node);
        if self.changes.explicit && !self.caller.privileged {
            let before = match self.changes.touched.get(path).map(|touched| &touched.copy) {
                Some(Private::Present(copy)) => copy_cost(path, copy),
                _ => 0,
            };
            self.check_room(cost, before)?;
        }
        self.take(path);
        let added = &mut self.delta(node.permissions.owner()).added;
        added.nodes += 1;
        added.bytes += node.cost(path);
        self.changes.bytes += cost;
        self.changes.work += 1;
        if let Some(touched) = self.changes.touched.get_mut(path) {
            touched.copy = Private::Present(Arc::new(node));
        }
        self.check_usage()
    }

    /// Marks a node as removed, and takes its cost off its owner's usage.
    fn take(&mut self, path: &Path) {
        let Some(touched) = self.changes.touched.get_mut(path) else {
            return;
        };
        let present = match core::mem::replace(&mut touched.copy, Private::Removed) {
            Private::Unchanged => touched.first.clone(),
            Private::Removed => None,
            Private::Present(copy) => {
                self.changes.bytes -= copy_cost(path, &copy);
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
        self.changes.check_usage(self.tree, self.caller, self.quotas, self.ledger)
    }

    /// Logs a change for the watches. A second change of the same path is not logged.
    fn log(&mut self, path: &Path, exact: bool) {
        let logged = self.changes.touched.get_mut(path).and_then(|touched| touched.logged.get_mut(usize::from(exact)));
        if logged.is_some_and(|logged| !core::mem::replace(logged, true)) {
            self.changes.told_bytes += told_cost(path);
            self.changes.log.push(Change { path: path.clone(), exact });
        }
    }
}
