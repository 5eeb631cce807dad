//! The guests a user asks for, whatever machine they are for: files that describe them, or one put together from options.

use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use xshell::Shell;
use xtask::bundle::{Bundle, DOM0_SPARE, Guest};
use xtask::guest_file::{self, Described};
use xtask::kernel_file;
use xtask::kernels::{self, Kernel};

/// Which guests dom0 starts.
#[derive(clap::Args)]
pub(crate) struct Selection {
    /// Guests to start, each described by a TOML file with the keys of xl.cfg, instead of one stock Linux
    #[arg(value_name = "FILE.toml", conflicts_with_all = ["kernel", "ramdisk", "extra", "vcpus", "guest_memory"])]
    guests: Vec<PathBuf>,
    /// Memory of the guest, in MiB or with a suffix
    #[arg(long, value_name = "SIZE", default_value = "256", value_parser = |text: &str| mebibytes(text, 16))]
    pub(crate) guest_memory: u32,
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

/// MiB the hypervisor may need for itself.
const HYPERVISOR_MIB: u64 = 32;

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
        fits(memory, &described)?;
        if let Some(path) = &self.kernel {
            kernel_file::check(path)?;
        }
        if let Some(path) = &self.ramdisk {
            ensure!(path.is_file(), "no ramdisk {}", path.display());
        }
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
            memory: self.guest_memory,
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

/// Whether the guests leave memory for dom0 and the hypervisor.
fn fits(memory: u32, guests: &[Described]) -> Result<()> {
    let bytes = |path: &Path| std::fs::metadata(path).map_or(0, |metadata| metadata.len());
    let files = |guest: &Described| bytes(&guest.kernel) + guest.ramdisk.as_deref().map_or(0, bytes);
    let ours = HYPERVISOR_MIB + DOM0_SPARE + guests.iter().map(files).sum::<u64>().div_ceil(1 << 20);
    let mut left = u64::from(memory).saturating_sub(ours);
    for guest in guests {
        let wanted = guest.config.memory;
        left = left.checked_sub(wanted).with_context(|| {
            format!(
                "{}: {wanted} MiB for {}, but only {left} MiB are left: the machine has {memory} MiB, of which dom0 \
                 and the hypervisor take {ours}; give it more with --memory",
                guest.memory_at, guest.config.name
            )
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

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
