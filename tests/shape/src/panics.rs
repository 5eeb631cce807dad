//! Which functions of ring 0 can panic: the calls into the panic machinery that are left in the release image.
//!
//! A panic in ring 0 ends the machine, so every place that can has its line and its reason in `panics.txt`. The numbers
//! only fall: a new or a further call is a failure, and so is a number that is higher than what is left.

use anyhow::{Context, Result, bail};
use object::read::elf::{ElfFile64, FileHeader, ProgramHeader};
use object::{Endianness, Object, ObjectSymbol, SymbolKind, elf};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// Functions that only ever panic, by the start of their demangled name.
const MACHINERY: &[&str] = &[
    "core::panicking::",
    "core::option::unwrap_failed",
    "core::option::expect_failed",
    "core::result::unwrap_failed",
    "core::str::slice_error_fail",
    "core::cell::panic_already",
    "alloc::alloc::handle_alloc_error",
    "alloc::raw_vec::handle_error",
    "alloc::raw_vec::capacity_overflow",
    "rust_begin_unwind",
    "__rustc::rust_begin_unwind",
];

/// Whether a function, by its demangled name, belongs to the panic machinery.
fn is_machinery(name: &str) -> bool {
    let failing = ["core::slice::", "core::array::"].iter().any(|path| name.starts_with(path));
    MACHINERY.iter().any(|start| name.starts_with(start))
        || (failing && (name.contains("_fail") || name.contains("len_mismatch")))
}

struct Function {
    name: String,
    start: u64,
    end: u64,
    panics: bool,
}

/// Compares the image with the list.
pub(crate) fn check(image: &Path, list: &Path) -> Result<Vec<String>> {
    let file = fs::read(image).with_context(|| format!("cannot read {}", image.display()))?;
    let calls = calls(&file).with_context(|| format!("cannot look through {}", image.display()))?;
    let total: usize = calls.values().sum();
    println!("calls of the panic machinery in ring 0: {total}, in {} functions", calls.len());
    let text = fs::read_to_string(list).unwrap_or_default();
    Ok(compare(&calls, &parse(&text)?, &list.display().to_string()))
}

/// The list: `count | caller | reason`, with blank lines and lines that start with `#` left out.
fn parse(text: &str) -> Result<BTreeMap<String, usize>> {
    let mut known = BTreeMap::new();
    for (index, line) in text.lines().enumerate() {
        if line.trim().is_empty() || line.starts_with('#') {
            continue;
        }
        let parts: Vec<&str> = line.splitn(3, " | ").map(str::trim).collect();
        let [count, caller, reason] = parts[..] else {
            bail!("panics.txt:{}: not `count | caller | reason`", index + 1);
        };
        let count = count.parse().with_context(|| format!("panics.txt:{}: {count} is no number", index + 1))?;
        if reason.is_empty() {
            bail!("panics.txt:{}: no reason", index + 1);
        }
        known.insert(caller.to_owned(), count);
    }
    Ok(known)
}

fn compare(calls: &BTreeMap<String, usize>, known: &BTreeMap<String, usize>, list: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (caller, count) in calls {
        match known.get(caller) {
            None => found.push(format!("{list} lacks: {count} | {caller} | (the reason why it cannot happen)")),
            Some(known) if count > known => {
                found.push(format!("{caller} calls the panic machinery {count} times, and {list} allows {known}"));
            }
            Some(known) if count < known => {
                found.push(format!("{caller} calls the panic machinery {count} times: lower the {known} in {list}"));
            }
            Some(_) => {}
        }
    }
    let gone = known.keys().filter(|caller| !calls.contains_key(*caller));
    found.extend(gone.map(|caller| format!("{caller} no longer panics: take its line out of {list}")));
    found
}

/// The number of calls of the panic machinery by calling function.
///
/// A call, a jump or a conditional jump has its target as a 32-bit distance after the opcode. Every byte that could be
/// such an opcode is tried; that a wrong guess leads exactly to the start of one of these functions is out of reach.
fn calls(file: &[u8]) -> Result<BTreeMap<String, usize>> {
    let functions = functions(file)?;
    let header = elf::FileHeader64::<Endianness>::parse(file)?;
    let endian = header.endian()?;
    let mut calls = BTreeMap::new();
    for segment in header.program_headers(endian, file)? {
        if segment.p_type(endian) != elf::PT_LOAD || segment.p_flags(endian) & elf::PF_X == elf::ProgramFlags(0) {
            continue;
        }
        let code = segment.data(endian, file).ok().context("a segment lies outside the file")?;
        let base = segment.p_vaddr(endian);
        for (at, target) in branches(code, base) {
            let Some(callee) = starting_at(&functions, target) else {
                continue;
            };
            let caller = containing(&functions, at);
            if callee.panics && caller.is_none_or(|caller| !caller.panics) {
                let name = caller.map_or("(assembly)", |caller| caller.name.as_str());
                *calls.entry(name.to_owned()).or_default() += 1;
            }
        }
    }
    Ok(calls)
}

