//! Debian packages without root: the archive the machine already uses, private lists, checked downloads.
//!
//! apt's own state is never touched. The address of the archive comes from `apt-get indextargets` alone.

use crate::cache;
use anyhow::{Context, Result, bail, ensure};
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use xshell::{Shell, cmd};

/// The helper behind apt's downloads: it knows the machine's proxy and certificates and checks the hash.
const HELPER: &str = "/usr/lib/apt/apt-helper";

/// A source of packages that apt is configured for: its address with a trailing slash, its label, and the release.
struct Source {
    uri: String,
    label: String,
    release: String,
}

/// The address of the Debian archive apt is configured for, with a trailing slash.
pub(crate) fn archive(sh: &Shell) -> Result<String> {
    Ok(debian(&known(sh)?)?.uri.clone())
}

/// The lines of a `sources.list` for the release `suite` of Debian: from the archive apt is configured for, with updates and
/// security updates if apt is configured for those of this machine's own release.
///
/// # Errors
/// No apt, or apt is configured for no Debian archive.
pub fn sources(sh: &Shell, suite: &str) -> Result<Vec<String>> {
    lines(&known(sh)?, suite)
}

fn lines(sources: &[Source], suite: &str) -> Result<Vec<String>> {
    let line = |source: &Source, ending: &str| format!("deb {} {suite}{ending} main", source.uri);
    let updates = sources.iter().find(|source| source.label == "Debian" && source.release.ends_with("-updates"));
    let security = sources.iter().find(|source| source.label == "Debian-Security");
    let more = [(updates, "-updates"), (security, "-security")];
    let more = more.into_iter().filter_map(|(source, ending)| Some(line(source?, ending)));
    Ok(std::iter::once(line(debian(sources)?, "")).chain(more).collect())
}

fn debian(sources: &[Source]) -> Result<&Source> {
    sources.iter().find(|source| source.label == "Debian").context("apt has no Debian archive configured")
}

/// The sources that apt is configured for, with their labels.
fn known(sh: &Shell) -> Result<Vec<Source>> {
    let sources = configured(sh, &[])?;
    if debian(&sources).is_ok() {
        return Ok(sources);
    }
    // apt knows the labels of its archives from their indexes, and a fresh machine has none: fetch them for ourselves.
    let scratch = cache::scratch()?;
    let state = &private_state(sh, scratch.path(), Installed::Nothing)?;
    // One foreign archive out of reach is no reason to stop: what counts is what can be asked afterwards.
    let updated = update(sh, state);
    let sources = configured(sh, state)?;
    if debian(&sources).is_err() {
        updated?;
    }
    Ok(sources)
}

/// Fetches the indexes that the options lead to.
fn update(sh: &Shell, options: &[String]) -> Result<()> {
    let output = cmd!(sh, "apt-get {options...} -qq update").quiet().ignore_status().output()?;
    ensure!(output.status.success(), "cannot fetch the package indexes: {}", complaint(&output.stderr));
    Ok(())
}

/// What apt complained of first, in one line.
fn complaint(said: &[u8]) -> String {
    let said = String::from_utf8_lossy(said);
    let first = said.lines().find_map(|line| line.strip_prefix("E: ").or_else(|| line.strip_prefix("W: ")));
    first
        .or_else(|| said.lines().last())
        .unwrap_or("apt gives no reason")
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
}

/// The sources that apt is configured for. apt knows the label of a source whose index it has.
fn configured(sh: &Shell, options: &[String]) -> Result<Vec<Source>> {
    let format = "$(REPO_URI) $(RELEASE) $(LABEL)";
    let query = ["--format", format, "Identifier: Packages", "Component: main"];
    let targets = cmd!(sh, "apt-get {options...} indextargets {query...}").quiet().ignore_stderr().read();
    Ok(targets.context("no apt on this machine")?.lines().filter_map(source).collect())
}

/// The source in a line of [`configured`].
fn source(line: &str) -> Option<Source> {
    let mut words = line.splitn(3, ' ').map(str::to_owned);
    Some(Source { uri: words.next()?, release: words.next()?, label: words.next().unwrap_or_default() })
}

/// What apt is configured for, as a text that is another for other sources.
pub(crate) fn configuration(sh: &Shell) -> Result<String> {
    let sources = configured(sh, &[])?;
    Ok(sources.iter().map(|source| format!("{} {}\n", source.uri, source.release)).collect())
}

