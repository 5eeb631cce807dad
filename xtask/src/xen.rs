//! Debian's Xen, for tests and benchmarks to compare with: fetched once, kept in the cache, never installed.

use crate::{apt, cache, kernels};
use anyhow::{Context, Result};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use xshell::Shell;

/// The package with the hypervisor, and the suite that has it.
const PACKAGE: (&str, &str) = ("xen-hypervisor-4.17-amd64", "bookworm");

/// A hypervisor in the cache.
#[derive(Clone, Debug)]
pub struct Xen {
    /// The image, unpacked.
    pub image: PathBuf,
    /// The package it is from, and its version.
    pub version: String,
}

/// The hypervisor, fetched first if need be.
///
/// # Errors
/// No way to fetch it.
pub fn hypervisor(sh: &Shell) -> Result<Xen> {
    let folder = folder()?;
    if !folder.is_dir() {
        let _lock = cache::lock("xen")?;
        if !folder.is_dir() {
            fetch(sh, &folder).context("cannot fetch Xen to compare with")?;
        }
    }
    unpacked(&folder)
}

fn folder() -> Result<PathBuf> {
    Ok(cache::dir()?.join("xen").join(PACKAGE.0))
}

fn unpacked(folder: &Path) -> Result<Xen> {
    let version = fs::read_to_string(folder.join("version")).context("the Xen in the cache is damaged")?;
    Ok(Xen { image: folder.join("xen"), version: version.trim_end().to_owned() })
}

fn fetch(sh: &Shell, folder: &Path) -> Result<()> {
    let (package, suite) = PACKAGE;
    let scratch = cache::scratch()?;
    let lists = apt::Lists::update(sh, scratch.path(), &[suite], apt::Installed::Nothing)?;
    let record = lists.record(sh, package)?;
    let version = record.field("Version")?;
    eprintln!("fetching {package} {version} to compare with ({} MB, once)", record.size()?.div_ceil(1_000_000));
    let deb = lists.fetch(sh, &record, scratch.path())?;
    let (root, staging) = (scratch.path().join("root"), scratch.path().join("xen"));
    fs::create_dir_all(&root)?;
    fs::create_dir_all(&staging)?;
    apt::extract_some(&deb, &root, &["./boot/xen-*.gz"])?;
    let packed = kernels::find(&root, "xen-").with_context(|| format!("{package} holds no hypervisor"))?;
    let status = Command::new("gzip").arg("-dc").arg(&packed).stdout(File::create(staging.join("xen"))?).status()?;
    anyhow::ensure!(status.success(), "the hypervisor in {package} cannot be unpacked");
    sh.write_file(staging.join("version"), format!("{package} {version}\n"))?;
    cache::publish(&staging, folder)
}
