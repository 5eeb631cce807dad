//! How long operations take by the clock, in the same emulator, whose clock is the host's here.
//!
//! Boot is timed on the host. Operations are timed by the guest's own clock, as a line on the console may wait for the program
//! that prints it; that this clock runs as fast as the host's is checked in every run, and said.

use super::columns::{Column, Form, Lab, Run};
use super::report::Report;
use anyhow::{Context, Result};
use microbench::{CLOCK, REACHED, TIMED, mode};
use serde_json::json;
use std::time::Duration;

/// Memory of the guest in MiB.
const MEMORY: u32 = 256;
/// How often everything is timed, the columns in turn.
const RUNS: usize = 5;
/// What the first row is called.
const BOOT: &str = "boot to init";

/// One run of a column.
type Start = fn(&Lab) -> Result<Run>;
/// The columns: name, what they belong to, and what runs.
const COLUMNS: [(&str, Column, Start); 4] = [
    ("bare", Column::Bare, |lab| lab.bare(mode::WALL)),
    ("pti", Column::Bare, |lab| lab.isolated(mode::WALL)),
    ("Xen", Column::Xen, |lab| lab.xen(Form::BzImage, mode::WALL, MEMORY)),
    ("Tenon", Column::Tenon, |lab| lab.tenon(Form::BzImage, mode::WALL, MEMORY)),
];

/// What was timed in one run.
#[derive(Debug, PartialEq)]
struct Timed {
    /// Name, number of operations, and seconds of all of them. The first is the boot.
    operations: Vec<(String, u32, f64)>,
    /// How much faster the guest's clock ran than the host's: 0.01 is a hundredth.
    clock: f64,
}

impl Timed {
    /// Reads what the benchmark program printed; `moment` says when a piece of text came.
    fn read(text: &str, moment: impl Fn(&str) -> Option<Duration>) -> Option<Self> {
        let mut operations = vec![(BOOT.to_owned(), 1, moment(REACHED)?.as_secs_f64())];
        for line in text.lines().filter_map(|line| line.split_once(TIMED)) {
            let mut words = line.1.split_whitespace();
            let (name, number) = (words.next()?.to_owned(), words.next()?.parse().ok()?);
            operations.push((name, number, seconds(words.next()?)?));
        }
        let [begin, end] = CLOCK;
        let guest = guest_clock(text, end)? - guest_clock(text, begin)?;
        let host = moment(end)?.checked_sub(moment(begin)?)?.as_secs_f64();
        Some(Self { operations, clock: guest / host - 1.0 })
    }
}

/// The guest's clock at a mark, in seconds.
fn guest_clock(text: &str, mark: &str) -> Option<f64> {
    text.split_once(mark)?.1.split_whitespace().next().and_then(seconds)
}

/// Nanoseconds in seconds.
#[allow(clippy::cast_precision_loss, reason = "hours are below 2^52 ns")]
fn seconds(nanoseconds: &str) -> Option<f64> {
    Some(nanoseconds.parse::<u64>().ok()? as f64 / 1e9)
}

