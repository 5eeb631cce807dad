//! The machine against stock front ends, hostile ones, and a toolstack, in a thousand random orders.

use std::collections::BTreeMap;

use test_random::Random;
use xenbus_backend::{Act, Device, Front, IN_USE_NS, Kind, State};

const ORDERS: u64 = 1_000;
/// Random events of each order, before it is brought to an end.
const EVENTS: usize = 150;
const BLOCK: Kind = Kind { published: State::Initialised };
const NET: Kind = Kind { published: State::Connected };

/// The stock drivers that differ in what they do (ABI io 2.4, 3.10, 3.11).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Driver {
    /// Publishes at B=2, F=3; F=4 at B=4.
    Block,
    /// Publishes at B=2, F=4 at once.
    Net,
    /// Publishes without waiting, F=3; F=4 at B=4.
    Console,
}

/// What a front end is about to do. The number counts the steps that are done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Plan {
    /// Be used, and follow B.
    Run,
    /// F=5, F=6, and no more: the guest shuts down.
    ShutDown(u8),
    /// F=5, F=6, F=1, each after B has followed: a new kernel that finds an old device, or a driver bound again.
    Reset(u8),
    /// F=6 at once, as blkfront is removed, and F=1 when B has followed.
    Unbind(u8),
    /// Anything.
    Hostile,
}

/// A guest's half of the device, its directory in the store and its driver.
struct FrontEnd {
    driver: Driver,
    plan: Plan,
    /// F's state; `None` when the directory is gone.
    state: Option<State>,
    /// The nodes, as a number that is new each time rings are made. A hostile one may write some that make no sense (0).
    nodes: Option<u64>,
    made: u64,
    /// It has written what no stock driver does since it last began at F=1.
    odd: bool,
}

impl FrontEnd {
    fn write(&mut self, state: State) {
        if self.state.is_some() {
            self.state = Some(state);
        }
    }

    fn publish(&mut self, state: State) {
        self.made += 1;
        self.nodes = Some(self.made);
        self.write(state);
    }

    /// The guest looks at B and does what follows.
    fn step(&mut self, back: State, random: &mut Random) {
        let Some(state) = self.state else { return };
        let followed = |least: State| back == State::Unknown || (least..=State::Closed).contains(&back);
        match self.plan {
            Plan::Run => self.run(state, back),
            Plan::ShutDown(0) => (self.state, self.plan) = (Some(State::Closing), Plan::ShutDown(1)),
            Plan::ShutDown(1) if followed(State::Closing) => {
                (self.state, self.plan) = (Some(State::Closed), Plan::ShutDown(2));
            }
            Plan::Reset(0) => (self.state, self.plan) = (Some(State::Closing), Plan::Reset(1)),
            Plan::Reset(1) if followed(State::Closing) => {
                (self.state, self.plan) = (Some(State::Closed), Plan::Reset(2));
            }
            Plan::Unbind(0) => (self.state, self.plan) = (Some(State::Closed), Plan::Unbind(1)),
            Plan::Reset(2) | Plan::Unbind(1) if followed(State::Closed) => {
                (self.state, self.plan, self.odd) = (Some(State::Initialising), Plan::Run, false);
            }
            Plan::ShutDown(_) | Plan::Reset(_) | Plan::Unbind(_) => {}
            Plan::Hostile => self.harm(random),
        }
    }

    fn run(&mut self, state: State, back: State) {
        use State::{Closed, Closing, Connected, InitWait, Initialised, Initialising};
        match (self.driver, state, back) {
            (Driver::Block, Initialising, InitWait) | (Driver::Console, Initialising, _) => self.publish(Initialised),
            (Driver::Net, Initialising, InitWait) => self.publish(Connected),
            (Driver::Block | Driver::Console, Initialised, Connected) => self.write(Connected),
            (_, Initialising | Closed, _) => {}
            // What was closed before it began again is waited for.
            (Driver::Console, Initialised, Closed) => {}
            (_, _, Closing | Closed) => self.write(Closed),
            _ => {}
        }
    }

