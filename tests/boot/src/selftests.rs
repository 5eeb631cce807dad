//! What the kernel's selftests said in a guest, and where two guests differ.

use std::collections::BTreeMap;
use std::fmt;

/// How a test ended, by its exit status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It found no fault.
    Passed,
    /// It could not run here.
    Skipped,
    /// It ended with this status.
    Failed(u8),
    /// Its time was up.
    Late,
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Passed => f.write_str("passed"),
            Self::Skipped => f.write_str("skipped"),
            Self::Failed(status) => write!(f, "failed ({status})"),
            Self::Late => f.write_str("out of time"),
        }
    }
}

/// What is known of one test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The program and its arguments.
    pub test: String,
    /// How it ended.
    pub end: End,
    /// Its own verdicts, and warnings of the kernel while it ran, without numbers; with how often each came.
    pub said: BTreeMap<String, usize>,
}

/// The verdicts in what a guest printed, in the order of the tests. A test that has no end is not among them.
#[must_use]
pub fn verdicts(console: &str) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    let mut current: Option<Verdict> = None;
    for line in console.lines().map(str::trim_end) {
        if let Some(test) = line.strip_prefix("@@ test ") {
            current = Some(Verdict { test: test.to_owned(), end: End::Late, said: BTreeMap::new() });
        } else if let Some(status) = line.strip_prefix("@@ end ") {
            if let (Some(mut verdict), Ok(status)) = (current.take(), status.parse()) {
                verdict.end = end(status);
                verdicts.push(verdict);
            }
        } else if let (Some(verdict), Some(said)) = (&mut current, opinion(line)) {
            *verdict.said.entry(said).or_default() += 1;
        }
    }
    verdicts
}

/// What an exit status means: 4 is the kernel's word for a skipped test, and a shell adds 128 to the number of SIGKILL.
fn end(status: u8) -> End {
    match status {
        0 => End::Passed,
        4 => End::Skipped,
        137 => End::Late,
        other => End::Failed(other),
    }
}

/// A line with a verdict of a test, or a warning of the kernel, without its numbers: those are addresses, sizes and counts that
/// another run need not repeat.
fn opinion(line: &str) -> Option<String> {
    const BEGINNINGS: [&str; 6] = ["ok ", "not ok ", "[OK]", "[FAIL]", "[SKIP]", "@@ log "];
    let line = line.trim_start_matches(['#', ' ', '\t']);
    let uffd = line.starts_with("Testing ") && ["done", "failed", "skipped"].iter().any(|word| line.contains(word));
    if !uffd && !BEGINNINGS.iter().any(|beginning| line.starts_with(beginning)) {
        return None;
    }
    Some(line.split_whitespace().map(without_numbers).collect::<Vec<_>>().join(" "))
}

/// A word with an `N` for each number in it, decimal or hexadecimal.
fn without_numbers(word: &str) -> String {
    const ADDRESS: usize = 8;
    if word.len() >= ADDRESS && word.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return "N".to_owned();
    }
    let (mut plain, mut rest) = (String::new(), word);
    while let Some(first) = rest.chars().next() {
        let hexadecimal =
            rest.strip_prefix("0x").map(|digits| digits.trim_start_matches(|c: char| c.is_ascii_hexdigit()));
        let decimal = rest.trim_start_matches(|c: char| c.is_ascii_digit());
        match hexadecimal {
            Some(after) => rest = after,
            None if decimal.len() < rest.len() => rest = decimal,
            None => {
                plain.push(first);
                rest = &rest[first.len_utf8()..];
                continue;
            }
        }
        plain.push('N');
    }
    plain
}

/// A line for each test: how it ended in each of two guests.
#[must_use]
pub fn table(ours: &[Verdict], theirs: &[Verdict]) -> Vec<String> {
    let other = |test: &str| theirs.iter().find(|verdict| verdict.test == test);
    let line = |verdict: &Verdict| {
        let theirs = other(&verdict.test).map_or_else(|| "no end".to_owned(), |other| other.end.to_string());
        format!("{}: {} | {theirs}", verdict.test, verdict.end)
    };
    ours.iter().map(line).collect()
}

