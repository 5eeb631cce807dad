//! Guest kernels that are built here: the distribution's source, the patches of `guest-kernel-patches`, and the configuration
//! that is committed beside them.
//!
//! One build folder per version keeps its objects, so that a changed patch costs what depends on the files it touches. What is
//! built is cached by content: the version of the source, the patches, the configuration and the compiler.

use crate::apt::{self, Programs};
use crate::kernels::Kernel;
use crate::{cache, kernel_file, root};
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeSet;
use std::collections::hash_map::DefaultHasher;
use std::ffi::OsString;
use std::fs::{self, File};
use std::hash::{Hash, Hasher};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use xshell::{Shell, cmd};

/// The versions there are patches for, and the suite of the distribution that has the source.
const VERSIONS: [(&str, &str); 1] = [("6.12", "trixie")];

/// The version that is built where none is named.
pub const DEFAULT: &str = "6.12";

/// The names that `run` and `bench` know kernels of [`DEFAULT`] by: with the patches and without.
pub const NAMES: [&str; 2] = [PATCHED, UNPATCHED];
const PATCHED: &str = "patched";
const UNPATCHED: &str = "unpatched";

/// Bytes that source, objects and kernels take.
const ROOM: u64 = 4 << 30;
/// How often the progress of a build is told.
const PROGRESS: Duration = Duration::from_secs(20);
/// Lines of the log that are shown when a build fails.
const SHOWN: usize = 20;

/// What a kernel build needs beside a C compiler.
const TOOLS: Programs = Programs {
    kind: "kernel-tools",
    packages: &["flex", "bison", "m4", "make", "bc", "patch", "libelf-dev"],
    why: "to build kernels",
    complete: |root| {
        ["usr/bin/flex", "usr/bin/bison", "usr/bin/m4", "usr/bin/make", "usr/bin/bc", "usr/bin/patch"]
            .iter()
            .chain(&["usr/include/libelf.h"])
            .all(|file| root.join(file).is_file())
    },
};

/// One patch of a series.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Patch {
    /// The name of its file.
    pub name: String,
    /// What is in the file.
    pub text: String,
}

impl Patch {
    /// The files that the patch changes, adds or removes.
    #[must_use]
    pub fn files(&self) -> BTreeSet<&str> {
        let sides = self.text.lines().filter_map(|line| line.strip_prefix("--- a/").or(line.strip_prefix("+++ b/")));
        sides.map(|file| file.split('\t').next().unwrap_or(file)).collect()
    }

    /// The patch without its message, which has no part in what is built.
    fn changes(&self) -> &str {
        self.text.find("\ndiff --git ").map_or(&*self.text, |at| &self.text[at..])
    }

    /// Lines that the patch adds, and lines that it removes.
    #[must_use]
    pub fn lines(&self) -> (usize, usize) {
        let (mut added, mut removed, mut inside) = (0, 0, false);
        for line in self.text.lines() {
            match line {
                // What git writes behind the last hunk.
                "-- " => inside = false,
                _ if line.starts_with("@@ ") => inside = true,
                _ if line.starts_with("diff ") => inside = false,
                _ if inside && line.starts_with('+') => added += 1,
                _ if inside && line.starts_with('-') => removed += 1,
                _ => {}
            }
        }
        (added, removed)
    }
}

/// The folder with the patches for a version.
#[must_use]
pub fn folder(version: &str) -> PathBuf {
    root().join("guest-kernel-patches").join(version)
}

/// The patches for a version, in the order in which they are applied.
///
/// # Errors
/// A file that cannot be read.
pub fn series(version: &str) -> Result<Vec<Patch>> {
    let folder = folder(version);
    let read = |name: &str| {
        let file = folder.join(name);
        fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))
    };
    let names = read("series")?;
    let names = names.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    names.map(|name| Ok(Patch { name: name.to_owned(), text: read(name)? })).collect()
}

/// The parts that a series lets the boot parameter switch.
#[must_use]
pub fn parts(series: &[Patch]) -> Vec<String> {
    let lines = series.iter().flat_map(|patch| patch.text.lines());
    let names = lines.filter_map(|line| line.strip_prefix("+\t{ .name = \"")?.split_once('"'));
    names.map(|(name, _)| name.to_owned()).collect()
}

