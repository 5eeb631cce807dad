//! Guests described in files of their own: TOML with the keys of `xl.cfg`, see [`toolstack::config`]. Paths in a file
//! are relative to it. What can be judged without a machine is judged here, and told with file and line.
//!
//! A file for this tool says more than dom0 reads: `kernel` may be a stock kernel's version, which then has our ramdisk unless
//! another is named; the target of a disk may be a file of this machine, which becomes a disk of the emulated one; and behind
//! `bundle:` stands such a file, too, which is put into the boot bundle.

use crate::disk::{self, Disk};
use crate::kernel_file::KernelFile;
use crate::kernels;
use anyhow::{Context, Result, anyhow, bail, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use toolstack::config::{GuestConfig, MAX_EXTRA, check_name};
use toolstack::disk::{DiskConfig, Target};
use xshell::Shell;

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
    /// The version of the kernel, if it is a stock one.
    pub stock: Option<&'static str>,
    /// Those of its disks that are files of this machine, until [`Disk::add`] takes them.
    pub disks: Vec<FileDisk>,
    /// Entries of the boot bundle that are its disks, and the files they are made from.
    pub images: Vec<(String, PathBuf)>,
}

/// A disk of a guest that is a file of this machine.
#[derive(Clone, Debug)]
pub struct FileDisk {
    /// Its number among the guest's disks.
    pub number: usize,
    /// `FILE:LINE: disk`.
    pub at: String,
    /// What it is.
    pub disk: Disk,
}

/// Reads guests from files; names must differ. A file with a `count` describes so many guests, whose names end with their
/// numbers.
///
/// # Errors
/// The first thing that is wrong, with its file and line.
pub fn read(sh: &Shell, files: &[impl AsRef<Path>]) -> Result<Vec<Described>> {
    let mut guests: Vec<(Described, &Path)> = Vec::new();
    for file in files {
        let file = file.as_ref();
        let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        for described in each(parse(sh, file, &text)?, file, &text)? {
            let name = &described.config.name;
            if let Some((_, other)) = guests.iter().find(|(other, _)| other.config.name == *name) {
                bail!("{}: {name:?} is the guest of {} already", place(file, &text, "name"), other.display());
            }
            guests.push((described, file));
        }
    }
    Ok(guests.into_iter().map(|(described, _)| described).collect())
}

fn parse(sh: &Shell, path: &Path, text: &str) -> Result<Described> {
    let mut config = GuestConfig::parse(text).map_err(|why| {
        let key = if why.key.is_empty() { String::new() } else { format!("{}: ", why.key) };
        // What is missing is missing from the whole file.
        anyhow!("{}:{}: {key}{}", path.display(), why.line.max(1), why.why)
    })?;
    let at = |key: &str| place(path, text, key);
    let folder = path.parent().unwrap_or(Path::new(""));
    let (mut disks, mut images) = (Vec::new(), Vec::new());
    for (number, config) in config.disk.iter_mut().enumerate() {
        match &config.target {
            Target::File(name) => {
                let at = place_of_disk(path, text, name);
                let disk = Disk::of_guest(&folder.join(name), config).with_context(|| at.clone())?;
                disks.push(FileDisk { number, at, disk });
            }
            Target::Bundle(name) => {
                let file = folder.join(name);
                let real = disk::bundled(&file).with_context(|| place_of_disk(path, text, name))?;
                let entry = format!("disks/{}", disk::serial(&real));
                images.push((entry.clone(), file));
                config.target = Target::Bundle(entry);
            }
            Target::Serial(_) | Target::Memory(_) => {}
        }
    }
    let kernel = folder.join(&config.kernel);
    let stock = kernels::names().find(|name| *name == config.kernel && !kernel.exists());
    let kernel = match stock {
        Some(name) => kernels::stock(sh, name).with_context(|| at("kernel"))?.vmlinux,
        None => kernel,
    };
    let file = KernelFile::read(&kernel).with_context(|| at("kernel"))?;
    let ramdisk = match (&config.ramdisk, stock) {
        (Some(ramdisk), _) => Some(folder.join(ramdisk)),
        (None, Some(name)) => {
            Some(kernels::ramdisk_for(sh, name, !config.vif.is_empty()).with_context(|| at("kernel"))?)
        }
        (None, None) => None,
    };
    if let Some(ramdisk) = &ramdisk {
        ensure!(ramdisk.is_file(), "{}: no file {}", at("ramdisk"), ramdisk.display());
    }
    file.fits(config.memory, ramdisk.as_deref(), true).with_context(|| at("memory"))?;
    file.warn(&at("memory"), config.memory, ramdisk.as_deref())?;
    Ok(Described { memory_at: at("memory"), config, kernel, ramdisk, room: file.room, stock, disks, images })
}

