//! Random requests of several domains, compared with the plainest store one could write.
//!
//! The model has no transactions of its own: what a transaction did and saw is replayed, all at
//! once, at the moment it commits, and every answer must be the same. So a commit that was not
//! serializable shows. `SEED` repeats a run, `STEPS` makes it longer.

mod common;
use std::collections::{BTreeMap, BTreeSet};

use common::*;
use store::{ConnectionId, DomainId, Quotas};
use test_random::Random;

const DOMAINS: [u16; 3] = [1, 2, 3];
const NODES_MAX: usize = 14;

#[derive(Clone, Debug, PartialEq)]
struct Node {
    value: String,
    perms: Vec<(char, u16)>,
}

#[derive(Clone, Debug)]
enum Op {
    Read(String),
    List(String),
    Perms(String),
    Write(String, String),
    Mkdir(String),
    Rm(String),
    SetPerms(String, Vec<(char, u16)>),
}

#[derive(Clone, Debug)]
struct Watch {
    who: u16,
    path: String,
    token: String,
}

/// A changed path, whether only exact watches hear of it, and the permissions before.
type Changes = Vec<(String, bool)>;

#[derive(Clone, Default)]
struct Model {
    nodes: BTreeMap<String, Node>,
    alive: BTreeSet<u16>,
    watches: Vec<Watch>,
}

fn parent(path: &str) -> Option<String> {
    match path.rfind('/')? {
        0 if path == "/" => None,
        0 => Some("/".into()),
        at => Some(path[..at].into()),
    }
}

fn below(path: &str, top: &str) -> bool {
    top == "/" && path.starts_with('/') || path == top || path.starts_with(&format!("{top}/"))
}

fn allowed(perms: &[(char, u16)], who: u16, want: char) -> bool {
    if who == 0 || perms[0].1 == who {
        return true;
    }
    let entry = perms[1..].iter().find(|entry| entry.1 == who).unwrap_or(&perms[0]);
    entry.0 == want || entry.0 == 'b'
}

fn show(perms: &[(char, u16)]) -> String {
    perms.iter().map(|(letter, domain)| format!("{letter}{domain}|")).collect()
}

impl Model {
    fn nearest(&self, path: &str) -> Option<&Node> {
        let mut at = parent(path);
        while let Some(path) = at {
            if let Some(node) = self.nodes.get(&path) {
                return Some(node);
            }
            at = parent(&path);
        }
        None
    }

    fn missing(&self, who: u16, path: &str, want: char) -> Reply {
        let known = who == 0 || self.nearest(path).is_none_or(|n| allowed(&n.perms, who, want));
        refused(if known { "ENOENT" } else { "EACCES" })
    }

    fn owned(&self, who: u16) -> usize {
        self.nodes.values().filter(|node| node.perms[0].1 == who).count()
    }

