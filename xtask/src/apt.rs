//! Debian packages without root: the archive the machine already uses, private lists, checked downloads.
//!
//! apt's own state is never touched. The address of the archive comes from `apt-get indextargets` alone.

use anyhow::{Context, Result, bail};
use std::path::Path;
use xshell::{Shell, cmd};

/// The helper behind apt's downloads: it knows the machine's proxy and certificates and checks the hash.
const HELPER: &str = "/usr/lib/apt/apt-helper";

/// The address of the Debian archive apt is configured for, with a trailing slash.
pub(crate) fn archive(sh: &Shell) -> Result<String> {
    let query = [
        "--format",
        "$(REPO_URI) $(LABEL)",
        "Identifier: Packages",
        "Component: main",
    ];
    let targets = cmd!(sh, "apt-get indextargets {query...}")
        .quiet()
        .ignore_stderr()
        .read();
    targets
        .context("no apt on this machine")?
        .lines()
        .find_map(|line| line.strip_suffix(" Debian"))
        .map(str::to_owned)
        .context("apt has no Debian archive configured")
}

/// Fetches `uri` into `file`; apt's helper refuses anything whose SHA-256 is not `sha256`.
pub(crate) fn download(sh: &Shell, uri: &str, file: &Path, sha256: &str) -> Result<()> {
    let hash = format!("SHA256:{sha256}");
    cmd!(
        sh,
        "{HELPER} -o APT::Sandbox::User= -qq download-file {uri} {file} {hash}"
    )
    .quiet()
    .run()
    .with_context(|| format!("cannot fetch {uri}"))
}

/// Unpacks a package file into `target`.
pub(crate) fn extract(sh: &Shell, deb: &Path, target: &Path) -> Result<()> {
    cmd!(sh, "dpkg-deb --extract {deb} {target}")
        .quiet()
        .run()
        .context("cannot unpack a Debian package")
}

/// Signed indexes of a few suites, read with state of our own.
pub(crate) struct Lists {
    options: Vec<String>,
}

impl Lists {
    /// Writes a private `sources.list` with `sources` into `dir` and fetches the indexes.
    pub(crate) fn update(sh: &Shell, dir: &Path, sources: &str) -> Result<Self> {
        sh.write_file(dir.join("sources.list"), sources)?;
        sh.create_dir(dir.join("lists/partial"))?;
        sh.create_dir(dir.join("cache/archives/partial"))?;
        let d = dir.display();
        let options = [
            format!("Dir::Etc::SourceList={d}/sources.list"),
            "Dir::Etc::SourceParts=/dev/null".into(),
            format!("Dir::State={d}"),
            "Dir::State::status=/dev/null".into(),
            format!("Dir::Cache={d}/cache"),
            "APT::Sandbox::User=".into(),
            "Acquire::Languages=none".into(),
            "Debug::NoLocking=true".into(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".into(),
        ];
        let options: Vec<String> = options
            .into_iter()
            .flat_map(|option| ["-o".into(), option])
            .collect();
        let arguments = &options;
        cmd!(sh, "apt-get {arguments...} -qq update")
            .quiet()
            .run()
            .context("cannot fetch the package indexes")?;
        Ok(Self { options })
    }

    /// The records of `package`, newest first, as `apt-cache show` prints them.
    pub(crate) fn records(&self, sh: &Shell, package: &str) -> Result<Vec<Record>> {
        let options = &self.options;
        let text = cmd!(sh, "apt-cache {options...} show {package}")
            .quiet()
            .ignore_stderr()
            .read();
        let text = text.with_context(|| format!("the package indexes have no {package}"))?;
        Ok(text
            .split("\n\n")
            .filter(|record| !record.trim().is_empty())
            .map(|r| Record(r.to_owned()))
            .collect())
    }
}

/// One record of a package index.
pub(crate) struct Record(String);

impl Record {
    /// The value of a field, such as `Version`.
    pub(crate) fn field(&self, name: &str) -> Result<&str> {
        let value = self
            .0
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        match value {
            Some(value) => Ok(value.trim()),
            None => bail!("a package record has no field {name}"),
        }
    }
}
