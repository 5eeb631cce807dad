//! Reading the workspace: its crates, and Rust source without what is not code.

use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// A crate of the workspace.
pub(crate) struct Crate {
    pub(crate) name: String,
    /// The folder of its manifest.
    pub(crate) folder: PathBuf,
    pub(crate) manifest: toml::Table,
    /// Its Rust files with their text, those of its tests, examples and build script included.
    pub(crate) files: Vec<(PathBuf, String)>,
}

/// All members of the workspace at `root`.
pub(crate) fn crates(root: &Path) -> Result<Vec<Crate>> {
    let workspace = manifest(root)?;
    let members = workspace.get("workspace").and_then(|table| table.get("members"));
    let members = members.and_then(toml::Value::as_array).context("the workspace has no members")?;
    let folders: Vec<PathBuf> = members.iter().filter_map(toml::Value::as_str).map(|path| root.join(path)).collect();
    folders.iter().map(|folder| read_crate(folder, &folders)).collect()
}

fn read_crate(folder: &Path, members: &[PathBuf]) -> Result<Crate> {
    let manifest = manifest(folder)?;
    let name = manifest.get("package").and_then(|table| table.get("name")).and_then(toml::Value::as_str);
    let name = name.with_context(|| format!("{} names no package", folder.display()))?.to_owned();
    let inside = |path: &Path| !members.iter().any(|other| other != folder && path == other);
    let mut files = Vec::new();
    for path in find(folder, &inside, &["rs"])? {
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        files.push((path, text));
    }
    Ok(Crate { name, folder: folder.to_owned(), manifest, files })
}

fn manifest(folder: &Path) -> Result<toml::Table> {
    let path = folder.join("Cargo.toml");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    text.parse().with_context(|| format!("cannot parse {}", path.display()))
}