/// The source of a kernel in the cache.
#[derive(Clone, Debug)]
pub struct Source {
    /// Its top folder, as the distribution ships it.
    pub tree: PathBuf,
    /// The package it is from, and its version.
    pub package: String,
    version: &'static str,
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
fn room() -> Result<()> {
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

/// Whether a kernel has the patches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant<'a> {
    /// It has these.
    Patched(&'a [Patch]),
    /// It is the source as it is, for comparison.
    Unpatched,
}

/// The kernel of [`DEFAULT`] that one of [`NAMES`] names, built first if need be.
///
/// # Errors
/// As [`build`].
pub fn named(sh: &Shell, name: &str) -> Result<Kernel> {
    match name {
        PATCHED => build(sh, DEFAULT, Variant::Patched(&series(DEFAULT)?)),
        UNPATCHED => build(sh, DEFAULT, Variant::Unpatched),
        _ => bail!("no kernel {name} is built here; there are: {}", NAMES.join(", ")),
    }
}

/// A kernel in the cache, built first if need be.
///
/// # Errors
/// Source or tools that cannot be fetched, a patch that does not apply, or a build that fails.
pub fn build(sh: &Shell, version: &str, variant: Variant<'_>) -> Result<Kernel> {
    let source = Source::find(sh, version)?;
    let config = folder(version).join("config");
    let wanted = fs::read_to_string(&config).with_context(|| format!("cannot read {}", config.display()))?;
    let compiler = cmd!(sh, "gcc --version").quiet().read().context("a kernel build needs gcc")?;
    let compiler = compiler.lines().next().unwrap_or_default().to_owned();
    let (name, patches) = match variant {
        Variant::Patched(patches) => (PATCHED, patches),
        Variant::Unpatched => (UNPATCHED, &[][..]),
    };
    let mut hasher = DefaultHasher::new();
    (&source.package, &wanted, &compiler).hash(&mut hasher);
    patches.iter().for_each(|patch| patch.changes().hash(&mut hasher));
    let built = cache::dir()?.join("kernel-built").join(source.version);
    let target = built.join(format!("{name}-{:016x}", hasher.finish()));
    let kernel = Kernel { bzimage: target.join("bzImage"), vmlinux: target.join("vmlinux") };
    if target.is_dir() {
        return Ok(kernel);
    }
    let _lock = cache::lock("kernel-built")?;
    if target.is_dir() {
        return Ok(kernel);
    }
    room()?;
    let tools = TOOLS.find(sh)?;
    mend_links(&tools, Path::new("/"))?;
    let workshop = Workshop { folder: cache::dir()?.join("kernel-build").join(source.version), tools };
    workshop.lay_out(sh, &source, &source.apply(patches)?)?;
    workshop.configure(&config, &wanted)?;
    workshop.make(&format!("{} {name}", source.package))?;
    let scratch = cache::scratch()?;
    let staging = scratch.path().join("kernel");
    fs::create_dir_all(&staging)?;
    let bzimage = fs::read(workshop.objects().join("arch/x86/boot/bzImage")).context("the build made no bzImage")?;
    fs::write(staging.join("vmlinux"), kernel_file::unpack(&bzimage)?)?;
    fs::write(staging.join("bzImage"), &bzimage)?;
    let patched = match patches.len() {
        0 => name.to_owned(),
        number => format!("{name} ({number} in the series)"),
    };
    fs::write(staging.join("version"), format!("{} {patched}, {compiler}\n", source.package))?;
    cache::publish(&staging, &target)?;
    Ok(kernel)
}

/// Makes links below `tools` to libraries that are not there lead to those of the machine, whose root is `machine`: what the
/// machine has is not fetched. The linker would take the static form instead, which wants more libraries.
fn mend_links(tools: &Path, machine: &Path) -> Result<()> {
    const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";
    if tools == machine {
        return Ok(());
    }
    for entry in fs::read_dir(tools.join(LIBRARIES))? {
        let link = entry?.path();
        let Ok(target) = fs::read_link(&link) else { continue };
        let installed = machine.join(LIBRARIES).join(target);
        if !link.exists() && installed.exists() {
            fs::remove_file(&link)?;
            std::os::unix::fs::symlink(&installed, &link)
                .with_context(|| format!("cannot make the link {}", link.display()))?;
        }
    }
    Ok(())
}

/// A folder with a source tree that patches are applied to, and its objects.
struct Workshop {
    folder: PathBuf,
    /// The tools lie below this folder.
    tools: PathBuf,
}

impl Workshop {
    fn tree(&self) -> PathBuf {
        self.folder.join("tree")
    }

    fn objects(&self) -> PathBuf {
        self.folder.join("objects")
    }

    /// Makes the tree that of `source` with the files of `overlay`. Files whose content stays are not touched, and nor are
    /// their objects.
    fn lay_out(&self, sh: &Shell, source: &Source, overlay: &TempDir) -> Result<()> {
        let (tree, of, list) = (self.tree(), self.folder.join("package"), self.folder.join("files"));
        if fs::read_to_string(&of).ok().as_deref() != Some(&source.package) {
            if self.folder.exists() {
                fs::remove_dir_all(&self.folder)?;
            }
            fs::create_dir_all(self.objects())?;
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
    fn command(&self) -> Command {
        let tools = &self.tools;
        let mut command = apt::command(tools, &tools.join("usr/bin/make"));
        if tools != Path::new("/") {
            let mut path = tools.join("usr/bin").into_os_string();
            path.push(":");
            path.push(std::env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/bin:/bin")));
            command.env("PATH", path);
            command.env("M4", tools.join("usr/bin/m4")).env("BISON_PKGDATADIR", tools.join("usr/share/bison"));
            command.env("C_INCLUDE_PATH", tools.join("usr/include"));
            command.env("LIBRARY_PATH", tools.join("usr/lib/x86_64-linux-gnu"));
        }
        // Nothing of the user's has a say, and nothing in the kernel tells who built it and when.
        for name in ["MAKEFLAGS", "MFLAGS", "CFLAGS", "KCFLAGS", "ARCH", "CROSS_COMPILE"] {
            command.env_remove(name);
        }
        command.env("KBUILD_BUILD_TIMESTAMP", "@0").env("KBUILD_BUILD_USER", "tenon").env("KBUILD_BUILD_HOST", "tenon");
        let mut objects = OsString::from("O=");
        objects.push(self.objects());
        command.arg("-C").arg(self.tree()).arg(objects).stdin(Stdio::null());
        command
    }

    /// Configures the build: nothing but `wanted`, which is the content of the file `config`, and what that needs.
    fn configure(&self, config: &Path, wanted: &str) -> Result<()> {
        let mut command = self.command();
        command.env("KCONFIG_ALLCONFIG", config).args(["-s", "allnoconfig"]);
        let output = command.output().context("cannot start make")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "the kernel cannot be configured: {}", last_line(&said));
        let got = fs::read_to_string(self.objects().join(".config"))?;
        match missing(wanted, &got) {
            None => Ok(()),
            Some((at, line)) => bail!("{}:{at}: the kernel's configuration does not take {line}", config.display()),
        }
    }

    /// Builds, and tells how far the build is.
    fn make(&self, what: &str) -> Result<()> {
        let jobs = thread::available_parallelism().map_or(1, usize::from);
        let log = self.folder.join("log");
        let mut file = File::create(&log)?;
        let mut command = self.command();
        command.arg(format!("-j{jobs}")).arg("bzImage").stdout(Stdio::piped()).stderr(file.try_clone()?);
        let start = Instant::now();
        eprintln!("building {what} on {jobs} CPUs (5 minutes from nothing on two that are idle)");
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

fn last_line(text: &str) -> &str {
    text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("nothing was said")
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

/// Runs the source's own check of a patch's form.
///
/// # Errors
/// What it calls an error.
pub fn check_form(sh: &Shell, source: &Source, patch: &Patch) -> Result<()> {
    let (script, tree) = (source.tree.join("scripts/checkpatch.pl"), &source.tree);
    let file = folder(source.version).join(&patch.name);
    let output = cmd!(sh, "perl {script} --root={tree} --terse --show-types {file}").quiet();
    let output = output.ignore_status().output().context("cannot start perl")?;
    if output.status.success() {
        return Ok(());
    }
    let [said, failed] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned());
    // It fails because of warnings as well.
    ensure!(said.contains("total:"), "checkpatch.pl cannot look at {}: {}", patch.name, last_line(&failed));
    match said.lines().find(|line| line.contains("ERROR:")) {
        Some(line) => bail!("{}: {line}", patch.name),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATCH: &str = "From 0\nSubject: [PATCH] x\n\n- a list\n---\n x.c | 2 +-\n\ndiff --git a/d/x.c b/d/x.c\n\
                         --- a/d/x.c\n+++ b/d/x.c\n@@ -1,3 +1,4 @@\n one\n-two\n+2\n+2b\n three\n-- \n2.47\n";

    fn patch(text: &str) -> Patch {
        Patch { name: "0001-x.patch".into(), text: text.into() }
    }

    fn source(folder: &Path) -> Source {
        fs::create_dir_all(folder.join("d")).unwrap();
        fs::write(folder.join("d/x.c"), "one\ntwo\nthree\n").unwrap();
        Source { tree: folder.to_owned(), package: "source 1".into(), version: DEFAULT }
    }

    #[test]
    fn a_patch_is_counted_by_its_hunks() {
        let patch = patch(PATCH);
        assert_eq!(patch.lines(), (2, 1));
        assert!(patch.changes().starts_with("\ndiff --git a/d/x.c"));
        assert_eq!(patch.files().into_iter().collect::<Vec<_>>(), ["d/x.c"]);
    }

    #[test]
    fn parts_are_those_of_the_patches() {
        let text = "+static struct part parts[] = {\n+\t{ .name = \"pte\", .key = &k },\n \t{ .name = \"old\" },\n";
        assert_eq!(parts(&[patch(text)]), ["pte"]);
        let parts = parts(&series(DEFAULT).unwrap());
        assert!(parts.iter().all(|part| !part.is_empty() && part != "all" && part != "none"), "{parts:?}");
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
    fn links_to_libraries_of_the_machine_are_mended() {
        let [tools, machine] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let libraries = |root: &Path| root.join("usr/lib/x86_64-linux-gnu");
        for root in [tools.path(), machine.path()] {
            fs::create_dir_all(libraries(root)).unwrap();
        }
        fs::write(libraries(machine.path()).join("a.so.1"), "a").unwrap();
        for (link, target) in [("a.so", "a.so.1"), ("b.so", "b.so.1")] {
            std::os::unix::fs::symlink(target, libraries(tools.path()).join(link)).unwrap();
        }
        mend_links(tools.path(), machine.path()).unwrap();
        assert_eq!(fs::read_to_string(libraries(tools.path()).join("a.so")).unwrap(), "a");
        assert!(!libraries(tools.path()).join("b.so").exists());
    }

    #[test]
    fn what_the_configuration_does_not_take_is_named() {
        let wanted = "# a comment\nCONFIG_A=y\nCONFIG_B=4\n";
        assert_eq!(missing(wanted, "CONFIG_A=y\nCONFIG_B=4\nCONFIG_C=y\n"), None);
        assert_eq!(missing(wanted, "CONFIG_A=y\n# CONFIG_B is not set\n"), Some((3, "CONFIG_B=4")));
    }

    /// The most lines that a series may add.
    const LIMIT: usize = 1_500;

    #[test]
    fn each_series_is_complete_and_in_form() {
        for (version, _) in VERSIONS {
            let series = series(version).unwrap();
            let files = fs::read_dir(folder(version)).unwrap().map(|entry| entry.unwrap().file_name());
            let mut files: Vec<String> = files.filter_map(|name| name.into_string().ok()).collect();
            files.retain(|name| name.ends_with(".patch"));
            files.sort();
            // Numbers are the order.
            assert_eq!(series.iter().map(|patch| patch.name.clone()).collect::<Vec<_>>(), files, "{version}");
            for Patch { name, text } in &series {
                let subject = text.lines().find_map(|line| line.strip_prefix("Subject: [PATCH] "));
                let subject = subject.unwrap_or_else(|| panic!("{name} has no subject on one line"));
                assert!(subject.len() <= 72 && subject.contains(": "), "{name}: {subject}");
                assert!(text.contains("\nSigned-off-by: "), "{name} is not signed off");
                assert!(text.contains("\nRisk: "), "{name} does not say what its risk is");
                let new: Vec<&str> = text.split("\n--- /dev/null\n").skip(1).collect();
                for file in new {
                    let first = file.lines().find(|line| line.starts_with("+") && !line.starts_with("+++"));
                    assert!(first.is_some_and(|line| line.contains("SPDX-License-Identifier: GPL-2.0-only")), "{name}");
                }
            }
            let added: usize = series.iter().map(|patch| patch.lines().0).sum();
            assert!(added < LIMIT, "the series for {version} adds {added} lines");
        }
    }

    /// Only if the source is in the cache: `cargo xtask kernel` fetches it.
    #[test]
    fn each_series_applies_exactly() {
        for (version, _) in VERSIONS {
            match (Source::cached(version).unwrap(), TOOLS.present().unwrap()) {
                (Some(source), Some(_)) => {
                    source.apply(&series(version).unwrap()).unwrap();
                }
                _ => println!("skipped: the source of Linux {version} is not in the cache"),
            }
        }
    }

    #[test]
    fn an_unknown_version_is_refused() {
        let refusal = Source::cached("2.6").unwrap_err().to_string();
        assert_eq!(refusal, "there are no patches for Linux 2.6; there are for: 6.12");
    }
}
