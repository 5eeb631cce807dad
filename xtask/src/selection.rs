//! The guests a user asks for, whatever machine they are for: files that describe them, or one put together from options.

use anyhow::{Context, Result, ensure};
use hypercall_abi::first::MAX_PAGES;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use toolstack::config::{MAX_EXTRA, check_name};
use toolstack::vif::VifConfig;
use xshell::Shell;
use xtask::built;
use xtask::bundle::{Bundle, DOM0_SPARE, Guest};
use xtask::guest_file::{self, Described};
use xtask::kernel_file::KernelFile;
use xtask::kernels::{self, Kernel};
use xtask::mebibytes;
use xtask::oci::Wanted;

/// Which guests dom0 starts.
#[derive(clap::Args)]
pub(crate) struct Selection {
    /// Guests to start, each described by a TOML file with the keys of xl.cfg, instead of one stock Linux
    #[arg(value_name = "FILE.toml")]
    #[arg(conflicts_with_all = ["name", "kernel", "ramdisk", "extra", "extra_only", "vcpus", "memory"])]
    guests: Vec<PathBuf>,
    /// What the guest is called [default: linux, or cloud with --cloud]
    #[arg(long, value_name = "NAME", allow_hyphen_values = true)]
    #[arg(value_parser = |name: &str| check_name(name).map(|()| name.to_owned()))]
    name: Option<String>,
    /// Memory of the guest, in MiB or with a suffix: 256M, 1G [default: 256M, or 512M with --cloud]
    #[arg(long, value_name = "SIZE", value_parser = |text: &str| mebibytes(text, 1))]
    memory: Option<u32>,
    /// How many vcpus the guest has
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=32))]
    vcpus: u32,
    /// The guest's kernel, bzImage, ELF or gzip'ed ELF, instead of the stock one; or a kernel that is built first: `patched`,
    /// or `unpatched` to compare with, and `patched-small` and `unpatched-small` with fewer options (`cargo xtask kernel`)
    #[arg(long, value_name = "PATH|patched|...")]
    kernel: Option<PathBuf>,
    /// The guest's initial ramdisk instead of busybox, or `none`
    #[arg(long, value_name = "PATH|none", value_parser = ramdisk)]
    ramdisk: Option<Ramdisk>,
    /// More words for the guest kernel's command line, behind `console=hvc0` (with --first: behind what shows its console)
    #[arg(long, value_name = "WORDS", default_value = "", allow_hyphen_values = true)]
    extra: String,
    /// The guest kernel's whole command line
    #[arg(long, value_name = "WORDS", allow_hyphen_values = true, conflicts_with = "extra")]
    extra_only: Option<String>,
    /// Guests that neither a file nor these options describe.
    #[arg(skip)]
    given: Vec<Described>,
}

/// What is said about a guest's initial ramdisk.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Ramdisk {
    /// There is none.
    None,
    /// A file.
    File(PathBuf),
}

/// A file may be called `none`, too: `./none`.
#[expect(clippy::unnecessary_wraps, reason = "clap asks for a result")]
fn ramdisk(text: &str) -> Result<Ramdisk, String> {
    Ok(if text == "none" { Ramdisk::None } else { Ramdisk::File(text.into()) })
}

/// What stands on a Linux's command line before the words of `--extra`.
const WORDS: &str = "console=hvc0";
/// The same for the first domain, which would look for the firmware's tables, and may not.
const FIRST_WORDS: &str = "console=hvc0 acpi=off";
/// The same for a Linux that cannot be told to be the first domain: its log is shown, and nobody can type.
const LOG_WORDS: &str = "earlyprintk=xen,keep";
/// MiB the hypervisor needs for itself beside what grows with the machine.
const HYPERVISOR_MIB: u64 = 8;
/// Of so many MiB of RAM the hypervisor takes one for its tables.
const PER_TABLE_MIB: u64 = 96;

/// MiB that the first domain can have.
const FIRST_MIB: u64 = MAX_PAGES >> 8;