/// Where something that looks like a near branch stands, and where it would lead.
fn branches(code: &[u8], base: u64) -> impl Iterator<Item = (u64, u64)> {
    code.windows(5).enumerate().filter_map(move |(offset, bytes)| {
        let conditional = offset > 0 && code[offset - 1] == 0x0f && bytes[0] & 0xf0 == 0x80;
        if !(bytes[0] == 0xe8 || bytes[0] == 0xe9 || conditional) {
            return None;
        }
        let at = base + offset as u64;
        let distance = i32::from_le_bytes([bytes[1], bytes[2], bytes[3], bytes[4]]);
        Some((at, (at + 5).wrapping_add_signed(i64::from(distance))))
    })
}

/// The functions of the image, in the order of their addresses.
fn functions(file: &[u8]) -> Result<Vec<Function>> {
    let elf = ElfFile64::<Endianness>::parse(file)?;
    let symbols = elf.symbols().filter(|symbol| symbol.kind() == SymbolKind::Text && symbol.size() > 0);
    let mut functions: Vec<Function> = symbols
        .map(|symbol| {
            let name = format!("{:#}", rustc_demangle::demangle(symbol.name().unwrap_or("?")));
            let (start, end) = (symbol.address(), symbol.address() + symbol.size());
            Function { panics: is_machinery(&name), name, start, end }
        })
        .collect();
    if functions.is_empty() {
        bail!("the image has no symbols");
    }
    // The linker merges equal functions; among names for one address the machinery's decides.
    functions.sort_by_key(|function| (function.start, !function.panics));
    functions.dedup_by_key(|function| function.start);
    Ok(functions)
}

fn starting_at(functions: &[Function], address: u64) -> Option<&Function> {
    functions.binary_search_by_key(&address, |function| function.start).ok().map(|index| &functions[index])
}

fn containing(functions: &[Function], address: u64) -> Option<&Function> {
    let after = functions.partition_point(|function| function.start <= address);
    functions[..after].last().filter(|function| address < function.end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(entries: &[(&str, usize)]) -> BTreeMap<String, usize> {
        entries.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
    }

    #[test]
    fn the_numbers_only_fall() {
        let known =
            parse("# what is left\n2 | core_a::b | the index is masked | twice\n1 | c | why\n1 | d | why\n").unwrap();
        assert_eq!(known, map(&[("core_a::b", 2), ("c", 1), ("d", 1)]));
        assert!(compare(&known, &known, "list").is_empty());
        let found = compare(&map(&[("core_a::b", 3), ("c", 1), ("new", 4)]), &known, "list");
        assert_eq!(found.len(), 3, "{found:?}");
        assert!(found[0].contains("3 times, and list allows 2"));
        assert!(found[1].contains("list lacks: 4 | new |"));
        assert!(found[2].contains("d no longer panics"));
        assert!(compare(&map(&[("c", 1)]), &map(&[("c", 2)]), "list")[0].contains("lower the 2"));
    }

    #[test]
    fn a_line_needs_its_reason() {
        assert!(parse("1 | a").is_err());
        assert!(parse("1 | a | ").is_err());
        assert!(parse("x | a | b").is_err());
    }

    #[test]
    fn branches_are_found_at_any_offset() {
        let code = [0x90, 0xe8, 0xfb, 0xff, 0xff, 0xff, 0x0f, 0x84, 1, 0, 0, 0, 0xe9, 0, 0, 0, 0];
        let found: Vec<_> = branches(&code, 0x1000).collect();
        assert!(found.contains(&(0x1001, 0x1001)));
        assert!(found.contains(&(0x1007, 0x100d)));
        assert!(found.contains(&(0x100c, 0x1011)));
    }

    #[test]
    fn the_machinery_is_known_by_name() {
        for name in [
            "core::panicking::panic_fmt",
            "core::slice::index::slice_end_index_len_fail",
            "core::slice::copy_from_slice_impl::len_mismatch_fail",
            "core::option::unwrap_failed",
        ] {
            assert!(is_machinery(name), "{name}");
        }
        assert!(!is_machinery("hv_core::frame::acquire"));
        assert!(!is_machinery("core::slice::sort"));
    }
}
