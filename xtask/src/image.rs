//! `cargo xtask image`: what boots without this tool.

use crate::selection::Selection;
use anyhow::{Result, bail, ensure};
use std::path::PathBuf;
use xshell::Shell;
use xtask::build;
use xtask::debian::{Image, Recipe};
use xtask::grub::{Menu, Tools};
use xtask::mebibytes;

/// Which image.
#[derive(clap::Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    form: Form,
}

#[derive(clap::Subcommand)]
#[command(subcommand_value_name = "FORM", subcommand_help_heading = "Forms", disable_help_subcommand = true)]
enum Form {
    /// A file for a CD or a stick, booted by GRUB on BIOS and UEFI machines: the hypervisor, dom0 and the guests
    Iso(Box<Iso>),
    /// A disk with Debian, and beside it the file that describes its guest, for `cargo xtask run`
    Debian(Debian),
    #[command(external_subcommand)]
    Other(Vec<String>),
}

#[derive(clap::Args)]
struct Iso {
    #[command(flatten)]
    guests: Selection,
    /// Where the image is written [default: tenon.iso in Cargo's target folder]
    #[arg(short, long, value_name = "PATH")]
    output: Option<PathBuf>,
    /// Memory of the machine it is for, in MiB or with a suffix: the guests must fit
    #[arg(long, value_name = "SIZE", default_value = "1024", value_parser = |text: &str| mebibytes(text, 64))]
    machine_memory: u32,
    /// Cargo profile of the images: `release` or `checked`
    #[arg(long, default_value = "release")]
    profile: String,
    /// The hypervisor's own options, after `--`
    #[arg(last = true)]
    hypervisor: Vec<String>,
}

#[derive(clap::Args)]
struct Debian {
    #[command(flatten)]
    recipe: Recipe,
    /// Where the disk is written [default: debian.img in Cargo's target folder, which `run --guest debian` starts]
    #[arg(short, long, value_name = "PATH")]
    output: Option<PathBuf>,
}

/// Makes a disk with Debian and prints where its guest is described.
fn debian(sh: &Shell, options: &Debian) -> Result<()> {
    let image = match &options.output {
        Some(output) => Image::at(output)?,
        None => Image::usual(sh)?,
    };
    image.make(sh, &options.recipe)?;
    println!("{}\n{}", image.disk.display(), image.guest.display());
    eprintln!("start it: cargo xtask run {} --forward 2222:debian:22", image.guest.display());
    Ok(())
}

/// Makes the image and prints where it is.
pub(crate) fn image(sh: &Shell, options: &Options) -> Result<()> {
    let iso = match &options.form {
        Form::Iso(iso) => iso,
        Form::Debian(options) => return debian(sh, options),
        Form::Other(words) => {
            bail!("no form {:?} of image; there are: iso, debian", words.first().map_or("", |word| word))
        }
    };
    // What the user named is looked at before anything is built or fetched for it.
    let described = iso.guests.check(sh, iso.machine_memory)?;
    if let Some(disk) = described.iter().flat_map(|guest| &guest.disks).next() {
        bail!(
            "{}: {} stays on this machine: in an image, a disk is `serial:NUMBER` of the machine that boots it, \
             `bundle:FILE` or `memory:SIZE`",
            disk.at,
            disk.disk.file().display()
        );
    }
    let menu = Menu::new(&iso.hypervisor)?;
    let output = match &iso.output {
        Some(output) => output.clone(),
        None => build::target_dir(sh)?.join("tenon.iso"),
    };
    let folder = output.parent().filter(|folder| !folder.as_os_str().is_empty());
    ensure!(folder.is_none_or(|folder| folder.is_dir() || iso.output.is_none()), "no folder for {}", output.display());
    ensure!(!output.is_dir(), "{} is a folder", output.display());
    let tools = Tools::find(sh)?;
    let images = build::images(sh, &iso.profile)?;
    // A firmware reads slowly, and dom0 unpacks quickly.
    let bundle =
        iso.guests.bundle(sh, &described, &build::image(&images, "dom0")?, None, |stock| stock.bzimage)?.write()?;
    tools.iso(&build::image(&images, "hypervisor")?, bundle.path(), &menu, &output)?;
    let size = std::fs::metadata(&output)?.len() / 1_000_000;
    println!("{} ({size} MB)", output.display());
    eprintln!("boot it here: cargo xtask run --iso {} [--firmware uefi]", output.display());
    Ok(())
}
