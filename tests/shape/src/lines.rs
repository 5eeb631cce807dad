//! How many lines of code run in ring 0, by risk and by part.

use crate::source::{find, without_comments, without_tests};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// Lines that share a risk, and so a limit.
struct Area {
    name: &'static str,
    /// The most lines its parts may have together.
    limit: usize,
    /// Its parts: name, budget in lines of code, and the paths (without extension) that belong to it.
    ///
    /// A budget is what the part has, plus about a tenth. A part that needs more raises it, with the reason, in the commit
    /// that needs it. A file counts for the first part with a matching prefix: each crate ends with a part that takes the
    /// rest.
    parts: &'static [(&'static str, usize, &'static [&'static str])],
}

/// All of ring 0.
const AREAS: &[Area] = &[
    // A mistake in the hands is caught by no compiler, no simulation and no audit: a hard limit.
    Area {
        name: "hands",
        limit: 2_750,
        parts: &[
            (
                "machine/boot, smp, acpi",
                510,
                &["hypervisor/machine/src/boot", "hypervisor/machine/src/smp", "hypervisor/machine/src/acpi"],
            ),
            ("machine/entry, cpu", 1_070, &["hypervisor/machine/src/entry", "hypervisor/machine/src/cpu"]),
            ("machine/memory", 310, &["hypervisor/machine/src/memory"]),
            (
                "machine/apic, ioapic, timer",
                330,
                &["hypervisor/machine/src/apic", "hypervisor/machine/src/ioapic", "hypervisor/machine/src/timer"],
            ),
            ("machine, the rest", 520, &["hypervisor/machine/src"]),
        ],
    },
    // Copies of rules for what is ordinary: a guest sees the same without them (`lean=off`). The entry code's part is among the
    // hands.
    Area {
        name: "fast paths",
        limit: 1_360,
        parts: &[
            // Of these, 115 for multicalls, flushes and kernels without a root of user mode: 3 % of a fork and of an exec.
            // And 40 for a switch of processes in one call.
            ("core/lean", 749, &["hypervisor/core/src/lean"]),
            (
                "fast paths of frame, paging, claim",
                611,
                &[
                    "hypervisor/core/src/frame/owned",
                    "hypervisor/core/src/paging/fast",
                    "hypervisor/core/src/claim/walks",
                ],
            ),
        ],
    },
    // Rules grow by what a hypervisor must do.
    Area {
        name: "rules and order",
        limit: 9_800,
        parts: &[
            ("core/frame", 1_200, &["hypervisor/core/src/frame"]),
            ("core/paging", 1_270, &["hypervisor/core/src/paging"]),
            ("core/event", 560, &["hypervisor/core/src/event"]),
            ("core/grant", 550, &["hypervisor/core/src/grant"]),
            ("core/domain/journal", 140, &["hypervisor/core/src/domain/journal"]),
            ("core/domain", 560, &["hypervisor/core/src/domain"]),
            ("core/vcpu", 1_000, &["hypervisor/core/src/vcpu"]),
            ("core/memory", 130, &["hypervisor/core/src/memory"]),
            // 200 more than before vcpus that sleep went first: a guest that pings or serves does not wait for floods.
            ("core/sched, time", 950, &["hypervisor/core/src/sched", "hypervisor/core/src/time"]),
            (
                "core/trap: decode, emulate",
                935,
                &["hypervisor/core/src/trap/decode", "hypervisor/core/src/trap/emulate"],
            ),
            ("core/trap, the rest", 400, &["hypervisor/core/src/trap"]),
            ("core/policy", 195, &["hypervisor/core/src/policy"]),
            ("core/host", 185, &["hypervisor/core/src/host"]),
            ("core/dispatch", 170, &["hypervisor/core/src/dispatch"]),
            ("core/claim, world", 385, &["hypervisor/core/src/claim", "hypervisor/core/src/world"]),
            ("core: addr, lock, machine, call", 865, &["hypervisor/core/src"]),
            ("hypervisor/src", 300, &["hypervisor/src"]),
        ],
    },
    // Data without logic.
    Area { name: "the ABI", limit: 1_200, parts: &[("hypercall-abi", 1_060, &["hypercall-abi/src"])] },
];

/// The folders whose code runs in ring 0.
const FOLDERS: &[&str] = &["hypercall-abi/src", "hypervisor/core/src", "hypervisor/machine/src", "hypervisor/src"];

/// What of dom0 runs in no test on the host, for it wires what does: the folder, and the most lines it may have, comments
/// among them.
const WIRING: (&str, usize) = ("dom0/src", 820);

