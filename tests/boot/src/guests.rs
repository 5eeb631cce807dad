//! The tests inside the test guests, as found in their ELF files: no list of them is kept by hand.

use crate::{Machine, Outcome, Setup, position};
use anyhow::{Context, Result};
use object::read::elf::ElfFile64;
use object::{Endianness, Object, ObjectSection, ObjectSymbol};
use std::fs;
use std::path::Path;
use std::time::Duration;
use xtask::bundle::Bundle;

/// A record of the `.tests` section: the name, padded with zeros, and the function's address.
const RECORD: usize = 64;
const NAME: usize = 56;

/// What a guest prints last if all went well.
const PASSED: &[u8] = b"@@ done: passed";

/// What the tests of the guest at `path` are called. One that has no table of tests, yet says in the end that it
/// passed, is a single test, whose name is `None`; one that never says so is part of some story, and no test.
///
/// # Errors
/// The file cannot be read, is no ELF file, or has a damaged table of tests.
pub fn tests(path: &Path) -> Result<Vec<Option<String>>> {
    let file = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let names = names(&file).with_context(|| format!("the tests of {}", path.display()))?;
    if names.is_empty() && position(&file, PASSED).is_some() {
        return Ok(vec![None]);
    }
    Ok(names.into_iter().map(Some).collect())
}

fn names(file: &[u8]) -> Result<Vec<String>> {
    let elf = ElfFile64::<Endianness>::parse(file)?;
    let Some(section) = elf.section_by_name(".tests") else {
        return Ok(Vec::new());
    };
    // The section may begin with a few bytes that align the table.
    let start = elf.symbol_by_name("tests_start").map_or(section.address(), |symbol| symbol.address());
    let padding = usize::try_from(start - section.address().min(start))?;
    parse(section.data()?.get(padding..).context("the table of tests lies outside its section")?)
}

fn parse(table: &[u8]) -> Result<Vec<String>> {
    let (records, rest) = table.as_chunks::<RECORD>();
    anyhow::ensure!(rest.is_empty(), "the table has {} bytes, which is no number of records", table.len());
    let name = |record: &[u8; RECORD]| {
        let name = record[..NAME].split(|byte| *byte == 0).next().unwrap_or_default();
        Ok(std::str::from_utf8(name).context("a name that is not text")?.to_owned())
    };
    records.iter().map(name).collect()
}

/// How a guest is run.
#[derive(Clone, Debug)]
pub struct Run<'a> {
    /// The one of its tests that is run; `None` for all that it does.
    pub test: Option<&'a str>,
    /// More words on its command line.
    pub more: &'a str,
    /// The hypervisor's own command line, but for the number of vcpus.
    pub options: &'a str,
    /// The model of the CPU, as in [`Setup::cpu`].
    pub cpu: Option<&'a str>,
    /// The machine is ended, as a failure, after this long.
    pub limit: Duration,
}

impl Default for Run<'_> {
    fn default() -> Self {
        Self { test: None, more: "", options: "", cpu: None, limit: Duration::from_secs(30) }
    }
}

/// Boots the guest at `path` alone, as the first domain; answers how the machine ended.
///
/// # Errors
/// Its tests did not pass.
pub fn run(path: &Path, run: &Run<'_>) -> Result<Outcome> {
    let mut name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut words = run.more.to_owned();
    if let Some(test) = run.test {
        name = format!("{name}-{test}");
        words = format!("test={test} {words}");
    }
    let mut setup = Setup::new(Bundle::first(path, None, words.trim_end()).first_memory(64));
    setup.memory = 256;
    // The second is for those that want one: it stays down until it is brought up.
    setup.options = format!("dom0_max_vcpus=2 {}", run.options).trim_end().to_owned();
    setup.limit = run.limit;
    setup.cpu = run.cpu.map(str::to_owned);
    let words_of_it = run.options.split_whitespace().chain(run.more.split_whitespace());
    for more in run.cpu.iter().copied().chain(words_of_it) {
        name = format!("{name}-on-{more}");
    }
    let outcome = Machine::boot(&name, &setup)?.finish()?;
    outcome.require_passed()?;
    Ok(outcome)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_from_the_records() {
        let mut table = vec![0; 2 * RECORD];
        table[..4].copy_from_slice(b"adds");
        table[RECORD..RECORD + NAME].fill(b'x');
        assert_eq!(parse(&table).unwrap(), ["adds".to_owned(), "x".repeat(NAME)]);
        assert!(parse(&[]).unwrap().is_empty());
        assert!(parse(&table[1..]).is_err());
        table[0] = 0xff;
        assert!(parse(&table).is_err());
    }
}