    fn harm(&mut self, random: &mut Random) {
        self.odd = true;
        match random.below(40) {
            0 => self.state = None,
            1..4 => self.nodes = None,
            4..8 => self.nodes = Some(0),
            8..12 => {
                self.made += 1;
                self.nodes = Some(self.made);
            }
            n => self.write(State::ALL[usize::try_from(n).unwrap() % State::ALL.len()]),
        }
    }
}

/// What can happen to a device, and is counted by the state in which it did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Detach,
    Force,
    Death,
    Failure,
    Reset,
    Unbind,
    ShutDown,
}

const COUNTED: [Event; 7] =
    [Event::Detach, Event::Force, Event::Death, Event::Failure, Event::Reset, Event::Unbind, Event::ShutDown];

/// How often each event met each state.
type Met = BTreeMap<(Event, State), usize>;

struct World {
    seed: u64,
    random: Random,
    now: u64,
    device: Device,
    front: FrontEnd,
    /// B's state; `None` when the directory is gone.
    back: Option<State>,
    online: bool,
    /// Nodes that are being connected.
    connecting: Option<u64>,
    /// Nodes that are connected.
    connection: Option<u64>,
    connects: usize,
    disconnects: usize,
    /// The last act asked for the nodes.
    reads: bool,
    in_use: usize,
    dead: bool,
    /// The front end is not asked.
    forced: bool,
    wanted: bool,
    /// When features were published.
    published: Vec<u64>,
    told: Vec<String>,
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("seed {}, {:?}:\n  {}", self.seed, self.front.driver, self.told.join("\n  "));
        }
    }
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Random::seeded(seed);
        let driver = [Driver::Block, Driver::Net, Driver::Console][usize::try_from(random.below(3)).unwrap()];
        let kind = if driver == Driver::Net { NET } else { BLOCK };
        let state = Some(State::Initialising);
        Self {
            seed,
            random,
            now: 1_000_000_000,
            device: Device::new(kind),
            front: FrontEnd { driver, plan: Plan::Run, state, nodes: None, made: 0, odd: false },
            back: state,
            online: true,
            connecting: None,
            connection: None,
            connects: 0,
            disconnects: 0,
            reads: false,
            in_use: 0,
            dead: false,
            forced: false,
            wanted: true,
            published: Vec::new(),
            told: Vec::new(),
        }
    }

    fn front_step(&mut self) {
        let before = (self.front.state, self.front.nodes);
        if !self.dead {
            self.front.step(self.back.unwrap_or_default(), &mut self.random);
        }
        if (self.front.state, self.front.nodes) != before {
            self.told.push(format!("{:?}: F={:?} nodes {:?}", self.front.plan, self.front.state, self.front.nodes));
        }
    }

    /// One act of the back end; answers whether there was something to do.
    fn back_step(&mut self) -> bool {
        let state = self.front.state.unwrap_or_default();
        let nodes = self.front.nodes.filter(|_| self.reads);
        let nodes_were_asked_for = std::mem::take(&mut self.reads);
        if nodes_were_asked_for && nodes.is_none() && self.connecting.is_none() {
            // The nodes are missing.
            self.device.failed();
            return true;
        }
        let act = self.device.step(Front { state, nodes }, self.now);
        if act != Act::Rest {
            self.told.push(format!("{act:?} at F={state:?}"));
        }
        self.carry_out(&act, state);
        self.device.done(&act, self.now);
        assert_eq!(self.back, Some(self.device.state()).filter(|_| !self.device.is_gone()), "we know what we wrote");
        self.look();
        act != Act::Rest
    }

    fn carry_out(&mut self, act: &Act<u64>, theirs: State) {
        match act {
            Act::Rest => {}
            Act::Publish => {
                assert!(matches!(self.back, Some(State::Initialising | State::Closed)));
                assert_eq!(self.connection, None, "a device that begins has nothing of the last one");
                let minute_ago = self.now.saturating_sub(59_999_999_999);
                assert!(self.published.iter().filter(|at| **at >= minute_ago).count() < 10, "ten times a minute");
                self.published.push(self.now);
                self.back = Some(State::InitWait);
            }
            Act::Read => self.reads = true,
            Act::Connect(nodes) => {
                assert_eq!((self.connecting, self.connection), (None, None));
                assert_eq!(Some(*nodes), self.front.nodes, "the nodes that are there now");
                assert!(matches!(theirs, State::Initialised | State::Connected), "and are published: {theirs:?}");
                self.connecting = Some(*nodes);
            }
            Act::Write(state) => {
                let used = matches!(theirs, State::Closing | State::Closed | State::Unknown);
                assert!(*state != State::Connected || (!used && self.connection.is_some()), "B=4 at F={theirs:?}");
                assert!(*state != State::Closed || self.connection.is_none(), "B=6 with rings still mapped");
                self.back = Some(*state);
            }
            Act::Offline => (self.back, self.online) = (Some(State::Closing), false),
            Act::Disconnect => {
                assert!(self.connection.take().is_some(), "there is something to disconnect");
                self.disconnects += 1;
            }
            Act::InUse => self.in_use += 1,
            Act::Remove => {
                assert_eq!((self.connecting, self.connection), (None, None));
                (self.back, self.front.state) = (None, None);
            }
        }
    }

    /// The mapping and binding that has begun ends.
    fn connect_ends(&mut self) {
        let Some(nodes) = self.connecting.take() else { return };
        if nodes == 0 || self.random.below(8) == 0 {
            self.told.push("cannot be connected".into());
            self.device.not_connected();
        } else {
            self.told.push(format!("connected to {nodes}"));
            self.device.connected();
            self.connection = Some(nodes);
            self.connects += 1;
        }
    }

    /// What must hold at every moment.
    fn look(&self) {
        let stock = !self.front.odd && self.front.plan == Plan::Run;
        let used = matches!(self.front.state, Some(State::Initialised | State::Connected));
        if stock && used && !self.forced && self.back == Some(State::Connected) {
            assert_eq!(self.connection, Some(self.front.made), "a front end in use is connected to its last rings");
        }
        assert_eq!(self.connects, self.disconnects + usize::from(self.connection.is_some()));
        assert!(!self.device.is_gone() || self.connection.is_none());
    }

    fn happen(&mut self, event: Event, met: &mut Met) {
        if self.device.is_gone() || self.dead {
            return;
        }
        *met.entry((event, self.device.state())).or_default() += 1;
        self.told.push(format!("{event:?} at B={:?}", self.back));
        match event {
            Event::Detach => {
                self.device.detach(self.now);
                self.wanted = false;
            }
            Event::Force => {
                self.device.force();
                (self.forced, self.wanted) = (true, false);
            }
            Event::Death => {
                self.device.domain_died();
                (self.dead, self.forced, self.wanted) = (true, true, false);
            }
            Event::Failure => self.device.failed(),
            Event::Reset => self.front.plan = Plan::Reset(0),
            Event::Unbind if self.front.driver == Driver::Block => self.front.plan = Plan::Unbind(0),
            // Others wait for the back end before they go.
            Event::Unbind => self.front.plan = Plan::Reset(0),
            Event::ShutDown => self.front.plan = Plan::ShutDown(0),
        }
    }

    fn random_event(&mut self, met: &mut Met) {
        match self.random.below(400) {
            0..160 => drop(self.back_step()),
            160..300 => self.front_step(),
            300..340 => self.connect_ends(),
            340..360 => self.now += 1_000_000 << self.random.below(16),
            360..366 => self.happen(Event::Reset, met),
            366..372 => self.happen(Event::Unbind, met),
            372..378 => self.happen(Event::Failure, met),
            378 => self.happen(Event::ShutDown, met),
            379..381 => self.happen(Event::Detach, met),
            381 => self.happen(Event::Force, met),
            382 => self.happen(Event::Death, met),
            _ if self.front.plan == Plan::Hostile => self.front.plan = Plan::Reset(0),
            _ => self.front.plan = Plan::Hostile,
        }
    }

    /// Lets both ends do what they can, and the clock go on, until nothing happens for longer than anything waits.
    fn settle(&mut self) {
        for _ in 0..20 {
            for _ in 0..20 {
                let before = self.told.len();
                while self.back_step() {
                    assert!(self.told.len() < before + 20, "the back end never rests");
                }
                self.connect_ends();
                self.front_step();
            }
            match self.device.again_ns(self.now) {
                Some(at) => self.now = at,
                None => self.now += 60_000_000_000,
            }
        }
    }

    /// Whatever has happened, a stock front end that begins again gets its device, one that shuts down closes it, and the
    /// toolstack gets rid of it.
    fn bring_to_an_end(&mut self) {
        if self.front.plan == Plan::Hostile {
            self.settle_hostile();
        }
        let ends = matches!(self.front.plan, Plan::ShutDown(_));
        if !ends {
            self.front.plan = Plan::Reset(0);
        }
        self.settle();
        if !self.wanted {
            assert!(self.device.is_gone(), "a front end that follows the rules lets go");
        } else if ends || self.front.state.is_none() {
            assert_eq!((self.back, self.connection), (Some(State::Closed), None));
        } else {
            self.begin_until_used();
            assert_eq!(self.back, Some(State::Connected));
            assert_eq!((self.front.state, self.connection), (Some(State::Connected), Some(self.front.made)));
        }
        self.device.force();
        self.forced = true;
        self.settle();
        assert!(self.device.is_gone());
        assert_eq!((self.back, self.front.state), (None, None));
        assert_eq!((self.connects, self.connection), (self.disconnects, None));
    }

    /// Connecting fails now and then by chance; the front end then begins again.
    fn begin_until_used(&mut self) {
        for _ in 0..50 {
            if self.back == Some(State::Connected) {
                return;
            }
            self.front.plan = Plan::Reset(0);
            self.settle();
        }
    }

    /// A hostile front end that does nothing more keeps a device that was detached, at most; then that is told once.
    fn settle_hostile(&mut self) {
        let plan = std::mem::replace(&mut self.front.plan, Plan::ShutDown(9));
        self.settle();
        assert!(self.in_use <= 1);
        if !self.wanted && !self.device.is_gone() {
            assert_eq!((self.in_use, self.online, self.back), (1, false, Some(State::Closing)));
        }
        self.front.plan = plan;
    }
}

