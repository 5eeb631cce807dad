//! The guests a user asks for, whatever machine they are for: files that describe them, or one put together from options.

use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use toolstack::config::MAX_EXTRA;
use xshell::Shell;
use xtask::bundle::{Bundle, DOM0_SPARE, Guest};
use xtask::guest_file::{self, Described};
use xtask::kernel_file;
use xtask::kernels::{self, Kernel};

/// Which guests dom0 starts.
#[derive(clap::Args)]
pub(crate) struct Selection {
    /// Guests to start, each described by a TOML file with the keys of xl.cfg, instead of one stock Linux
    #[arg(value_name = "FILE.toml", conflicts_with_all = ["kernel", "ramdisk", "extra", "vcpus", "memory"])]
    guests: Vec<PathBuf>,
    /// Memory of the guest, in MiB or with a suffix: 256M, 1G
    #[arg(long, value_name = "SIZE", default_value = "256", value_parser = |text: &str| mebibytes(text, 1))]
    pub(crate) memory: u32,
    /// How many vcpus the guest has
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=32))]
    vcpus: u32,
    /// The guest's kernel, bzImage or ELF, instead of the stock one
    #[arg(long, value_name = "PATH")]
    kernel: Option<PathBuf>,
    /// The guest's initial ramdisk, instead of busybox
    #[arg(long, value_name = "PATH")]
    pub(crate) ramdisk: Option<PathBuf>,
    /// More words for the guest kernel's command line
    #[arg(long, value_name = "WORDS", default_value = "", allow_hyphen_values = true)]
    pub(crate) extra: String,
}

/// MiB the hypervisor needs for itself beside what grows with the machine.
const HYPERVISOR_MIB: u64 = 8;
/// Of so many MiB of RAM the hypervisor takes one for its tables.
const PER_TABLE_MIB: u64 = 96;

/// A size in MiB: `256`, `256M` or `1G`.
pub(crate) fn mebibytes(text: &str, least: u32) -> Result<u32, String> {
    let (number, unit) = match text.strip_suffix(['G', 'g']) {
        Some(number) => (number, 1024),
        None => (text.strip_suffix(['M', 'm']).unwrap_or(text), 1),
    };
    let size = number.parse::<u32>().ok().and_then(|number| number.checked_mul(unit));
    let size = size.ok_or("a size is a number of MiB, or has a suffix: 256M, 1G")?;
    if size < least { Err(format!("at least {least}M")) } else { Ok(size) }
}

impl Selection {
    /// Looks at everything the user named, before anything is built or fetched for it, and reads the files that
    /// describe guests. The machine has `memory` MiB.
    ///
    /// # Errors
    /// What is wrong first, and where.
    pub(crate) fn check(&self, memory: u32) -> Result<Vec<Described>> {
        let described = guest_file::read(&self.guests)?;
        let room = self.kernel.as_deref().map(kernel_file::check).transpose()?;
        if let Some(path) = &self.ramdisk {
            ensure!(path.is_file(), "no ramdisk {}", path.display());
        }
        let words = self.cmdline().len();
        ensure!(words <= MAX_EXTRA, "--extra: {words} bytes with `console=hvc0`, and a command line has {MAX_EXTRA}");
        let mut wishes: Vec<Wish<'_>> = described.iter().map(Wish::of).collect();
        if described.is_empty() {
            let files = [self.kernel.as_deref(), self.ramdisk.as_deref()].into_iter().flatten().map(size).sum();
            let (memory, room) = (self.memory.into(), room.unwrap_or(0));
            wishes.push(Wish { at: "--memory", name: "linux", memory, files, room });
        }
        fits(memory.into(), &wishes)?;
        Ok(described)
    }

    /// A bundle with dom0 and the guests. `stock` chooses the form of the stock kernel.
    ///
    /// # Errors
    /// A stock kernel or an initramfs that cannot be fetched.
    pub(crate) fn bundle(
        &self,
        sh: &Shell,
        described: &[Described],
        dom0: &Path,
        stock: impl FnOnce(Kernel) -> PathBuf,
    ) -> Result<Bundle> {
        let bundle = Bundle::dom0(dom0, "");
        if !described.is_empty() {
            return Ok(described.iter().fold(bundle, Bundle::described));
        }
        let kernel = match &self.kernel {
            Some(path) => path.clone(),
            None => stock(kernels::stock(sh, kernels::DEFAULT)?),
        };
        Ok(bundle.guest(&Guest {
            name: "linux".into(),
            memory: self.memory,
            vcpus: self.vcpus,
            kernel,
            ramdisk: Some(self.ramdisk(sh)?),
            extra: self.cmdline(),
        }))
    }

    /// The initial ramdisk of a Linux that no file describes.
    ///
    /// # Errors
    /// It cannot be fetched.
    pub(crate) fn ramdisk(&self, sh: &Shell) -> Result<PathBuf> {
        self.ramdisk.clone().map_or_else(|| kernels::ramdisk(sh), Ok)
    }

    /// Its command line.
    pub(crate) fn cmdline(&self) -> String {
        format!("console=hvc0 {}", self.extra).trim_end().to_owned()
    }
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
    fn of(guest: &'a Described) -> Self {
        let files = size(&guest.kernel) + guest.ramdisk.as_deref().map_or(0, size);
        let (at, name, memory) = (&guest.memory_at, &guest.config.name, guest.config.memory);
        Self { at, name, memory, files, room: guest.room }
    }
}

/// Whether the guests leave memory for dom0 and the hypervisor, whenever one of them is made.
fn fits(machine: u64, guests: &[Wish<'_>]) -> Result<()> {
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let files = mib(guests.iter().map(|guest| guest.files).sum());
    let ours = HYPERVISOR_MIB + machine / PER_TABLE_MIB + DOM0_SPARE + files;
    let mut left = machine.saturating_sub(ours);
    for guest in guests {
        let Wish { at, name, memory, room, .. } = guest;
        let after = left.checked_sub(*memory).with_context(|| {
            format!(
                "{at}: {memory} MiB for {name}, but only {left} MiB are left: the machine has {machine} MiB, of which \
                 dom0 and the hypervisor take {ours}; give it more with --machine-memory"
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
        assert!(fits(1024, &[wish(256, 0), wish(256, 200 << 20)]).is_ok());
        let refusal = fits(1024, &[wish(512, 0), wish(300, 0)]).unwrap_err().to_string();
        assert!(refusal.starts_with("web.toml:2: memory: 300 MiB for web, but only 286 MiB are left"), "{refusal}");
        let refusal = fits(1024, &[wish(512, 700 << 20)]).unwrap_err().to_string();
        assert!(refusal.contains("unpacking its kernel takes 700"), "{refusal}");
        assert!(fits(64, &[wish(1, 0)]).is_err());
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
}
