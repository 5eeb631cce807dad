//! Refusing a guest kernel that cannot work, before a machine is started for it.

use anyhow::{Context, Result, anyhow};
use guest_image::{Config, Kernel, PAGE_SIZE, Plan};
use std::borrow::Cow;
use std::fs;
use std::path::Path;

/// No kernel unpacks to more than this many bytes.
pub(crate) const UNPACKED_LIMIT: usize = 256 << 20;
const PAGES_PER_MIB: u64 = (1 << 20) / PAGE_SIZE;

/// A kernel that can run as a paravirtualized guest.
pub struct KernelFile {
    elf: Vec<u8>,
    /// Bytes that unpacking it takes.
    pub room: u64,
}

impl KernelFile {
    /// Reads a kernel.
    ///
    /// # Errors
    /// One line that says what is wrong: no such file, neither bzImage nor ELF, a payload cut short, no Xen notes.
    pub fn read(path: &Path) -> Result<Self> {
        let inspect = || -> Result<Self> {
            let file = fs::read(path).context("cannot be read")?;
            let elf = unpack(&file)?;
            Kernel::parse(&elf).map_err(|error| anyhow!("{error}"))?;
            Ok(Self { room: toolstack::unpack::room_for(&file) as u64, elf: elf.into_owned() })
        };
        inspect().with_context(|| format!("unusable kernel {}", path.display()))
    }

    /// Bytes of the ELF file.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.elf.len() as u64
    }

    /// Whether it can be told where its ramdisk is by page number, as it must be in the first domain.
    #[must_use]
    pub fn takes_unmapped_ramdisk(&self) -> bool {
        Kernel::parse(&self.elf).is_ok_and(|kernel| kernel.unmapped_ramdisk)
    }

    /// Whether this is a kernel that [`looks_at_firmware`] where it is the first domain.
    #[must_use]
    pub fn looks_at_firmware(&self) -> bool {
        looks_at_firmware(&self.elf)
    }

    /// Checks that kernel and ramdisk find room in a guest of `memory` MiB, which has rings unless it is the first domain.
    ///
    /// # Errors
    /// How much it needs; or the ramdisk cannot be read.
    pub fn fits(&self, memory: u64, ramdisk: Option<&Path>, rings: bool) -> Result<()> {
        let ramdisk = read_ramdisk(ramdisk)?;
        let nr_pages = memory.saturating_mul(PAGES_PER_MIB);
        let config = Config { nr_pages, ramdisk: &ramdisk, rings, ..Config::default() };
        let plan = Kernel::parse(&self.elf).and_then(|kernel| Plan::new(kernel, config));
        plan.map(|_| ()).map_err(|why| anyhow!("{why}"))
    }

    /// What to warn of if a guest of `memory` MiB cannot hold its ramdisk beside what that unpacks to.
    ///
    /// # Errors
    /// The ramdisk cannot be read.
    pub fn ramdisk_warning(&self, memory: u64, ramdisk: Option<&Path>) -> Result<Option<String>> {
        Ok(toolstack::ramdisk::warning(memory, &self.elf, &read_ramdisk(ramdisk)?))
    }

    /// Prints the warning of [`KernelFile::ramdisk_warning`], if any, behind the place `at` that sets the memory.
    ///
    /// # Errors
    /// As [`KernelFile::ramdisk_warning`].
    pub fn warn(&self, at: &str, memory: u64, ramdisk: Option<&Path>) -> Result<()> {
        if let Some(why) = self.ramdisk_warning(memory, ramdisk)? {
            eprintln!("warning: {at}: {why}");
        }
        Ok(())
    }
}

/// The ramdisk's content, empty if there is none.
fn read_ramdisk(path: Option<&Path>) -> Result<Vec<u8>> {
    let content = path.map(|path| fs::read(path).with_context(|| format!("cannot read {}", path.display())));
    Ok(content.transpose()?.unwrap_or_default())
}

/// Whether a kernel that is told to be the first domain looks for a table of the firmware's below the first MiB of the
/// machine, before it can do without: Linux from 6.5 on. Nobody may map that memory.
pub(crate) fn looks_at_firmware(elf: &[u8]) -> bool {
    const BANNER: &[u8] = b"Linux version ";
    let Some(at) = elf.windows(BANNER.len()).position(|window| window == BANNER) else { return false };
    let version = elf.get(at + BANNER.len()..).unwrap_or_default();
    let mut numbers = version.split(|byte| !byte.is_ascii_digit()).map(|number| {
        let number = std::str::from_utf8(number).ok()?;
        number.parse::<u32>().ok()
    });
    let version = (numbers.next().flatten(), numbers.next().flatten());
    matches!(version, (Some(major), Some(minor)) if (major, minor) >= (6, 5))
}