    fn run(&mut self, who: u16, op: &Op, changes: &mut Changes) -> Reply {
        match op {
            Op::Read(path) | Op::List(path) | Op::Perms(path) => {
                let Some(node) = self.nodes.get(path) else {
                    return self.missing(who, path, 'r');
                };
                if !allowed(&node.perms, who, 'r') {
                    return refused("EACCES");
                }
                Ok(match op {
                    Op::Read(_) => node.value.clone(),
                    Op::Perms(_) => show(&node.perms),
                    _ => {
                        let children = self.nodes.keys().filter(|k| parent(k).as_ref() == Some(path));
                        children.map(|k| format!("{}|", k.rsplit('/').next().unwrap())).collect()
                    }
                })
            }
            Op::Write(path, _) | Op::Mkdir(path) => {
                let value = if let Op::Write(_, value) = op { value.clone() } else { String::new() };
                if let Some(node) = self.nodes.get_mut(path) {
                    if !allowed(&node.perms, who, 'w') {
                        return refused("EACCES");
                    }
                    if matches!(op, Op::Write(..)) {
                        node.value = value;
                        changes.push((path.clone(), false));
                    }
                    return ok();
                }
                let base = self.nearest(path).unwrap();
                if !allowed(&base.perms, who, 'w') {
                    return refused("EACCES");
                }
                let mut perms = base.perms.clone();
                if who != 0 {
                    perms[0].1 = who;
                }
                let mut at = path.clone();
                let mut value = Some(value);
                while !self.nodes.contains_key(&at) {
                    let value = value.take().unwrap_or_default();
                    self.nodes.insert(at.clone(), Node { value, perms: perms.clone() });
                    at = parent(&at).unwrap();
                }
                changes.push((path.clone(), false));
                ok()
            }
            Op::Rm(path) => {
                let Some(up) = parent(path) else {
                    return refused("EINVAL");
                };
                let Some(node) = self.nodes.get(path) else {
                    let missing = self.missing(who, path, 'w');
                    let forgiven = missing == refused("ENOENT") && self.nodes.contains_key(&up);
                    return if forgiven { ok() } else { missing };
                };
                if !allowed(&node.perms, who, 'w') {
                    return refused("EACCES");
                }
                changes.push((path.clone(), false));
                self.cut(path, changes);
                ok()
            }
            Op::SetPerms(path, perms) => {
                let Some(node) = self.nodes.get(path) else {
                    return self.missing(who, path, 'w');
                };
                if who != 0 && node.perms[0].1 != who {
                    return refused("EACCES");
                }
                let mut perms = perms.clone();
                if who != 0 {
                    if perms[0].1 != who {
                        return refused("EPERM");
                    }
                    let mut first = true;
                    perms.retain(|p| std::mem::take(&mut first) || p.1 == 0 || self.alive.contains(&p.1));
                    if perms.len() > 5 {
                        return refused("ENOSPC");
                    }
                }
                self.nodes.get_mut(path).unwrap().perms = perms;
                changes.push((path.clone(), false));
                ok()
            }
        }
    }

    /// Takes a subtree out; watches inside hear of their own node, outermost first.
    fn cut(&mut self, path: &str, changes: &mut Changes) {
        let mut gone: Vec<String> = self.nodes.keys().filter(|k| below(k, path)).cloned().collect();
        gone.sort_by_key(|path| path.split('/').map(str::to_owned).collect::<Vec<_>>());
        for inside in gone {
            self.nodes.remove(&inside);
            if inside != path {
                changes.push((inside, true));
            }
        }
    }

    /// What each watcher hears of these changes, from `before` to now.
    fn events(&self, before: &Model, changes: &Changes) -> BTreeMap<u16, Vec<String>> {
        let mut heard: BTreeMap<u16, Vec<String>> = BTreeMap::new();
        let mut seen = BTreeSet::new();
        for change in changes.iter().filter(|change| seen.insert((*change).clone())) {
            let (path, exact) = change;
            let up = parent(path);
            let witnesses = [self.nodes.get(path), up.and_then(|p| self.nodes.get(&p)), before.nodes.get(path)];
            let mut at = Some(path.clone());
            while let Some(place) = at {
                for watch in self.watches.iter().filter(|watch| watch.path == place) {
                    let may = |node: &&Node| allowed(&node.perms, watch.who, 'r');
                    let event = format!("{path}|{}", watch.token);
                    let queue = heard.entry(watch.who).or_default();
                    if witnesses.iter().flatten().any(may) && !queue.contains(&event) {
                        queue.push(event);
                    }
                }
                at = if *exact { None } else { parent(&place) };
            }
        }
        heard.retain(|_, events| !events.is_empty());
        heard
    }

    fn release(&mut self, who: u16) -> Changes {
        let mut changes = Changes::new();
        self.alive.remove(&who);
        self.watches.retain(|watch| watch.who != who);
        let mut owned: Vec<String> =
            self.nodes.iter().filter(|(_, n)| n.perms[0].1 == who).map(|(k, _)| k.clone()).collect();
        owned.sort();
        for path in owned {
            if path == "/" {
                self.nodes.get_mut("/").unwrap().perms = vec![('n', 0)];
                changes.push((path, false));
            } else if self.nodes.contains_key(&path) {
                changes.push((path.clone(), false));
                self.cut(&path, &mut changes);
            }
        }
        changes
    }