impl Selection {
    /// Looks at everything the user named, before anything is built or fetched for it, and reads the files that
    /// describe guests. The machine has `memory` MiB.
    ///
    /// # Errors
    /// What is wrong first, and where.
    pub(crate) fn check(&self, sh: &Shell, memory: u32) -> Result<Vec<Described>> {
        let mut described = guest_file::read(sh, &self.guests)?;
        for guest in &self.given {
            let name = &guest.config.name;
            let known = described.iter().any(|other| other.config.name == *name);
            ensure!(!known, "{name:?} is the name of two guests");
            described.push(guest.clone());
        }
        self.check_words(&self.cmdline(WORDS))?;
        // Guests that have the same file share it.
        let mut counted = BTreeSet::new();
        let mut wishes: Vec<Wish<'_>> = described.iter().map(|guest| Wish::of(guest, &mut counted)).collect();
        if described.is_empty() {
            let ramdisk = self.named_ramdisk()?;
            let mut room = 0;
            let kernel = self.named_kernel(sh)?;
            if let Some(path) = &kernel {
                let kernel = KernelFile::read(path)?;
                kernel.fits(self.memory().into(), ramdisk, true).context("--memory")?;
                room = kernel.room;
            }
            let files = [kernel.as_deref(), ramdisk].into_iter().flatten().map(size).sum();
            wishes.push(Wish { at: "--memory", name: self.name(), memory: self.memory().into(), files, room });
        }
        fits(memory.into(), Some(DOM0_SPARE), &wishes)?;
        Ok(described)
    }

    /// Adds a guest that the file `file` describes.
    pub(crate) fn add(&mut self, file: PathBuf) {
        self.guests.push(file);
    }

