//! `cargo xtask check`: format, lints, and the shape of the project.

use anyhow::{Context, Result};
use std::time::Instant;
use xshell::{Shell, cmd};
use xtask::{TARGET, build, sysroot};

/// Runs every check; the first kind that fails ends it.
pub(crate) fn check(sh: &Shell) -> Result<()> {
    let start = Instant::now();
    step("format");
    cmd!(sh, "cargo fmt --all -- --check -l")
        .quiet()
        .run()
        .context("the files named above are not formatted: run `cargo fmt --all`")?;

    step("lints on the host");
    // The images are programs without an operating system: they are looked at for their own target only.
    let without = build::IMAGES.into_iter().flat_map(|name| ["--exclude", name]);
    cmd!(
        sh,
        "cargo clippy --quiet --workspace {without...} --all-targets -- -D warnings"
    )
    .quiet()
    .run()?;

    sysroot::ensure_target(sh)?;
    let images = build::bare_metal_packages(sh);
    if !images.is_empty() {
        step("lints on bare metal");
        let packages = images.iter().flat_map(|name| ["-p", name]);
        build::bare_metal(cmd!(
            sh,
            "cargo clippy --quiet --target {TARGET} {packages...} -- -D warnings"
        ))
        .run()?;
    }

    step("shape");
    let folder = build::images(sh, "release")?;
    let hypervisor = images.contains(&"hypervisor").then(|| folder.join("hypervisor"));
    cmd!(sh, "cargo run --quiet --package shape -- {hypervisor...}")
        .quiet()
        .run()?;
    eprintln!("check passed in {} s", start.elapsed().as_secs());
    Ok(())
}

fn step(what: &str) {
    eprintln!("== {what}");
}