#[test]
fn a_thousand_random_orders_leak_nothing_and_stick_nowhere() {
    let mut met = Met::new();
    let (mut connects, mut in_use) = (0, 0);
    for seed in 0..ORDERS {
        let mut world = World::new(seed);
        for _ in 0..EVENTS {
            world.random_event(&mut met);
            world.look();
        }
        world.bring_to_an_end();
        connects += world.connects;
        in_use += world.in_use;
    }
    for event in COUNTED {
        for state in [State::Initialising, State::InitWait, State::Connected, State::Closing, State::Closed] {
            assert!(met.contains_key(&(event, state)), "{event:?} has never met B={state:?}");
        }
    }
    assert!(connects >= 1_000, "{connects}");
    assert!(in_use > 0, "no front end has held on to its device");
}

/// For every pair of states and every wish the machine comes to rest after a few acts: the function is total.
#[test]
fn every_state_of_a_front_end_leads_to_rest() {
    for kind in [BLOCK, NET] {
        for path in 0..9_u32.pow(4) {
            let mut device = Device::new(kind);
            let states = (0..4).map(|n| State::ALL[usize::try_from(path / 9_u32.pow(n) % 9).unwrap()]);
            for (n, state) in states.enumerate() {
                if n == 2 {
                    device.detach(0);
                }
                let mut acts = 0;
                loop {
                    let act = device.step(Front { state, nodes: Some(()) }, 0);
                    device.done(&act, 0);
                    match act {
                        Act::Rest => break,
                        Act::Connect(()) => device.connected(),
                        _ => {}
                    }
                    acts += 1;
                    assert!(acts < 8, "path {path} of {kind:?} does not rest at F={state:?}");
                }
            }
        }
    }
}