/// Runs everything, the columns in turn.
pub(super) fn measure(lab: &Lab) -> Result<Report> {
    let columns = COLUMNS.into_iter().filter(|(_, column, _)| lab.wants(*column)).collect::<Vec<_>>();
    let mut runs: Vec<Vec<Timed>> = columns.iter().map(|_| Vec::new()).collect();
    for _ in 0..RUNS {
        for ((name, _, run), timed) in columns.iter().zip(&mut runs) {
            let Run { printed, .. } = run(lab)?;
            let read = Timed::read(&printed.text(), |piece| printed.moment(piece));
            timed.push(read.with_context(|| format!("{name}: the benchmark program did not say its times"))?);
        }
    }
    let of = |wanted: &str| columns.iter().position(|(name, ..)| *name == wanted).map(|index| &runs[index]);
    let pairs = [("pti", "bare"), ("Xen", "bare"), ("Tenon", "bare"), ("Tenon", "Xen")];
    let pairs: Vec<_> = pairs.iter().filter_map(|(a, b)| Some((format!("{a} : {b}"), of(a)?, of(b)?))).collect();
    let mut head = vec!["time of an operation".to_owned()];
    head.extend(columns.iter().map(|(name, ..)| (*name).to_owned()));
    head.extend(pairs.iter().map(|(name, ..)| name.clone()));
    let mut table = vec![head];
    let mut numbers = Vec::new();
    let names = runs.first().and_then(|column| column.first()).map_or(&[][..], |timed| &timed.operations);
    for (index, (operation, count, _)) in names.iter().enumerate() {
        let all = |column: &[Timed]| -> Vec<f64> {
            column.iter().filter_map(|timed| timed.operations.get(index)).map(|(.., seconds)| *seconds).collect()
        };
        let mut row = vec![operation.clone()];
        for ((name, ..), column) in columns.iter().zip(&runs) {
            let seconds = all(column);
            row.push(spread(&seconds).map_or_else(|| "-".into(), |[least, ..]| duration(least / f64::from(*count))));
            let name = format!("{name}/{operation}");
            numbers.push(json!({ "name": name, "operations": count, "seconds": seconds }));
        }
        for (_, of, to) in &pairs {
            let ratios: Vec<f64> = all(of).iter().zip(all(to)).map(|(of, to)| of / to).collect();
            let spread = spread(&ratios);
            row.push(spread.map_or_else(|| "-".into(), |ratios| ratios.map(|ratio| format!("{ratio:.2}")).join(" / ")));
        }
        table.push(row);
    }
    let most = columns.iter().zip(&runs).map(|((name, ..), column)| {
        let most = column.iter().map(|timed| timed.clock.abs()).fold(0.0, f64::max);
        format!("{name} {:.2} %", most * 100.0)
    });
    let clocks = most.collect::<Vec<_>>().join(", ");
    Ok(Report {
        name: "wall".into(),
        about: format!(
            "Time of operations inside a stock Linux, by the clock, on the emulator without hardware help: the fastest of {RUNS} \
             runs, the columns in turn, and ratios as least / median / most of the pairs of runs. Other work on the host \
             changes all of it; nothing is promised. Boot is from power-on with a bzImage. \"pti\" is the bare machine \
             with `pti=on`: the kernel loads CR3 when it is entered and left, as is done for every PV guest."
        ),
        versions: lab.versions.clone(),
        date: lab.date.clone(),
        tables: vec![table.into()],
        notes: vec![format!(
            "Boot is timed on the host, the operations by the guest's clock, which differed from the host's by at most: \
             {clocks}."
        )],
        bars: Vec::new(),
        plot: Vec::new(),
        numbers,
        profiles: Vec::new(),
    })
}

/// Least, median and most.
fn spread(numbers: &[f64]) -> Option<[f64; 3]> {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    Some([*sorted.first()?, *sorted.get(sorted.len() / 2)?, *sorted.last()?])
}

/// A time for people.
fn duration(seconds: f64) -> String {
    match seconds {
        s if s >= 1.0 => format!("{s:.2} s"),
        s if s >= 1e-3 => format!("{:.2} ms", s * 1e3),
        s => format!("{:.2} us", s * 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_program_says_is_read() {
        let text = format!(
            "[1.0] boot\n{REACHED}\n{0}1000000000\r\n{TIMED}null_syscall 40000 20000000\n{1}3000000000\n",
            CLOCK[0], CLOCK[1]
        );
        let moment = |piece: &str| {
            let pieces = [(REACHED, 5000), (CLOCK[0], 6000), (CLOCK[1], 8020)];
            pieces.iter().find(|(it, _)| *it == piece).map(|(_, moment)| Duration::from_millis(*moment))
        };
        let timed = Timed::read(&text, moment).unwrap();
        assert_eq!(timed.operations, [(BOOT.into(), 1, 5.0), ("null_syscall".into(), 40000, 0.02)]);
        assert!((timed.clock - -0.0099).abs() < 1e-4, "{}", timed.clock);
        assert_eq!(Timed::read(REACHED, moment), None, "no clock");
        assert_eq!(Timed::read(&text, |_| None), None, "nothing came");
    }

    #[test]
    fn a_spread_is_least_median_and_most() {
        assert_eq!(spread(&[3.0, 1.0, 2.0, 9.0, 0.5]), Some([0.5, 2.0, 9.0]));
        assert_eq!(spread(&[]), None);
        assert_eq!([2.5, 0.0025, 2.5e-6].map(duration), ["2.50 s", "2.50 ms", "2.50 us"]);
    }
}
