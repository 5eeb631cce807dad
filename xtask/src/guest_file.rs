//! Guests described in files of their own: TOML with the keys of `xl.cfg`, see [`toolstack::config`]. Paths in a file
//! are relative to it. What can be judged without a machine is judged here, and told with file and line.

use crate::kernel_file::KernelFile;
use anyhow::{Context, Result, anyhow, bail, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use toolstack::config::GuestConfig;

/// A guest, and where its file says what may yet turn out wrong.
#[derive(Clone, Debug)]
pub struct Described {
    /// What it should be.
    pub config: GuestConfig,
    /// The kernel file.
    pub kernel: PathBuf,
    /// The initial ramdisk, if it has one.
    pub ramdisk: Option<PathBuf>,
    /// `FILE:LINE: memory`.
    pub memory_at: String,
    /// Bytes that unpacking the kernel takes.
    pub room: u64,
}

/// Reads guests from files; names must differ.
///
/// # Errors
/// The first thing that is wrong, with its file and line.
pub fn read(files: &[impl AsRef<Path>]) -> Result<Vec<Described>> {
    let mut guests: Vec<(Described, &Path)> = Vec::new();
    for file in files {
        let file = file.as_ref();
        let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        let described = parse(file, &text)?;
        let name = &described.config.name;
        if let Some((_, other)) = guests.iter().find(|(other, _)| other.config.name == *name) {
            bail!("{}: {name:?} is the guest of {} already", place(file, &text, "name"), other.display());
        }
        guests.push((described, file));
    }
    Ok(guests.into_iter().map(|(described, _)| described).collect())
}

fn parse(file: &Path, text: &str) -> Result<Described> {
    let config = GuestConfig::parse(text).map_err(|why| {
        let key = if why.key.is_empty() { String::new() } else { format!("{}: ", why.key) };
        // What is missing is missing from the whole file.
        anyhow!("{}:{}: {key}{}", file.display(), why.line.max(1), why.why)
    })?;
    let at = |key: &str| place(file, text, key);
    let folder = file.parent().unwrap_or(Path::new(""));
    let kernel = folder.join(&config.kernel);
    let file = KernelFile::read(&kernel).with_context(|| at("kernel"))?;
    let ramdisk = config.ramdisk.as_ref().map(|ramdisk| folder.join(ramdisk));
    if let Some(ramdisk) = &ramdisk {
        ensure!(ramdisk.is_file(), "{}: no file {}", at("ramdisk"), ramdisk.display());
    }
    file.fits(config.memory, ramdisk.as_deref(), true).with_context(|| at("memory"))?;
    file.warn(&at("memory"), config.memory, ramdisk.as_deref())?;
    Ok(Described { memory_at: at("memory"), config, kernel, ramdisk, room: file.room })
}

/// `FILE:LINE: KEY`, where the file sets the key.
fn place(file: &Path, text: &str, key: &str) -> String {
    let sets = |line: &str| line.split_once('=').is_some_and(|(before, _)| before.trim() == key);
    let line = text.lines().position(sets).map_or(1, |index| index + 1);
    format!("{}:{line}: {key}", file.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("boot")).unwrap();
        fs::write(folder.path().join("boot/vmlinuz"), test_kernels::halting()).unwrap();
        fs::write(folder.path().join("initrd"), "ramdisk").unwrap();
        folder
    }

    fn refusal(text: &str) -> String {
        let folder = folder();
        fs::write(folder.path().join("web.toml"), text).unwrap();
        let error = read(&[folder.path().join("web.toml")]).unwrap_err();
        format!("{error:#}").replace(&format!("{}/", folder.path().display()), "")
    }

    const GOOD: &str = "name = 'web'\nmemory = 64\nkernel = 'boot/vmlinuz'\n";

    #[test]
    fn paths_are_relative_to_the_file() {
        let folder = folder();
        let file = folder.path().join("web.toml");
        fs::write(&file, format!("{GOOD}ramdisk = 'initrd'\nmaxmem = 128\non_crash = 'preserve'\n")).unwrap();
        let [described] = &read(std::slice::from_ref(&file)).unwrap()[..] else { panic!("one guest") };
        assert_eq!(described.kernel, folder.path().join("boot/vmlinuz"));
        assert_eq!(described.ramdisk, Some(folder.path().join("initrd")));
        assert_eq!((described.config.memory, described.config.maxmem), (64, 128));
        assert_eq!(described.memory_at, format!("{}:2: memory", file.display()));
    }

    #[test]
    fn what_is_wrong_is_told_with_file_and_line() {
        for (text, why) in [
            (format!("{GOOD}disk = ['x,,xvda', 'y,,xvda']\n"), "web.toml:4: disk: two disks are named xvda"),
            (format!("{GOOD}\nvif = ['bridge=br0']\n"), "web.toml:5: vif: this build has no such devices"),
            (format!("{GOOD}cpus = 1\n"), "web.toml:4: cpus: unknown field `cpus`"),
            (format!("{GOOD}vcpus = 'two'\n"), "web.toml:4: vcpus: invalid type"),
            (format!("{GOOD}maxmem = 32\n"), "web.toml:4: maxmem: a number of MiB, and not less"),
            (format!("{GOOD}name = 'again'\n"), "web.toml:4: name: duplicate key"),
            (format!("{GOOD}ramdisk = 'none'\n"), "web.toml:4: ramdisk: no file none"),
            (GOOD.replace("boot/", ""), "web.toml:3: kernel: unusable kernel vmlinuz: cannot be read"),
            (GOOD.replace("boot/vmlinuz", "initrd"), "web.toml:3: kernel: unusable kernel initrd: "),
            (GOOD.replace("64", "1"), "web.toml:2: memory: too little memory: needs 4 MiB at least"),
            (GOOD.replace("'web'", "'a b'"), "web.toml:1: name: 1 to 64 letters"),
            (GOOD.replace("'web'", "'12'"), "web.toml:1: name: 1 to 64 letters"),
            (GOOD.replace("'web'", "'-j'"), "web.toml:1: name: 1 to 64 letters"),
            (GOOD.replace("'web'", "'dom0'"), "web.toml:1: name: this is the name of the first domain"),
            (GOOD.replace("'web'", "'Domain-0'"), "web.toml:1: name: this is the name of the first domain"),
            ("name = 'web'\nkernel = 'k'\n".into(), "web.toml:1: missing field `memory`"),
        ] {
            let refusal = refusal(&text);
            assert!(refusal.starts_with(why), "{refusal} is not: {why}");
            assert_eq!(refusal.lines().count(), 1, "{refusal}");
        }
    }

    #[test]
    fn names_differ_and_files_exist() {
        let folder = folder();
        let [one, two] = ["one.toml", "two.toml"].map(|name| folder.path().join(name));
        fs::write(&one, GOOD).unwrap();
        fs::write(&two, format!("# the same\n{GOOD}")).unwrap();
        let refusal = format!("{:#}", read(&[&one, &two]).unwrap_err());
        assert_eq!(refusal, format!("{}:2: name: \"web\" is the guest of {} already", two.display(), one.display()));
        let refusal = format!("{:#}", read(&[folder.path().join("none.toml")]).unwrap_err());
        assert!(refusal.contains("none.toml"), "{refusal}");
    }
}
