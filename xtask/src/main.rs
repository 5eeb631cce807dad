//! The project's own tool: `cargo xtask <verb>` builds, runs and checks Tenon.

#![forbid(unsafe_code)]

mod bench;
mod check;
mod doctor;
mod image;
mod kernel;
mod picture;
mod run;
mod selection;
mod soak;
mod terminal;
mod test;

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::process::ExitCode;
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
    /// Boot the hypervisor in an emulated machine, with its console on this terminal
    Run(Box<run::Options>),
    /// Make a bootable image for other machines
    Image(image::Options),
    /// Build a guest kernel with the patches of guest-kernel-patches
    Kernel(kernel::Options),
    /// Check format, lints and the shape of the project
    Check,
    /// Run every test, on the host and in emulated machines
    Test(test::Options),
    /// Run the long forms of the random and hostile tests, and those that are only long; write what they counted
    Soak(soak::Options),
    /// Count the instructions things take, and compare with the bare machine and Xen
    Bench(bench::Options),
    /// Say what this machine has and lacks
    Doctor,
    /// Draw the picture on the README's first page, of the transcript there
    #[command(hide = true)]
    Picture,
    /// Make `core` for the bare-metal target available to plain cargo in this checkout
    #[command(hide = true)]
    Provision {
        /// Fetch QEMU, the default kernel and the initramfs too, and print where they are
        #[arg(long)]
        all: bool,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    act(arguments.verb).unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn act(verb: Verb) -> Result<ExitCode> {
    let sh = Shell::new()?;
    sh.change_dir(root());
    match verb {
        Verb::Build(options) => build::images(&sh, &options.profile).map(drop)?,
        Verb::Run(options) => return run::run(&sh, *options),
        Verb::Image(options) => image::image(&sh, &options)?,
        Verb::Kernel(options) => kernel::kernel(&sh, &options)?,
        Verb::Check => check::check(&sh)?,
        Verb::Test(options) => return test::test(&sh, &options),
        Verb::Soak(options) => return soak::soak(&sh, &options),
        Verb::Bench(options) => return bench::bench(&sh, &options),
        Verb::Doctor => doctor::doctor(&sh)?,
        Verb::Picture => picture::write()?,
        Verb::Provision { all } => provision(&sh, all)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn provision(sh: &Shell, all: bool) -> Result<()> {
    sysroot::ensure_target(sh)?;
    if all {
        println!("{:?}", qemu::Qemu::find(sh, None)?.command());
        let kernel = kernels::stock(sh, kernels::DEFAULT)?;
        println!("{}\n{}", kernel.bzimage.display(), kernel.vmlinux.display());
        println!("{}", kernels::ramdisk(sh)?.display());
    }
    Ok(())
}