    /// A guest of these options that runs the process of the image `image`.
    pub(crate) fn container<'a>(&'a self, image: &'a Path, command: &'a [String]) -> Wanted<'a> {
        let (name, extra) = (self.name(), self.cmdline(WORDS));
        Wanted { image, command, name, memory: self.memory(), vcpus: self.vcpus, extra, vif: None, written: None }
    }

    /// Adds a guest.
    pub(crate) fn give(&mut self, guest: Described) {
        self.given.push(guest);
    }

    /// What the options say of a guest from a cloud image: its name, memory in MiB, vcpus and more words for its kernel.
    pub(crate) fn cloud(&self) -> (&str, u32, u32, &str) {
        (self.name.as_deref().unwrap_or("cloud"), self.memory.unwrap_or(512), self.vcpus, &self.extra)
    }

    fn name(&self) -> &str {
        self.name.as_deref().unwrap_or("linux")
    }

    /// MiB.
    fn memory(&self) -> u32 {
        self.memory.unwrap_or(256)
    }

    /// The names of the guests. `described` is what [`Selection::check`] returned.
    pub(crate) fn names<'a>(&'a self, described: &'a [Described]) -> Vec<&'a str> {
        match described {
            [] => vec![self.name()],
            _ => described.iter().map(|guest| guest.config.name.as_str()).collect(),
        }
    }

    /// A bundle with dom0 and the guests. A guest that no file describes has the network device `vif`. `stock` chooses the form
    /// of the stock kernel.
    ///
    /// # Errors
    /// A stock kernel or an initramfs that cannot be fetched, or that does not fit.
    pub(crate) fn bundle(
        &self,
        sh: &Shell,
        described: &[Described],
        dom0: &Path,
        vif: Option<VifConfig>,
        stock: impl Fn(Kernel) -> PathBuf,
    ) -> Result<Bundle> {
        let mut bundle = Bundle::dom0(dom0, "");
        for guest in described {
            let kernel = match guest.stock {
                Some(name) => stock(kernels::stock(sh, name)?),
                None => guest.kernel.clone(),
            };
            bundle = bundle.described(&Described { kernel, ..guest.clone() });
        }
        if !described.is_empty() {
            return Ok(bundle);
        }
        let kernel = match self.named_kernel(sh)? {
            Some(path) => path,
            None => stock(kernels::stock(sh, kernels::DEFAULT)?),
        };
        let ramdisk = match &self.ramdisk {
            None if self.kernel.is_none() => Some(stock_ramdisk(sh, kernels::DEFAULT, vif.is_some())?),
            None => Some(kernels::ramdisk(sh)?),
            Some(_) => self.named_ramdisk()?.map(Path::to_owned),
        };
        let file = KernelFile::read(&kernel)?;
        file.fits(self.memory().into(), ramdisk.as_deref(), true).context("--memory")?;
        file.warn("--memory", self.memory().into(), ramdisk.as_deref())?;
        Ok(bundle.guest(&Guest {
            name: self.name().to_owned(),
            memory: self.memory(),
            vcpus: self.vcpus,
            kernel,
            ramdisk,
            extra: self.cmdline(WORDS),
            vif: vif.into_iter().collect(),
        }))
    }

    /// A bundle with the kernel that `first` names as the first domain: one of the test guests in `images`, a stock kernel,
    /// or a file. The machine has `machine` MiB.
    ///
    /// # Errors
    /// What cannot be fetched, is no kernel, or does not fit.
    pub(crate) fn first(&self, sh: &Shell, first: &str, images: &Path, machine: u32) -> Result<Bundle> {
        let guest = images.join(first);
        let ours = !first.contains('/') && guest.is_file();
        let kernel = if ours {
            guest
        } else if kernels::names().any(|name| name == first) {
            kernels::stock(sh, first)?.vmlinux
        } else {
            first.into()
        };
        let file = KernelFile::read(&kernel)?;
        let words = match file.looks_at_firmware() {
            _ if ours => "",
            true => LOG_WORDS,
            false => FIRST_WORDS,
        };
        let ramdisk = match &self.ramdisk {
            None if ours || !file.takes_unmapped_ramdisk() => None,
            None => Some(kernels::ramdisk(sh)?),
            Some(_) => self.named_ramdisk()?.map(Path::to_owned),
        };
        ensure!(
            ramdisk.is_none() || file.takes_unmapped_ramdisk(),
            "--ramdisk: {first} cannot have one as the first domain: it has no Xen note MOD_START_PFN"
        );
        let memory = u64::from(self.memory());
        ensure!(memory <= FIRST_MIB, "--memory: {memory} MiB, and the first domain can have {FIRST_MIB}");
        file.fits(memory, ramdisk.as_deref(), false).context("--memory")?;
        file.warn("--memory", memory, ramdisk.as_deref())?;
        let files = file.size() + ramdisk.as_deref().map_or(0, size);
        fits(machine.into(), None, &[Wish { at: "--memory", name: first, memory, files, room: 0 }])?;
        let cmdline = self.cmdline(words);
        self.check_words(&cmdline)?;
        Ok(Bundle::first(&kernel, ramdisk.as_deref(), &cmdline).first_memory(memory))
    }

    /// The hypervisor's options, with the number of the first domain's vcpus if it is not one.
    ///
    /// # Errors
    /// They say another number.
    pub(crate) fn first_options(&self, options: &[String]) -> Result<Vec<String>> {
        const VCPUS: &str = "dom0_max_vcpus=";
        let mut options = options.to_vec();
        if self.vcpus != 1 {
            let said = options.iter().flat_map(|words| words.split_whitespace()).any(|word| word.starts_with(VCPUS));
            ensure!(!said, "--vcpus and {VCPUS}N are the same: give one of them");
            options.push(format!("{VCPUS}{}", self.vcpus));
        }
        Ok(options)
    }

    /// The kernel that the user named, built first if it is one of ours.
    pub(crate) fn named_kernel(&self, sh: &Shell) -> Result<Option<PathBuf>> {
        let Some(path) = &self.kernel else { return Ok(None) };
        let ours = built::NAMES.into_iter().find(|name| path == Path::new(name) && !path.exists());
        Ok(Some(match ours {
            Some(name) => built::named(sh, name)?.vmlinux,
            None => path.clone(),
        }))
    }

    /// The ramdisk that the user named.
    fn named_ramdisk(&self) -> Result<Option<&Path>> {
        match &self.ramdisk {
            None | Some(Ramdisk::None) => Ok(None),
            Some(Ramdisk::File(path)) => {
                ensure!(path.is_file(), "no ramdisk {}", path.display());
                Ok(Some(path))
            }
        }
    }

    /// The command line of a guest that no file describes.
    fn cmdline(&self, words: &str) -> String {
        match &self.extra_only {
            Some(only) => only.clone(),
            None => format!("{words} {}", self.extra).trim().to_owned(),
        }
    }

    fn check_words(&self, cmdline: &str) -> Result<()> {
        let option = if self.extra_only.is_some() { "--extra-only" } else { "--extra" };
        let length = cmdline.len();
        ensure!(length <= MAX_EXTRA, "{option}: a command line of {length} bytes, and it can have {MAX_EXTRA}");
        ensure!(!cmdline.contains('\0'), "{option}: a NUL in a command line");
        Ok(())
    }
}

