//! How long the stays in ring 0 are, and what they are for.

use super::counts::Stay;
use anyhow::{Context, Result};
use hypercall_abi::Hypercall;
use object::{Object, ObjectSymbol};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// How many lengths are shown, and how many kinds of entries.
const SHOWN: usize = 16;
/// Bytes from one stub in `entry_vectors` to the next.
const STUB: u64 = 16;
const VECTORS: u64 = 256;

/// The places where ring 0 is entered, by address: the symbols of our hypervisor, or nothing for Xen's.
#[derive(Default)]
pub(super) struct Places(BTreeMap<u64, String>);

impl Places {
    /// Those of our hypervisor.
    pub(super) fn of(hypervisor: &Path) -> Result<Self> {
        let bytes = fs::read(hypervisor).with_context(|| format!("cannot read {}", hypervisor.display()))?;
        let elf = object::File::parse(&*bytes).context("the hypervisor is no program")?;
        let named = |symbol: object::Symbol<'_, '_>| Some((symbol.address(), symbol.name().ok()?.to_owned()));
        Ok(Self(elf.symbols().filter_map(named).filter(|(_, name)| name.starts_with("entry_")).collect()))
    }

    /// What an entry was for.
    fn name(&self, stay: &Stay) -> String {
        let why = match stay.cause.split_once(':') {
            Some(("hypercall", number)) => {
                let call = number.parse().ok().and_then(Hypercall::from_number).map_or("unknown", Hypercall::name);
                format!("hypercall {number} {call}")
            }
            Some(("at", address)) => self.place(address),
            _ => "system call".to_owned(),
        };
        format!("{:<6} {why}", stay.from)
    }

    fn place(&self, address: &str) -> String {
        let place =
            u64::from_str_radix(address, 16).ok().and_then(|at| self.0.range(..=at).next_back().map(|it| (at, it)));
        match place {
            Some((at, (start, name))) if name == "entry_vectors" && at - start < VECTORS * STUB => {
                format!("vector {}", (at - start) / STUB)
            }
            Some((at, (start, name))) if at == *start => name.replace('_', " "),
            _ => format!("at {address}"),
        }
    }
}

/// A histogram: first what the entries were for, then each length. A line has the share of ring 0's instructions, how many of
/// them and how many stays an operation has, the length (least, median and most, or the one), and what the entry was for.
pub(super) fn lines(places: &Places, stays: &[Stay], operations: u32) -> Vec<String> {
    // Two causes may have one name.
    let mut kinds: BTreeMap<String, BTreeMap<u64, u64>> = BTreeMap::new();
    for stay in stays {
        *kinds.entry(places.name(stay)).or_default().entry(stay.length).or_default() += stay.count;
    }
    let kinds: Vec<(String, Vec<(u64, u64)>)> =
        kinds.into_iter().map(|(name, lengths)| (name, lengths.into_iter().collect())).collect();
    let sum = |lengths: &[(u64, u64)]| lengths.iter().map(|(length, count)| length * count).sum::<u64>();
    let total = kinds.iter().map(|(_, lengths)| sum(lengths)).sum::<u64>().max(1);
    let line = |name: &str, lengths: &[(u64, u64)], span: &str| {
        let instructions = sum(lengths);
        let count = lengths.iter().map(|(_, count)| count).sum::<u64>();
        #[allow(clippy::cast_precision_loss, reason = "for people")]
        let (share, per, often) = (
            instructions as f64 * 100.0 / total as f64,
            instructions as f64 / f64::from(operations),
            count as f64 / f64::from(operations),
        );
        (instructions, format!("{share:5.1} % {per:>12.1} {often:>10.3} x {span:<24} {name}"))
    };
    let most = |mut lines: Vec<(u64, String)>| {
        lines.sort_by_key(|(instructions, _)| std::cmp::Reverse(*instructions));
        let rest = lines.len().saturating_sub(SHOWN);
        let mut lines: Vec<_> = lines.into_iter().take(SHOWN).map(|(_, line)| line).collect();
        if rest > 0 {
            lines.push(format!("and {rest} more"));
        }
        lines
    };
    let whole = kinds.iter().map(|(name, lengths)| line(name, lengths, &span(lengths)));
    let single = kinds.iter().flat_map(|(name, lengths)| {
        lengths.iter().map(|(length, count)| line(name, &[(*length, *count)], &length.to_string()))
    });
    let mut all =
        vec![format!("{:>7} {:>12} {:>10} x {:<24} {:<6} why", "share", "instructions", "stays", "length", "from")];
    all.extend(most(whole.collect()));
    all.push(String::new());
    all.extend(most(single.collect()));
    all
}

/// Least, median and most of sorted lengths with their counts.
fn span(lengths: &[(u64, u64)]) -> String {
    let half = lengths.iter().map(|(_, count)| count).sum::<u64>().div_ceil(2);
    let mut seen = 0;
    let median = lengths.iter().find(|(_, count)| {
        seen += count;
        seen >= half
    });
    match (lengths, median) {
        ([(length, _)], _) => length.to_string(),
        ([(least, _), .., (most, _)], Some((median, _))) => format!("{least} .. {median} .. {most}"),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stay(from: &str, cause: &str, length: u64, count: u64) -> Stay {
        Stay { from: from.into(), cause: cause.into(), length, count }
    }

    #[test]
    fn entries_have_names() {
        let symbols = [(0x1000, "entry_vectors"), (0x3000, "entry_page_fault")];
        let places = Places(symbols.map(|(at, name)| (at, name.to_owned())).into());
        let name = |cause| places.name(&stay("kernel", cause, 1, 1));
        assert_eq!(name("hypercall:23"), "kernel hypercall 23 Iret");
        assert_eq!(name("hypercall:12345"), "kernel hypercall 12345 unknown");
        assert_eq!(name("syscall"), "kernel system call");
        assert_eq!(name("at:10d0"), "kernel vector 13");
        assert_eq!(name("at:3000"), "kernel entry page fault");
        assert_eq!(name("at:3001"), "kernel at 3001");
        assert_eq!(Places::default().name(&stay("user", "at:10d0", 1, 1)), "user   at 10d0");
    }

    #[test]
    fn what_takes_most_comes_first() {
        let stays = vec![
            stay("user", "syscall", 36, 10),
            stay("kernel", "hypercall:23", 51, 9),
            stay("kernel", "hypercall:23", 400, 1),
        ];
        let lines = lines(&Places::default(), &stays, 10);
        let want = [
            "  share instructions      stays x length                   from   why",
            " 70.5 %         85.9      1.000 x 51 .. 51 .. 400          kernel hypercall 23 Iret",
            " 29.5 %         36.0      1.000 x 36                       user   system call",
            "",
            " 37.7 %         45.9      0.900 x 51                       kernel hypercall 23 Iret",
            " 32.8 %         40.0      0.100 x 400                      kernel hypercall 23 Iret",
            " 29.5 %         36.0      1.000 x 36                       user   system call",
        ];
        assert_eq!(lines, want);
    }
}