/// Returns the guests that a file describes: one, or as many as its `count` says. They may share a disk that none of them
/// writes, and no address. A system that they start from a disk is told its name.
fn each(described: Described, path: &Path, text: &str) -> Result<Vec<Described>> {
    let count = described.config.count;
    if count == 1 {
        return Ok(vec![described]);
    }
    let at = |key: &str| place(path, text, key);
    let config = &described.config;
    let shared = |disk: &&DiskConfig| disk.writes_target() && !matches!(disk.target, Target::Memory(_));
    if let Some(disk) = config.disk.iter().find(shared) {
        let at = match &disk.target {
            Target::File(target) | Target::Serial(target) => place_of_disk(path, text, target),
            Target::Bundle(_) | Target::Memory(_) => at("disk"),
        };
        bail!("{at}: {} would be written by {count} guests; give it an `overlay`, or the access `r`", disk.vdev.name());
    }
    for vif in &config.vif {
        ensure!(vif.mac.is_none() && vif.ip.is_none(), "{}: {count} guests cannot have one `mac` or `ip`", at("vif"));
    }
    (1..=count).map(|number| numbered(&described, number, &at)).collect()
}

/// The guest with this number among those that a file describes.
fn numbered(described: &Described, number: u32, at: &impl Fn(&str) -> String) -> Result<Described> {
    let name = format!("{}-{number}", described.config.name);
    check_name(&name).map_err(|why| anyhow!("{}: {name}: {why}", at("name")))?;
    let mut extra = described.config.extra.clone();
    if extra.split_whitespace().any(|word| word.starts_with("root=")) {
        extra.push_str(&format!(" systemd.hostname={name}"));
    }
    ensure!(extra.len() <= MAX_EXTRA, "{}: with the name of a guest, more than {MAX_EXTRA} bytes", at("extra"));
    let config = GuestConfig { name, extra, count: 1, ..described.config.clone() };
    Ok(Described { config, ..described.clone() })
}

/// `FILE:LINE: disk`, where the file names this target of a disk.
fn place_of_disk(file: &Path, text: &str, target: &str) -> String {
    let begins = line_of(text, "disk");
    // As a whole, not as a part of another path.
    let whole = |line: &str, at: usize| {
        let before = line.get(..at).unwrap_or_default().ends_with(['"', '\'', '=', ':', ' ']);
        before && line.get(at + target.len()..).unwrap_or_default().starts_with(['"', '\'', ',', ' '])
    };
    let names = |line: &str| line.match_indices(target).any(|(at, _)| whole(line, at));
    let names = text.lines().skip(begins - 1).position(names);
    format!("{}:{}: disk", file.display(), begins + names.unwrap_or(0))
}

/// `FILE:LINE: KEY`, where the file sets the key.
fn place(file: &Path, text: &str, key: &str) -> String {
    format!("{}:{}: {key}", file.display(), line_of(text, key))
}

