//! An archive of an installed Debian, made by mmdebstrap, which is installed, or fetched into the cache.

use crate::apt::{self, Programs};
use crate::cache;
use crate::debian::{Extra, Recipe, User};
use anyhow::{Context, Result, bail};
use std::collections::hash_map::DefaultHasher;
use std::fs::{self, File};
use std::hash::{Hash, Hasher};
use std::io::{self, BufRead, BufReader, IsTerminal, PipeReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use xshell::Shell;

const MMDEBSTRAP: Programs = Programs {
    kind: "mmdebstrap",
    packages: &["mmdebstrap"],
    why: "to install Debian for guests",
    complete: |root| root.join("usr/bin/mmdebstrap").is_file(),
};

/// The packages of each guest, beside those that every Debian has.
const PACKAGES: [&str; 15] = [
    "apt-utils",
    "ca-certificates",
    "dbus",
    "e2fsprogs",
    "iproute2",
    "iputils-ping",
    "kmod",
    "less",
    "nano",
    "openssh-server",
    "procps",
    "sudo",
    "systemd-resolved",
    "systemd-sysv",
    "udev",
];
/// What is done in the new system once all packages are installed. Root logs in on the console without a password: whoever has
/// the console has the machine. sshd takes the key alone.
const SETUP: &str = "passwd -q -d root
systemctl -q enable systemd-networkd systemd-resolved
rm -f /etc/ssh/ssh_host_* /etc/machine-id
: > /etc/machine-id";

/// How often the progress is shown where each time takes a line.
const PERIOD: Duration = Duration::from_secs(30);

/// Returns an archive of an installed Debian: of the cache, or made now.
pub(crate) fn archive(sh: &Shell, recipe: &Recipe, user: User) -> Result<PathBuf> {
    let mut packages: Vec<&str> = PACKAGES.into_iter().chain(recipe.packages.iter().map(String::as_str)).collect();
    packages.extend(recipe.with.contains(&Extra::CloudInit).then_some("cloud-init"));
    packages.sort_unstable();
    packages.dedup();
    let suite = recipe.suite.name();
    let mut hasher = DefaultHasher::new();
    (&packages, SETUP, apt::configuration(sh)?).hash(&mut hasher);
    let target = cache::dir()?.join("debian").join(format!("{suite}-{:016x}.tar", hasher.finish()));
    if cache::has(&target) {
        return Ok(target);
    }
    let _lock = cache::lock("debian")?;
    if cache::has(&target) {
        return Ok(target);
    }
    let root = MMDEBSTRAP.find(sh)?;
    let scratch = cache::scratch()?;
    let tree = match user {
        User::Root => tempfile::tempdir_in(scratch.path())?,
        // In mmdebstrap's namespace, this user is nobody, and may not enter a home folder, where the cache is.
        User::Namespace => tempfile::tempdir_in("/var/tmp")?,
    };
    fs::set_permissions(tree.path(), fs::Permissions::from_mode(0o755))?;
    let sources = apt::sources(sh, suite)?;
    let (staging, log) = (scratch.path().join("tar"), scratch.path().join("log"));
    eprintln!(
        "installing Debian {suite} for guests: {} packages and what they need (once, some minutes)",
        packages.len()
    );
    let mut command = apt::command(&root, Path::new("perl"));
    command.arg(root.join("usr/bin/mmdebstrap")).args(["--verbose", "--variant=minbase", "--format=tar"]);
    command.arg(format!("--mode={}", user.mode())).arg(format!("--include={}", packages.join(",")));
    command.arg(format!("--customize-hook=chroot \"$1\" sh -euc '{SETUP}'"));
    command.arg(suite).arg(&staging).args(&sources);
    command.env("TMPDIR", tree.path());
    let (output, end) = io::pipe()?;
    let child = command.stdout(end.try_clone()?).stderr(end).spawn();
    // The command holds the ends that the child writes to.
    drop(command);
    let mut child = child.context("cannot start perl, which mmdebstrap is written in")?;
    let shown = show(output, &mut File::create(&log)?);
    let status = child.wait()?;
    shown?;
    if !status.success() {
        let text = fs::read_to_string(&log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("E: ")).collect();
        let why = lines.first().copied().or_else(|| text.lines().last()).unwrap_or_default();
        bail!("mmdebstrap cannot install Debian {suite} with {}: {why}", sources.join(", "));
    }
    cache::publish_by_content(&staging, &target)?;
    Ok(target)
}

/// Keeps what mmdebstrap prints in the file `log`, and shows the progress: on a terminal in a line that changes, otherwise in a
/// few lines.
fn show(output: PipeReader, log: &mut File) -> Result<()> {
    let mut progress = Progress::default();
    let mut errors = io::stderr();
    let terminal = errors.is_terminal();
    let (mut last, mut open) = (Instant::now(), false);
    for line in BufReader::new(output).split(b'\n') {
        let line = line?;
        log.write_all(&line)?;
        log.write_all(b"\n")?;
        match progress.read(&String::from_utf8_lossy(&line)) {
            Some(News::Step(step)) => {
                let end = if std::mem::take(&mut open) { "\n" } else { "" };
                writeln!(errors, "{end}  {step}")?;
            }
            Some(News::Counts) if terminal => {
                open = true;
                write!(errors, "\r  {progress}")?;
            }
            Some(News::Counts) if last.elapsed() >= PERIOD => {
                last = Instant::now();
                writeln!(errors, "  {progress}")?;
            }
            _ => {}
        }
    }
    if open {
        writeln!(errors)?;
    }
    Ok(())
}

/// How far mmdebstrap is: the numbers of packages that were fetched, unpacked, and set up.
#[derive(Debug, Default, PartialEq, Eq)]
struct Progress {
    fetched: u32,
    unpacked: u32,
    done: u32,
}

/// What a line of mmdebstrap's tells.
#[derive(Debug, PartialEq, Eq)]
enum News {
    /// A step begins.
    Step(String),
    /// A number has changed.
    Counts,
}

impl Progress {
    /// Takes a line that mmdebstrap, apt or dpkg has printed.
    fn read(&mut self, line: &str) -> Option<News> {
        let step = line.strip_prefix("I: ").and_then(|text| text.trim_end().strip_suffix("..."));
        if let Some(step) = step.filter(|step| !step.contains('/')) {
            return Some(News::Step(step.to_owned()));
        }
        let package = |line: &str| line.starts_with("Get:") && [" amd64 ", " all "].iter().any(|it| line.contains(it));
        let count = match line {
            line if line.starts_with("Unpacking ") => &mut self.unpacked,
            line if line.starts_with("Setting up ") => &mut self.done,
            line if package(line) && !line.contains(" Packages ") => &mut self.fetched,
            _ => return None,
        };
        *count += 1;
        Some(News::Counts)
    }
}

impl std::fmt::Display for Progress {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "packages: {} fetched, {} unpacked, {} set up", self.fetched, self.unpacked, self.done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_counts_packages() {
        let mut progress = Progress::default();
        let step = |text: &str| Some(News::Step(text.to_owned()));
        assert_eq!(progress.read("I: downloading packages with apt..."), step("downloading packages with apt"));
        assert_eq!(progress.read("I: automatically chosen mode: root"), None);
        assert_eq!(progress.read("I: removing tempdir /tmp/x..."), None);
        for (line, news) in [
            ("Get:1 http://here/debian bookworm InRelease [151 kB]", None),
            ("Get:2 http://here/debian bookworm/main amd64 Packages [8792 kB]", None),
            ("Get:3 http://here/debian bookworm/main amd64 libc6 amd64 2.36-9 [2758 kB]", Some(News::Counts)),
            ("Get:4 http://here/debian bookworm/main amd64 tzdata all 2024a [300 kB]", Some(News::Counts)),
            ("Unpacking libc6:amd64 (2.36-9) ...", Some(News::Counts)),
            ("Setting up libc6:amd64 (2.36-9) ...", Some(News::Counts)),
            ("Setting", None),
        ] {
            assert_eq!(progress.read(line), news, "{line}");
        }
        assert_eq!(progress.to_string(), "packages: 2 fetched, 1 unpacked, 1 set up");
    }
}
