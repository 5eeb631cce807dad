//! Building the bare-metal images.

use crate::{TARGET, sysroot};
use anyhow::{Context, Result, ensure};
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use xshell::{Shell, cmd};

/// The packages that are images rather than libraries.
pub const IMAGES: [&str; 4] = ["hypervisor", "dom0", "guests", "microbench"];

/// What to build.
#[derive(clap::Args)]
pub struct Options {
    /// Cargo profile: `release`, or `checked` (release with assertions, what the system tests boot)
    #[arg(long, default_value = "release")]
    pub profile: String,
}

/// Builds every image with `profile` and returns the folder they lie in.
///
/// # Errors
/// No `core` for the target, or a failed build.
pub fn images(sh: &Shell, profile: &str) -> Result<PathBuf> {
    sysroot::ensure_target(sh)?;
    let packages: Vec<&str> = bare_metal_packages(sh).into_iter().flat_map(|name| ["-p", name]).collect();
    if packages.is_empty() {
        eprintln!("no image to build yet");
    } else {
        bare_metal(cmd!(sh, "cargo build --profile {profile} --target {TARGET} {packages...}")).run()?;
    }
    Ok(target_dir(sh)?.join(TARGET).join(profile))
}

/// The file of one image in the folder that [`images`] returned.
///
/// # Errors
/// It has not been built.
pub fn image(folder: &Path, name: &str) -> Result<PathBuf> {
    let file = folder.join(name);
    ensure!(file.is_file(), "there is no {}: `cargo xtask build` makes it", file.display());
    Ok(file)
}

/// Cargo for the bare-metal target: RUSTFLAGS in the environment would replace the flags of `.cargo/config.toml`.
pub fn bare_metal(command: xshell::Cmd<'_>) -> xshell::Cmd<'_> {
    command.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS").quiet()
}

/// Cargo's target folder, wherever the environment or a configuration puts it.
///
/// # Errors
/// Cargo does not say.
pub fn target_dir(sh: &Shell) -> Result<PathBuf> {
    if let Some(dir) = env::var_os("CARGO_TARGET_DIR") {
        return Ok(sh.current_dir().join(dir));
    }
    let metadata = cmd!(sh, "cargo metadata --no-deps --format-version 1 --offline").quiet().read()?;
    let (_, rest) = metadata.split_once("\"target_directory\":\"").context("cargo metadata has no target_directory")?;
    let (path, _) = rest.split_once('"').context("cargo metadata has no target_directory")?;
    Ok(path.into())
}

/// Those of the [`IMAGES`] that can be built for the bare-metal target.
#[must_use]
pub fn bare_metal_packages(sh: &Shell) -> Vec<&'static str> {
    IMAGES.into_iter().filter(|name| is_bare_metal(sh, name)).collect()
}

/// The names of the test guests: the programs in `tests/guests/src/bin`.
///
/// # Errors
/// The folder cannot be read.
pub fn test_guests(sh: &Shell) -> Result<Vec<String>> {
    let folder = sh.current_dir().join("tests/guests/src/bin");
    let entries = fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
    // A program is a file, or a folder with a `main.rs`; other folders hold the modules of the file beside them.
    let program = |path: &PathBuf| path.extension().is_some_and(|e| e == "rs") || path.join("main.rs").is_file();
    let programs = entries.flatten().map(|entry| entry.path()).filter(program);
    let mut names: Vec<String> = programs.filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned())).collect();
    names.sort();
    Ok(names)
}

/// Whether an image's package has become a bare-metal program (a placeholder for the host cannot be built).
fn is_bare_metal(sh: &Shell, name: &str) -> bool {
    let folder = match name {
        "guests" => "tests/guests",
        "microbench" => "tests/bench",
        name => name,
    };
    let folder = sh.current_dir().join(folder);
    let bins = fs::read_dir(folder.join("src/bin")).into_iter().flatten().flatten().map(|entry| entry.path());
    bins.chain([folder.join("src/main.rs")])
        .any(|file| fs::read_to_string(file).is_ok_and(|text| text.contains("no_std")))
}
