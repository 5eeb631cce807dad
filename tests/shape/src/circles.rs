//! Which files of the rules know each other in a circle.
//!
//! A file knows another if it names something defined there, or calls a method that the other adds to a type of a third
//! file (`impl World` stands in many). A circle inside one folder is that noun's own affair; a wider one means that
//! neither of its nouns can be understood, tested or moved alone.

use crate::source::{find, without_comments, without_tests};
use anyhow::{Context, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// The rules of ring 0.
const CORE: &str = "hypervisor/core/src";

/// Prints the number of circles that are wider than a folder, and says where they are.
pub(crate) fn check(root: &Path) -> Result<Vec<String>> {
    let folder = root.join(CORE);
    let mut files = Vec::new();
    for path in find(&folder, &|_| true, &["rs"])? {
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let name = path.strip_prefix(&folder).unwrap_or(&path).to_string_lossy().into_owned();
        files.push(File::new(name, &text));
    }
    let circles = circles(&files);
    println!("circles in {CORE} wider than a folder: {}", circles.len());
    Ok(circles.into_iter().map(|members| format!("a circle in {CORE}: {}", members.join("; "))).collect())
}

/// A file of the crate.
struct File {
    /// Its path in the crate's `src`.
    name: String,
    /// Its module, as a path from the crate's root.
    module: Vec<String>,
    code: String,
}

impl File {
    fn new(name: String, text: &str) -> Self {
        let code = without_tests(&without_comments(text)).0;
        let stem = name.trim_end_matches(".rs");
        let module = stem.split('/').filter(|part| !matches!(*part, "mod" | "lib")).map(str::to_owned).collect();
        Self { name, module, code }
    }

    /// The noun it belongs to: its folder, or itself.
    fn noun(&self) -> &str {
        self.module.first().map_or("", String::as_str)
    }
}

/// The groups of files that reach each other and lie in more than one folder: each file with those of its group it knows.
fn circles(files: &[File]) -> Vec<Vec<String>> {
    let knows = knows(files);
    let mut reach = knows.clone();
    for via in 0..files.len() {
        let onward = reach[via].clone();
        for from in reach.iter_mut().filter(|from| from.contains(&via)) {
            from.extend(&onward);
        }
    }
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for (index, file) in files.iter().enumerate() {
        let mut group: Vec<usize> =
            reach[index].iter().copied().filter(|other| reach[*other].contains(&index)).collect();
        group.retain(|other| seen.insert(*other));
        if group.iter().any(|other| files[*other].noun() != file.noun()) {
            let name = |index: &usize| files[*index].name.as_str();
            let line = |of: &usize| {
                let known: Vec<&str> = knows[*of].iter().filter(|other| group.contains(other)).map(name).collect();
                format!("{} knows {}", name(of), known.join(", "))
            };
            found.push(group.iter().map(line).collect());
        }
    }
    found
}

/// For each file the files it knows. The root knows all and is known by macros only, so it is left out.
fn knows(files: &[File]) -> Vec<BTreeSet<usize>> {
    let modules: BTreeMap<&[String], usize> = files.iter().enumerate().map(|(n, f)| (f.module.as_slice(), n)).collect();
    let file_of = |path: &[String]| (1..=path.len()).rev().find_map(|length| modules.get(&path[..length]).copied());
    let prelude: BTreeMap<String, usize> = files
        .iter()
        .filter(|file| file.module.is_empty())
        .flat_map(|file| paths(&file.code, &file.module))
        .filter_map(|path| Some((path.last()?.clone(), file_of(&path)?)))
        .collect();
    let methods = foreign_methods(files);
    let mut all = Vec::new();
    for (index, file) in files.iter().enumerate() {
        let mut known = BTreeSet::new();
        if !file.module.is_empty() {
            let paths = paths(&file.code, &file.module);
            known.extend(paths.iter().filter_map(|path| file_of(path)));
            if paths.iter().any(|path| path.first().is_some_and(|first| first == "prelude")) {
                known.extend(words(&file.code).filter_map(|word| prelude.get(word)));
            }
            known.extend(called(&file.code).filter_map(|name| methods.get(name)));
            known.remove(&index);
        }
        all.push(known);
    }
    all
}

/// The paths in `code` that begin with `crate`, `self` or `super`, as seen from the crate's root; lists are taken apart.
fn paths(code: &str, module: &[String]) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("::") {
        let before = code[..at].rsplit(|c: char| !is_word(c)).next().unwrap_or("");
        let start = match before {
            "crate" => Vec::new(),
            "self" => module.to_vec(),
            "super" => module[..module.len().saturating_sub(1)].to_vec(),
            _ => continue,
        };
        tree(&code[at + 2..], &start, &mut found);
    }
    found
}