    fn scrub(&mut self, who: u16) {
        for node in self.nodes.values_mut() {
            let mut first = true;
            node.perms.retain(|entry| std::mem::take(&mut first) || entry.1 != who);
        }
    }
}

fn random_path(random: &mut Random) -> String {
    let tops = ["", "/local/domain/1/data", "/local/domain/2/data", "/s"];
    let mut path = (random.pick(&tops)).to_owned();
    for _ in 0..random.below(4) {
        path += random.pick(&["/a", "/b", "/c-", "/b0"]);
    }
    if path.is_empty() { "/".into() } else { path }
}

fn random_op(random: &mut Random) -> Op {
    let path = random_path(random);
    match random.below(14) {
        0..=2 => Op::Read(path),
        3 => Op::List(path),
        4 => Op::Perms(path),
        5..=8 => Op::Write(path, format!("{}", random.below(5))),
        9 => Op::Mkdir(path),
        10 | 11 => Op::Rm(path),
        _ => {
            let count = 1 + random.below(4);
            let one = |random: &mut Random| (random.pick(&['n', 'r', 'w', 'b']), random.pick(&[0, 1, 2, 3]));
            Op::SetPerms(path, (0..count).map(|_| one(random)).collect())
        }
    }
}

fn encode(op: &Op) -> (u32, String) {
    match op {
        Op::Read(path) => (READ, format!("{path}|")),
        Op::List(path) => (DIRECTORY, format!("{path}|")),
        Op::Perms(path) => (GET_PERMS, format!("{path}|")),
        Op::Write(path, value) => (WRITE, format!("{path}|{value}")),
        Op::Mkdir(path) => (MKDIR, format!("{path}|")),
        Op::Rm(path) => (RM, format!("{path}|")),
        Op::SetPerms(path, perms) => (SET_PERMS, format!("{path}|{}", show(perms))),
    }
}

/// An open transaction: who, its number, what it did and saw, and how many commits it started after.
struct Open {
    who: u16,
    number: u32,
    done: Vec<(Op, Reply)>,
    commits: usize,
}

struct Run {
    world: World,
    model: Model,
    open: Vec<Open>,
    commits: usize,
    counts: BTreeMap<String, usize>,
}

impl Run {
    fn new() -> Self {
        let quotas = Quotas { nodes: NODES_MAX, ..Quotas::default() };
        let mut world = World::with_quotas(&[], quotas);
        let mut model = Model::default();
        model.nodes.insert("/".into(), Node { value: String::new(), perms: vec![('n', 0)] });
        let dom0 = world.dom0;
        world.store.session(dom0).mkdir("/s").unwrap();
        model.run(0, &Op::Mkdir("/s".into()), &mut Changes::new()).unwrap();
        let mut run = Self { world, model, open: Vec::new(), commits: 0, counts: BTreeMap::new() };
        for domain in DOMAINS {
            run.introduce(domain);
        }
        run
    }

    fn id(&self, who: u16) -> ConnectionId {
        if who == 0 { self.world.dom0 } else { World::guest(who) }
    }

    fn introduce(&mut self, who: u16) {
        self.world.introduce(who);
        self.model.alive.insert(who);
        let home = format!("/local/domain/{who}");
        let mut quiet = Changes::new();
        for (path, perms) in [
            (home.clone(), vec![('n', 0), ('r', who)]),
            (format!("{home}/data"), vec![('n', who), ('r', 0)]),
            (format!("{home}/device"), vec![('n', who), ('r', 0)]),
        ] {
            self.model.run(0, &Op::Mkdir(path.clone()), &mut quiet).unwrap();
            self.model.run(0, &Op::SetPerms(path, perms), &mut quiet).unwrap();
        }
        self.commits += 1;
        self.drain();
    }

    fn drain(&mut self) -> BTreeMap<u16, Vec<String>> {
        let everyone = [0, 1, 2, 3].map(|who| (who, self.world.events(self.id(who))));
        everyone.into_iter().filter(|(_, events)| !events.is_empty()).collect()
    }