/// Where the verdicts of two guests on these tests differ; each difference is a line.
#[must_use]
pub fn differences(tests: &[String], ours: &[Verdict], theirs: &[Verdict]) -> Vec<String> {
    let mut differences = Vec::new();
    for test in tests {
        let [ours, theirs] = [ours, theirs].map(|all| all.iter().find(|verdict| verdict.test == *test));
        match (ours, theirs) {
            (Some(ours), Some(theirs)) if ours.end != theirs.end => {
                differences.push(format!("{test}: {} | {}", ours.end, theirs.end));
            }
            (Some(ours), Some(theirs)) => {
                let said = ours.said.keys().chain(theirs.said.keys().filter(|said| !ours.said.contains_key(*said)));
                for said in said {
                    let [mine, yours] = [ours, theirs].map(|verdict| verdict.said.get(said).copied().unwrap_or(0));
                    if mine != yours {
                        differences.push(format!("{test}: {said:?} {mine} times | {yours} times"));
                    }
                }
            }
            (None, None) => differences.push(format!("{test}: no end | no end")),
            (ours, _) => {
                let words = if ours.is_some() { "an end | no end" } else { "no end | an end" };
                differences.push(format!("{test}: {words}"));
            }
        }
    }
    differences
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONSOLE: &str = "@@ test mm/cow\r\nTAP version 13\r\n# ok 1 COW of 4096 pages\r\nnot ok 2 COW at 0x7f12\r\n\
                           @@ log WARNING: CPU: 0 PID: 81 at mm/x.c:7 f+0x1a/0x40\r\n@@ end 1\r\n\
                           @@ test x86/iopl_64\r\n[OK]\toutb to 0x80 worked\r\n@@ end 0\r\n@@ test mm/slow\r\n@@ end 137\r\n\
                           @@ test mm/none\r\n@@ end 4\r\n@@ test mm/cut\r\nok 1\r\n";

    #[test]
    fn verdicts_are_read_from_the_console() {
        let verdicts = verdicts(CONSOLE);
        let ends: Vec<_> = verdicts.iter().map(|verdict| (verdict.test.as_str(), verdict.end)).collect();
        let wanted = [("mm/cow", End::Failed(1)), ("x86/iopl_64", End::Passed), ("mm/slow", End::Late)];
        assert_eq!(ends, [&wanted[..], &[("mm/none", End::Skipped)]].concat());
        let said: Vec<_> = verdicts[0].said.keys().map(String::as_str).collect();
        assert_eq!(
            said,
            ["@@ log WARNING: CPU: N PID: N at mm/x.c:N f+N/N", "not ok N COW at N", "ok N COW of N pages"]
        );
        assert_eq!(verdicts[1].said.keys().collect::<Vec<_>>(), ["[OK] outb to N worked"]);
    }

    #[test]
    fn each_difference_is_told() {
        let tests: Vec<String> = ["mm/cow", "x86/iopl_64", "mm/slow", "mm/cut"].map(str::to_owned).into();
        let ours = verdicts(CONSOLE);
        assert_eq!(differences(&tests[..3], &ours, &ours), Vec::<String>::new());
        assert_eq!(differences(&tests, &ours, &ours), ["mm/cut: no end | no end"]);
        // Other numbers are no difference; another verdict, another status or a warning that is missing is one.
        let numbers = CONSOLE.replace("4096", "16").replace("0x7f12", "0x7f34").replace("PID: 81", "PID: 82");
        assert!(differences(&tests[..3], &ours, &verdicts(&numbers)).is_empty());
        let theirs = verdicts(&CONSOLE.replace("@@ end 137", "@@ end 0").replace("@@ log WARNING", "WARNING"));
        let told = [
            "mm/cow: \"@@ log WARNING: CPU: N PID: N at mm/x.c:N f+N/N\" 1 times | 0 times",
            "mm/slow: out of time | passed",
        ];
        assert_eq!(differences(&tests[..3], &ours, &theirs), told);
        let theirs = verdicts(&CONSOLE.replace("@@ end 0", ""));
        assert_eq!(differences(&tests[..2], &ours, &theirs), ["x86/iopl_64: an end | no end"]);
        assert_eq!(table(&ours[..2], &theirs), ["mm/cow: failed (1) | failed (1)", "x86/iopl_64: passed | no end"]);
    }
}
