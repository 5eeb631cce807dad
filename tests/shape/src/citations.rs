//! A citation leads somewhere: to a section of the ABI's documents, to a pitfall listed there, to a document of the tree.
//!
//! `hypercall-abi/doc/README.md` says how to cite.

use crate::source::find;
use anyhow::{Context, Result};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Component, Path, PathBuf};

/// Where the cited documents lie.
const DOCUMENTS: &str = "hypercall-abi/doc";
/// The kinds of files that are looked at.
const KINDS: &[&str] = &["rs", "s", "ld", "md", "toml", "txt", "sh"];
/// Characters that a citation may stand in or end with.
const AROUND: &[char] = &['(', ')', '[', ']', '"', '\'', '`', '*', ',', ';', ':', '.', '-', '–', '§', '|'];

/// A document that is cited by section.
struct Document {
    name: &'static str,
    sections: BTreeSet<String>,
    /// The items of its list of pitfalls.
    pitfalls: BTreeSet<String>,
}

/// What the citations are looked up in.
struct Tree {
    documents: [Document; 2],
    files: Vec<PathBuf>,
}

/// Prints how many citations there are, and says which lead nowhere.
pub(crate) fn check(root: &Path) -> Result<Vec<String>> {
    let document = |name: &'static str| -> Result<Document> {
        let path = format!("{DOCUMENTS}/{name}.md");
        Ok(Document::new(name, &fs::read_to_string(root.join(&path)).with_context(|| format!("cannot read {path}"))?))
    };
    let documents = [document("core")?, document("io")?];
    let inside = |path: &Path| fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()));
    let paths = find(root, &|_| true, KINDS)?;
    let relative = |path: &PathBuf| path.strip_prefix(root).unwrap_or(path).to_owned();
    let tree = Tree { documents, files: paths.iter().map(relative).collect() };
    let (mut count, mut found) = (0, Vec::new());
    for (path, at) in paths.iter().zip(&tree.files) {
        let (cited, lost) = tree.look_at(root, at, &inside(path)?);
        count += cited;
        found.extend(lost);
    }
    match found.len() {
        0 => println!("citations: {count}, none leads nowhere"),
        lost => println!("citations: {count}, {lost} lead nowhere"),
    }
    Ok(found)
}

impl Document {
    fn new(name: &'static str, text: &str) -> Self {
        let headings = text.lines().filter_map(|line| line.strip_prefix("## ").or(line.strip_prefix("### ")));
        let sections = headings.filter_map(number).collect();
        let pitfalls = text.split(" Pitfalls\n").nth(1).unwrap_or_default();
        let items = pitfalls.lines().filter(|line| line.split_once(". ").is_some_and(|(before, _)| is_number(before)));
        Self { name, sections, pitfalls: items.filter_map(number).collect() }
    }
}

impl Tree {
    /// How many citations the text of a file has, and what is wrong with them, by line.
    fn look_at(&self, root: &Path, path: &Path, text: &str) -> (usize, Vec<String>) {
        let is_document = path.extension().is_some_and(|e| e == "md");
        let own = self.documents.iter().find(|d| path == Path::new(DOCUMENTS).join(d.name).with_extension("md"));
        let (mut count, mut found) = (0, Vec::new());
        let mut note = |line: usize, exists: bool, what: String| {
            count += 1;
            if !exists {
                found.push(format!("{}:{line} cites {what}, which does not exist", path.display()));
            }
        };
        let words = words(text);
        let mut at = 0;
        while let Some(&(line, word)) = words.get(at) {
            at += 1;
            let bare = word.trim_matches(AROUND);
            let cited =
                self.documents.iter().find(|document| document.name == bare && !word.ends_with([',', '.', ';']));
            let is_pitfall = matches!(bare, "pitfall" | "pitfalls");
            if cited.is_some() || is_pitfall || bare == "ABI" {
                let numbers = numbers(&words[at..]);
                at += numbers.len();
                for (line, number) in
                    numbers.into_iter().flat_map(|(line, list)| list.into_iter().map(move |n| (line, n)))
                {
                    let (set, what) = match cited {
                        Some(document) => (Some(&document.sections), format!("{} {number}", document.name)),
                        None if is_pitfall => (Some(&self.documents[0].pitfalls), format!("pitfall {number}")),
                        None => (None, format!("ABI {number} without a document")),
                    };
                    note(line, set.is_some_and(|set| set.contains(&number)), what);
                }
                continue;
            }
            if let (Some(document), true) = (own, word.contains('§')) {
                for number in word.split('§').skip(1).flat_map(listed) {
                    note(line, document.sections.contains(&number), format!("§{number}"));
                }
            }
            for name in named_documents(word) {
                note(line, self.has_document(path, name), name.to_owned());
            }
        }
        for (line, target) in links(text).filter(|_| is_document) {
            let file = target.split('#').next().unwrap_or_default();
            let exists = file.is_empty() || root.join(path.with_file_name("")).join(file).exists();
            note(line, exists, target.to_owned());
        }
        (count, found)
    }

    /// Whether a document named in the file at `path` exists: from the top, from there, or anywhere under that name.
    fn has_document(&self, path: &Path, name: &str) -> bool {
        let from_here = without_dots(&path.with_file_name("").join(name));
        self.files.iter().any(|file| *file == from_here || file.ends_with(name))
    }
}

/// The path with its `..` carried out.
fn without_dots(path: &Path) -> PathBuf {
    path.components().fold(PathBuf::new(), |mut done, part| {
        match part {
            Component::ParentDir => _ = done.pop(),
            Component::CurDir => {}
            part => done.push(part),
        }
        done
    })
}

