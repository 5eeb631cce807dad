//! `hypervisor/PROMISES.md` leads from each promise to code and tests; what it names must exist.

use crate::source::find;
use anyhow::{Context, Result};
use std::fs;
use std::path::Path;

const PAGE: &str = "hypervisor/PROMISES.md";
/// Where tests and planted faults are defined.
const FOLDERS: &[&str] = &["hypervisor", "tests"];

/// Says what the page names and does not exist.
pub(crate) fn check(root: &Path) -> Result<Vec<String>> {
    let page = fs::read_to_string(root.join(PAGE)).with_context(|| format!("cannot read {PAGE}"))?;
    let mut sources = String::new();
    for folder in FOLDERS {
        for path in find(&root.join(folder), &|_| true, &["rs"])? {
            sources += &fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        }
    }
    let exists = |name: &str| match kind(name) {
        Kind::File => root.join(name).exists(),
        Kind::Test => sources.contains(&format!("fn {name}(")) || sources.contains(&format!("{name} => ")),
        Kind::InGuest => sources.contains(&format!("test!(\"{name}\"")),
        Kind::Fault => sources.contains(&format!("    {name},\n")) || sources.contains(&format!("    {name} = ")),
        Kind::Other => true,
    };
    let lost = names(&page).filter(|name| !exists(name));
    let mut found: Vec<String> = lost.map(|name| format!("{PAGE} names `{name}`, which does not exist")).collect();
    let promises = (1..=13).filter(|n| !page.contains(&format!("| **P{n}** ")));
    found.extend(promises.map(|n| format!("{PAGE} says nothing about P{n}")));
    Ok(found)
}

/// What stands in backticks.
fn names(page: &str) -> impl Iterator<Item = &str> {
    page.split('`').skip(1).step_by(2)
}

#[derive(PartialEq, Eq, Debug)]
enum Kind {
    /// A path.
    File,
    /// A test function on the host, or a story.
    Test,
    /// A test inside a guest.
    InGuest,
    /// A planted fault.
    Fault,
    /// A type, a command.
    Other,
}

fn kind(name: &str) -> Kind {
    let of = |also: &str| name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || also.contains(c));
    match name {
        _ if name.contains('/') => Kind::File,
        _ if name.contains('.') && of(".-") => Kind::InGuest,
        _ if name.matches('_').count() > 1 && of("_") => Kind::Test,
        "Powers" | "ControlAuthority" => Kind::Other,
        _ if name.starts_with(char::is_uppercase) && name.chars().all(char::is_alphanumeric) => Kind::Fault,
        _ => Kind::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_apart() {
        assert_eq!(kind("hypervisor/core/src/lib.rs"), Kind::File);
        assert_eq!(kind("random_guests_never_break_a_promise"), Kind::Test);
        assert_eq!(kind("pins.writable-alias"), Kind::InGuest);
        assert_eq!(kind("SkipFlush"), Kind::Fault);
        assert_eq!(kind("cargo xtask check"), Kind::Other);
        assert_eq!(kind("TypeState::take"), Kind::Other);
        assert_eq!(names("a `b` c `d/e`").collect::<Vec<_>>(), ["b", "d/e"]);
    }
}