/// Prints the table, and says which areas have passed their limits, and which parts their budgets.
pub(crate) fn check(root: &Path) -> Result<Vec<String>> {
    let mut files = Vec::new();
    for folder in FOLDERS {
        files.extend(code_lines(&root.join(folder))?);
    }
    let mut found = Vec::new();
    for (path, _) in &files {
        let path = path.strip_prefix(root).unwrap_or(path).to_string_lossy();
        if part_of(&path).is_none() {
            found.push(format!("{path} belongs to no part of ring 0"));
        }
    }
    println!("{:<30} {:>6} {:>6}", "lines of code in ring 0", "code", "budget");
    for area in AREAS {
        let mut total = 0;
        for (name, budget, _) in area.parts {
            let mine = files
                .iter()
                .filter(|(path, _)| part_of(&path.strip_prefix(root).unwrap_or(path).to_string_lossy()) == Some(*name));
            let count: usize = mine.map(|(_, lines)| lines).sum();
            println!("{name:<30} {count:>6} {budget:>6}");
            if count > *budget {
                found.push(format!(
                    "{name} has {count} lines of code, and its budget is {budget}: make it simpler, or say in \
                     tests/shape/src/lines.rs what it is worth, and in the commit why"
                ));
            }
            total += count;
        }
        println!("{:<30} {total:>6} {:>6}", format!("= {}", area.name), area.limit);
        if total > area.limit {
            found.push(format!("{} have {total} lines of code, and their limit is {}", area.name, area.limit));
        }
    }
    let (folder, limit) = WIRING;
    let mut wiring = 0;
    for path in find(&root.join(folder), &|_| true, &["rs"])? {
        wiring += fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?.lines().count();
    }
    println!("{:<30} {wiring:>6} {limit:>6}", format!("{folder}, all lines"));
    if wiring > limit {
        found.push(format!("{folder} has {wiring} lines that no test on the host runs, and its limit is {limit}"));
    }
    Ok(found)
}

/// The part of ring 0 that a file belongs to.
fn part_of(path: &str) -> Option<&'static str> {
    let mut parts = AREAS.iter().flat_map(|area| area.parts);
    parts.find(|(.., prefixes)| prefixes.iter().any(|prefix| path.starts_with(prefix))).map(|(name, ..)| *name)
}

/// The files below `folder` with their numbers of code lines: no blanks, no comments, no tests.
fn code_lines(folder: &Path) -> Result<Vec<(PathBuf, usize)>> {
    let mut files = Vec::new();
    let mut for_tests = Vec::new();
    for path in find(folder, &|_| true, &["rs", "s", "S"])? {
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let (count, modules) = count(&text);
        let stem = path.with_extension("");
        let is_mod = stem.ends_with("mod") || stem.ends_with("lib") || stem.ends_with("main");
        let home = if is_mod { path.parent().unwrap_or(folder).to_owned() } else { stem };
        for_tests.extend(modules.iter().map(|module| home.join(module)));
        files.push((path, count));
    }
    files.retain(|(path, _)| !for_tests.iter().any(|home| path.starts_with(home) || path.with_extension("") == *home));
    Ok(files)
}

/// The number of code lines in `text`, and the modules in other files that are for tests only.
fn count(text: &str) -> (usize, Vec<String>) {
    let (code, modules) = without_tests(&without_comments(text));
    (code.lines().filter(|line| !line.trim().is_empty()).count(), modules)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_stay_within_their_limits() {
        for area in AREAS {
            let sum: usize = area.parts.iter().map(|(_, budget, _)| budget).sum();
            assert!(sum <= area.limit, "{}: {sum} of {}", area.name, area.limit);
        }
    }

    #[test]
    fn a_file_counts_for_the_first_part_that_names_it() {
        assert_eq!(part_of("hypervisor/core/src/frame/table.rs"), Some("core/frame"));
        assert_eq!(part_of("hypervisor/core/src/addr.rs"), Some("core: addr, lock, machine, call"));
        assert_eq!(part_of("hypervisor/src/run.rs"), Some("hypervisor/src"));
        assert_eq!(part_of("dom0/src/main.rs"), None);
    }

    #[test]
    fn only_code_counts() {
        let text = "//! About.\n\nfn a() {\n    b(); // c\n}\n\n#[cfg(test)]\nmod tests {\n    fn d() {}\n}\n";
        assert_eq!(count(text).0, 3);
        assert_eq!(count("global_asm!(\n\"\n// comment\nnop\nret\n\");\n").0, 5);
        assert_eq!(count(".text\n// comment\nnop /* more\n and more */\nret\n").0, 3);
    }

    #[test]
    fn files_of_test_modules_do_not_count() {
        let dir = tempdir("shape-lines");
        fs::write(dir.join("lib.rs"), "mod a;\n#[cfg(test)]\nmod far;\n").unwrap();
        fs::write(dir.join("a.rs"), "fn a() {}\n#[cfg(test)]\nmod tests;\n").unwrap();
        fs::create_dir_all(dir.join("a")).unwrap();
        fs::write(dir.join("a/tests.rs"), "fn b() {}\n").unwrap();
        fs::write(dir.join("far.rs"), "fn c() {}\n").unwrap();
        let lines: Vec<usize> = code_lines(&dir).unwrap().into_iter().map(|(_, lines)| lines).collect();
        fs::remove_dir_all(&dir).unwrap();
        assert_eq!(lines, [1, 1]);
    }

    fn tempdir(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        dir
    }
}