/// Options that make apt keep its state in the folder `dir` instead of its own.
fn private_state(sh: &Shell, dir: &Path, installed: Installed) -> Result<Vec<String>> {
    sh.create_dir(dir.join("lists/partial"))?;
    sh.create_dir(dir.join("cache/archives/partial"))?;
    let d = dir.display();
    let status = match installed {
        Installed::Nothing => "/dev/null",
        Installed::Host => "/var/lib/dpkg/status",
    };
    let options = [
        format!("Dir::State={d}"),
        format!("Dir::State::lists={d}/lists"),
        format!("Dir::State::status={status}"),
        format!("Dir::Cache={d}/cache"),
        "APT::Sandbox::User=".into(),
        "Acquire::Languages=none".into(),
        "Debug::NoLocking=true".into(),
        // Without the indexes of an archive, packages would seem to be missing.
        "APT::Update::Error-Mode=any".into(),
        "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".into(),
    ];
    Ok(options.into_iter().flat_map(|option| ["-o".into(), option]).collect())
}

/// Fetches `uri` into `file`; apt's helper refuses anything whose SHA-256 is not `sha256`.
pub(crate) fn download(sh: &Shell, uri: &str, file: &Path, sha256: &str) -> Result<()> {
    let hash = format!("SHA256:{sha256}");
    let output = cmd!(sh, "{HELPER} -o APT::Sandbox::User= -qq download-file {uri} {file} {hash}")
        .quiet()
        .ignore_status()
        .output()?;
    ensure!(output.status.success(), "cannot fetch {uri}: {}", complaint(&output.stderr));
    Ok(())
}

/// Unpacks a package file into `target`.
pub(crate) fn extract(sh: &Shell, deb: &Path, target: &Path) -> Result<()> {
    cmd!(sh, "dpkg-deb --extract {deb} {target}").quiet().run().context("cannot unpack a Debian package")
}

/// Unpacks only the files of a package that match one of tar's `patterns` into the existing folder `target`.
pub(crate) fn extract_some(deb: &Path, target: &Path, patterns: &[&str]) -> Result<()> {
    let mut tarfile = Command::new("dpkg-deb").arg("--fsys-tarfile").arg(deb).stdout(Stdio::piped()).spawn()?;
    let pipe = tarfile.stdout.take().context("dpkg-deb has no output")?;
    // A pattern without a match makes tar complain; what is needed is looked for afterwards by the caller.
    Command::new("tar")
        .args(["-x", "--no-same-owner", "--wildcards", "-C"])
        .arg(target)
        .args(patterns)
        .stdin(pipe)
        .stderr(Stdio::null())
        .status()?;
    ensure!(tarfile.wait()?.success(), "cannot unpack {}", deb.display());
    Ok(())
}

/// Fetches `packages` of this machine's release, with those libraries of theirs that the machine lacks, and unpacks
/// them side by side into the folder of the cache named `kind`, below the version of the first. `why` is told.
fn provide(sh: &Shell, kind: &str, packages: &[&str], why: &str) -> Result<PathBuf> {
    let os = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let suite =
        os.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME=")).context("this machine is no Debian")?;
    let scratch = cache::scratch()?;
    let lists = Lists::update(sh, scratch.path(), &[suite], Installed::Host)?;
    // Those named are needed in this folder, wherever else they are installed; of the rest only what is missing.
    let mut records = packages.iter().map(|package| lists.record(sh, package)).collect::<Result<Vec<_>>>()?;
    let version = records.first().context("no package to fetch")?.field("Version")?.replace(':', "-");
    for package in packages {
        for record in lists.missing(sh, package, suite)? {
            let name = record.field("Package")?;
            if records.iter().all(|known| known.field("Package").is_ok_and(|known| known != name)) {
                records.push(record);
            }
        }
    }
    let size = records.iter().map(Record::size).sum::<Result<u64>>()?.div_ceil(1_000_000);
    eprintln!("fetching {} {why}: {} packages, {size} MB (once, not installed)", packages.join(", "), records.len());
    let root = scratch.path().join("root");
    for record in &records {
        extract(sh, &lists.fetch(sh, record, scratch.path())?, &root)?;
    }
    let target = cache::dir()?.join(kind).join(version);
    cache::publish(&root, &target)?;
    Ok(target)
}

