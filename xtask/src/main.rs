//! The project's own tool: `cargo xtask <verb>` builds, runs and checks Tenon.

#![forbid(unsafe_code)]

use anyhow::Result;
use clap::{Parser, Subcommand};
use xshell::Shell;
use xtask::{build, kernels, qemu, root, sysroot};

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
    Provision {
        /// Fetch QEMU, the kernels and the initramfs too, and print where they are
        #[arg(long)]
        all: bool,
    },
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let sh = Shell::new()?;
    sh.change_dir(root());
    match arguments.verb {
        Verb::Build(options) => build::images(&sh, &options.profile).map(drop),
        Verb::Doctor => doctor(&sh),
        Verb::Provision { all } => provision(&sh, all),
    }
}

fn provision(sh: &Shell, all: bool) -> Result<()> {
    sysroot::ensure_target(sh)?;
    if all {
        println!("{:?}", qemu::Qemu::find(sh, None)?.command());
        for name in kernels::names() {
            let kernel = kernels::stock(sh, name)?;
            println!("{}\n{}", kernel.bzimage.display(), kernel.vmlinux.display());
        }
        println!("{}", kernels::ramdisk(sh)?.display());
    }
    Ok(())
}

fn doctor(sh: &Shell) -> Result<()> {
    println!("target   {}", sysroot::state(sh)?);
    println!("emulator {}", qemu::Qemu::state()?);
    for name in kernels::names() {
        let state = if kernels::is_cached(name)? {
            "in the cache"
        } else {
            "would be fetched from the distribution"
        };
        println!("kernel   stock {name}: {state}");
    }
    Ok(())
}
