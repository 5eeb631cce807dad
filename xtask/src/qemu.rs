//! Finding QEMU, or fetching it from the distribution without installing it.

use crate::{apt, cache};
use anyhow::{Context, Result, bail, ensure};
use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use xshell::Shell;

/// The oldest major version that runs guests rightly: before 8, TCG gives `int n` a wrong error code in long mode.
const OLDEST: u32 = 8;
const PROGRAM: &str = "qemu-system-x86_64";
/// Where a machine without a suitable QEMU takes it from: release, suite that carries QEMU 10.
const SUITES: &[(&str, &str)] = &[("bookworm", "bookworm-backports"), ("trixie", "trixie")];

/// A QEMU that can be started.
#[derive(Clone, Debug)]
pub struct Qemu {
    program: PathBuf,
    /// The root of an unpacked, not installed QEMU: its libraries and firmware lie below.
    unpacked: Option<PathBuf>,
}

impl Qemu {
    /// The QEMU to use: `given`, else `TENON_QEMU`, else one on `PATH`, else one fetched into the cache.
    ///
    /// # Errors
    /// A named QEMU that does not start or is too old; no QEMU at all and no way to fetch one.
    pub fn find(sh: &Shell, given: Option<&Path>) -> Result<Self> {
        let named = given.map(|path| (path.to_owned(), "--qemu"));
        let named = named.or_else(|| Some((env::var_os("TENON_QEMU")?.into(), "TENON_QEMU")));
        if let Some((program, whence)) = named {
            let qemu = Self { program, unpacked: None };
            let version = qemu.version().with_context(|| format!("{whence} names no QEMU that starts"))?;
            ensure!(version.0 >= OLDEST, "{whence} names QEMU {}, and {OLDEST} is the oldest that works", version.1);
            return Ok(qemu);
        }
        let installed = Self { program: PROGRAM.into(), unpacked: None };
        if installed.version().is_ok_and(|(major, _)| major >= OLDEST) {
            return Ok(installed);
        }
        if let Some(cached) = Self::cached()? {
            return Ok(cached);
        }
        let _lock = cache::lock("qemu")?;
        if let Some(cached) = Self::cached()? {
            return Ok(cached);
        }
        fetch(sh, &installed).with_context(|| {
            format!("no {PROGRAM} of version {OLDEST} or newer: install one, or name one with --qemu or TENON_QEMU")
        })
    }

    /// For `doctor`: whether there is a QEMU, and which.
    ///
    /// # Errors
    /// No cache folder can be named.
    pub fn state() -> Result<(bool, String)> {
        let installed = Self { program: PROGRAM.into(), unpacked: None };
        Ok(match (installed.version(), Self::cached()?) {
            (Ok((major, version)), _) if major >= OLDEST => (true, format!("QEMU {version} on PATH")),
            (_, Some(cached)) => (true, format!("QEMU {} in {}", cached.version()?.1, cached.program.display())),
            (Ok((_, version)), None) => {
                (false, format!("QEMU {version} on PATH is older than {OLDEST}: one would be fetched (15 MB)"))
            }
            (Err(_), None) => (false, format!("no {PROGRAM} on PATH: one would be fetched (15 MB)")),
        })
    }

