//! The project's own tool: `cargo xtask <verb>` builds, runs and checks Tenon.

#![forbid(unsafe_code)]

mod apt;
mod build;
mod cache;
mod sysroot;

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::path::Path;
use xshell::Shell;

/// The bare-metal target of every image.
pub(crate) const TARGET: &str = "x86_64-unknown-none";

/// Builds, runs and checks Tenon.
#[derive(Parser)]
#[command(name = "cargo xtask", disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Build the bare-metal images: hypervisor, dom0 and the test guests
    Build(build::Options),
    /// Say what this machine has and lacks
    Doctor,
    /// Make `core` for the bare-metal target available to plain cargo in this checkout
    #[command(hide = true)]
    Provision,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let sh = Shell::new()?;
    sh.change_dir(root());
    match arguments.verb {
        Verb::Build(options) => build::images(&sh, &options.profile).map(drop),
        Verb::Doctor => {
            println!("{}", sysroot::state(&sh)?);
            Ok(())
        }
        Verb::Provision => sysroot::ensure_target(&sh),
    }
}

/// The top folder of the checkout.
pub(crate) fn root() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here)
}
