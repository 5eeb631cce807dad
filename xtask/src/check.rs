//! `cargo xtask check`: format, lints, documentation, and the shape of the project.

use anyhow::{Result, bail};
use std::time::Instant;
use xshell::{Cmd, Shell, cmd};
use xtask::{TARGET, build, sysroot};

/// What a check is called, and the check.
type Step = (&'static str, fn(&Shell) -> Result<()>);

const STEPS: [Step; 6] = [
    ("format", format),
    ("lints on the host", host_lints),
    ("lints on bare metal", bare_lints),
    ("documentation of the host's crates", host_docs),
    ("documentation of the images", bare_docs),
    ("shape", shape),
];

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
    let without = without_images();
    Ok(cmd!(sh, "cargo clippy --quiet --workspace {without...} --all-targets -- -D warnings").quiet().run()?)
}

fn bare_lints(sh: &Shell) -> Result<()> {
    let packages = bare_metal_packages(sh);
    if packages.is_empty() {
        return Ok(());
    }
    Ok(build::bare_metal(cmd!(sh, "cargo clippy --quiet --target {TARGET} {packages...} -- -D warnings")).run()?)
}

/// Builds the documentation, private items included: a link that leads nowhere is an error.
fn host_docs(sh: &Shell) -> Result<()> {
    let without = without_images();
    document(cmd!(sh, "cargo doc --workspace {without...} --config build.{DENIED}"))?;
    // Of a library and a program with one name the first alone is documented.
    document(cmd!(sh, "cargo doc --package xtask --bin xtask --config build.{DENIED}"))
}

fn bare_docs(sh: &Shell) -> Result<()> {
    let packages = bare_metal_packages(sh);
    if packages.is_empty() {
        return Ok(());
    }
    document(build::bare_metal(cmd!(sh, "cargo doc --target {TARGET} {packages...} --config target.{TARGET}.{DENIED}")))
}

/// Joined to what `.cargo` says; RUSTDOCFLAGS would replace that.
const DENIED: &str = "rustdocflags=['-Dwarnings']";

fn document(command: Cmd<'_>) -> Result<()> {
    let command = command.args(["--quiet", "--keep-going", "--no-deps", "--document-private-items"]);
    Ok(command.env_remove("RUSTDOCFLAGS").quiet().run()?)
}

/// Leaves out the images: they are programs without an operating system, and are looked at for their own target only.
fn without_images() -> impl Iterator<Item = &'static str> {
    build::IMAGES.into_iter().flat_map(|name| ["--exclude", name])
}

fn bare_metal_packages(sh: &Shell) -> Vec<&'static str> {
    build::bare_metal_packages(sh).into_iter().flat_map(|name| ["-p", name]).collect()
}

fn shape(sh: &Shell) -> Result<()> {
    let folder = build::images(sh, "release")?;
    let hypervisor = build::bare_metal_packages(sh).contains(&"hypervisor").then(|| folder.join("hypervisor"));
    Ok(cmd!(sh, "cargo run --quiet --package shape -- {hypervisor...}").quiet().run()?)
}
