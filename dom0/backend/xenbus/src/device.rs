//! A device between a toolstack, which wants it or wants it removed, and a front end, which may write anything.

use crate::rate::Rate;
use crate::state::State;

/// Nanoseconds after which a device that the front end does not release is reported as in use.
pub const IN_USE_NS: u64 = 10_000_000_000;

/// The difference between kinds of devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// The state in which a front end has published its rings: `Initialised` (block, console) or `Connected` (net). The
    /// rings are also published in the states between this one and `Connected`.
    pub published: State,
}

/// What the toolstack wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Want {
    /// The device connected.
    Up,
    /// The device removed once the front end releases it.
    Down,
    /// The device removed at once, whatever the front end does.
    Forced,
    /// The domain is dead, so the device is removed at once.
    Dead,
}

/// Whether the front end's rings are mapped and bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    Down,
    /// The owner is connecting.
    Begun,
    Up,
}

/// The front end's nodes, as read in one transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Front<N> {
    /// The front end's state.
    pub state: State,
    /// The front end's other nodes, if they were read in the same transaction: see [`Act::Read`].
    pub nodes: Option<N>,
}

/// What the owner of a device has to do next.
#[must_use = "the device stands still until it is done"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act<N> {
    /// Do nothing until something changes or until [`Device::again_ns`].
    Rest,
    /// Write the features and B=2.
    Publish,
    /// Read the nodes of the front end together with its state, and step again. If the nodes are invalid, call
    /// [`Device::failed`].
    Read,
    /// Map and bind what the nodes name, then call [`Device::connected`] or
    /// [`Device::not_connected`].
    Connect(N),
    /// Write this state into B.
    Write(State),
    /// Write online=0 and B=5.
    Offline,
    /// Finish the requests taken so far, unmap, unbind.
    Disconnect,
    /// Report to a person that the front end does not release the device.
    InUse,
    /// Remove both directories; the device is then gone.
    Remove,
}

/// A device, from the time when the toolstack has written both directories (F=1, B=1) until both are removed.
#[derive(Clone, Debug)]
pub struct Device {
    kind: Kind,
    want: Want,
    /// B, as last written.
    ours: State,
    link: Link,
    /// Whether the device has failed, or could not be connected.
    broken: bool,
    /// Whether the front end was told that the device is to be removed.
    offline: bool,
    /// When the toolstack asked for removal; `None` once the device was reported as in use.
    waits_since: Option<u64>,
    begun: Rate,
    gone: bool,
}

impl Device {
    /// A device whose directories have just been written.
    #[must_use]
    pub fn new(kind: Kind) -> Self {
        Self {
            kind,
            want: Want::Up,
            ours: State::Initialising,
            link: Link::Down,
            broken: false,
            offline: false,
            waits_since: None,
            begun: Rate::default(),
            gone: false,
        }
    }

    /// B, as last written.
    #[must_use]
    pub const fn state(&self) -> State {
        self.ours
    }

    /// Whether both directories have been removed: nothing is left to do.
    #[must_use]
    pub const fn is_gone(&self) -> bool {
        self.gone
    }

    /// Whether the toolstack wants the device removed.
    #[must_use]
    pub fn is_leaving(&self) -> bool {
        self.want != Want::Up
    }

    /// Tells that the toolstack wants the device removed once the front end releases it.
    pub fn detach(&mut self, now_ns: u64) {
        if self.want == Want::Up {
            (self.want, self.waits_since) = (Want::Down, Some(now_ns));
        }
    }

    /// Tells that the toolstack wants the device removed at once; the guest then sees errors.
    pub fn force(&mut self) {
        if self.want != Want::Dead {
            self.want = Want::Forced;
        }
    }

    /// Tells that the domain is dead.
    pub const fn domain_died(&mut self) {
        self.want = Want::Dead;
    }

    /// Reports that what the nodes name is mapped and bound.
    pub const fn connected(&mut self) {
        self.link = Link::Up;
    }