/// The files below `folder` with one of the `extensions`, sorted; only folders that are `inside` are entered.
pub(crate) fn find(folder: &Path, inside: &dyn Fn(&Path) -> bool, extensions: &[&str]) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    for path in entries.flatten().map(|entry| entry.path()) {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() {
            if name != "target" && !name.starts_with('.') && inside(&path) {
                found.extend(find(&path, inside, extensions)?);
            }
        } else if path.extension().is_some_and(|e| extensions.iter().any(|known| e == *known)) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// `text` with comments replaced by spaces and what stands in literals by dots; lines are kept.
///
/// Good for both Rust and the assembly that Rust crates include. A comment inside a literal (of assembly) goes too.
pub(crate) fn without_comments(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let rest = &bytes[at..];
        let end = if rest.starts_with(b"//") {
            let end = at + rest.iter().position(|b| *b == b'\n').unwrap_or(rest.len());
            fill(&mut out[at..end], b' ');
            end
        } else if rest.starts_with(b"/*") {
            let end = at + block_comment(rest);
            fill(&mut out[at..end], b' ');
            end
        } else if let Some((length, start)) = literal(rest, at > 0 && is_word(bytes[at - 1])) {
            for line in out[at + start..at + length].split_mut(|byte| *byte == b'\n') {
                let comment = line.trim_ascii_start().starts_with(b"//");
                fill(line, if comment { b' ' } else { b'.' });
            }
            at + length
        } else {
            at + 1
        };
        at = end;
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn fill(bytes: &mut [u8], with: u8) {
    for byte in bytes.iter_mut().filter(|byte| !byte.is_ascii_whitespace()) {
        *byte = with;
    }
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

/// The length of a block comment, nested ones included.
fn block_comment(text: &[u8]) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < text.len() {
        if text[at..].starts_with(b"/*") {
            (depth, at) = (depth + 1, at + 2);
        } else if text[at..].starts_with(b"*/") {
            (depth, at) = (depth - 1, at + 2);
            if depth == 0 {
                break;
            }
        } else {
            at += 1;
        }
    }
    at
}

/// The length of the literal that `text` starts with, and how much of its start stays visible.
fn literal(text: &[u8], after_word: bool) -> Option<(usize, usize)> {
    let prefix = text.iter().take_while(|b| matches!(b, b'b' | b'c' | b'r')).count().min(2);
    let prefix = if after_word { 0 } else { prefix };
    let hashes = text[prefix..].iter().take_while(|b| **b == b'#').count();
    if text[..prefix].contains(&b'r') && text.get(prefix + hashes) == Some(&b'"') {
        let mut end = vec![b'"'];
        end.extend(std::iter::repeat_n(b'#', hashes));
        let body = &text[prefix + hashes + 1..];
        let length = body.windows(end.len()).position(|window| window == end).unwrap_or(body.len());
        return Some((text.len().min(prefix + hashes + 1 + length + end.len()), prefix + hashes + 1));
    }
    if text.get(prefix) == Some(&b'"') {
        return Some((quoted(text, prefix, b'"'), prefix + 1));
    }
    // A quote followed by one character and a quote, or by a backslash, is a character; any other is a lifetime.
    if text.first() == Some(&b'\'') && !after_word {
        let character = text.get(1) == Some(&b'\\') || {
            let width = std::str::from_utf8(&text[1..text.len().min(5)]).map_or_else(
                |error| error.valid_up_to().max(1),
                |valid| valid.chars().next().map_or(1, char::len_utf8),
            );
            let width = if text.get(1).is_some_and(u8::is_ascii) { 1 } else { width };
            text.get(1 + width) == Some(&b'\'')
        };
        return character.then(|| (quoted(text, 0, b'\''), 1));
    }
    None
}

/// Where the literal that opens at `open` ends.
fn quoted(text: &[u8], open: usize, quote: u8) -> usize {
    let mut at = open + 1;
    while at < text.len() && text[at] != quote {
        at += if text[at] == b'\\' { 2 } else { 1 };
    }
    text.len().min(at + 1)
}

/// `code` (without comments) with every item that is compiled for tests only replaced by spaces, and the names of the
/// modules among them that live in files of their own.
pub(crate) fn without_tests(code: &str) -> (String, Vec<String>) {
    let mut out = code.as_bytes().to_vec();
    let mut modules = Vec::new();
    let mut from = 0;
    // No image is built with a feature: what stands behind one is for tests as well (planted faults, the audit's view).
    let marks = ["#[cfg(test)]", "#[cfg(all(test", "#[cfg(feature = "];
    while let Some(at) = marks.iter().filter_map(|mark| code[from..].find(mark)).min() {
        let start = from + at;
        let end = start + item(&code[start..]);
        if let Some(name) = code[start..end].trim_end().strip_suffix(';').and_then(|item| item.split("mod ").nth(1)) {
            modules.push(name.trim().to_owned());
        }
        for byte in &mut out[start..end] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
        from = end;
    }
    (String::from_utf8_lossy(&out).into_owned(), modules)
}

/// The length of the attributes and the item that `code` starts with.
fn item(code: &str) -> usize {
    let mut depth = 0_i32;
    for (at, character) in code.char_indices() {
        match character {
            '(' | '[' => depth += 1,
            ')' | ']' => depth -= 1,
            '{' => depth += 1,
            '}' => {
                depth -= 1;
                if depth == 0 {
                    return at + 1;
                }
            }
            ';' if depth == 0 => return at + 1,
            _ => {}
        }
    }
    code.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_are_blanked_and_lines_kept() {
        let text = "let a = \"// no\"; // yes\n/* x /* y */\n z */ let b = 'c'; let q = '\\''; let l: &'a str = r#\"un\"safe\"#;\nasm!(\"\n // note\n nop\");\n";
        let code = without_comments(text);
        assert_eq!(code.lines().count(), text.lines().count());
        for gone in ["no", "yes", "x", "z", "un", "safe", "note"] {
            assert!(!code.contains(gone), "{gone} in {code}");
        }
        for kept in ["let a = \"", "let b = '", "let q = '", "&'a str"] {
            assert!(code.contains(kept), "{kept} not in {code}");
        }
    }

    #[test]
    fn items_for_tests_are_blanked() {
        let text =
            "fn a() {}\n#[cfg(test)]\nmod t {\n fn b() { c(); }\n}\nfn d() {}\n#[cfg(test)]\nmod far;\nfn e() {}\n";
        let gated = "#[cfg(feature = \"f\")]\npub mod audit;\nfn f() {}\n";
        let (kept, modules) = without_tests(gated);
        assert!(kept.contains("fn f") && !kept.contains("audit") && modules == ["audit"], "{kept} {modules:?}");
        let (code, modules) = without_tests(text);
        assert!(code.contains("fn a") && code.contains("fn d") && code.contains("fn e"), "{code}");
        assert!(!code.contains("fn b") && !code.contains("far"), "{code}");
        assert_eq!(modules, ["far"]);
    }
}
