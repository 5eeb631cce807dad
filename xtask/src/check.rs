//! `cargo xtask check`: format, lints, and the shape of the project.

use anyhow::{Result, bail};
use std::time::Instant;
use xshell::{Shell, cmd};
use xtask::{TARGET, build, sysroot};

/// What a check is called, and the check.
type Step = (&'static str, fn(&Shell) -> Result<()>);

const STEPS: [Step; 4] =
    [("format", format), ("lints on the host", host_lints), ("lints on bare metal", bare_lints), ("shape", shape)];

/// Runs every check, also after one has failed.
pub(crate) fn check(sh: &Shell) -> Result<()> {
    let start = Instant::now();
    sysroot::ensure_target(sh)?;
    let mut failed = Vec::new();
    for (name, step) in STEPS {
        eprintln!("== {name}");
        if let Err(error) = step(sh) {
            eprintln!("error: {error:#}");
            failed.push(name);
        }
    }
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    eprintln!("check passed in {} s", start.elapsed().as_secs());
    Ok(())
}

fn format(sh: &Shell) -> Result<()> {
    if cmd!(sh, "cargo fmt --all -- --check -l").quiet().run().is_err() {
        bail!("the files named above are not formatted: run `cargo fmt --all`");
    }
    Ok(())
}

fn host_lints(sh: &Shell) -> Result<()> {
    // The images are programs without an operating system: they are looked at for their own target only.
    let without = build::IMAGES.into_iter().flat_map(|name| ["--exclude", name]);
    Ok(cmd!(sh, "cargo clippy --quiet --workspace {without...} --all-targets -- -D warnings").quiet().run()?)
}

fn bare_lints(sh: &Shell) -> Result<()> {
    let packages: Vec<&str> = build::bare_metal_packages(sh).into_iter().flat_map(|name| ["-p", name]).collect();
    if packages.is_empty() {
        return Ok(());
    }
    Ok(build::bare_metal(cmd!(sh, "cargo clippy --quiet --target {TARGET} {packages...} -- -D warnings")).run()?)
}

fn shape(sh: &Shell) -> Result<()> {
    let folder = build::images(sh, "release")?;
    let hypervisor = build::bare_metal_packages(sh).contains(&"hypervisor").then(|| folder.join("hypervisor"));
    Ok(cmd!(sh, "cargo run --quiet --package shape -- {hypervisor...}").quiet().run()?)
}
