//! Work that follows from requests, done in pieces so that no turn is long: watchers are told of changes, and the nodes
//! and rights of a domain that is gone are removed.
//!
//! There is one queue for all work, in the order of the commits, so each watcher hears of a commit before it hears of a
//! later one. A change is in the tree when its request is answered; only the events come piece by piece. Who may hear
//! of a change is recorded when the change is committed.

use alloc::collections::VecDeque;
use alloc::format;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;

use crate::domain::{Caller, ConnectionId, DomainId};
use crate::error::StoreError;
use crate::path::{Path, RELEASE_DOMAIN};
use crate::permission::{Permissions, Rights};
use crate::server::Store;
use crate::tree::Node;
use crate::view::{Changes, Fired, View};
use crate::watch::{Search, Watch};

/// Steps after which a turn of [`Store::work`] ends.
const TURN: u64 = 256;
/// Nodes removed, or looked at, in one step.
const PIECE: usize = 16;

/// What follows from a request in addition to its reply.
#[derive(Debug)]
pub(crate) enum Effect {
    None,
    Changed(Vec<Fired>),
    /// The first event of a new watch. Only the client that set the watch gets it.
    FirstEvent(Arc<Watch>),
    Special(&'static str, DomainId),
    /// A domain is gone: its nodes and rights are to be removed, then the special name `@releaseDomain` fires.
    Gone(DomainId),
    /// A privileged caller has asked to remove a node and all nodes below it, whoever owns them.
    Removed(Path),
}

/// A piece of work that can be interrupted and continued.
#[derive(Clone, Debug)]
enum Job {
    /// Tells watchers of the changes of one commit. `bytes` are charged to the client `cause` until all watchers have been
    /// told.
    Tell { cause: Option<ConnectionId>, bytes: usize, changes: vec::IntoIter<Fired>, now: Option<(Fired, Search)> },
    /// Queues the first event of a new watch, for the watch's own path.
    First(Arc<Watch>),
    /// Fires a special name at those of its watchers that may read it by `rights`; goes on at the watch with number `next`.
    Special { name: Path, domain: DomainId, rights: Permissions, next: u64 },
    /// Removes the nodes and rights of `domain`, which is gone, so that the next domain with the same number inherits nothing
    /// (XSA-322, XSA-419). Goes on after the path `after`; begins with the root if that is `None`.
    Unmake { domain: DomainId, after: Option<Path> },
    /// Removes a node and all below it.
    Remove(Path),
}

/// The work left to do, oldest first.
#[derive(Clone, Debug, Default)]
pub(crate) struct Jobs(VecDeque<Job>);

impl Jobs {
    /// Whether nodes or rights of this domain are still to be removed.
    pub(crate) fn unmakes(&self, domain: DomainId) -> bool {
        self.0.iter().any(|job| matches!(job, Job::Unmake { domain: gone, .. } if *gone == domain))
    }

    /// Whether a node and all below it are still to be removed, by a request of a privileged caller.
    pub(crate) fn removes(&self, path: &Path) -> bool {
        self.0.iter().any(|job| matches!(job, Job::Remove(removed) if removed == path))
    }

    /// How many bytes are charged to a client for changes that not all watchers have been told of.
    pub(crate) fn untold(&self, id: ConnectionId) -> usize {
        let of = |job: &Job| match job {
            Job::Tell { cause, bytes, .. } if *cause == Some(id) => *bytes,
            _ => 0,
        };
        self.0.iter().map(of).sum()
    }
}

impl Store {
    /// Does up to one turn of the work that requests have left; returns whether more is left. Whoever makes requests calls this
    /// until nothing is left, and lets other tasks have turns in between.
    #[must_use = "watchers wait for what is left"]
    pub fn work(&mut self) -> bool {
        let end = self.steps.saturating_add(TURN);
        while self.steps < end {
            let Some(job) = self.jobs.0.pop_front() else { return false };
            self.steps += 1;
            self.step(job);
        }
        self.has_work()
    }

    /// Whether [`work`](Self::work) has anything to do.
    #[must_use]
    pub fn has_work(&self) -> bool {
        !self.jobs.0.is_empty()
    }

    /// Queues the work that follows from a request, and does the first turn of it.
    pub(crate) fn follow(&mut self, cause: Option<ConnectionId>, effect: Effect) {
        match effect {
            Effect::None => return,
            Effect::Changed(fired) if fired.is_empty() => return,
            Effect::Changed(fired) => {
                let job = self.tell(cause, fired);
                self.jobs.0.push_back(job);
            }
            Effect::FirstEvent(watch) => self.jobs.0.push_back(Job::First(watch)),
            Effect::Special(name, domain) => self.tell_special(name, domain),
            Effect::Gone(domain) => {
                self.jobs.0.push_back(Job::Unmake { domain, after: None });
                self.tell_special(RELEASE_DOMAIN, domain);
            }
            Effect::Removed(path) => self.jobs.0.push_back(Job::Remove(path)),
        }
        let _ = self.work();
    }

    fn tell(&mut self, cause: Option<ConnectionId>, fired: Vec<Fired>) -> Job {
        let bytes = fired.iter().map(Fired::cost).sum();
        let connection = cause.and_then(|cause| self.connections.get_mut(&cause));
        if let Some(connection) = connection {
            connection.untold += bytes;
        }
        Job::Tell { cause, bytes, changes: fired.into_iter(), now: None }
    }

