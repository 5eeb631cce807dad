//! Disks for guests on a machine without room or without a network: the user is told in a line, and nothing is left behind.

use crate::run::{xtask_by, xtask_with};
use anyhow::{Result, ensure};
use std::fs;
use std::path::Path;
use std::process::Command;
use xtask::debian::User;

/// Settings of apt with which no server is reached, in place of the machine's own.
const NOWHERE: &str = "Dir::Etc::Main \"/dev/null\";\nDir::Etc::Parts \"/dev/null/\";\nAcquire::Retries \"0\";\n\
                       Acquire::http::Proxy \"http://127.0.0.1:9\";\nAcquire::https::Proxy \"http://127.0.0.1:9\";\n";

/// Mounts a small file system on the folder `$1`, starts what follows there, and prints what is left in the folder.
const SMALL: &str = "mount -t tmpfs -o size=16m none \"$1\"; folder=$1; shift; status=0; \"$@\" || status=$?; \
                     ls -A \"$folder\"; exit $status";

/// An error unless `xtask` was refused in one line that says why.
fn require_refusal((status, out, err): &(i32, String, String), why: &[&str]) -> Result<()> {
    ensure!(*status == 1 && out.is_empty(), "not refused, or something is left: {status}\n{out}\n{err}");
    let errors: Vec<&str> = err.lines().filter(|line| line.starts_with("error: ")).collect();
    let told = errors.len() == 1 && why.iter().all(|why| errors[0].contains(why));
    let others = err.lines().filter(|line| ["E: ", "W: "].iter().any(|mark| line.starts_with(mark))).count();
    ensure!(told && others == 0, "not one line with {why:?}:\n{err}");
    Ok(())
}

/// With an empty cache and an archive that is out of reach, the first address that could not be reached is named.
pub(crate) fn a_machine_without_a_network_is_told() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let [config, cache, output] = ["apt.conf", "cache", "debian.img"].map(|name| folder.path().join(name));
    fs::write(&config, NOWHERE)?;
    let said = xtask_with(
        &["image", "debian", "--output", &output.to_string_lossy()],
        &[("APT_CONFIG", &config), ("XDG_CACHE_HOME", &cache)],
    )?;
    // An installed mmdebstrap asks the archive itself.
    let installed = Path::new("/usr/bin/mmdebstrap").is_file();
    let why = if installed { "mmdebstrap cannot install" } else { "cannot fetch the package indexes: " };
    require_refusal(&said, &[why, "127.0.0.1"][..if installed { 1 } else { 2 }])?;
    let left: Vec<_> = fs::read_dir(cache.join("tenon"))?.flatten().map(|entry| entry.file_name()).collect();
    ensure!(left.iter().all(|name| name.to_string_lossy().ends_with(".lock")), "something was left behind: {left:?}");
    ensure!(!output.exists() && !output.with_extension("toml").exists(), "a disk was made of nothing");
    Ok(())
}

/// A disk is made where there is no room for it.
pub(crate) fn a_full_disk_is_told() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut command = Command::new("unshare");
    if User::find()? == User::Namespace {
        command.args(["--map-root-user", "--map-auto"]);
    }
    command.args(["--mount", "--", "sh", "-euc", SMALL, "sh"]).arg(folder.path());
    let output = folder.path().join("debian.img");
    let said = xtask_by(&mut command, &["image", "debian", "--output", &output.to_string_lossy()])?;
    require_refusal(&said, &["cannot make ", "debian.img: ", "No space left on device"])
}