/// The ELF file in `image`, a bzImage, gzip'ed, or already an ELF file.
pub(crate) fn unpack(image: &[u8]) -> Result<Cow<'_, [u8]>> {
    Ok(toolstack::unpack::unpack(image, UNPACKED_LIMIT)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(content: &[u8]) -> String {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), content).unwrap();
        told(file.path())
    }

    fn told(path: &Path) -> String {
        KernelFile::read(path).map_or_else(|why| format!("{why:#}"), |_| panic!("{} is a kernel", path.display()))
    }

    #[test]
    fn each_kind_of_bad_file_is_one_line_that_names_it() {
        assert!(told(Path::new("no/such/file")).contains("no/such/file"));
        for (content, words) in
            [(&b"#!/bin/sh\n"[..], "neither"), (b"\x7fELF", "ELF"), (&test_kernels::cut_bzimage(), "cut off")]
        {
            let refusal = refusal(content);
            assert!(refusal.contains(words), "{words} not in: {refusal}");
            assert!(refusal.starts_with("unusable kernel ") && refusal.lines().count() == 1, "{refusal}");
        }
    }

    /// This test's own program is a sound ELF file, yet no kernel.
    #[test]
    fn a_program_without_xen_notes_is_refused() {
        let refusal = told(&std::env::current_exe().unwrap());
        assert!(refusal.contains("notes") || refusal.contains("Xen"), "{refusal}");
    }

    #[test]
    fn kernel_and_ramdisk_must_find_room() {
        let folder = tempfile::tempdir().unwrap();
        let [kernel, ramdisk] = ["kernel", "ramdisk"].map(|name| folder.path().join(name));
        fs::write(&kernel, test_kernels::halting()).unwrap();
        fs::write(&ramdisk, vec![1; 6 << 20]).unwrap();
        let kernel = KernelFile::read(&kernel).unwrap();
        let refusal = |memory, ramdisk| kernel.fits(memory, ramdisk, true).unwrap_err().to_string();
        assert!(kernel.fits(4, None, true).is_ok() && kernel.fits(8, Some(&ramdisk), true).is_ok());
        assert!(refusal(3, None).contains("needs 4 MiB at least") && refusal(3, None).contains("has 3 MiB"));
        assert!(refusal(7, Some(&ramdisk)).contains("needs 8 MiB at least for the kernel and its ramdisk, has 7 MiB"));
        assert!(refusal(8, Some(&folder.path().join("other"))).contains("cannot read"));
        assert!(!kernel.takes_unmapped_ramdisk());
    }

    #[test]
    fn a_ramdisk_that_cannot_be_unpacked_is_warned_of() {
        let folder = tempfile::tempdir().unwrap();
        let [kernel, ramdisk] = ["kernel.gz", "ramdisk.gz"].map(|name| folder.path().join(name));
        fs::write(&kernel, test_kernels::gzipped(&test_kernels::halting())).unwrap();
        fs::write(&ramdisk, test_kernels::gzipped(&vec![7; 40 << 20])).unwrap();
        let kernel = KernelFile::read(&kernel).unwrap();
        assert_eq!(
            kernel.ramdisk_warning(32, Some(&ramdisk)).unwrap().unwrap(),
            "32 MiB of memory cannot hold the ramdisk (1 MiB) beside what it unpacks to (40 MiB) and the kernel (1 MiB): \
             it takes 41 MiB and more"
        );
        assert_eq!(kernel.ramdisk_warning(42, Some(&ramdisk)).unwrap(), None);
        assert_eq!(kernel.ramdisk_warning(4, None).unwrap(), None);
    }

    #[test]
    fn later_linuxes_look_at_the_firmware() {
        let says = |banner: &[u8]| looks_at_firmware(&[b"\0Linux", banner, b"\0"].concat());
        assert!(
            says(b"Linux version 6.5-rc1") && says(b"Linux version 6.12.117+deb13") && says(b"Linux version 7.2.0")
        );
        assert!(!says(b"Linux version 6.1.0-50-amd64") && !says(b"Linux version 5.10.0") && !says(b"version 6.12"));
        assert!(!says(b"Linux version ") && !says(b"Linux version %s"));
    }
}