fn acts(device: &mut Device, state: State, now: u64) -> Vec<Act<()>> {
    let mut acts = Vec::new();
    loop {
        let act = device.step(Front { state, nodes: Some(()) }, now);
        device.done(&act, now);
        match act {
            Act::Rest => return acts,
            Act::Connect(()) => device.connected(),
            _ => {}
        }
        acts.push(act);
        assert!(acts.len() < 8, "{acts:?}");
    }
}

#[test]
fn a_block_device_from_the_beginning_to_the_end() {
    let mut device = Device::new(BLOCK);
    assert_eq!(acts(&mut device, State::Initialising, 0), [Act::Publish]);
    assert_eq!(device.step::<()>(Front { state: State::Initialised, nodes: None }, 0), Act::Read);
    assert_eq!(acts(&mut device, State::Initialised, 0), [Act::Connect(()), Act::Write(State::Connected)]);
    assert_eq!(acts(&mut device, State::Connected, 0), []);
    device.detach(5);
    assert_eq!(acts(&mut device, State::Connected, 5), [Act::Offline]);
    assert_eq!(device.again_ns(5), Some(5 + IN_USE_NS));
    assert_eq!(acts(&mut device, State::Connected, 5 + IN_USE_NS), [Act::InUse]);
    assert_eq!(acts(&mut device, State::Connected, u64::MAX), [], "once");
    assert_eq!(acts(&mut device, State::Closing, 9), []);
    assert_eq!(acts(&mut device, State::Closed, 9), [Act::Disconnect, Act::Write(State::Closed), Act::Remove]);
    assert!(device.is_gone());
    assert_eq!(acts(&mut device, State::Initialising, 9), []);
}

