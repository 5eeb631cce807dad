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
    /// Audits of all: steps of different CPUs that overlap share one.
    pub audits: u64,
    /// The most steps that one of these audits followed.
    pub worst: u64,
    /// Times one CPU had to wait, or was stopped between two looks, and another went on.
    pub turns: u64,
    /// Most looks at memory in one step of a call.
    pub longest: (u64, &'static str),
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
        write!(
            f,
            "{} steps, {:.1} % followed at once by an audit of all, the others after {} at most; {} audits, {} turns; the \
             longest step looked {} times at memory: {}",
            self.steps,
            100.0 * self.followed as f64 / self.steps.max(1) as f64,
            self.worst,
            self.audits,
            self.turns,
            self.longest.0,
            self.longest.1
        )
    }
}
