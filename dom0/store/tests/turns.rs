//! No turn is long: the steps of each are counted, whatever a guest has prepared.

mod common;
use common::*;
use store::{DomainId, StoreError};

/// Steps of a request that looks at, makes or removes as many nodes as a request may: each is looked at when the request
/// is made and when it is committed, and copied in between.
const LONGEST: u64 = 3 * 1024;
/// Steps of a piece of what a request leaves to be done, and one step of removing nodes that began within them.
const PIECE: u64 = 256 + 128;

/// The world of a test, and the longest turn in it.
struct Turns {
    world: World,
    longest: u64,
}

impl Turns {
    fn new(domains: &[u16]) -> Self {
        Self { world: World::new(domains), longest: 0 }
    }

    /// Makes a turn, and notes how many steps it took.
    fn turn<R>(&mut self, turn: impl FnOnce(&mut World) -> R) -> R {
        let before = self.world.store.steps();
        let done = turn(&mut self.world);
        self.longest = self.longest.max(self.world.store.steps() - before);
        done
    }

    /// A request of a guest; its reply comes in the same turn.
    fn ask(&mut self, domain: u16, kind: u32, payload: &str) {
        self.turn(|world| world.send(World::guest(domain), kind, 0, &bytes(payload)));
    }

    /// Does what is left, piece by piece; answers how many there were.
    fn rest(&mut self) -> usize {
        let mut pieces = 0;
        loop {
            let before = self.world.store.steps();
            let more = self.world.store.work();
            let steps = self.world.store.steps() - before;
            assert!(steps <= PIECE, "a piece of {steps} steps");
            pieces += 1;
            if !more {
                return pieces;
            }
        }
    }

    fn end(self, what: &str) {
        println!("{what}: the longest turn has {} steps", self.longest);
        assert!(self.longest <= LONGEST, "{what}: a turn of {} steps", self.longest);
    }
}

/// A transaction of as many writes as fit, on a directory that everybody watches as often as may be.
#[test]
fn a_commit_under_many_watches_is_told_in_pieces() {
    let mut turns = Turns::new(&[1, 2, 3, 4]);
    turns.world.ask(World::guest(1), SET_PERMS, "data|r1|").unwrap();
    for domain in 1..=4 {
        for number in 0..128 {
            let watch = format!("/local/domain/1/data|t{number:03}|");
            assert_eq!(turns.world.ask(World::guest(domain), WATCH, &watch), ok());
        }
    }
    let guest = World::guest(1);
    let tx = turns.world.start(guest);
    let mut writes = 0;
    while turns.world.ask_in(guest, tx, WRITE, &format!("data/{writes:03}|")) == ok() {
        writes += 1;
    }
    assert_eq!(turns.world.ask_in(guest, tx, END, "T|"), refused("ENOMEM"));
    let tx = turns.world.start(guest);
    for number in 0..writes {
        assert_eq!(turns.world.ask_in(guest, tx, WRITE, &format!("data/{number:03}|")), ok());
    }
    turns.turn(|world| world.send(guest, END, tx, b"T\0"));
    let committed = turns.world.store.usage(DomainId(1)).nodes;
    assert!(writes > 200 && committed >= writes, "{writes} writes, {committed} nodes");
    // The writer waits until all have heard; what another domain does is answered at once, and told after it.
    assert!(!turns.world.store.accepts_input(guest) && turns.world.store.has_work());
    turns.ask(2, WRITE, "data/x|1");
    let pieces = turns.rest();
    assert!(pieces > writes, "{writes} writes for 512 watches in {pieces} pieces");
    assert!(turns.world.store.accepts_input(guest));
    for domain in 1..=4 {
        let events = turns.world.events(World::guest(domain));
        let own = |event: &&String| event.starts_with("/local/domain/1/data|");
        assert!(events.len() > 256 && events.iter().filter(own).count() == 128, "each watch has heard of everything");
    }
    turns.end("commit");
}

/// Events of a commit come before those of a later one, however many turns the first one takes.
#[test]
fn a_later_commit_does_not_overtake() {
    let mut turns = Turns::new(&[1, 2]);
    turns.world.ask(World::guest(1), SET_PERMS, "data|b1|").unwrap();
    for number in 0..128 {
        turns.world.ask(World::guest(1), WATCH, &format!("data/far/{number}|t|")).unwrap();
    }
    turns.world.ask(World::guest(2), WATCH, "/local/domain/1/data|w|").unwrap();
    let tx = turns.world.start(World::guest(1));
    for number in 0..200 {
        turns.world.ask_in(World::guest(1), tx, WRITE, &format!("data/{number:03}|")).unwrap();
    }
    turns.world.send(World::guest(1), END, tx, b"T\0");
    turns.world.send(World::guest(2), WRITE, 0, b"/local/domain/1/data/later\0x");
    assert!(turns.world.store.has_work());
    let events = turns.world.events(World::guest(2));
    let expected: Vec<_> = (0..200).map(|n| format!("/local/domain/1/data/{n:03}|w")).collect();
    assert_eq!(events[..200], expected);
    assert_eq!(events[200..], ["/local/domain/1/data/later|w"]);
}

/// Who may hear is decided when a change is committed: rights that are given later show nothing of it.
#[test]
fn rights_given_while_others_are_told_show_nothing_older() {
    let mut world = World::new(&[1, 2]);
    for number in 0..128 {
        world.ask(World::guest(1), WATCH, &format!("data|{number}|")).unwrap();
    }
    world.ask(World::guest(2), WATCH, "/local/domain/1/data|spy|").unwrap();
    world.ask(World::guest(1), SET_PERMS, "data|n1|").unwrap();
    world.drain(World::guest(2));
    let tx = world.start(World::guest(1));
    for name in ["secret-1", "secret-2", "secret-3"] {
        world.ask_in(World::guest(1), tx, WRITE, &format!("data/{name}|x")).unwrap();
    }
    world.send(World::guest(1), END, tx, b"T\0");
    assert!(world.store.has_work());
    world.store.session(world.dom0).set_permissions("/local/domain/1/data", "r1").unwrap();
    assert_eq!(world.events(World::guest(2)), ["/local/domain/1/data|spy"]);
}

