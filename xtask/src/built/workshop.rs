//! The folder where kernels are built: a source tree that patches are applied to, and the objects of each configuration.

use super::Config;
use super::source::Source;
use super::tools::command;
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use xshell::{Shell, cmd};

/// How often the progress of a build is told.
const PROGRESS: Duration = Duration::from_secs(20);
/// Lines of the log that are shown when a build fails.
const SHOWN: usize = 20;

/// A folder with a source tree that patches are applied to, and objects.
pub(super) struct Workshop {
    pub(super) folder: PathBuf,
    /// The tools lie below this folder.
    pub(super) tools: PathBuf,
    /// What kernels are built with. Each configuration has objects of its own, so that another one does not replace them.
    pub(super) config: Config,
}

impl Workshop {
    fn tree(&self) -> PathBuf {
        self.folder.join("tree")
    }

    fn objects(&self) -> PathBuf {
        self.folder.join(format!("objects-{}", self.config.name()))
    }

    /// The kernel that was built.
    pub(super) fn bzimage(&self) -> PathBuf {
        self.objects().join("arch/x86/boot/bzImage")
    }

    /// Makes the tree that of `source` with the files of `overlay`. Files whose content stays are not touched, and nor are
    /// their objects.
    pub(super) fn lay_out(&self, sh: &Shell, source: &Source, overlay: &TempDir) -> Result<()> {
        let (tree, of, list) = (self.tree(), self.folder.join("package"), self.folder.join("files"));
        if fs::read_to_string(&of).ok().as_deref() != Some(&source.package) {
            if self.folder.exists() {
                fs::remove_dir_all(&self.folder)?;
            }
            fs::create_dir_all(&self.folder)?;
            // Links: a file is replaced, never written to.
            let from = &source.tree;
            cmd!(sh, "cp -al {from} {tree}").quiet().run().context("cannot copy the kernel source")?;
            fs::write(&of, &source.package)?;
        }
        let before = fs::read_to_string(&list).unwrap_or_default();
        let mut now = Vec::new();
        files_below(overlay.path(), overlay.path(), &mut now)?;
        // Before anything changes: a stop in the middle must not lose a file.
        let all: BTreeSet<&str> = before.lines().chain(now.iter().map(String::as_str)).collect();
        fs::write(&list, all.iter().map(|file| format!("{file}\n")).collect::<String>())?;
        for file in &all {
            let (target, patched) = (tree.join(file), overlay.path().join(file));
            let original = source.tree.join(file);
            // A file that a patch removes is in the source and was not copied back.
            let content = if patched.is_file() { Some(patched) } else { original.is_file().then_some(original) };
            let content = content.map(fs::read).transpose()?;
            if content == fs::read(&target).ok() {
                continue;
            }
            if target.exists() {
                fs::remove_file(&target)?;
            }
            if let Some(content) = content {
                fs::create_dir_all(target.parent().context("a file without a folder")?)?;
                fs::write(&target, content)?;
            }
        }
        Ok(())
    }

    /// `make` in the tree, with the tools.
    fn make_command(&self) -> Command {
        let mut command = command(&self.tools);
        // Nothing in the kernel tells who built it and when.
        command.env("KBUILD_BUILD_TIMESTAMP", "@0").env("KBUILD_BUILD_USER", "tenon").env("KBUILD_BUILD_HOST", "tenon");
        let mut objects = OsString::from("O=");
        objects.push(self.objects());
        command.arg("-C").arg(self.tree()).arg(objects).stdin(Stdio::null());
        command
    }

    /// Configures the build: nothing but `wanted`, which is the content of the file `config`, and what that needs.
    pub(super) fn configure(&self, config: &Path, wanted: &str) -> Result<()> {
        let mut command = self.make_command();
        fs::create_dir_all(self.objects())?;
        command.env("KCONFIG_ALLCONFIG", config).args(["-s", "allnoconfig"]);
        let output = command.output().context("cannot start make")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "the kernel cannot be configured: {}", super::last_line(&said));
        let got = fs::read_to_string(self.objects().join(".config"))?;
        match missing(wanted, &got) {
            None => Ok(()),
            Some((at, line)) => bail!("{}:{at}: the kernel's configuration does not take {line}", config.display()),
        }
    }

    /// Builds, and tells how far the build is.
    pub(super) fn make(&self, what: &str) -> Result<()> {
        let jobs = thread::available_parallelism().map_or(1, usize::from);
        let log = self.folder.join("log");
        let mut file = File::create(&log)?;
        let mut command = self.make_command();
        command.arg(format!("-j{jobs}")).arg("bzImage").stdout(Stdio::piped()).stderr(file.try_clone()?);
        let start = Instant::now();
        let minutes = self.config.minutes();
        eprintln!("building {what} on {jobs} CPUs ({minutes} minutes from nothing on two that are idle)");
        let mut child = command.spawn().context("cannot start make")?;
        let (mut files, mut told) = (0, start);
        for line in BufReader::new(child.stdout.take().context("make has no output")?).lines() {
            let line = line?;
            writeln!(file, "{line}")?;
            let step = line.trim_start();
            files += usize::from(["CC ", "AS "].iter().any(|word| step.starts_with(word)));
            if told.elapsed() >= PROGRESS {
                told = Instant::now();
                eprintln!("  {files} files compiled, {} s", start.elapsed().as_secs());
            }
        }
        if child.wait()?.success() {
            eprintln!("  {files} files compiled, {} s: done", start.elapsed().as_secs());
            return Ok(());
        }
        let said = fs::read_to_string(&log).unwrap_or_default();
        let lines: Vec<&str> = said.lines().collect();
        eprintln!("{}", lines[lines.len().saturating_sub(SHOWN)..].join("\n"));
        bail!("the build of {what} failed; its log is {}", log.display())
    }
}

/// The first line of a configuration that is wanted and not in the configuration `got`, with its number.
fn missing<'a>(wanted: &'a str, got: &str) -> Option<(usize, &'a str)> {
    let got: BTreeSet<&str> = got.lines().collect();
    let lines = (1..).zip(wanted.lines()).filter(|(_, line)| line.starts_with("CONFIG_"));
    lines.into_iter().find(|(_, line)| !got.contains(line))
}

/// Adds the names of all files below `folder`, seen from `top`.
fn files_below(top: &Path, folder: &Path, files: &mut Vec<String>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            files_below(top, &path, files)?;
        } else {
            let name = path.strip_prefix(top)?.to_str().context("a file's name is no text")?;
            files.push(name.to_owned());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_configuration_does_not_take_is_named() {
        let wanted = "# a comment\nCONFIG_A=y\nCONFIG_B=4\n";
        assert_eq!(missing(wanted, "CONFIG_A=y\nCONFIG_B=4\nCONFIG_C=y\n"), None);
        assert_eq!(missing(wanted, "CONFIG_A=y\n# CONFIG_B is not set\n"), Some((3, "CONFIG_B=4")));
    }
}
