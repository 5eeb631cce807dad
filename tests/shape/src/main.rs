//! The shape of the project, checked: `shape [HYPERVISOR]`, run in the top folder of the checkout.
//!
//! It looks at eight things: which crate depends on which, where `unsafe` stands and why, how wide comments are, how many lines
//! run in ring 0, which of its files know each other in a circle, whether PROMISES.md names what exists, whether citations lead
//! somewhere, and (given the release hypervisor's ELF file) which functions of ring 0 can panic.

#![forbid(unsafe_code)]

mod arrows;
mod circles;
mod citations;
mod lines;
mod panics;
mod promises;
mod source;
mod unsafety;
mod widths;

use anyhow::Result;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

fn main() -> ExitCode {
    let hypervisor = std::env::args_os().nth(1).map(PathBuf::from);
    match violations(Path::new("."), hypervisor.as_deref()) {
        Ok(found) if found.is_empty() => ExitCode::SUCCESS,
        Ok(found) => {
            for line in &found {
                eprintln!("shape: {line}");
            }
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("shape: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Everything that is wrong, one line each.
fn violations(root: &Path, hypervisor: Option<&Path>) -> Result<Vec<String>> {
    let crates = source::crates(root)?;
    let mut found = arrows::check(&crates);
    found.extend(unsafety::check(&crates));
    found.extend(widths::check(&crates));
    found.extend(lines::check(root)?);
    found.extend(circles::check(root)?);
    found.extend(promises::check(root)?);
    found.extend(citations::check(root)?);
    match hypervisor {
        Some(elf) => found.extend(panics::check(elf, &root.join("tests/shape/panics.txt"))?),
        None => println!("panics of ring 0: not looked at, no hypervisor given"),
    }
    Ok(found)
}
