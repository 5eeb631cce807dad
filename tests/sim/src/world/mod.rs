//! A whole world of hostile guests: every call of the ABI with random arguments, exits of every kind, domains made and
//! unmade at any point, and audits as [`hostile`] says.
//!
//! [`machine`] is the machine, [`build`] makes guests, [`hostile`] plays them, and
//! [`audit`] recounts. In [`script`] they do as they are told.

#![allow(clippy::cast_possible_truncation, reason = "the numbers of a small machine")]

pub mod audit;
pub mod build;
pub mod calls;
pub mod crowd;
pub mod hostile;
pub mod machine;
pub mod meanwhile;
pub mod pair;
pub mod script;
pub mod turns;
pub mod twins;

use std::collections::BTreeMap;
use std::fmt;

/// A vcpu on a simulated CPU.
pub type Context<'a> = hv_core::world::Ctx<'a, machine::WholeMachine>;

/// How many steps have an audit of all of their own, at once after them, in the tests of hostile guests and of crowds on so
/// many CPUs.
#[derive(Clone, Copy, Debug)]
pub struct Share {
    /// CPUs of the machine.
    pub cpus: usize,
    /// Steps of hostile guests, at least.
    pub hostile: u64,
    /// Steps of crowds, at least.
    pub crowd: u64,
}

/// What there is of each number of CPUs: at least two million steps together.
pub const SHARES: [Share; 3] = [
    Share { cpus: 1, hostile: 800_000, crowd: 120_000 },
    Share { cpus: 2, hostile: 520_000, crowd: 60_000 },
    Share { cpus: 4, hostile: 520_000, crowd: 60_000 },
];

const _: () = {
    let [one, two, four] = SHARES;
    let hostile = one.hostile + two.hostile + four.hostile;
    assert!(hostile + one.crowd + two.crowd + four.crowd >= 2_000_000);
};

/// What many runs reached.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    /// Calls by number and operation: tried, succeeded.
    pub calls: BTreeMap<(&'static str, &'static str), (u64, u64)>,
    /// Other things that happened.
    pub events: BTreeMap<&'static str, u64>,
    /// Steps.
    pub steps: u64,
    /// Steps after which all CPUs came to rest for an audit of all.
    pub followed: u64,
    /// Audits of all, each at once after a step that no other has followed: steps of different CPUs that overlap share one.
    pub audits: u64,
    /// The most steps that one of these audits followed.
    pub worst: u64,
    /// Times one CPU had to wait, or was stopped between two looks, and another went on.
    pub turns: u64,
    /// Most looks at memory in one step of a call.
    pub longest: (u64, &'static str),
}

impl FromIterator<Totals> for Totals {
    fn from_iter<I: IntoIterator<Item = Self>>(runs: I) -> Self {
        runs.into_iter().fold(Self::default(), |mut sum, run| {
            sum.add(&run);
            sum
        })
    }
}

impl Totals {
    /// Adds another run's.
    pub fn add(&mut self, other: &Self) {
        for (key, (tried, done)) in &other.calls {
            let sum = self.calls.entry(*key).or_default();
            *sum = (sum.0 + tried, sum.1 + done);
        }
        for (key, n) in &other.events {
            *self.events.entry(key).or_default() += n;
        }
        self.steps += other.steps;
        self.followed += other.followed;
        self.audits += other.audits;
        self.worst = self.worst.max(other.worst);
        self.turns += other.turns;
        self.longest = self.longest.max(other.longest);
    }

    /// How much there was of everything, in a line.
    #[must_use]
    pub fn sum(&self) -> String {
        let (looks, call) = self.longest;
        format!(
            "{} steps, {} followed at once by an audit of all, the others after {} at most; {} audits, each after a step of \
             its own; {} turns; the longest step looked {looks} times at memory: {call}",
            self.steps, self.followed, self.worst, self.audits, self.turns,
        )
    }

    /// Tries and successes of a hypercall, all its operations together.
    #[must_use]
    pub fn of(&self, call: &str) -> (u64, u64) {
        let mine = self.calls.iter().filter(|((name, _), _)| *name == call);
        mine.fold((0, 0), |sum, (_, n)| (sum.0 + n.0, sum.1 + n.1))
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<28}{:<28}{:>10}{:>10}", "call", "operation", "tried", "succeeded")?;
        for ((call, op), (tried, done)) in &self.calls {
            writeln!(f, "{call:<28}{op:<28}{tried:>10}{done:>10}")?;
        }
        for (what, n) in &self.events {
            writeln!(f, "{what:<56}{n:>10}")?;
        }
        write!(f, "{}", self.sum())
    }
}