    fn tell_special(&mut self, name: &'static str, domain: DomainId) {
        let name = Path::literal(name);
        if let Some(node) = self.tree.get(&name) {
            let rights = node.permissions.clone();
            self.jobs.0.push_back(Job::Special { name, domain, rights, next: 0 });
        }
    }

    /// Does one step of a job. A job that is not done goes back to the front of the queue.
    fn step(&mut self, job: Job) {
        let left = match job {
            Job::Tell { cause, bytes, mut changes, now } => {
                let now = now.or_else(|| {
                    let fired = changes.next()?;
                    let search = Search::new(fired.path.clone(), fired.exact);
                    Some((fired, search))
                });
                match now {
                    Some((fired, search)) => {
                        let now = self.tell_one(fired, search);
                        Some(Job::Tell { cause, bytes, changes, now })
                    }
                    None => {
                        let connection = cause.and_then(|cause| self.connections.get_mut(&cause));
                        if let Some(connection) = connection {
                            connection.untold -= bytes;
                        }
                        None
                    }
                }
            }
            Job::First(watch) => {
                let watched = watch.path.clone();
                self.queue_event(&watch, &watched, |_| true);
                None
            }
            Job::Special { name, domain, rights, next } => self.watches.on(&name, next).cloned().map(|watch| {
                // A watch with a depth above 0 is told which domain the event is about.
                let with_domain = watch.depth.is_some_and(|depth| depth > 0);
                let path = if with_domain { name.child(&format!("{domain}")) } else { name.clone() };
                self.queue_event(&watch, &path, |caller| rights.allow(caller, Rights::READ));
                Job::Special { name, domain, rights, next: watch.number + 1 }
            }),
            Job::Unmake { domain, after } => {
                self.unmake_some(domain, after.as_ref());
                None
            }
            Job::Remove(path) => {
                self.remove_some(path);
                None
            }
        };
        if let Some(left) = left {
            self.jobs.0.push_front(left);
        }
    }

    /// Does one step of telling watchers of the change `fired`: queues the event of one watch, or goes on with the search for
    /// watches. Returns `None` when all watches have been told.
    fn tell_one(&mut self, fired: Fired, mut search: Search) -> Option<(Fired, Search)> {
        if let Some(watch) = search.step(&self.watches, &fired.path)? {
            self.queue_event(&watch, &fired.path, |caller| fired.may_be_heard_by(caller));
        }
        Some((fired, search))
    }

    fn queue_event(&mut self, watch: &Arc<Watch>, path: &Path, may_hear: impl FnOnce(&Caller) -> bool) {
        if let Some(connection) = self.connections.get_mut(&watch.connection)
            && may_hear(&connection.caller)
        {
            connection.outbox.event(watch, path, &self.quotas);
        }
    }

    /// Looks at the next few nodes after the path `after`. Removes the rights that `domain`, which is gone, has to them. At the
    /// first node that the domain owned, stops and queues the removal of this node. Queues the rest of the job.
    fn unmake_some(&mut self, domain: DomainId, after: Option<&Path>) {
        let next = self.tree.after(after).take(PIECE);
        let nodes: Vec<(Path, Arc<Node>)> = next.map(|(path, node)| (path.clone(), Arc::clone(node))).collect();
        self.steps += nodes.len() as u64;
        for (path, node) in &nodes {
            if node.permissions.owner() == domain {
                self.jobs.0.push_front(Job::Unmake { domain, after: Some(path.clone()) });
                if path.parent().is_some() {
                    self.jobs.0.push_front(Job::Remove(path.clone()));
                } else {
                    // The root and special names cannot be removed; the server's own domain becomes their owner.
                    let own = Permissions::private(self.own);
                    self.change_as_owner(|view| view.set_permissions(path, own));
                }
                return;
            }
            if node.permissions.mention(domain) {
                let permissions = node.permissions.retaining(|named| named != domain);
                self.tree.insert(path.clone(), Node { permissions, ..Node::clone(node) });
            }
        }
        if let Some((path, _)) = nodes.last() {
            self.jobs.0.push_front(Job::Unmake { domain, after: Some(path.clone()) });
        }
    }

    /// Removes the last few nodes below a path, and queues the rest of the job; if there are none, removes the node at the
    /// path.
    fn remove_some(&mut self, path: Path) {
        let doomed: Vec<Path> = self.tree.below(&path).take(PIECE).cloned().collect();
        if doomed.is_empty() {
            self.change_as_owner(|view| view.remove_leaf(&path, false));
            return;
        }
        self.jobs.0.push_front(Job::Remove(path));
        self.change_as_owner(|view| doomed.iter().try_for_each(|below| view.remove_leaf(below, true)));
    }

    /// Changes the tree with the rights of the server. Watchers are told of the changes before any other job goes on.
    fn change_as_owner(&mut self, change: impl FnOnce(&mut View<'_>) -> Result<(), StoreError>) {
        let caller = Caller { domain: self.own, privileged: true, target: None };
        let mut changes = Changes::default();
        let ledger = self.ledger();
        let mut view = View { tree: &self.tree, changes: &mut changes, caller: &caller, quotas: &self.quotas, ledger };
        // This can only fail because a node is gone already, which is no error here: the server has all rights.
        let _ = change(&mut view);
        self.steps += changes.take_work() as u64;
        let fired = self.commit(changes);
        if !fired.is_empty() {
            let job = self.tell(None, fired);
            self.jobs.0.push_front(job);
        }
    }
}
