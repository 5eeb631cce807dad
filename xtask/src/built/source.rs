//! The source of a kernel: fetched from the distribution once, kept in the cache.

use super::series::Patch;
use super::tools::TOOLS;
use crate::{apt, cache};
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;
use tempfile::TempDir;
use xshell::{Shell, cmd};

/// The versions there are patches for, and the suite of the distribution that has the source.
pub(super) const VERSIONS: [(&str, &str); 1] = [("6.12", "trixie")];

/// Bytes that source, objects and kernels take.
const ROOM: u64 = 6 << 30;

/// The source of a kernel in the cache.
#[derive(Clone, Debug)]
pub struct Source {
    /// Its top folder, as the distribution ships it.
    pub tree: PathBuf,
    /// The package it is from, and its version.
    pub package: String,
    pub(super) version: &'static str,
}

impl Source {
    /// The source for a version, if it is in the cache.
    ///
    /// # Errors
    /// No patches are for this version; or the cache is damaged.
    pub fn cached(version: &str) -> Result<Option<Self>> {
        let folder = cache::dir()?.join("kernel-source").join(known(version)?.0);
        Ok(if folder.is_dir() { Some(Self::in_folder(known(version)?.0, &folder)?) } else { None })
    }

    fn in_folder(version: &'static str, folder: &Path) -> Result<Self> {
        let package =
            fs::read_to_string(folder.join("package")).context("the kernel source in the cache is damaged")?;
        Ok(Self { tree: folder.join("tree"), package: package.trim_end().to_owned(), version })
    }

    /// The source for a version, fetched first if need be.
    ///
    /// # Errors
    /// No patches are for this version; or the source cannot be fetched, or finds no room.
    pub fn find(sh: &Shell, version: &str) -> Result<Self> {
        if let Some(source) = Self::cached(version)? {
            return Ok(source);
        }
        let _lock = cache::lock("kernel-source")?;
        if let Some(source) = Self::cached(version)? {
            return Ok(source);
        }
        let (version, suite) = known(version)?;
        let folder = cache::dir()?.join("kernel-source").join(version);
        fetch(sh, version, suite, &folder).with_context(|| format!("cannot fetch the source of Linux {version}"))?;
        Self::in_folder(version, &folder)
    }

    /// Applies patches to copies of the files that they touch, in a new folder.
    ///
    /// # Errors
    /// The patch that does not apply exactly, and the file and the hunk.
    pub fn apply(&self, patches: &[Patch]) -> Result<TempDir> {
        let tools = TOOLS.present()?.unwrap_or_else(|| PathBuf::from("/"));
        let overlay = cache::scratch()?;
        for patch in patches {
            for file in patch.files() {
                let (from, to) = (self.tree.join(file), overlay.path().join(file));
                if from.is_file() && !to.exists() {
                    fs::create_dir_all(to.parent().context("a patch of no file")?)?;
                    fs::copy(&from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
                }
            }
            let mut command = apt::command(&tools, &tools.join("usr/bin/patch"));
            command.args(["-p1", "--fuzz=0", "--batch", "--forward", "--no-backup-if-mismatch", "-r", "-", "-d"]);
            command.arg(overlay.path()).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
            let mut child = command.spawn().context("cannot start patch")?;
            let mut input = child.stdin.take().context("patch has no input")?;
            let text = patch.text.clone();
            let writer = thread::spawn(move || input.write_all(text.as_bytes()));
            let output = child.wait_with_output()?;
            // A patch that ends early does not read all; its status says so.
            let _ = writer.join();
            let said = String::from_utf8_lossy(&output.stdout);
            if !output.status.success() {
                bail!("{} does not apply to {}: {}", patch.name, self.package, refusal(&said));
            }
        }
        Ok(overlay)
    }
}

/// What `patch` says is wrong: the file and the hunk.
fn refusal(said: &str) -> String {
    let mut file = "";
    for line in said.lines() {
        if let Some(name) = line.strip_prefix("patching file ") {
            file = name;
        } else if line.contains("FAILED") {
            return format!("{file}: {}", line.split(" -- ").next().unwrap_or(line).trim_end_matches('.'));
        }
    }
    let last = said.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("patch said nothing");
    if file.is_empty() { last.to_owned() } else { format!("{file}: {last}") }
}

fn known(version: &str) -> Result<(&'static str, &'static str)> {
    VERSIONS.into_iter().find(|(name, _)| *name == version).with_context(|| {
        let names = VERSIONS.map(|(name, _)| name).join(", ");
        format!("there are no patches for Linux {version}; there are for: {names}")
    })
}

/// Fetches and unpacks the source into the folder `folder` of the cache.
fn fetch(sh: &Shell, version: &str, suite: &str, folder: &Path) -> Result<()> {
    room()?;
    let scratch = cache::scratch()?;
    let lists = apt::Lists::update(sh, scratch.path(), &[suite], apt::Installed::Nothing)?;
    let package = format!("linux-source-{version}");
    let record = lists.record(sh, &package)?;
    let name = format!("{package} {}", record.field("Version")?);
    eprintln!("fetching {name} ({} MB, once)", record.size()? / 1_000_000);
    let deb = lists.fetch(sh, &record, scratch.path())?;
    let (root, staging) = (scratch.path().join("root"), scratch.path().join("source"));
    fs::create_dir_all(&root)?;
    fs::create_dir_all(staging.join("tree"))?;
    apt::extract_some(&deb, &root, &["./usr/src/*.tar.xz"])?;
    fs::remove_file(&deb)?;
    let archive = root.join("usr/src").join(format!("{package}.tar.xz"));
    ensure!(archive.is_file(), "{name} holds no {package}.tar.xz");
    eprintln!("unpacking it (1.6 GB)");
    let tree = staging.join("tree");
    let output = cmd!(sh, "tar -xJf {archive} --no-same-owner --strip-components=1 -C {tree}")
        .quiet()
        .ignore_status()
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "cannot unpack {name}: {}", said.lines().next().unwrap_or("tar failed"));
    fs::write(staging.join("package"), name + "\n")?;
    cache::publish(&staging, folder)
}