/// Takes a path, or a list of them, apart; returns how much of `text` belonged to it.
fn tree(text: &str, start: &[String], found: &mut Vec<Vec<String>>) -> usize {
    let skipped = text.len() - text.trim_start().len();
    let rest = &text[skipped..];
    if let Some(list) = rest.strip_prefix('{') {
        let mut at = 0;
        while !list[at..].trim_start().starts_with('}') && at < list.len() {
            at += tree(&list[at..], start, found).max(1);
        }
        return skipped + 1 + at + list[at..].find('}').map_or(0, |end| end + 1);
    }
    let word: String = rest.chars().take_while(|c| is_word(*c)).collect();
    let mut path = start.to_vec();
    match word.as_str() {
        "self" | "" => {}
        "super" => _ = path.pop(),
        _ => path.push(word.clone()),
    }
    let end = skipped + word.len();
    match text[end..].strip_prefix("::") {
        Some(onward) => end + 2 + tree(onward, &path, found),
        None => {
            found.push(path);
            end.max(skipped + usize::from(word.is_empty()))
        }
    }
}

/// Methods by name that a file adds to a type of another file, where the crate has only one of that name.
fn foreign_methods(files: &[File]) -> BTreeMap<String, usize> {
    let mut home = BTreeMap::new();
    let mut count: BTreeMap<&str, usize> = BTreeMap::new();
    for (index, file) in files.iter().enumerate() {
        for kind in ["struct ", "enum ", "trait "] {
            home.extend(after(&file.code, kind).map(|name| (name, index)));
        }
        for name in after(&file.code, "fn ") {
            *count.entry(name).or_default() += 1;
        }
    }
    let mut methods = BTreeMap::new();
    for (index, file) in files.iter().enumerate() {
        for (name, body) in impls(&file.code) {
            if home.get(name).is_some_and(|home| *home != index) {
                let unique = after(body, "fn ").filter(|method| count.get(method) == Some(&1));
                methods.extend(unique.map(|method| (method.to_owned(), index)));
            }
        }
    }
    methods
}

/// The inherent `impl` blocks of a file: the type's name, and the block.
fn impls(code: &str) -> impl Iterator<Item = (&str, &str)> {
    code.split("\nimpl").skip(1).filter_map(|block| {
        let (head, body) = block.split_once('{')?;
        // Past the parameters of the block itself.
        let mut depth = 0usize;
        let name = head.find(|c| {
            depth = match c {
                '<' => depth + 1,
                '>' => depth.saturating_sub(1),
                _ => depth,
            };
            depth == 0 && is_word(c)
        })?;
        let name = head[name..].split(|c: char| !is_word(c)).next()?;
        (!head.contains(" for ")).then(|| (name, body.split("\n}").next().unwrap_or(body)))
    })
}

/// The word that follows each `mark`.
fn after<'a>(code: &'a str, mark: &'a str) -> impl Iterator<Item = &'a str> {
    code.split(mark).skip(1).filter_map(|rest| rest.split(|c: char| !is_word(c)).next())
}

/// The names of the methods that are called.
fn called(code: &str) -> impl Iterator<Item = &str> {
    code.split('.').skip(1).filter_map(|rest| {
        let name = rest.split(|c: char| !is_word(c)).next()?;
        rest[name.len()..].starts_with(['(', ':']).then_some(name)
    })
}

fn words(code: &str) -> impl Iterator<Item = &str> {
    code.split(|c: char| !is_word(c)).filter(|word| !word.is_empty())
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(files: &[(&str, &str)]) -> Vec<Vec<String>> {
        circles(&files.iter().map(|(name, text)| File::new((*name).to_owned(), text)).collect::<Vec<_>>())
    }

    #[test]
    fn a_circle_over_two_folders_is_found() {
        let files = [
            ("event/mod.rs", "use crate::sched::{self, wake::Wake};"),
            ("sched/mod.rs", "pub mod wake;"),
            ("sched/wake.rs", "fn a() { crate::time::now() }"),
            ("time.rs", "use super::event;"),
        ];
        assert_eq!(
            found(&files),
            [["event/mod.rs knows sched/wake.rs", "sched/wake.rs knows time.rs", "time.rs knows event/mod.rs"]]
        );
        assert!(found(&files[..3]).is_empty());
    }

    #[test]
    fn a_circle_inside_a_folder_is_its_own_affair() {
        assert!(found(&[("a/x.rs", "use super::y::Y;"), ("a/y.rs", "use crate::a::x;")]).is_empty());
    }

    #[test]
    fn what_comes_through_the_prelude_counts() {
        let root = ("lib.rs", "mod prelude {\n    pub(crate) use crate::world::{Ctx, World};\n}");
        let event = ("event.rs", "use crate::prelude::*;\nfn a(w: &World) {}");
        assert_eq!(found(&[root, event, ("world.rs", "use crate::event;")]).len(), 1);
        let silent = ("event.rs", "use crate::prelude::*;\nfn a() {}");
        assert!(found(&[root, silent, ("world.rs", "use crate::event;")]).is_empty());
    }

    #[test]
    fn a_method_counts_for_the_file_that_adds_it() {
        let world = ("world.rs", "pub struct World;");
        let event =
            ("event.rs", "use crate::world::World;\nuse crate::sched;\nimpl World {\n    fn raise(&self) {}\n}");
        let sched = ("sched.rs", "fn tick(w: &W) { w.raise() }");
        assert_eq!(found(&[world, event, sched]), [["event.rs knows sched.rs", "sched.rs knows event.rs"]]);
        let tests = ("sched.rs", "#[cfg(test)]\nmod tests {\n    fn tick(w: &W) { w.raise() }\n}");
        assert!(found(&[world, event, tests]).is_empty());
    }
}
