//! What the plugin wrote.

use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;

/// The owners of instructions, in the plugin's words, in the order they are shown.
pub(super) const OWNERS: [&str; 5] = ["boot", "user", "kernel", "dom0", "ring0"];

/// What was counted in a window, or up to a point.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    numbers: BTreeMap<String, u64>,
    /// Instructions by the address of the code they belong to, if that was asked for.
    pub(super) places: Vec<(u64, u64)>,
    /// Stays in ring 0, if that was asked for.
    pub(super) stays: Vec<Stay>,
}

/// Stays in ring 0 that began in the same way and had the same length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stay {
    /// The owner who executed before.
    pub(super) from: String,
    /// `syscall`, `hypercall:NUMBER` or `at:ADDRESS`.
    pub(super) cause: String,
    /// Instructions of one.
    pub(super) length: u64,
    /// How many there were.
    pub(super) count: u64,
}

impl Counts {
    /// Adds the rest of a line about a place or a stay.
    fn add<'a>(&mut self, what: &str, mut words: impl Iterator<Item = &'a str>) -> Option<()> {
        if what == "at" {
            self.places.push((u64::from_str_radix(words.next()?, 16).ok()?, words.next()?.parse().ok()?));
        } else {
            let (from, cause) = (words.next()?.to_owned(), words.next()?.to_owned());
            self.stays.push(Stay {
                from,
                cause,
                length: words.next()?.parse().ok()?,
                count: words.next()?.parse().ok()?,
            });
        }
        Some(())
    }

    fn get(&self, key: &str) -> u64 {
        self.numbers.get(key).copied().unwrap_or(0)
    }

    /// Instructions of an owner.
    pub(super) fn insns(&self, owner: &str) -> u64 {
        self.get(&format!("insns.{owner}"))
    }

    /// Instructions of all owners.
    pub(super) fn total(&self) -> u64 {
        OWNERS.iter().map(|owner| self.insns(owner)).sum()
    }

    /// What was counted here and not yet in `then`.
    fn since(&self, then: &Self) -> Self {
        let less = |(key, count): (&String, &u64)| (key.clone(), count.saturating_sub(then.get(key)));
        Self { numbers: self.numbers.iter().map(less).collect(), ..Self::default() }
    }

    /// Instructions of the hypervisor and of dom0: those of a deed of theirs, whatever guests do meanwhile.
    pub(super) fn hosts(&self) -> u64 {
        self.insns("dom0") + self.insns("ring0")
    }

    /// How often the hypervisor was entered from a guest or from dom0.
    pub(super) fn entries(&self) -> u64 {
        OWNERS.iter().map(|from| self.get(&format!("entry.{from}.ring0"))).sum()
    }

    /// How often a program left for its kernel or the hypervisor.
    pub(super) fn left_user(&self) -> u64 {
        OWNERS.iter().map(|to| self.get(&format!("entry.user.{to}"))).sum()
    }

    /// Loads of CR3.
    pub(super) fn cr3(&self) -> u64 {
        OWNERS.iter().map(|owner| self.get(&format!("cr3.{owner}"))).sum()
    }
}

/// Everything a machine's plugin wrote.
#[derive(Clone, Debug, Default)]
pub(super) struct Record {
    windows: Vec<(u16, Counts)>,
    points: Vec<(u16, Counts)>,
    /// From power-on to the end.
    pub(super) all: Counts,
}

impl Record {
    /// Reads the plugin's output.
    pub(super) fn parse(text: &str) -> Result<Self> {
        let mut record = Self::default();
        // Where lines of places belong to.
        let mut last: Option<usize> = None;
        for line in text.lines() {
            let mut words = line.split(' ');
            let what = words.next().unwrap_or_default();
            if matches!(what, "at" | "stay") {
                let counts = match last {
                    Some(window) => &mut record.windows[window].1,
                    None => &mut record.all,
                };
                counts.add(what, words).with_context(|| format!("the plugin wrote `{line}`"))?;
                continue;
            }
            let number = words.next().and_then(|word| word.parse().ok());
            let number = number.with_context(|| format!("the plugin wrote `{line}`"))?;
            let parse = |word: &str| {
                let (key, value) = word.split_once('=')?;
                Some((key.to_owned(), value.parse().ok()?))
            };
            let numbers = words.map(parse).collect::<Option<_>>();
            let numbers = numbers.with_context(|| format!("the plugin wrote `{line}`"))?;
            let counts = Counts { numbers, ..Counts::default() };
            match what {
                "window" => {
                    last = Some(record.windows.len());
                    record.windows.push((number, counts));
                }
                "point" => record.points.push((number, counts)),
                "total" => {
                    last = None;
                    record.all = counts;
                }
                _ => bail!("the plugin wrote `{line}`"),
            }
        }
        Ok(record)
    }

    /// All windows of this number, in the order they ended.
    pub(super) fn windows(&self, number: u16) -> impl Iterator<Item = &Counts> {
        self.windows.iter().filter(move |(it, _)| *it == number).map(|(_, counts)| counts)
    }

    /// The window of this number with the fewest instructions.
    pub(super) fn least(&self, number: u16) -> Option<&Counts> {
        self.windows(number).min_by_key(|counts| counts.total())
    }

    /// The fewest of something in any window of this number.
    pub(super) fn fewest(&self, number: u16, of: fn(&Counts) -> u64) -> Option<u64> {
        self.windows(number).map(of).min()
    }

    /// What was counted up to a point, the first time it was reached.
    pub(super) fn point(&self, number: u16) -> Option<&Counts> {
        self.points.iter().find(|(it, _)| *it == number).map(|(_, counts)| counts)
    }

    /// What was counted from the first instruction of a kernel up to a point.
    pub(super) fn since_kernel(&self, number: u16) -> Option<Counts> {
        Some(self.point(number)?.since(self.point(marker::KERNEL)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_points_and_places_are_read() {
        let text = "window 256 insns.user=10 insns.ring0=5 entry.user.ring0=2 cr3.ring0=1\nat ffff8280 5\n\
                    stay kernel hypercall:23 51 2\nwindow 256 insns.user=9 entry.user.kernel=1\npoint 3 insns.boot=60 insns.ring0=5\n\
                    point 1 insns.boot=60 insns.ring0=25 insns.kernel=15\ntotal 0 insns.boot=200\nat 10 3\n";
        let record = Record::parse(text).unwrap();
        assert_eq!(record.windows(256).count(), 2);
        assert_eq!(record.least(256).unwrap().total(), 9);
        let first = record.windows(256).next().unwrap();
        assert_eq!((first.total(), first.entries(), first.cr3(), first.left_user()), (15, 2, 1, 2));
        assert_eq!(first.places, [(0xffff_8280, 5)]);
        let stay = Stay { from: "kernel".into(), cause: "hypercall:23".into(), length: 51, count: 2 };
        assert_eq!(first.stays, [stay]);
        assert_eq!(record.fewest(256, Counts::entries), Some(0));
        assert_eq!(record.point(1).unwrap().total(), 100);
        let boot = record.since_kernel(1).unwrap();
        assert_eq!((boot.insns("boot"), boot.insns("ring0"), boot.insns("kernel")), (0, 20, 15));
        assert_eq!(record.all.places, [(0x10, 3)]);
        assert!(record.least(1).is_none() && record.point(2).is_none());
    }

    #[test]
    fn a_damaged_line_is_named() {
        for line in ["window", "window x", "window 1 insns", "at zz 1", "stay kernel at:1 5", "noise 1"] {
            assert!(format!("{:#}", Record::parse(line).unwrap_err()).contains(line));
        }
    }
}