/// The ramdisk of the stock kernel called `name`, with its modules for devices if they can be had.
fn stock_ramdisk(sh: &Shell, name: &str, network: bool) -> Result<PathBuf> {
    kernels::ramdisk_for(sh, name, network).or_else(|why| {
        eprintln!("warning: the guest cannot use disks and networks: {why:#}");
        kernels::ramdisk(sh)
    })
}

/// Bytes of a file; one that cannot be read is found elsewhere.
fn size(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |metadata| metadata.len())
}

/// What a guest takes of the machine's memory.
struct Wish<'a> {
    /// Where it was wished for.
    at: &'a str,
    name: &'a str,
    /// MiB.
    memory: u64,
    /// Bytes of its files, which are in the boot bundle.
    files: u64,
    /// Bytes that unpacking its kernel takes.
    room: u64,
}

impl<'a> Wish<'a> {
    /// The wish of a guest. Files in `counted` are not counted again.
    fn of(guest: &'a Described, counted: &mut BTreeSet<&'a Path>) -> Self {
        let images = guest.images.iter().map(|(_, file)| file);
        let files = [&guest.kernel].into_iter().chain(&guest.ramdisk).chain(images).map(PathBuf::as_path);
        let files = files.filter(|file| counted.insert(file)).map(size).sum();
        let (at, name, memory) = (&guest.memory_at, &guest.config.name, guest.config.memory);
        Self { at, name, memory, files, room: guest.room }
    }
}