/// The words of a text with their lines, but for what begins the lines of a comment: a citation may be broken there.
fn words(text: &str) -> Vec<(usize, &str)> {
    let mut words = Vec::new();
    for (n, line) in text.lines().enumerate() {
        let marks = ["//", "///", "//!", "#"];
        words.extend(line.split_whitespace().filter(|word| !marks.contains(word)).map(|word| (n + 1, word)));
    }
    words
}

/// The numbers at the start of a text, for each word: the list goes on after a comma.
fn numbers(words: &[(usize, &str)]) -> Vec<(usize, Vec<String>)> {
    let mut found = Vec::new();
    for &(line, word) in words {
        let list = listed(word);
        if list.is_empty() {
            break;
        }
        found.push((line, list));
        if !word.ends_with(',') {
            break;
        }
    }
    found
}

/// The number of a section, or both ends of a range of them, if a word is one.
fn listed(word: &str) -> Vec<String> {
    let ends: Vec<&str> = word.trim_matches(AROUND).split(['-', '–']).map(|end| end.trim_matches(AROUND)).collect();
    if ends.iter().all(|end| is_number(end)) { ends.into_iter().map(str::to_owned).collect() } else { Vec::new() }
}

/// The number that a heading or an item begins with.
fn number(line: &str) -> Option<String> {
    let first = line.split_whitespace().next()?.trim_end_matches('.');
    is_number(first).then(|| first.to_owned())
}

fn is_number(word: &str) -> bool {
    !word.is_empty() && word.split('.').all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()))
}

/// The names of documents in a word.
fn named_documents(word: &str) -> impl Iterator<Item = &str> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || "./-_".contains(c);
    let names = word.split(move |c: char| !is_name(c)).map(|name| name.trim_end_matches(['.', '-']));
    let named = names.filter(|name| name.strip_suffix(".md").is_some_and(|stem| stem.ends_with(char::is_alphanumeric)));
    named.filter(move |_| !word.contains("://") && !word.contains("]("))
}

/// What the links of a document lead to, but for other hosts, with their lines.
fn links(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let lines = text.lines().enumerate();
    let all = lines.flat_map(|(n, line)| line.split("](").skip(1).map(move |rest| (n + 1, rest)));
    let targets = all.filter_map(|(n, rest)| Some((n, rest.split_once(')')?.0)));
    targets.filter(|(_, target)| !target.contains("://"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree() -> Tree {
        let core = "# Core\n\n## 1. Start\n\n### 1.2 Notes\n\n## 3. CPU\n\n### 3.2 Who\n\n## 11. Pitfalls\n\n1. One.\n2. Two.\n";
        let io = "## 1. Grants\n\n### 1.3 Operations\n";
        let files = ["README.md", "hypervisor/PROMISES.md", "hypercall-abi/doc/core.md", "src/lib.rs"]
            .map(PathBuf::from)
            .to_vec();
        Tree { documents: [Document::new("core", core), Document::new("io", io)], files }
    }

    /// What is wrong with a text in a file.
    fn lost(path: &str, text: &str) -> Vec<String> {
        tree().look_at(Path::new("."), Path::new(path), text).1
    }

    fn count(text: &str) -> usize {
        tree().look_at(Path::new("."), Path::new("src/lib.rs"), text).0
    }

    /// The words of a citation, put together here: this file is looked at as well.
    fn cite(document: &str, rest: &str) -> String {
        format!("/// As {document} {rest} says.\n")
    }

    #[test]
    fn a_section_that_exists_may_be_cited() {
        for good in ["1.2", "1", "1.2, 3.2:", "1.2-3.2", "(1.2;"] {
            assert_eq!(lost("src/lib.rs", &cite("core", good)), Vec::<String>::new(), "{good}");
        }
        assert_eq!(count(&cite("core", "1.2, 3.2")), 2);
        assert_eq!(count(&cite("ABI io", "1.3")), 1);
        assert_eq!(count(&cite("a core", "of two")), 0);
    }

    #[test]
    fn a_citation_that_leads_nowhere_is_found_with_its_line() {
        let text = format!("\n{}", cite("core", "1.2, 9.9"));
        assert_eq!(lost("src/lib.rs", &text), [format!("src/lib.rs:2 cites {} 9.9, which does not exist", "core")]);
        let broken = format!("/// (ABI {}\n/// 4.4)\n", "io");
        assert_eq!(lost("src/lib.rs", &broken).len(), 1, "also if a line ends within it");
        for bad in [cite("ABI", "1.2"), cite("pitfall", "3"), cite("core", "1.2-1.9"), cite("io", "3.2")] {
            assert_eq!(lost("src/lib.rs", &bad).len(), 1, "{bad}");
        }
        assert_eq!(lost("src/lib.rs", &cite("pitfall", "2")).len(), 0);
    }

    #[test]
    fn documents_cite_their_own_sections() {
        let own = "hypercall-abi/doc/core.md";
        assert_eq!(lost(own, &format!("see {0}3.2 and {0}7.7", '§')).len(), 1);
        assert_eq!(lost(own, &format!("as {} {}1.3 says", "io", '§')).len(), 0);
    }

    #[test]
    fn documents_and_links_must_exist() {
        let named = |name: &str| format!("// see `{name}{}`, or not\n", ".md");
        for good in ["README", "hypervisor/PROMISES", "PROMISES", "doc/core"] {
            assert_eq!(lost("src/lib.rs", &named(good)).len(), 0, "{good}");
        }
        assert_eq!(lost("src/lib.rs", &named("isolation")).len(), 1);
        assert_eq!(lost("README.md", "[up](../nowhere/to/be.svg), [out](https://example.org/x), [here](#a)").len(), 1);
    }
}