    /// Reports that what the nodes name could not be mapped or bound. The owner has released all of it, and writes the
    /// reason into its error node.
    pub const fn not_connected(&mut self) {
        (self.link, self.broken) = (Link::Down, true);
    }

    /// Reports that the nodes are invalid, or that the resource behind the device failed. The owner writes the reason
    /// into its error node.
    pub const fn failed(&mut self) {
        self.broken = true;
    }

    /// When to step again even if nothing has changed.
    #[must_use]
    pub fn again_ns(&self, now_ns: u64) -> Option<u64> {
        let at = match self.want {
            Want::Up if self.ours == State::Closed => self.begun.allowed_ns(),
            Want::Down if !self.gone => self.waits_since?.saturating_add(IN_USE_NS),
            _ => return None,
        };
        Some(at).filter(|at| *at > now_ns)
    }

    /// Returns what to do next, given the state of the front end. The owner makes an act's writes in the transaction in
    /// which it read `front`. After the commit, or when the act is done, it calls [`done`](Self::done) and steps again.
    pub fn step<N>(&self, front: Front<N>, now_ns: u64) -> Act<N> {
        if self.gone || self.link == Link::Begun {
            return Act::Rest;
        }
        match self.want {
            Want::Up => self.up(front, now_ns),
            Want::Down if self.may_go(front.state) => self.away(),
            Want::Down => self.down(now_ns),
            Want::Forced | Want::Dead => self.away(),
        }
    }

    /// Reports that the owner did what [`step`](Self::step) returned.
    pub fn done<N>(&mut self, act: &Act<N>, now_ns: u64) {
        match act {
            Act::Rest | Act::Read => {}
            Act::Publish => {
                (self.ours, self.broken) = (State::InitWait, false);
                self.begun.note(now_ns);
            }
            Act::Connect(_) => self.link = Link::Begun,
            Act::Write(state) => self.ours = *state,
            Act::Offline => (self.ours, self.offline) = (State::Closing, true),
            Act::Disconnect => self.link = Link::Down,
            Act::InUse => self.waits_since = None,
            Act::Remove => self.gone = true,
        }
    }

    fn up<N>(&self, front: Front<N>, now_ns: u64) -> Act<N> {
        use State::{Closed, Closing, Connected, InitWait, Initialising};
        match (self.ours, front.state) {
            // The front end was closed as well, so it connects again; some do so without waiting for B=2.
            (Closed, theirs) if theirs.is_up() && now_ns >= self.begun.allowed_ns() => Act::Publish,
            (Closed, _) => Act::Rest,
            (_, theirs) if theirs.is_over() => self.close(),
            (Initialising | InitWait | Connected, Closing) => Act::Write(Closing),
            (InitWait | Connected, _) if self.broken => Act::Write(Closing),
            (Initialising, theirs) if theirs.is_up() => Act::Publish,
            (InitWait, theirs) if theirs.is_up() && theirs >= self.kind.published => match front.nodes {
                _ if self.link == Link::Up => Act::Write(Connected),
                Some(nodes) => Act::Connect(nodes),
                None => Act::Read,
            },
            _ => Act::Rest,
        }
    }

    /// Whether the device may be removed: a front end in this state does not use it.
    fn may_go(&self, theirs: State) -> bool {
        let unused = self.link == Link::Down && matches!(theirs, State::Initialising | State::InitWait);
        theirs.is_over() || self.ours == State::Closed || unused
    }

    fn down<N>(&self, now_ns: u64) -> Act<N> {
        if !self.offline {
            return Act::Offline;
        }
        let late = self.waits_since.is_some_and(|since| now_ns >= since.saturating_add(IN_USE_NS));
        if late { Act::InUse } else { Act::Rest }
    }

    fn close<N>(&self) -> Act<N> {
        match self.link {
            Link::Up => Act::Disconnect,
            _ => Act::Write(State::Closed),
        }
    }

    fn away<N>(&self) -> Act<N> {
        if self.link != Link::Up && (self.ours == State::Closed || self.want == Want::Dead) {
            return Act::Remove;
        }
        self.close()
    }
}
