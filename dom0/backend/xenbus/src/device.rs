//! A device between a toolstack that wants it, or no longer does, and a front end that may write anything.

use crate::rate::Rate;
use crate::state::State;

/// How long a front end may take to let go of a device before that is reported.
pub const IN_USE_NS: u64 = 10_000_000_000;

/// What kinds of devices differ in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// The state in which a front end has published its rings: `Initialised` (block, console) or `Connected` (net). It has
    /// also published them in states between this and `Connected`.
    pub published: State,
}

/// What is to become of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Want {
    Up,
    /// Detached, if the front end lets go.
    Down,
    /// Detached, whatever the front end does.
    Forced,
    /// The domain is dead.
    Dead,
}

/// What we have of the front end's rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    Down,
    /// The owner is connecting.
    Begun,
    Up,
}

/// What was read of the front end, in one transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Front<N> {
    /// Its state.
    pub state: State,
    /// Its nodes, if they were read in the same transaction: see [`Act::Read`].
    pub nodes: Option<N>,
}

/// What the owner of a device does next.
#[must_use = "the device stands still until it is done"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act<N> {
    /// Nothing, until something changes or the clock says [`Device::again_ns`].
    Rest,
    /// Write the features and B=2.
    Publish,
    /// Read the nodes of the front end together with its state, and step again. Nodes that make no sense are a failure:
    /// [`Device::failed`].
    Read,
    /// Map and bind what the nodes name, then call [`Device::connected`] or
    /// [`Device::not_connected`].
    Connect(N),
    /// Write this state into B.
    Write(State),
    /// Write online=0 and B=5.
    Offline,
    /// Finish what was taken, unmap, unbind.
    Disconnect,
    /// Tell a person that the front end does not let go.
    InUse,
    /// Remove both directories. The device is gone then.
    Remove,
}

/// A device, from the moment at which the toolstack has written both directories (F=1, B=1) until they are removed.
#[derive(Clone, Debug)]
pub struct Device {
    kind: Kind,
    want: Want,
    /// B, as we wrote it last.
    ours: State,
    link: Link,
    /// What was connected works no longer, or could not be connected.
    broken: bool,
    /// The front end was told that the device goes.
    offline: bool,
    /// When the toolstack asked for the device to go; `None` once it has been reported as in use.
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

    /// B, as it is.
    #[must_use]
    pub const fn state(&self) -> State {
        self.ours
    }

    /// Whether the directories have been removed: nothing is left to do.
    #[must_use]
    pub const fn is_gone(&self) -> bool {
        self.gone
    }

    /// The toolstack wishes the device away, when the front end lets go of it.
    pub fn detach(&mut self, now_ns: u64) {
        if self.want == Want::Up {
            (self.want, self.waits_since) = (Want::Down, Some(now_ns));
        }
    }

    /// The toolstack wishes the device away now: the guest sees errors.
    pub fn force(&mut self) {
        if self.want != Want::Dead {
            self.want = Want::Forced;
        }
    }

    /// The domain is dead.
    pub const fn domain_died(&mut self) {
        self.want = Want::Dead;
    }

    /// The nodes made sense, and what they name is mapped and bound.
    pub const fn connected(&mut self) {
        self.link = Link::Up;
    }

    /// What the nodes name could not be mapped or bound; the owner holds nothing of it, and writes the reason into its error
    /// node.
    pub const fn not_connected(&mut self) {
        (self.link, self.broken) = (Link::Down, true);
    }

    /// The nodes make no sense, or what is behind the device works no longer. The owner writes the reason into its error node.
    pub const fn failed(&mut self) {
        self.broken = true;
    }

    /// When to step again though nothing has changed.
    #[must_use]
    pub fn again_ns(&self, now_ns: u64) -> Option<u64> {
        let at = match self.want {
            Want::Up if self.ours == State::Closed => self.begun.allowed_ns(),
            Want::Down if !self.gone => self.waits_since?.saturating_add(IN_USE_NS),
            _ => return None,
        };
        Some(at).filter(|at| *at > now_ns)
    }

    /// What to do next, given what the front end says. Make the writes of the act in the transaction in which `front` was read;
    /// after its commit, or when the act is done, call [`done`](Self::done) and step again.
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

    /// The owner did what [`step`](Self::step) said.
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
            // The front end was closed when we were, so it connects again; some do not wait for our InitWait.
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

    /// Whether a front end that is in this state does not use the device.
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