    fn ask(&mut self, who: u16, tx: u32, kind: u32, payload: &str) -> (Reply, Vec<String>) {
        let mut out = self.world.exchange(self.id(who), kind, tx, &bytes(payload));
        let (kind, text) = out.remove(0);
        let reply = if kind == ERROR { Err(text.trim_end_matches('|').into()) } else { Ok(text) };
        let events = out.into_iter().map(|(_, text)| text.trim_end_matches('|').into()).collect();
        (reply, events)
    }

    fn expect_events(&mut self, who: u16, own: Vec<String>, expected: &BTreeMap<u16, Vec<String>>) {
        let mut heard = self.drain();
        if !own.is_empty() {
            heard.insert(who, own);
        }
        assert_eq!(&heard, expected);
    }

    fn plain(&mut self, who: u16, op: &Op) {
        let (kind, payload) = encode(op);
        let (reply, own) = self.ask(who, 0, kind, &payload);
        let mut after = self.model.clone();
        let mut changes = Changes::new();
        let expected = after.run(who, op, &mut changes);
        *self.counts.entry(format!("{:?}", reply.as_ref().err())).or_default() += 1;
        if reply == refused("ENOSPC") && expected == ok() {
            assert!(who != 0 && after.owned(who) > NODES_MAX, "{op:?}: quota without reason");
            assert!(own.is_empty() && self.drain().is_empty());
            return;
        }
        assert_eq!(reply, expected, "domain {who}: {op:?}");
        let grew = after.owned(who) > self.model.owned(who);
        assert!(who == 0 || !grew || after.owned(who) <= NODES_MAX, "{op:?}: quota passed over");
        let events = after.events(&self.model, &changes);
        self.expect_events(who, own, &events);
        self.commits += usize::from(!changes.is_empty());
        self.model = after;
    }

    fn end(&mut self, at: usize, commit: bool) {
        let Open { who, number, done, commits } = self.open.swap_remove(at);
        let (reply, own) = self.ask(who, number, END, if commit { "T|" } else { "F|" });
        let label = format!("end {commit} {:?}", reply.as_ref().err());
        *self.counts.entry(label).or_default() += 1;
        if !commit {
            assert_eq!(reply, ok());
            assert!(own.is_empty() && self.drain().is_empty());
            return;
        }
        let mut after = self.model.clone();
        let mut changes = Changes::new();
        let replay: Vec<Reply> = done.iter().map(|(op, _)| after.run(who, op, &mut changes)).collect();
        let saw: Vec<Reply> = done.iter().map(|(_, reply)| reply.clone()).collect();
        match reply.as_ref().map_err(String::as_str) {
            Ok(_) => {
                assert_eq!(saw, replay, "domain {who} committed what was not so: {done:?}");
                let events = after.events(&self.model, &changes);
                self.expect_events(who, own, &events);
                self.commits += usize::from(!changes.is_empty());
                self.model = after;
                return;
            }
            Err("EAGAIN") => assert!(self.commits > commits, "nobody was in the way of {done:?}"),
            Err("ENOSPC") => {
                let doomed = saw.contains(&refused("ENOSPC"));
                let full = after.owned(who) > NODES_MAX;
                assert!(who != 0 && (doomed || full), "quota without reason");
            }
            other => panic!("unexpected end: {other:?}"),
        }
        assert!(own.is_empty() && self.drain().is_empty(), "events of a refused transaction");
    }

    fn watch(&mut self, who: u16, path: String, token: String) {
        let known = |w: &Watch| w.who == who && w.path == path && w.token == token;
        let full = self.model.watches.iter().filter(|watch| watch.who == who).count() >= 100;
        if full && !self.model.watches.iter().any(known) {
            return;
        }
        if let Some(at) = self.model.watches.iter().position(known) {
            assert_eq!(self.ask(who, 0, WATCH, &format!("{path}|{token}|")).0, refused("EEXIST"));
            assert_eq!(self.ask(who, 0, UNWATCH, &format!("{path}|{token}|")).0, ok());
            self.model.watches.remove(at);
        } else {
            let (reply, events) = self.ask(who, 0, WATCH, &format!("{path}|{token}|"));
            assert_eq!((reply, events), (ok(), vec![format!("{path}|{token}")]));
            self.model.watches.push(Watch { who, path, token });
        }
    }

