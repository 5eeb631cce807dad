//! Random guests against the page-table rules.
//!
//! [`world`] carries out calls and keeps the books that a toolstack and the rest of the hypervisor would keep; [`guest`]
//! invents calls; [`audit`] recounts everything from memory and those books.

pub mod audit;
pub mod guest;
pub mod world;

use world::{FAMILIES, World};

/// What many runs reached.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    /// Calls that came to an answer, by family: tried, succeeded.
    pub families: [(u64, u64); FAMILIES.len()],
    /// Calls into the rules, interrupted ones included.
    pub calls: u64,
    /// Audits of everything: one after each call, and one after whatever else guests and CPUs did.
    pub audits: u64,
    /// Calls that were interrupted and then answered.
    pub resumed: u64,
    /// Climbs that were given up because their domain died.
    pub abandoned: u64,
    /// L4 tables pinned.
    pub roots_pinned: u64,
    /// Frames that were a table, then writable, then a table again.
    pub reused: u64,
    /// Times an audit saw unfinished work of two domains at once.
    pub two_unfinished: u64,
    /// Domains destroyed completely.
    pub destroyed: u64,
    /// Flushes of a CPU.
    pub flushes: u64,
}

impl Totals {
    /// Adds another run's.
    pub fn add(&mut self, other: &Self) {
        for (a, b) in self.families.iter_mut().zip(other.families) {
            *a = (a.0 + b.0, a.1 + b.1);
        }
        self.calls += other.calls;
        self.audits += other.audits;
        self.resumed += other.resumed;
        self.abandoned += other.abandoned;
        self.roots_pinned += other.roots_pinned;
        self.reused += other.reused;
        self.two_unfinished += other.two_unfinished;
        self.destroyed += other.destroyed;
        self.flushes += other.flushes;
    }
}

impl std::fmt::Display for Totals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let all = self.families.iter().fold((0, 0), |sum, n| (sum.0 + n.0, sum.1 + n.1));
        writeln!(f, "{:<16}{:>10}{:>10}{:>9}", "family", "tried", "granted", "of all")?;
        let percent = |n: u64| 100.0 * n as f64 / all.0.max(1) as f64;
        for (name, (tried, granted)) in FAMILIES.iter().zip(self.families) {
            writeln!(f, "{name:<16}{tried:>10}{granted:>10}{:>8.1}%", percent(granted))?;
        }
        writeln!(f, "{:<16}{:>10}{:>10}{:>8.1}%", "all", all.0, all.1, percent(all.1))?;
        write!(
            f,
            "{} calls, {} audits of everything, {} answered after an interruption, {} climbs abandoned, {} L4 pinned, {} frames table-writable-table, \
             {} of the audits with two domains' work unfinished, {} domains destroyed, {} flushes",
            self.calls,
            self.audits,
            self.resumed,
            self.abandoned,
            self.roots_pinned,
            self.reused,
            self.two_unfinished,
            self.destroyed,
            self.flushes
        )
    }
}

/// Lets random guests make `calls` calls on 1, 2 or 4 CPUs, as the seed says, with an audit after each; with both ways, another
/// world is not audited but compared.
///
/// # Errors
/// What the audit found, with the seed and the step.
pub fn run(seed: u64, calls: u64, ways: Ways) -> Result<Totals, String> {
    let mut world = World::new(seed, ways != Ways::Long);
    let mut other = (ways == Ways::Both).then(|| World::new(seed, false));
    let mut step = 0;
    while world.totals.calls < calls {
        step += 1;
        let what = guest::act(&mut world).and_then(|()| audit::audit(&mut world)).and_then(|()| {
            let Some(other) = &mut other else { return Ok(()) };
            guest::act(other)?;
            other.known.clone_from(&world.known); // which only an audit keeps up to date
            world.differs(other).map_err(|why| format!("the fast path: {why}"))
        });
        what.map_err(|why| {
            let (cpus, calls) = (world.running.len(), world.totals.calls);
            format!("seed {seed}, {cpus} CPUs, step {step} call {calls}: {why}; last: {:?}", world.last)
        })?;
    }
    world.totals.flushes = world.m.flushes.get();
    world.totals.audits = world.scratch.audits();
    Ok(world.totals)
}

/// Which ways the rules may take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ways {
    /// Fast paths where there are any; and in a second world the same once more the slow path, to compare after every step.
    Both,
    /// Slow paths alone.
    Long,
}