#[test]
fn a_net_device_is_not_connected_before_its_rings_are_published() {
    let mut device = Device::new(NET);
    assert_eq!(acts(&mut device, State::Initialised, 0), [Act::Publish]);
    assert_eq!(acts(&mut device, State::Connected, 0), [Act::Connect(()), Act::Write(State::Connected)]);
    assert_eq!(acts(&mut device, State::Reconfiguring, 0), []);
    device.detach(0);
    assert_eq!(acts(&mut device, State::Initialising, 0), [Act::Offline], "what is connected is not taken from it");
    device.domain_died();
    assert_eq!(acts(&mut device, State::Connected, 0), [Act::Disconnect, Act::Remove]);
}

#[test]
fn a_front_end_that_closes_while_it_is_connected_is_not_told_that_it_is() {
    let mut device = Device::new(BLOCK);
    assert_eq!(acts(&mut device, State::Initialising, 0), [Act::Publish]);
    let act = device.step(Front { state: State::Initialised, nodes: Some(()) }, 0);
    device.done(&act, 0);
    assert_eq!(act, Act::Connect(()));
    assert_eq!(acts(&mut device, State::Closing, 0), [], "what has begun is waited for");
    device.connected();
    assert_eq!(acts(&mut device, State::Closing, 0), [Act::Write(State::Closing)]);
    assert_eq!(acts(&mut device, State::Closed, 0), [Act::Disconnect, Act::Write(State::Closed)]);
}

#[test]
fn what_cannot_be_connected_is_closed_and_may_begin_again_ten_times_a_minute() {
    let mut device = Device::new(BLOCK);
    let mut published = 0;
    for _ in 0..100 {
        published += acts(&mut device, State::Initialising, 7).len();
        let act = device.step(Front { state: State::Initialised, nodes: Some(()) }, 7);
        device.done(&act, 7);
        if act == Act::Connect(()) {
            device.not_connected();
            assert_eq!(acts(&mut device, State::Initialised, 7), [Act::Write(State::Closing)]);
        }
        acts(&mut device, State::Closed, 7);
    }
    assert_eq!(published, 10);
    assert_eq!(device.again_ns(7), Some(60_000_000_007));
    assert_eq!(acts(&mut device, State::Initialising, 60_000_000_007), [Act::Publish]);
}

#[test]
fn a_device_that_nobody_uses_goes_at_once() {
    let mut device = Device::new(BLOCK);
    assert_eq!(acts(&mut device, State::Initialising, 0), [Act::Publish]);
    device.detach(0);
    assert_eq!(acts(&mut device, State::Initialising, 0), [Act::Write(State::Closed), Act::Remove]);
}

#[test]
fn a_weaker_wish_does_not_undo_a_stronger_one() {
    let mut device = Device::new(BLOCK);
    assert_eq!(acts(&mut device, State::Initialised, 0).len(), 3);
    device.force();
    device.detach(0);
    let mut dead = device.clone();
    let forced = [Act::Disconnect, Act::Write(State::Closed), Act::Remove];
    assert_eq!(acts(&mut device, State::Connected, 0), forced);
    dead.domain_died();
    dead.force();
    assert_eq!(acts(&mut dead, State::Connected, 0), [Act::Disconnect, Act::Remove]);
}