/// Checks that the cache has room for a kernel's source and objects.
pub(super) fn room() -> Result<()> {
    let dir = cache::dir()?;
    fs::create_dir_all(&dir)?;
    let state = nix::sys::statvfs::statvfs(&dir).with_context(|| format!("cannot look at {}", dir.display()))?;
    let free = state.blocks_available() * state.fragment_size();
    let mib = |bytes: u64| bytes >> 20;
    ensure!(
        free >= ROOM,
        "a kernel build needs {} MiB in {}, and {} MiB are free",
        mib(ROOM),
        dir.display(),
        mib(free)
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::DEFAULT;
    use super::super::series::tests::{PATCH, patch};
    use super::*;

    fn source(folder: &Path) -> Source {
        fs::create_dir_all(folder.join("d")).unwrap();
        fs::write(folder.join("d/x.c"), "one\ntwo\nthree\n").unwrap();
        Source { tree: folder.to_owned(), package: "source 1".into(), version: DEFAULT }
    }

    /// Whether there is a program `patch`. Where it would have to be fetched, `cargo xtask kernel` fetches and uses it.
    fn can_patch() -> bool {
        let tools = TOOLS.present().unwrap().unwrap_or_else(|| PathBuf::from("/"));
        tools.join("usr/bin/patch").is_file()
    }

    #[test]
    fn a_patch_applies_to_copies() {
        if !can_patch() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let source = source(folder.path());
        let overlay = source.apply(&[patch(PATCH)]).unwrap();
        assert_eq!(fs::read_to_string(overlay.path().join("d/x.c")).unwrap(), "one\n2\n2b\nthree\n");
        assert_eq!(fs::read_to_string(folder.path().join("d/x.c")).unwrap(), "one\ntwo\nthree\n");
    }

    #[test]
    fn a_patch_with_another_context_is_refused_by_name_file_and_hunk() {
        if !can_patch() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let source = source(folder.path());
        let refusal = source.apply(&[patch(&PATCH.replace(" three", " 3"))]).unwrap_err().to_string();
        assert_eq!(refusal, "0001-x.patch does not apply to source 1: d/x.c: Hunk #1 FAILED at 1");
        let refusal = source.apply(&[patch(&PATCH.replace("d/x.c", "d/y.c"))]).unwrap_err().to_string();
        assert!(refusal.starts_with("0001-x.patch does not apply to source 1: "), "{refusal}");
    }

    #[test]
    fn an_unknown_version_is_refused() {
        let refusal = Source::cached("2.6").unwrap_err().to_string();
        assert_eq!(refusal, "there are no patches for Linux 2.6; there are for: 6.12");
    }
}