/// The line where a text sets the key, counted from 1 on; 1 if no line does.
fn line_of(text: &str, key: &str) -> usize {
    let sets = |line: &str| line.split_once('=').is_some_and(|(before, _)| before.trim() == key);
    text.lines().position(sets).map_or(1, |index| index + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("boot")).unwrap();
        fs::write(folder.path().join("boot/vmlinuz"), test_kernels::halting()).unwrap();
        fs::write(folder.path().join("initrd"), "ramdisk").unwrap();
        for (name, bytes) in
            [("a.img", &[0; 1024][..]), ("odd.img", &[0; 1000]), ("b.qcow2", b"QFI\xfb"), ("none", b"")]
        {
            fs::write(folder.path().join("boot").join(name), bytes).unwrap();
        }
        folder
    }

    fn refusal(text: &str) -> String {
        let folder = folder();
        fs::write(folder.path().join("web.toml"), text).unwrap();
        let error = read(&Shell::new().unwrap(), &[folder.path().join("web.toml")]).unwrap_err();
        format!("{error:#}").replace(&format!("{}/", folder.path().display()), "")
    }

    const GOOD: &str = "name = 'web'\nmemory = 64\nkernel = 'boot/vmlinuz'\n";

    #[test]
    fn paths_are_relative_to_the_file() {
        let folder = folder();
        let file = folder.path().join("web.toml");
        fs::write(&file, format!("{GOOD}ramdisk = 'initrd'\nmaxmem = 128\non_crash = 'preserve'\n")).unwrap();
        let [described] = &read(&Shell::new().unwrap(), std::slice::from_ref(&file)).unwrap()[..] else {
            panic!("one guest")
        };
        assert_eq!(described.kernel, folder.path().join("boot/vmlinuz"));
        assert_eq!(described.ramdisk, Some(folder.path().join("initrd")));
        assert_eq!((described.config.memory, described.config.maxmem), (64, 128));
        assert_eq!(described.memory_at, format!("{}:2: memory", file.display()));
    }

    #[test]
    fn what_is_wrong_is_told_with_file_and_line() {
        for (text, why) in [
            (format!("{GOOD}disk = ['x,,xvda', 'y,,xvda']\n"), "web.toml:4: disk: two disks are named xvda"),
            (format!("{GOOD}disk = ['no.img,,xvda']\n"), "web.toml:4: disk: no.img: no such file"),
            (
                format!("{GOOD}disk = [\n  'boot/a.img,,xvda',\n\n  'boot,,xvdb',\n]\n"),
                "web.toml:7: disk: boot: is a directory",
            ),
            (format!("{GOOD}disk = ['boot/odd.img,,xvda']\n"), "web.toml:4: disk: boot/odd.img: has 1000 bytes"),
            (
                format!("{GOOD}disk = ['boot/a.img,qcow2,xvda']\n"),
                "web.toml:4: disk: boot/a.img: has no header of qcow2",
            ),
            (
                format!("{GOOD}disk = ['boot/b.qcow2,,xvda']\n"),
                "web.toml:4: disk: boot/b.qcow2: has the header of qcow2",
            ),
            (format!("{GOOD}disk = ['boot/b.qcow2,qcow2,xvda']\n"), "web.toml:4: disk: boot/b.qcow2: has version 0"),
            (format!("{GOOD}disk = ['bundle:boot/b.qcow2,,xvda']\n"), "web.toml:4: disk: boot/b.qcow2: has the header"),
            (format!("{GOOD}disk = ['bundle:boot/none,,xvda']\n"), "web.toml:4: disk: boot/none: is empty"),
            (format!("{GOOD}disk = ['bundle:base,,xvda']\n"), "web.toml:4: disk: base: no such file"),
            (format!("{GOOD}\nvif = ['br0']\n"), "web.toml:5: vif: vif 1: `br0` is not KEY=VALUE"),
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

    /// A file that two guests name is one disk of the machine.
    #[test]
    fn files_become_disks_of_the_machine() {
        let folder = folder();
        let [one, two] =
            [("one", "boot/a.img,,xvda,r"), ("two", "vdev=xvdb,target=./boot/../boot/a.img")].map(|(name, disk)| {
                let file = folder.path().join(format!("{name}.toml"));
                let more = format!("disk = ['memory:1M,,xvdc', '{disk}', 'bundle:boot/odd.img,,xvdd']\n");
                fs::write(&file, GOOD.replace("web", name) + &more).unwrap();
                file
            });
        let sh = Shell::new().unwrap();
        let machine = |files: &[&PathBuf], given: &[String]| {
            let mut guests = read(&sh, files).unwrap();
            let mut disks = Disk::read_all(given).unwrap();
            Disk::add(&mut disks, &mut guests).map(|()| (disks, guests)).map_err(|why| why.to_string())
        };
        let real = fs::canonicalize(folder.path().join("boot/a.img")).unwrap();
        let serial = disk::serial(&real);
        for (files, read_only) in [(&[&one][..], "read-only=on"), (&[&one, &two], "read-only=off")] {
            let (disks, guests) = machine(files, &[]).unwrap();
            let [only] = &disks[..] else { panic!("{disks:?}") };
            let arguments = only.arguments(0).join(" ");
            assert!(arguments.contains(read_only) && arguments.contains(&format!("serial={serial},")), "{arguments}");
            for guest in &guests {
                assert_eq!(guest.config.disk[0].target, Target::Memory(1 << 20));
                assert_eq!(guest.config.disk[1].target, Target::Serial(serial.clone()));
                let (entry, file) = &guest.images[0];
                assert_eq!(guest.config.disk[2].target, Target::Bundle(entry.clone()));
                assert!(entry.starts_with("disks/odd-") && file.ends_with("boot/odd.img"), "{entry}");
            }
        }
        let why = machine(&[&one], &[format!("{},ro", real.display())]).unwrap_err();
        assert!(why.ends_with("boot/a.img is given with --disk, too") && why.contains("one.toml:4: disk: "), "{why}");
    }

    /// Guests of one file share what none of them writes, and have names of their own.
    #[test]
    fn a_count_makes_guests() {
        let folder = folder();
        let file = folder.path().join("web.toml");
        let text = format!(
            "{GOOD}count = 3\nextra = 'root=/dev/xvda'\ndisk = ['boot/a.img,,xvda,overlay=1M', 'memory:1M,,xvdb']\n"
        );
        fs::write(&file, &text).unwrap();
        let mut guests = read(&Shell::new().unwrap(), std::slice::from_ref(&file)).unwrap();
        let mut disks = Vec::new();
        Disk::add(&mut disks, &mut guests).unwrap();
        assert_eq!(disks.len(), 1, "one base for all: {disks:?}");
        let told: Vec<_> = guests.iter().map(|guest| format!("{} {}", guest.config.name, guest.config.extra)).collect();
        let wanted = [1, 2, 3].map(|number| format!("web-{number} root=/dev/xvda systemd.hostname=web-{number}"));
        assert_eq!(told, wanted);
        assert!(guests.iter().all(|guest| guest.config.disk[0].target == guests[0].config.disk[0].target));
        assert!(!guests[0].config.to_toml().contains("count"));
        for (line, why) in [
            ("count = 0", "web.toml:4: count: 1 to 64 guests"),
            ("count = 65", "web.toml:4: count: 1 to 64 guests"),
            ("count = 2\ndisk = ['boot/a.img,,xvda']", "web.toml:5: disk: xvda would be written by 2 guests"),
            ("count = 2\ndisk = ['serial:tenon0,,xvda,!']", "web.toml:5: disk: xvda would be written by 2 guests"),
            ("count = 2\nvif = ['mac=00:16:3e:00:00:01']", "web.toml:5: vif: 2 guests cannot have one `mac` or `ip`"),
            ("count = 2\nvif = ['', 'ip=10.77.0.9']", "web.toml:5: vif: 2 guests cannot have one `mac` or `ip`"),
        ] {
            let refusal = refusal(&format!("{GOOD}{line}\n"));
            assert!(refusal.starts_with(why), "{refusal} is not: {why}");
        }
        let long = GOOD.replace("web", &"w".repeat(63));
        assert!(refusal(&format!("{long}count = 2\n")).starts_with("web.toml:1: name: "));
        let other = folder.path().join("other.toml");
        fs::write(&other, GOOD.replace("web", "web-2")).unwrap();
        let why = read(&Shell::new().unwrap(), &[&file, &other]).unwrap_err().to_string();
        assert!(why.contains("other.toml:1: name: \"web-2\" is the guest of "), "{why}");
    }

    #[test]
    fn names_differ_and_files_exist() {
        let folder = folder();
        let [one, two] = ["one.toml", "two.toml"].map(|name| folder.path().join(name));
        fs::write(&one, GOOD).unwrap();
        fs::write(&two, format!("# the same\n{GOOD}")).unwrap();
        let refusal = format!("{:#}", read(&Shell::new().unwrap(), &[&one, &two]).unwrap_err());
        assert_eq!(refusal, format!("{}:2: name: \"web\" is the guest of {} already", two.display(), one.display()));
        let refusal = format!("{:#}", read(&Shell::new().unwrap(), &[folder.path().join("none.toml")]).unwrap_err());
        assert!(refusal.contains("none.toml"), "{refusal}");
    }
}