/// The folders that [`provide`] made for `kind` earlier, newest version last.
fn provided(kind: &str) -> Result<Vec<PathBuf>> {
    let folders = fs::read_dir(cache::dir()?.join(kind)).into_iter().flatten().flatten();
    let mut folders: Vec<PathBuf> = folders.map(|entry| entry.path()).collect();
    folders.sort();
    Ok(folders)
}

/// Programs, or other files of packages, that are used where they are installed, or else fetched into the cache.
pub(crate) struct Programs {
    /// The folder of the cache.
    pub(crate) kind: &'static str,
    /// The packages that have them.
    pub(crate) packages: &'static [&'static str],
    /// What is told when they are fetched.
    pub(crate) why: &'static str,
    /// Whether all that is needed lies below a folder.
    pub(crate) complete: fn(&Path) -> bool,
}

impl Programs {
    /// Returns the folder below which the programs lie, `/` if they are installed; `None` if they would have to be fetched.
    ///
    /// # Errors
    /// No cache folder can be named.
    pub(crate) fn present(&self) -> Result<Option<PathBuf>> {
        let roots = std::iter::once(PathBuf::from("/")).chain(provided(self.kind)?.into_iter().rev());
        Ok(roots.into_iter().find(|root| (self.complete)(root)))
    }

    /// As [`Programs::present`], but fetches the programs if need be.
    ///
    /// # Errors
    /// The programs are not installed and cannot be fetched, or the packages lack something that is needed.
    pub(crate) fn find(&self, sh: &Shell) -> Result<PathBuf> {
        if let Some(found) = self.present()? {
            return Ok(found);
        }
        let _lock = cache::lock(self.kind)?;
        if let Some(found) = self.present()? {
            return Ok(found);
        }
        let packages = self.packages.join(", ");
        provide(sh, self.kind, self.packages, self.why)
            .with_context(|| format!("cannot fetch {}; installing {packages} helps as well", self.kind))?;
        self.present()?.with_context(|| format!("something that is needed is not in {packages}"))
    }
}

/// A command that starts `program`, which lies below `root`, with the libraries that are there.
pub(crate) fn command(root: &Path, program: &Path) -> Command {
    let mut command = Command::new(program);
    if root != Path::new("/") {
        let libraries =
            ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"].map(|path| root.join(path).into_os_string());
        command.env("LD_LIBRARY_PATH", libraries.join(OsStr::new(":")));
    }
    command
}

/// Where apt is told to look for what is installed.
pub(crate) enum Installed {
    /// Nothing counts as installed: only the indexes matter.
    Nothing,
    /// The packages of this machine, so that only what is missing is named.
    Host,
}

/// Signed indexes of a few suites of the machine's archive, read with state of our own.
pub(crate) struct Lists {
    archive: String,
    options: Vec<String>,
}

impl Lists {
    /// Fetches the indexes of `suites` into the folder `dir`.
    pub(crate) fn update(sh: &Shell, dir: &Path, suites: &[&str], installed: Installed) -> Result<Self> {
        let archive = archive(sh)?;
        let sources: String = suites.iter().map(|suite| format!("deb {archive} {suite} main\n")).collect();
        sh.write_file(dir.join("sources.list"), sources)?;
        let mut options = private_state(sh, dir, installed)?;
        let sources =
            [format!("Dir::Etc::SourceList={}/sources.list", dir.display()), "Dir::Etc::SourceParts=/dev/null".into()];
        options.extend(sources.into_iter().flat_map(|option| ["-o".into(), option]));
        update(sh, &options)?;
        Ok(Self { archive, options })
    }

    /// The records of `package` (or `package=version`), newest first.
    pub(crate) fn records(&self, sh: &Shell, package: &str) -> Result<Vec<Record>> {
        let options = &self.options;
        let text = cmd!(sh, "apt-cache {options...} show {package}").quiet().ignore_stderr().read();
        let text = text.with_context(|| format!("the package indexes have no {package}"))?;
        Ok(text.split("\n\n").filter(|record| !record.trim().is_empty()).map(|r| Record(r.to_owned())).collect())
    }

    /// The newest record of `package`.
    pub(crate) fn record(&self, sh: &Shell, package: &str) -> Result<Record> {
        let newest = self.records(sh, package)?.into_iter().next();
        newest.with_context(|| format!("the package indexes have no {package}"))
    }

