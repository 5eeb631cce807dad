//! How many lines of code run in ring 0, by part.

use crate::source::{find, without_comments, without_tests};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// All of ring 0 stays below this many lines of code.
const LIMIT: usize = 10_000;

/// A part of ring 0: its name, its budget in lines of code, and the paths (without extension) that belong to it.
///
/// A budget is what the part was worth when somebody last looked, and little more. Who needs a larger one raises it in
/// the commit that needs it, out of what the limit has left. A file counts for the first part with a matching prefix:
/// each crate ends with a part that takes the rest.
const PARTS: &[(&str, usize, &[&str])] = &[
    ("core/frame", 807, &["hypervisor/core/src/frame"]),
    ("core/paging", 785, &["hypervisor/core/src/paging"]),
    ("core/event", 370, &["hypervisor/core/src/event"]),
    ("core/grant", 444, &["hypervisor/core/src/grant"]),
    ("core/domain", 713, &["hypervisor/core/src/domain"]),
    ("core/memory", 82, &["hypervisor/core/src/memory"]),
    ("core/sched, time", 305, &["hypervisor/core/src/sched", "hypervisor/core/src/time"]),
    ("core/trap", 288, &["hypervisor/core/src/trap"]),
    ("core/decode, emulate", 646, &["hypervisor/core/src/decode", "hypervisor/core/src/emulate"]),
    ("core/policy", 120, &["hypervisor/core/src/policy"]),
    ("core/calls", 768, &["hypervisor/core/src/calls"]),
    ("core/dispatch", 160, &["hypervisor/core/src/dispatch"]),
    ("core/claim, world", 271, &["hypervisor/core/src/claim", "hypervisor/core/src/world"]),
    ("core: addr, lock, machine", 473, &["hypervisor/core/src"]),
    (
        "machine/boot, smp, acpi",
        461,
        &["hypervisor/machine/src/boot", "hypervisor/machine/src/smp", "hypervisor/machine/src/acpi"],
    ),
    ("machine/entry, cpu", 684, &["hypervisor/machine/src/entry", "hypervisor/machine/src/cpu"]),
    ("machine/memory", 263, &["hypervisor/machine/src/memory"]),
    (
        "machine/apic, ioapic, timer",
        300,
        &["hypervisor/machine/src/apic", "hypervisor/machine/src/ioapic", "hypervisor/machine/src/timer"],
    ),
    ("machine, the rest", 470, &["hypervisor/machine/src"]),
    ("hypervisor/src", 340, &["hypervisor/src"]),
    ("hypercall-abi", 956, &["hypercall-abi/src"]),
];

/// The folders whose code runs in ring 0.
const FOLDERS: &[&str] = &["hypercall-abi/src", "hypervisor/core/src", "hypervisor/machine/src", "hypervisor/src"];

/// Prints the table, and says which parts have outgrown their budgets, or ring 0 its limit.
pub(crate) fn check(root: &Path) -> Result<Vec<String>> {
    let mut counts = vec![0; PARTS.len()];
    let mut found = Vec::new();
    for folder in FOLDERS {
        for (path, lines) in code_lines(&root.join(folder))? {
            let path = path.strip_prefix(root).unwrap_or(&path).to_string_lossy().into_owned();
            let part = PARTS.iter().position(|(.., prefixes)| prefixes.iter().any(|prefix| path.starts_with(prefix)));
            match part {
                Some(part) => counts[part] += lines,
                None => found.push(format!("{path} belongs to no part of ring 0")),
            }
        }
    }
    println!("{:<30} {:>6} {:>6}", "lines of code in ring 0", "code", "budget");
    for ((name, budget, _), count) in PARTS.iter().zip(&counts) {
        println!("{name:<30} {count:>6} {budget:>6}");
        if count > budget {
            let left = LIMIT.saturating_sub(PARTS.iter().map(|(_, budget, _)| budget).sum());
            found.push(format!(
                "{name} has {count} lines of code, and its budget is {budget}: make it smaller, or say in \
                 tests/shape/src/lines.rs that it is worth more ({left} lines of the limit are not given away)"
            ));
        }
    }
    let total: usize = counts.iter().sum();
    println!("{:<30} {total:>6} {LIMIT:>6}", "in all");
    if total >= LIMIT {
        found.push(format!("ring 0 has {total} lines of code, and its limit is {LIMIT}"));
    }
    Ok(found)
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
    fn budgets_stay_within_the_limit() {
        assert!(PARTS.iter().map(|(_, budget, _)| budget).sum::<usize>() <= LIMIT);
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