/// Whether the guests leave memory for the hypervisor, and for dom0 whenever one of them is made: dom0 starts with so many
/// MiB beside the boot bundle, if it runs.
fn fits(machine: u64, dom0: Option<u64>, guests: &[Wish<'_>]) -> Result<()> {
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let files = mib(guests.iter().map(|guest| guest.files).sum());
    let ours = HYPERVISOR_MIB + machine / PER_TABLE_MIB + dom0.unwrap_or(0) + files;
    let who = if dom0.is_some() { "dom0 and the hypervisor" } else { "the hypervisor and the boot bundle" };
    let mut left = machine.saturating_sub(ours);
    for guest in guests {
        let Wish { at, name, memory, room, .. } = guest;
        let after = left.checked_sub(*memory).with_context(|| {
            format!(
                "{at}: {memory} MiB for {name}, but only {left} MiB are left: the machine has {machine} MiB, of which \
                 {who} take {ours}; give it more with --machine-memory"
            )
        })?;
        let room = mib(*room);
        ensure!(
            room <= after,
            "{at}: {memory} MiB for {name} leave {after} MiB of the machine's {machine}, and unpacking its kernel takes \
             {room}; give it more with --machine-memory"
        );
        left = after;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_counted_before_anything_starts() {
        let wish = |memory, room| Wish { at: "web.toml:2: memory", name: "web", memory, files: 100 << 20, room };
        assert!(fits(1024, Some(8), &[wish(256, 0), wish(256, 200 << 20)]).is_ok());
        let refusal = fits(1024, Some(8), &[wish(512, 0), wish(300, 0)]).unwrap_err().to_string();
        assert!(refusal.starts_with("web.toml:2: memory: 300 MiB for web, but only 286 MiB are left"), "{refusal}");
        let refusal = fits(1024, Some(8), &[wish(512, 700 << 20)]).unwrap_err().to_string();
        assert!(refusal.contains("unpacking its kernel takes 700"), "{refusal}");
        assert!(fits(64, Some(8), &[wish(1, 0)]).is_err());
    }

    #[test]
    fn sizes_have_suffixes() {
        assert_eq!(mebibytes("256", 16), Ok(256));
        assert_eq!(mebibytes("256M", 16), Ok(256));
        assert_eq!(mebibytes("2g", 16), Ok(2048));
        for bad in ["", "M", "1T", "-1", "99999999G", "15", "1.5G"] {
            assert!(mebibytes(bad, 16).is_err(), "{bad}");
        }
    }

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        selection: Selection,
    }

    fn select(words: &[&str]) -> Result<Selection, String> {
        let line = <Line as clap::Parser>::try_parse_from([&["xtask"], words].concat());
        line.map(|line| line.selection).map_err(|error| error.to_string())
    }

    #[test]
    fn the_command_line_is_the_users() {
        let words = |words: &[&str]| select(words).unwrap().cmdline(WORDS);
        assert_eq!(words(&[]), "console=hvc0");
        assert_eq!(words(&["--extra", "quiet -x"]), "console=hvc0 quiet -x");
        assert_eq!(words(&["--extra-only", "-a b"]), "-a b");
        assert_eq!(words(&["--extra-only", ""]), "");
        assert_eq!(select(&["--extra", "how=x"]).unwrap().cmdline(""), "how=x");
        assert!(select(&["--extra", "a", "--extra-only", "b"]).is_err());
        let long = select(&["--extra-only", &"x".repeat(1024)])
            .unwrap()
            .check(&Shell::new().unwrap(), 1024)
            .unwrap_err()
            .to_string();
        assert_eq!(long, "--extra-only: a command line of 1024 bytes, and it can have 1023");
    }

    #[test]
    fn names_are_checked_with_the_line() {
        assert_eq!(select(&["--name", "web"]).unwrap().name(), "web");
        for bad in ["-j", "12", "a b", ""] {
            let why = select(&["--name", bad]).err().unwrap_or_default();
            assert!(why.contains("1 to 64 letters"), "{bad}: {why}");
        }
        assert!(select(&["--name", "Domain-0"]).err().unwrap_or_default().contains("the first domain"));
    }

    #[test]
    fn a_ramdisk_may_be_left_out() {
        let named = |words: &[&str]| select(words).unwrap().ramdisk;
        assert_eq!(named(&[]), None);
        assert_eq!(named(&["--ramdisk", "none"]), Some(Ramdisk::None));
        assert_eq!(named(&["--ramdisk", "./none"]), Some(Ramdisk::File("./none".into())));
        let missing = select(&["--ramdisk", "no/such/file"])
            .unwrap()
            .check(&Shell::new().unwrap(), 1024)
            .unwrap_err()
            .to_string();
        assert_eq!(missing, "no ramdisk no/such/file");
    }

    #[test]
    fn vcpus_of_the_first_domain_are_an_option_of_the_hypervisor() {
        let options = |words: &[&str], given: &[&str]| {
            let given: Vec<String> = given.iter().map(|word| (*word).to_owned()).collect();
            select(words).unwrap().first_options(&given).map_err(|error| error.to_string())
        };
        assert_eq!(options(&[], &["log=debug"]), Ok(vec!["log=debug".to_owned()]));
        assert_eq!(options(&["--vcpus", "3"], &[]), Ok(vec!["dom0_max_vcpus=3".to_owned()]));
        assert!(options(&["--vcpus", "3"], &["log=debug dom0_max_vcpus=2"]).unwrap_err().contains("are the same"));
        assert!(options(&[], &["dom0_max_vcpus=2"]).is_ok());
    }

    /// What a first domain cannot have is told before there is a machine.
    #[test]
    fn a_first_domain_must_fit() {
        let folder = tempfile::tempdir().unwrap();
        let [kernel, ramdisk] = ["kernel", "ramdisk"].map(|name| folder.path().join(name));
        std::fs::write(&kernel, test_kernels::halting()).unwrap();
        std::fs::write(&ramdisk, "ramdisk").unwrap();
        let [first, ramdisk] = [kernel, ramdisk].map(|path| path.to_string_lossy().into_owned());
        let made = |words: &[&str], machine| {
            let sh = Shell::new().unwrap();
            select(words).unwrap().first(&sh, &first, Path::new(""), machine).map_err(|error| format!("{error:#}"))
        };
        assert!(made(&[], 1024).is_ok() && made(&["--ramdisk", "none", "--memory", "4"], 64).is_ok());
        for (words, machine, why) in [
            (&["--ramdisk", &ramdisk][..], 1024, "cannot have one as the first domain"),
            (&["--memory", "3"], 1024, "--memory: too little memory: needs 4 MiB at least"),
            (&["--memory", "900"], 512, "--memory: 900 MiB for"),
            (&["--memory", "3G"], 8192, "--memory: 3072 MiB, and the first domain can have 2048"),
        ] {
            let refusal = made(words, machine).unwrap_err();
            assert!(refusal.contains(why), "{refusal}");
        }
    }
}
