//! Watches: who wants to hear of which path (ABI 3.3).

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use crate::domain::{ConnectionId, DomainId};
use crate::error::StoreError;
use crate::path::Path;
use crate::tree::OVERHEAD;

/// Longest token: with the longest path, an event still fits into a message (XSA-324).
pub const TOKEN_MAX: usize = 4096 - crate::path::ABSOLUTE_MAX - 2;

/// One registered watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Watch {
    pub(crate) connection: ConnectionId,
    /// The domain whose home a relative path starts from.
    pub(crate) home: DomainId,
    pub(crate) relative: bool,
    pub(crate) token: Box<[u8]>,
    /// How many levels below its path it hears of; all if not given.
    pub(crate) depth: Option<u32>,
}

/// What a client is told: a path as it would write it, and its own token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchEvent {
    /// The path that changed, relative if the watch was.
    pub path: String,
    /// The token given at registration.
    pub token: Box<[u8]>,
}

impl Watch {
    /// The event for a change at `path`.
    pub(crate) fn event(&self, path: &Path) -> WatchEvent {
        let path = if self.relative { path.relative_to(self.home) } else { path.as_str().into() };
        WatchEvent { path, token: self.token.clone() }
    }

    /// The event for a special name; with a depth it says which domain.
    pub(crate) fn special_event(&self, name: &Path, domain: DomainId) -> WatchEvent {
        let with_domain = self.depth.is_some_and(|depth| depth > 0);
        let path = if with_domain { format!("{name}/{domain}") } else { name.as_str().into() };
        WatchEvent { path, token: self.token.clone() }
    }

    /// Whether a change this many levels below is near enough.
    fn reaches(&self, levels: usize) -> bool {
        self.depth.is_none_or(|depth| levels <= depth as usize)
    }

    pub(crate) fn cost(&self, path: &Path) -> usize {
        2 * OVERHEAD + path.as_str().len() + self.token.len()
    }
}

/// All watches by path, so that a change finds those it concerns by walking up.
#[derive(Clone, Debug, Default)]
pub(crate) struct Watches {
    by_path: BTreeMap<Path, Vec<Watch>>,
    held: BTreeMap<ConnectionId, Held>,
}

/// What one connection's watches use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) watches: usize,
    pub(crate) bytes: usize,
}

impl Watches {
    pub(crate) fn held(&self, connection: ConnectionId) -> Held {
        self.held.get(&connection).copied().unwrap_or_default()
    }

    pub(crate) fn add(&mut self, path: Path, watch: Watch) -> Result<(), StoreError> {
        let here = self.by_path.entry(path.clone()).or_default();
        let same = |w: &Watch| w.connection == watch.connection && w.token == watch.token;
        if here.iter().any(same) {
            return Err(StoreError::Exists);
        }
        let held = self.held.entry(watch.connection).or_default();
        held.watches += 1;
        held.bytes += watch.cost(&path);
        here.push(watch);
        Ok(())
    }

    pub(crate) fn remove(&mut self, connection: ConnectionId, path: &Path, token: &[u8]) -> Result<Watch, StoreError> {
        let here = self.by_path.get_mut(path).ok_or(StoreError::NotFound)?;
        let same = |w: &Watch| w.connection == connection && *w.token == *token;
        let at = here.iter().position(same).ok_or(StoreError::NotFound)?;
        let watch = here.remove(at);
        if here.is_empty() {
            self.by_path.remove(path);
        }
        if let Some(held) = self.held.get_mut(&connection) {
            held.watches -= 1;
            held.bytes -= watch.cost(path);
            if held.watches == 0 {
                self.held.remove(&connection);
            }
        }
        Ok(watch)
    }

    pub(crate) fn remove_all(&mut self, connection: ConnectionId) {
        if self.held.remove(&connection).is_none() {
            return;
        }
        self.by_path.retain(|_, here| {
            here.retain(|watch| watch.connection != connection);
            !here.is_empty()
        });
    }

    /// Watches on exactly this path.
    pub(crate) fn on<'s>(&'s self, path: &Path) -> impl Iterator<Item = &'s Watch> + use<'s> {
        self.by_path.get(path).into_iter().flatten()
    }

    /// Watches that a change at `path` concerns, outermost last, with the path each watches.
    pub(crate) fn at_or_above(&self, path: &Path) -> impl Iterator<Item = (Path, &Watch)> {
        path.and_ancestors().enumerate().flat_map(|(levels, at)| {
            let near = self.on(&at).filter(move |watch| watch.reaches(levels));
            near.map(move |watch| (at.clone(), watch))
        })
    }

    /// Every watch with its path.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&Path, &Watch)> {
        self.by_path.iter().flat_map(|(path, here)| here.iter().map(move |watch| (path, watch)))
    }
}