    fn release(&mut self, who: u16) {
        self.open.retain(|open| open.who != who);
        self.world.store.session(self.world.dom0).release(DomainId(who)).unwrap();
        let before = self.model.clone();
        let changes = self.model.release(who);
        let mut after = self.model.clone();
        after.scrub(who);
        // Watchers are told with the rights they have once the owner is gone.
        let events = after.events(&before, &changes);
        self.model = after;
        // It vanishes piece by piece: the order is another, and a directory that is still there lets others hear.
        let heard = self.drain();
        let all = |by: &BTreeMap<u16, Vec<String>>| -> BTreeSet<(u16, String)> {
            by.iter().flat_map(|(who, events)| events.iter().map(|event| (*who, event.clone()))).collect()
        };
        assert!(all(&heard).is_superset(&all(&events)), "{heard:?} lacks some of {events:?}");
        let changed = |event: &str| changes.iter().any(|(path, _)| event.starts_with(&format!("{path}|")));
        assert!(heard.values().flatten().all(|event| changed(event)), "{heard:?} for {changes:?}");
        self.commits += 1;
        assert_eq!(self.model.owned(who), 0);
        self.introduce(who);
    }

    fn compare(&self) {
        let tree = self.world.store.tree();
        let seen: BTreeMap<String, Node> = tree
            .iter()
            .filter(|(path, _)| !path.is_special())
            .map(|(path, node)| {
                let perms = text(&node.permissions.encode());
                let perms = perms.trim_end_matches('|').split('|');
                let perms = perms.map(|p| (p.chars().next().unwrap(), p[1..].parse().unwrap()));
                (path.as_str().to_owned(), Node { value: text(&node.value), perms: perms.collect() })
            })
            .collect();
        assert_eq!(seen, self.model.nodes);
        self.world.store.audit().unwrap();
    }
}

#[test]
fn the_store_agrees_with_its_model() {
    let mut random = Random::new();
    let steps = std::env::var("STEPS").ok().and_then(|text| text.parse().ok()).unwrap_or(60_000);
    let mut run = Run::new();
    for step in 0..steps {
        if step % 5_000 == 4_999 {
            // Clean up now and then, or everything ends up forbidden.
            for top in ["/a", "/b", "/c-", "/b0", "/s"] {
                run.plain(0, &Op::Rm(top.into()));
            }
            run.plain(0, &Op::Mkdir("/s".into()));
            run.plain(0, &Op::SetPerms("/s".into(), vec![('n', 0), ('b', 1), ('b', 2), ('r', 3)]));
            run.plain(0, &Op::SetPerms("/".into(), vec![('r', 0)]));
        }
        let who = random.pick(&[0, 1, 1, 2, 2, 3]);
        match random.below(100) {
            0 if random.below(20) == 0 => run.release(random.pick(&DOMAINS)),
            0..=2 => {
                let token = format!("t{}", random.below(3));
                run.watch(who, random_path(&mut random), token);
            }
            3..=5 if run.open.iter().filter(|open| open.who == who).count() < 4 => {
                let number = run.world.start(run.id(who));
                run.open.push(Open { who, number, done: Vec::new(), commits: run.commits });
            }
            6..=10 if !run.open.is_empty() => {
                let at = random.below(run.open.len());
                run.end(at, random.below(8) != 0);
            }
            11..=50 if !run.open.is_empty() => {
                let at = random.below(run.open.len());
                let op = random_op(&mut random);
                let (kind, payload) = encode(&op);
                let (who, number) = (run.open[at].who, run.open[at].number);
                let (reply, events) = run.ask(who, number, kind, &payload);
                assert!(events.is_empty(), "events before the end");
                run.open[at].done.push((op, reply));
            }
            _ => {
                let op = random_op(&mut random);
                run.plain(who, &op);
            }
        }
        if step % 100 == 0 {
            run.compare();
        }
    }
    run.compare();
    println!("{:?}", run.counts);
    for needed in ["None", "Some(\"EACCES\")", "Some(\"ENOENT\")", "end true None"] {
        assert!(run.counts.get(needed).copied().unwrap_or(0) > steps / 2000, "few {needed}");
    }
}
