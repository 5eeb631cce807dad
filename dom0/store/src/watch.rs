//! Watches: which client is told of changes at which path (ABI io 3.3).
//!
//! A [`Search`] finds the watches that a change concerns. It goes from the changed path towards the root, directly from
//! one watched path to the next: watches elsewhere and levels without a watch cost nothing. It can stop at any watch
//! and continue later.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::sync::Arc;

use crate::domain::{ConnectionId, DomainId};
use crate::error::StoreError;
use crate::path::Path;
use crate::quota::{map_entry, shared};

/// Longest token: an event with the longest path still fits into a message (XSA-324).
pub const TOKEN_MAX: usize = 4096 - crate::path::ABSOLUTE_MAX - 2;

/// One registered watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Watch {
    /// Number in the order of registration; 0 if the watch only carries an event restored from a snapshot.
    pub(crate) number: u64,
    pub(crate) connection: ConnectionId,
    pub(crate) path: Path,
    /// The domain whose home a relative path starts from.
    pub(crate) home: DomainId,
    pub(crate) relative: bool,
    pub(crate) token: Arc<[u8]>,
    /// How many levels below its path the watch covers; all levels if `None`.
    pub(crate) depth: Option<u32>,
}

/// What a client is told: the path as the client writes it, and the token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchEvent {
    /// The path that changed, relative if the watch was registered with a relative path.
    pub path: String,
    /// The token given at registration.
    pub token: Box<[u8]>,
}

impl Watch {
    /// The event for a change at `path`.
    pub(crate) fn event(&self, path: &Path) -> WatchEvent {
        let path = if self.relative { path.relative_to(self.home) } else { path.as_str().into() };
        WatchEvent { path, token: (&*self.token).into() }
    }

    /// Whether `path` is within the watch's depth.
    fn reaches(&self, path: &Path) -> bool {
        let levels = || path.levels_below(&self.path).unwrap_or(usize::MAX);
        self.depth.is_none_or(|depth| levels() <= depth as usize)
    }

    /// Bytes of the heap that the watch uses, with its places in the maps here and in the overflow map of its
    /// connection.
    pub(crate) fn cost(&self) -> usize {
        let maps = map_entry(size_of::<(Key, Arc<Self>)>())
            + map_entry(size_of::<(OwnKey, u64)>())
            + map_entry(size_of::<(u64, Arc<Self>)>());
        maps + shared(size_of::<Self>()) + shared(self.path.as_str().len()) + shared(self.token.len())
    }
}

type Key = (Path, u64);
type OwnKey = (ConnectionId, Path, Arc<[u8]>);

/// All watches, by path and by connection.
#[derive(Clone, Debug, Default)]
pub(crate) struct Watches {
    by_path: BTreeMap<Key, Arc<Watch>>,
    by_owner: BTreeMap<OwnKey, u64>,
    held: BTreeMap<ConnectionId, Held>,
    last: u64,
}

/// How much one connection's watches use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) watches: usize,
    pub(crate) bytes: usize,
}

impl Watches {
    pub(crate) fn held(&self, connection: ConnectionId) -> Held {
        self.held.get(&connection).copied().unwrap_or_default()
    }

    /// Registers a watch, and gives it its number.
    pub(crate) fn add(&mut self, watch: Watch) -> Result<Arc<Watch>, StoreError> {
        let own = (watch.connection, watch.path.clone(), Arc::clone(&watch.token));
        if self.by_owner.contains_key(&own) {
            return Err(StoreError::Exists);
        }
        self.last += 1;
        let watch = Arc::new(Watch { number: self.last, ..watch });
        let held = self.held.entry(watch.connection).or_default();
        held.watches += 1;
        held.bytes += watch.cost();
        self.by_owner.insert(own, watch.number);
        self.by_path.insert((watch.path.clone(), watch.number), Arc::clone(&watch));
        Ok(watch)
    }

    pub(crate) fn remove(
        &mut self,
        connection: ConnectionId,
        path: &Path,
        token: &[u8],
    ) -> Result<Arc<Watch>, StoreError> {
        let number = self.by_owner.remove(&(connection, path.clone(), token.into())).ok_or(StoreError::NotFound)?;
        let watch = self.by_path.remove(&(path.clone(), number)).ok_or(StoreError::NotFound)?;
        if let Some(held) = self.held.get_mut(&connection) {
            held.watches -= 1;
            held.bytes -= watch.cost();
            if held.watches == 0 {
                self.held.remove(&connection);
            }
        }
        Ok(watch)
    }

    /// Removes the watches of one connection, without passing those of others.
    pub(crate) fn remove_all(&mut self, connection: ConnectionId) {
        self.held.remove(&connection);
        let first = (connection, Path::first(), Arc::default());
        loop {
            let own = self.by_owner.range(&first..).next().filter(|((of, ..), _)| *of == connection);
            let Some((key, number)) = own.map(|(key, number)| (key.clone(), *number)) else { return };
            self.by_owner.remove(&key);
            self.by_path.remove(&(key.1, number));
        }
    }

    /// The watch on exactly this path with the smallest number from `number` on.
    pub(crate) fn on(&self, path: &Path, number: u64) -> Option<&Arc<Watch>> {
        let key = (path.clone(), number);
        self.by_path.range(key..).next().filter(|((at, _), _)| at == path).map(|(_, watch)| watch)
    }

    /// All watches.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<Watch>> {
        self.by_path.values()
    }

    /// All watches of one connection.
    pub(crate) fn of(&self, connection: ConnectionId) -> impl Iterator<Item = &Arc<Watch>> {
        self.iter().filter(move |watch| watch.connection == connection)
    }
}

/// The search for the watches that a change concerns: those on its path, then those on each path above. Watches on one
/// path come in the order of registration.
#[derive(Clone, Debug)]
pub(crate) struct Search {
    /// The path whose watches are looked at; `None` at the end.
    at: Option<Path>,
    /// The smallest watch number not looked at yet on the path `at`; `None` before the next watched path is found.
    next: Option<u64>,
    /// Whether only watches on exactly the path are looked for.
    exact: bool,
}

impl Search {
    /// Begins a search at `path`.
    pub(crate) const fn new(path: Path, exact: bool) -> Self {
        Self { at: Some(path), next: if exact { Some(0) } else { None }, exact }
    }

    /// Does one step. Returns a watch that a change at `path` concerns, `Some(None)` if the step found no watch, and
    /// `None` at the end.
    pub(crate) fn step(&mut self, watches: &Watches, path: &Path) -> Option<Option<Arc<Watch>>> {
        let at = self.at.clone()?;
        let Some(number) = self.next else {
            self.descend(watches, &at);
            return Some(None);
        };
        match watches.on(&at, number) {
            Some(watch) => {
                self.next = Some(watch.number + 1);
                Some(Some(watch).filter(|watch| watch.reaches(path)).cloned())
            }
            None => {
                self.at = at.parent().filter(|_| !self.exact);
                self.next = None;
                Some(None)
            }
        }
    }

    /// Moves on to the longest path at or above `at` that may be watched. It follows from the last watched path at or
    /// before `at` in the order of paths.
    fn descend(&mut self, watches: &Watches, at: &Path) {
        let last = watches.by_path.range(..=(at.clone(), u64::MAX)).next_back();
        let Some(((watched, _), _)) = last else {
            self.at = None;
            return;
        };
        let common = at.common(watched);
        self.next = common.as_ref().filter(|common| *common == watched).map(|_| 0);
        self.at = common;
    }
}
