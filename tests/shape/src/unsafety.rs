//! Where `unsafe` may stand, and that each use says why it is sound.

use crate::source::{Crate, without_comments};
use std::path::Path;

/// The crates that may use `unsafe`; every other forbids it.
const ALLOWED: &[&str] = &["hv-machine", "microbench", "plugin", "unikernel"];

/// The most unsafe blocks and impls that ring 0 may have.
const RING0_LIMIT: usize = 60;

/// What is wrong, one line each. The number of unsafe blocks per crate is printed.
pub(crate) fn check(crates: &[Crate]) -> Vec<String> {
    let mut found = Vec::new();
    for member in crates {
        let mut blocks = 0;
        for (path, text) in &member.files {
            let code = without_comments(text);
            if ALLOWED.contains(&member.name.as_str()) {
                let (here, bare) = reasons(text, &code);
                blocks += here;
                found.extend(
                    bare.iter().map(|line| format!("{}:{line}: unsafe without a SAFETY reason", path.display())),
                );
                continue;
            }
            for (index, _) in code.lines().enumerate().filter(|(_, line)| uses_of_unsafe(line) > 0) {
                found.push(format!("{}:{}: no unsafe in the crate {}", path.display(), index + 1, member.name));
            }
            if is_root(&member.folder, path) && !code.contains("#![forbid(unsafe_code)]") {
                found.push(format!("{}: lacks #![forbid(unsafe_code)]", path.display()));
            }
        }
        if blocks > 0 {
            println!("unsafe blocks and impls in {}: {blocks}", member.name);
        }
        if member.name == "hv-machine" && blocks > RING0_LIMIT {
            found.push(format!("{} has {blocks} unsafe blocks, and the limit of ring 0 is {RING0_LIMIT}", member.name));
        }
    }
    found
}

/// Whether `path` is the root file of a library or a program. (The tests beside them are only searched for the word.)
fn is_root(folder: &Path, path: &Path) -> bool {
    let path = path.strip_prefix(folder).unwrap_or(path);
    ["src/lib.rs", "src/main.rs"].iter().any(|root| path == Path::new(root))
        || path.parent() == Some(Path::new("src/bin"))
}

/// How often `unsafe` stands in a line of code as a word; in an attribute such as `#[unsafe(naked)]` too.
fn uses_of_unsafe(line: &str) -> usize {
    let word = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices("unsafe")
        .filter(|(at, text)| !line[..*at].ends_with(word) && !line[at + text.len()..].starts_with(word))
        .count()
}

/// The number of unsafe blocks and impls, and the lines (from 1) of those without a reason.
fn reasons(text: &str, code: &str) -> (usize, Vec<usize>) {
    let lines: Vec<&str> = text.lines().collect();
    let (mut blocks, mut bare) = (0, Vec::new());
    for (index, line) in code.lines().enumerate() {
        let starts = line.matches("unsafe {").count() + line.matches("unsafe impl").count();
        // `unsafe` alone at the end of a line opens its block in the next.
        let starts = starts + usize::from(line.trim_end().ends_with(" unsafe"));
        if starts == 0 {
            continue;
        }
        blocks += starts;
        // The reason stands in the comment above the statement, which may have begun a few lines earlier.
        let above = lines[..index].iter().rev().take(12).take_while(|line| !line.trim().is_empty());
        if !lines[index].contains("SAFETY:") && !above.into_iter().any(|line| line.contains("SAFETY:")) {
            bare.push(index + 1);
        }
    }
    (blocks, bare)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn check_one(name: &str, text: &str) -> Vec<String> {
        let files = vec![(PathBuf::from(name).join("src/lib.rs"), text.to_owned())];
        check(&[Crate { name: name.into(), folder: name.into(), manifest: toml::Table::new(), files }])
    }

    #[test]
    fn unsafe_is_forbidden_outside_the_two_crates() {
        assert!(check_one("store", "#![forbid(unsafe_code)]\n// unsafe\nfn a() { \"unsafe {\"; }").is_empty());
        assert_eq!(check_one("store", "fn a() {}").len(), 1);
        assert_eq!(check_one("store", "#![forbid(unsafe_code)]\nfn a() { unsafe { b() } }").len(), 1);
        assert_eq!(check_one("store", "#![forbid(unsafe_code)]\n#[unsafe(no_mangle)] fn a() {}").len(), 1);
    }

    #[test]
    fn an_unsafe_block_needs_its_reason() {
        let good = "fn a() {\n    // SAFETY: b is fine\n    // here.\n    let c =\n        unsafe { b() };\n}";
        assert!(check_one("hv-machine", good).is_empty());
        let bad = check_one("hv-machine", "fn a() {\n    unsafe { b() };\n}\n");
        assert_eq!(bad.len(), 1);
        assert!(bad[0].contains("lib.rs:2:"), "{bad:?}");
    }
}