    /// Everything that installing `package` from `suite` would add to this machine, as found by apt's own solver.
    pub(crate) fn missing(&self, sh: &Shell, package: &str, suite: &str) -> Result<Vec<Record>> {
        let options = &self.options;
        let plan =
            cmd!(sh, "apt-get {options...} --print-uris -qq -y install --no-install-recommends -t {suite} {package}")
                .quiet()
                .ignore_stderr()
                .read()
                .with_context(|| format!("apt finds no way to install {package} from {suite}"))?;
        let mut records = Vec::new();
        // 'ADDRESS' NAME_VERSION_ARCHITECTURE.deb SIZE HASH, where the colon of an epoch is written %3a.
        for name in plan.lines().filter_map(|line| line.split(' ').nth(1)) {
            let mut parts = name.split('_');
            let (Some(package), Some(version)) = (parts.next(), parts.next()) else {
                bail!("apt names a file {name}, which is no package");
            };
            records.push(self.record(sh, &format!("{package}={}", version.replace("%3a", ":")))?);
        }
        Ok(records)
    }

    /// Fetches the package of `record` into the folder `dir` and returns the file.
    pub(crate) fn fetch(&self, sh: &Shell, record: &Record, dir: &Path) -> Result<PathBuf> {
        let file = dir.join(format!("{}.deb", record.field("Package")?));
        let uri = format!("{}{}", self.archive, record.field("Filename")?);
        download(sh, &uri, &file, record.field("SHA256")?)?;
        Ok(file)
    }
}

/// One record of a package index.
pub(crate) struct Record(String);

impl Record {
    /// The value of a field, such as `Version`.
    pub(crate) fn field(&self, name: &str) -> Result<&str> {
        let value = self.0.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        match value {
            Some(value) => Ok(value.trim()),
            None => bail!("a package record has no field {name}"),
        }
    }

    /// The size of the package file in bytes.
    pub(crate) fn size(&self) -> Result<u64> {
        Ok(self.field("Size")?.parse()?)
    }
}

/// A small package for tests: it needs no other than the C library.
pub const TEST_PACKAGE: &str = "hello";

/// Returns a folder of the cache with a small archive: these packages of the release `suite` of Debian, and their index
/// `Packages`. It is not signed.
///
/// # Errors
/// A package cannot be fetched.
pub fn mirror(sh: &Shell, suite: &str, packages: &[&str]) -> Result<PathBuf> {
    let target = cache::dir()?.join("mirror").join(format!("{suite}-{}", packages.join("-")));
    if target.is_dir() {
        return Ok(target);
    }
    let scratch = cache::scratch()?;
    let lists = Lists::update(sh, scratch.path(), &[suite], Installed::Nothing)?;
    let staging = scratch.path().join("mirror");
    fs::create_dir(&staging)?;
    let mut index = String::new();
    for package in packages {
        let record = lists.record(sh, package)?;
        let file = lists.fetch(sh, &record, &staging)?;
        let name = file.file_name().and_then(OsStr::to_str).context("a package without a name")?;
        index += &record.0.replace(record.field("Filename")?, &format!("./{name}"));
        index += "\n\n";
    }
    fs::write(staging.join("Packages"), index)?;
    cache::publish(&staging, &target)?;
    Ok(target)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_has_the_sources_of_this_machine() {
        let read = |text: &str| text.lines().filter_map(source).collect::<Vec<_>>();
        let main = "https://foreign/ nodistro Node\nhttp://here/debian/ stable Debian\n";
        let lines_of = |text: &str| lines(&read(text), "trixie");
        assert_eq!(lines_of(main).unwrap(), ["deb http://here/debian/ trixie main"]);
        let all = format!(
            "{main}http://there/ stable-updates Debian\nhttp://safe/ stable-security Debian-Security\n\
             http://back/ bookworm-backports Debian Backports\n"
        );
        let wanted = [
            "deb http://here/debian/ trixie main",
            "deb http://there/ trixie-updates main",
            "deb http://safe/ trixie-security main",
        ];
        assert_eq!(lines_of(&all).unwrap(), wanted);
        // Without an index, apt knows no label.
        assert_eq!(lines_of("http://here/ stable \n").unwrap_err().to_string(), "apt has no Debian archive configured");
    }

    #[test]
    fn the_first_complaint_is_told() {
        let said = b"Err:1 somewhere\nW: Failed to fetch x  Could not connect\nE: Some index files failed\n";
        assert_eq!(complaint(said), "Failed to fetch x Could not connect");
        assert_eq!(complaint(b"404\n"), "404");
        assert_eq!(complaint(b""), "apt gives no reason");
    }
}