/// The largest trees a guest can make, looked at, given away and removed.
#[test]
fn large_directories_and_trees_take_bounded_turns() {
    let mut turns = Turns::new(&[1, 2]);
    turns.ask(1, SET_PERMS, "data|b1|");
    let mut made = 0;
    while turns.world.ask(World::guest(1), MKDIR, &format!("data/{}/{made}|", made % 30)) == ok() {
        made += 1;
    }
    println!("{made} nodes");
    for watch in 0..120 {
        turns.ask(1, WATCH, &format!("data/{}/{watch}|t|", watch % 30));
    }
    turns.rest();
    turns.world.drain(World::guest(1));
    turns.ask(1, DIRECTORY, "data/7|");
    turns.ask(1, DIRECTORY_PART, "data/7|0|");
    turns.ask(1, SET_PERMS, "data|n1|r2|");
    turns.ask(1, READ, &format!("data{}|", "/x".repeat(1000)));
    turns.ask(1, WRITE, &format!("data{}|1", "/x".repeat(1000)));
    turns.ask(1, RM, "data|");
    turns.rest();
    let events = turns.world.events(World::guest(1));
    assert!(events.len() >= 120, "{} events", events.len());
    turns.end("directories");
}

/// A tree with nodes of many owners is not removed in one turn, and in pieces by us.
#[test]
fn a_tree_of_many_owners_goes_in_pieces() {
    let domains = [1, 2, 3, 4, 5];
    let mut turns = Turns::new(&domains);
    turns.ask(1, SET_PERMS, "data|b1|");
    for domain in domains {
        for number in 0..400 {
            turns.ask(domain, WRITE, &format!("/local/domain/1/data/{domain}/{number}|"));
            turns.world.drain(World::guest(domain));
        }
    }
    assert_eq!(turns.world.ask(World::guest(1), RM, "data|"), refused("ENOSPC"));
    let removed = turns.world.store.tree().len();
    let in_one = turns.turn(|world| world.store.session(world.dom0).remove("/local/domain/1"));
    assert_eq!(in_one, Err(StoreError::NoSpace));
    turns.turn(|world| world.store.session(world.dom0).remove_gradually("/local/domain/1").unwrap());
    assert!(turns.world.store.session(turns.world.dom0).is_removing("/local/domain/1"));
    let pieces = turns.rest();
    assert!(pieces > 30, "{pieces}");
    assert!(!turns.world.store.session(turns.world.dom0).is_removing("/local/domain/1"));
    assert!(turns.world.store.tree().len() + 2000 < removed);
    turns.end("tree of many owners");
}

/// The end of a domain with all it may own, and with rights in the nodes of others.
#[test]
fn a_domain_is_released_in_pieces() {
    let mut turns = Turns::new(&[1, 2]);
    let mut made = 0;
    while turns.world.ask(World::guest(1), MKDIR, &format!("data/{made}|")) == ok() {
        made += 1;
    }
    for number in 0..300 {
        turns.ask(2, MKDIR, &format!("data/{number}|"));
        turns.ask(2, SET_PERMS, &format!("data/{number}|n2|r1|"));
        turns.world.drain(World::guest(2));
    }
    for watch in 0..128 {
        turns.ask(1, WATCH, &format!("data/{watch}|t|"));
        turns.world.drain(World::guest(1));
    }
    turns.turn(|world| world.store.session(world.dom0).release(DomainId(1)).unwrap());
    assert!(turns.rest() > 10);
    assert_eq!(turns.world.store.usage(DomainId(1)).nodes, 0);
    assert_eq!(turns.world.store.charged(DomainId(1)), 0);
    let of_one = |node: &store::tree::Node| node.permissions.mention(DomainId(1));
    let left: Vec<_> = turns.world.store.tree().iter().filter(|(_, node)| of_one(node)).collect();
    assert!(left.iter().all(|(path, _)| path.as_str() == "/local/domain/1"), "{left:?}");
    turns.end("release");
}

/// A number that comes back at once finds nothing of its last bearer.
#[test]
fn a_domain_of_the_same_number_waits_for_the_end_of_the_last() {
    let mut turns = Turns::new(&[1]);
    for number in 0..300 {
        turns.world.ask(World::guest(1), MKDIR, &format!("data/{number}|")).unwrap();
    }
    turns.world.store.session(turns.world.dom0).release(DomainId(1)).unwrap();
    assert!(turns.world.store.has_work());
    turns.world.store.session(turns.world.dom0).introduce(DomainId(1), 0, 0).unwrap();
    assert_eq!(turns.world.store.usage(DomainId(1)).nodes, 0);
}

/// What a guest has open goes in one turn when its ring breaks.
#[test]
fn a_broken_connection_takes_a_bounded_turn() {
    let mut turns = Turns::new(&[1, 2, 3]);
    for domain in [1, 2, 3] {
        for watch in 0..128 {
            turns.ask(domain, WATCH, &format!("data|{watch}|"));
            turns.world.drain(World::guest(domain));
        }
    }
    for _ in 0..10 {
        turns.world.start(World::guest(1));
    }
    turns.turn(|world| world.store.reset_connection(World::guest(1)));
    turns.ask(1, WRITE, "data/x|1");
    assert_eq!(turns.world.events(World::guest(1)), Vec::<String>::new());
    turns.end("reset");
}