    /// A command that starts this QEMU with its firmware, without a machine yet.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        if let Some(root) = &self.unpacked {
            let lib = |path: &str| root.join(path).into_os_string();
            let libraries = [lib("usr/lib/x86_64-linux-gnu"), lib("lib/x86_64-linux-gnu")];
            command.env("LD_LIBRARY_PATH", libraries.join(OsStr::new(":")));
            command.env("QEMU_MODULE_DIR", root.join("usr/lib/x86_64-linux-gnu/qemu"));
            for firmware in ["usr/share/qemu", "usr/share/seabios"] {
                command.arg("-L").arg(root.join(firmware));
            }
        }
        command
    }

    /// Its version, as it says itself.
    ///
    /// # Errors
    /// It does not start.
    pub fn version_text(&self) -> Result<String> {
        Ok(self.version()?.1)
    }

    /// The CPU models it has, as `-cpu` takes them.
    ///
    /// # Errors
    /// It does not start.
    pub fn cpu_models(&self) -> Result<Vec<String>> {
        let name = self.program.display();
        let output = self.command().args(["-cpu", "help"]).output().with_context(|| format!("cannot start {name}"))?;
        Ok(models(&String::from_utf8_lossy(&output.stdout)))
    }

    /// Major version and the whole version text.
    fn version(&self) -> Result<(u32, String)> {
        let name = self.program.display();
        let output = self.command().arg("--version").output().with_context(|| format!("cannot start {name}"))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = text.lines().next().and_then(|line| line.strip_prefix("QEMU emulator version "));
        let version = version.with_context(|| format!("{name} does not answer like QEMU"))?;
        let number = version.split(' ').next().unwrap_or(version).to_owned();
        let major = number.split('.').next().and_then(|major| major.parse().ok());
        Ok((major.with_context(|| format!("{name} has the version {number}"))?, number))
    }

    /// A QEMU fetched earlier.
    fn cached() -> Result<Option<Self>> {
        let folders = fs::read_dir(cache::dir()?.join("qemu")).into_iter().flatten().flatten();
        let mut found: Vec<_> = folders.map(|entry| Self::unpacked(entry.path())).collect();
        found.retain(|qemu| qemu.program.is_file());
        found.sort_by(|a, b| a.program.cmp(&b.program));
        Ok(found.into_iter().rev().find(|qemu| qemu.version().is_ok_and(|(major, _)| major >= OLDEST)))
    }

    /// The QEMU at `program`, which nobody has tried.
    #[cfg(test)]
    pub(crate) fn at(program: PathBuf) -> Self {
        Self { program, unpacked: None }
    }

    fn unpacked(root: PathBuf) -> Self {
        Self { program: root.join("usr/bin").join(PROGRAM), unpacked: Some(root) }
    }
}

/// Fetches QEMU and those of its libraries that this machine lacks, and unpacks them side by side in the cache.
fn fetch(sh: &Shell, installed: &Qemu) -> Result<Qemu> {
    let os = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let codename = os.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME=")).unwrap_or("unknown");
    let Some((release, suite)) = SUITES.iter().find(|(release, _)| *release == codename) else {
        bail!("fetching QEMU is known for Debian 12 and 13 only, and this machine runs {codename}");
    };
    let why = match installed.version() {
        Ok((_, version)) => format!("version {version} on PATH is older than {OLDEST}"),
        Err(_) => "there is none on PATH".to_owned(),
    };
    let scratch = cache::scratch()?;
    let suites = if release == suite { vec![*release] } else { vec![*release, *suite] };
    let lists = apt::Lists::update(sh, scratch.path(), &suites, apt::Installed::Host)?;
    let packages = lists.missing(sh, "qemu-system-x86", suite)?;
    let size = packages.iter().map(apt::Record::size).sum::<Result<u64>>()? / 1_000_000;
    let main = packages.iter().find(|record| record.field("Package").is_ok_and(|name| name == "qemu-system-x86"));
    let version = main.context("apt's plan for QEMU lacks QEMU itself")?.field("Version")?.replace(':', "-");
    eprintln!(
        "fetching QEMU {version} from {suite}, because {why}: {} packages, {size} MB (once, not installed)",
        packages.len()
    );
    let root = scratch.path().join("root");
    for package in &packages {
        let name = package.field("Package")?;
        ensure!(name != "libc6", "QEMU from {suite} needs a newer C library: update this machine first");
        let deb = lists.fetch(sh, package, scratch.path())?;
        apt::extract(sh, &deb, &root)?;
    }
    let target = cache::dir()?.join("qemu").join(version);
    cache::publish(&root, &target)?;
    let qemu = Qemu::unpacked(target);
    qemu.version().context("the fetched QEMU does not start")?;
    Ok(qemu)
}

/// The models in what `-cpu help` prints: one to a line, behind `x86` in older versions. Lines of features follow.
fn models(help: &str) -> Vec<String> {
    let model = |line: &str| {
        let mut words = line.split_whitespace();
        Some(words.next().filter(|word| *word != "x86").or_else(|| words.next())?.to_owned())
    };
    help.lines().filter_map(model).collect()
}

/// The accelerator, and the CPU model where none is asked for: hardware help only where the machine really offers it.
#[must_use]
pub fn accelerator() -> (&'static str, &'static str) {
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let virtualization = flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm");
    let usable = virtualization && fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    if usable { ("kvm", "host") } else { ("tcg", "max") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_named_by_old_and_new_versions() {
        let new = "Available CPUs:\n  EPYC-Rome             (alias configured by machine type)\n  max\n";
        let old = "Available CPUs:\nx86 EPYC-Rome             (alias configured by machine type)\nx86 max    \n\n";
        for help in [new, old] {
            assert_eq!(models(help)[1..], ["EPYC-Rome", "max"]);
        }
    }
}
