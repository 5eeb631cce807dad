//! The patches for a version of the kernel, and the order in which they are applied.

use super::source::Source;
use crate::root;
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use xshell::{Shell, cmd};

/// One patch of a series.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Patch {
    /// The name of its file.
    pub name: String,
    /// What is in the file.
    pub text: String,
}

impl Patch {
    /// The files that the patch changes, adds or removes.
    #[must_use]
    pub fn files(&self) -> BTreeSet<&str> {
        let sides = self.text.lines().filter_map(|line| line.strip_prefix("--- a/").or(line.strip_prefix("+++ b/")));
        sides.map(|file| file.split('\t').next().unwrap_or(file)).collect()
    }

    /// The patch without its message, which has no part in what is built.
    pub(super) fn changes(&self) -> &str {
        self.text.find("\ndiff --git ").map_or(&*self.text, |at| &self.text[at..])
    }

    /// Lines that the patch adds, and lines that it removes.
    #[must_use]
    pub fn lines(&self) -> (usize, usize) {
        let (mut added, mut removed, mut inside) = (0, 0, false);
        for line in self.text.lines() {
            match line {
                // What git writes behind the last hunk.
                "-- " => inside = false,
                _ if line.starts_with("@@ ") => inside = true,
                _ if line.starts_with("diff ") => inside = false,
                _ if inside && line.starts_with('+') => added += 1,
                _ if inside && line.starts_with('-') => removed += 1,
                _ => {}
            }
        }
        (added, removed)
    }
}

/// The folder with the patches for a version.
#[must_use]
pub fn folder(version: &str) -> PathBuf {
    root().join("guest-kernel-patches").join(version)
}

/// The patches for a version, in the order in which they are applied.
///
/// # Errors
/// A file that cannot be read.
pub fn series(version: &str) -> Result<Vec<Patch>> {
    let folder = folder(version);
    let read = |name: &str| {
        let file = folder.join(name);
        fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))
    };
    let names = read("series")?;
    let names = names.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    names.map(|name| Ok(Patch { name: name.to_owned(), text: read(name)? })).collect()
}

/// The parts that a series lets the boot parameter switch.
#[must_use]
pub fn parts(series: &[Patch]) -> Vec<String> {
    let lines = series.iter().flat_map(|patch| patch.text.lines());
    let names = lines.filter_map(|line| line.strip_prefix("+\t{ .name = \"")?.split_once('"'));
    names.map(|(name, _)| name.to_owned()).collect()
}

/// Runs the source's own check of a patch's form.
///
/// # Errors
/// What it calls an error.
pub fn check_form(sh: &Shell, source: &Source, patch: &Patch) -> Result<()> {
    let (script, tree) = (source.tree.join("scripts/checkpatch.pl"), &source.tree);
    let file = folder(source.version).join(&patch.name);
    let output = cmd!(sh, "perl {script} --root={tree} --terse --show-types {file}").quiet();
    let output = output.ignore_status().output().context("cannot start perl")?;
    if output.status.success() {
        return Ok(());
    }
    let [said, failed] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned());
    // It fails because of warnings as well.
    ensure!(said.contains("total:"), "checkpatch.pl cannot look at {}: {}", patch.name, super::last_line(&failed));
    match said.lines().find(|line| line.contains("ERROR:")) {
        Some(line) => bail!("{}: {line}", patch.name),
        None => Ok(()),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::source::VERSIONS;
    use super::super::tools::TOOLS;
    use super::*;

    pub(in crate::built) const PATCH: &str = "From 0\nSubject: [PATCH] x\n\n- a list\n---\n x.c | 2 +-\n\ndiff --git a/d/x.c b/d/x.c\n\
                         --- a/d/x.c\n+++ b/d/x.c\n@@ -1,3 +1,4 @@\n one\n-two\n+2\n+2b\n three\n-- \n2.47\n";

    pub(in crate::built) fn patch(text: &str) -> Patch {
        Patch { name: "0001-x.patch".into(), text: text.into() }
    }

    #[test]
    fn a_patch_is_counted_by_its_hunks() {
        let patch = patch(PATCH);
        assert_eq!(patch.lines(), (2, 1));
        assert!(patch.changes().starts_with("\ndiff --git a/d/x.c"));
        assert_eq!(patch.files().into_iter().collect::<Vec<_>>(), ["d/x.c"]);
    }

    #[test]
    fn parts_are_those_of_the_patches() {
        let text = "+static struct part parts[] = {\n+\t{ .name = \"pte\", .key = &k },\n \t{ .name = \"old\" },\n";
        assert_eq!(parts(&[patch(text)]), ["pte"]);
        let parts = parts(&series(super::super::DEFAULT).unwrap());
        assert!(parts.iter().all(|part| !part.is_empty() && part != "all" && part != "none"), "{parts:?}");
    }

    /// The most lines that a series may add.
    const LIMIT: usize = 1_500;

    #[test]
    fn each_series_is_complete_and_in_form() {
        for (version, _) in VERSIONS {
            let series = series(version).unwrap();
            let files = fs::read_dir(folder(version)).unwrap().map(|entry| entry.unwrap().file_name());
            let mut files: Vec<String> = files.filter_map(|name| name.into_string().ok()).collect();
            files.retain(|name| name.ends_with(".patch"));
            files.sort();
            // Numbers are the order.
            assert_eq!(series.iter().map(|patch| patch.name.clone()).collect::<Vec<_>>(), files, "{version}");
            for Patch { name, text } in &series {
                let subject = text.lines().find_map(|line| line.strip_prefix("Subject: [PATCH] "));
                let subject = subject.unwrap_or_else(|| panic!("{name} has no subject on one line"));
                assert!(subject.len() <= 72 && subject.contains(": "), "{name}: {subject}");
                assert!(text.contains("\nSigned-off-by: "), "{name} is not signed off");
                assert!(text.contains("\nRisk: "), "{name} does not say what its risk is");
                let new: Vec<&str> = text.split("\n--- /dev/null\n").skip(1).collect();
                // Descriptions of interfaces have a form of their own, without a licence.
                for file in new.into_iter().filter(|file| !file.starts_with("+++ b/Documentation/ABI/")) {
                    let first = file.lines().find(|line| line.starts_with("+") && !line.starts_with("+++"));
                    assert!(first.is_some_and(|line| line.contains("SPDX-License-Identifier: GPL-2.0-only")), "{name}");
                }
            }
            let added: usize = series.iter().map(|patch| patch.lines().0).sum();
            assert!(added < LIMIT, "the series for {version} adds {added} lines");
        }
    }

    /// Only if the source is in the cache: `cargo xtask kernel` fetches it.
    #[test]
    fn each_series_applies_exactly() {
        for (version, _) in VERSIONS {
            match (Source::cached(version).unwrap(), TOOLS.present().unwrap()) {
                (Some(source), Some(_)) => {
                    source.apply(&series(version).unwrap()).unwrap();
                }
                _ => println!("skipped: the source of Linux {version} is not in the cache"),
            }
        }
    }
}
