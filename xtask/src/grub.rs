//! Bootable images: GRUB, the hypervisor and its bundle in one ISO file that BIOS and UEFI machines boot, from a CD or
//! from a stick.
//!
//! GRUB's modules and the programs that assemble the file are used where they are installed, or else fetched from the
//! distribution without installing them. The layout is that of `grub-mkrescue`: an El Torito image for BIOS, a FAT image
//! with `EFI/BOOT/BOOTX64.EFI` for UEFI, and a boot sector and partitions for machines that see a disk.

use crate::apt::{self, Programs};
use anyhow::{Context, Result, ensure};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use xshell::Shell;

/// The packages everything comes from.
const PACKAGES: [&str; 5] = ["grub-common", "grub-pc-bin", "grub-efi-amd64-bin", "xorriso", "mtools"];
/// What must be there, below a root.
const FILES: [&str; 8] = [
    "usr/bin/grub-mkimage",
    "usr/bin/xorriso",
    "usr/bin/mformat",
    "usr/bin/mmd",
    "usr/bin/mcopy",
    "usr/lib/grub/i386-pc/moddep.lst",
    "usr/lib/grub/i386-pc/boot_hybrid.img",
    "usr/lib/grub/x86_64-efi/moddep.lst",
];
/// GRUB's modules on either firmware; BIOS needs its disk driver as well.
const MODULES: &str =
    "normal iso9660 part_msdos part_gpt search search_fs_file multiboot2 configfile echo test serial terminal";
/// What GRUB does first: it looks for the medium it was loaded from.
const EARLY: &str = "search --no-floppy --file --set=root /boot/tenon/hypervisor\nset prefix=($root)/boot/grub\n";

const NEEDED: Programs = Programs {
    kind: "grub",
    packages: &PACKAGES,
    why: "to make bootable images",
    complete: |root| FILES.iter().all(|file| root.join(file).is_file()),
};

/// GRUB and the programs that make an image of it.
#[derive(Clone, Debug)]
pub struct Tools {
    /// They lie below this folder; `/` if they are installed.
    root: PathBuf,
}

impl Tools {
    /// The installed tools, or those in the cache, fetched first if need be.
    ///
    /// # Errors
    /// They are not all installed, and there is no way to fetch them.
    pub fn find(sh: &Shell) -> Result<Self> {
        NEEDED.find(sh).map(|root| Self { root })
    }

    /// For `doctor`: whether there is all that images need, and where.
    ///
    /// # Errors
    /// No cache folder can be named.
    pub fn state() -> Result<(bool, String)> {
        Ok(match NEEDED.present()? {
            Some(root) => (true, format!("GRUB and xorriso below {}", root.display())),
            None => (false, "GRUB and xorriso would be fetched for `cargo xtask image` (8 MB)".into()),
        })
    }

    /// Runs one of the programs.
    fn run<I: AsRef<OsStr>>(&self, program: &str, arguments: impl IntoIterator<Item = I>) -> Result<()> {
        let mut command = apt::command(&self.root, &self.root.join("usr/bin").join(program));
        // No configuration of the user's has a say.
        command.env("MTOOLSRC", "/dev/null").args(arguments);
        let output = command.output().with_context(|| format!("cannot start {program}"))?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{program} failed: {}", said.trim_end());
        Ok(())
    }

    /// GRUB with its modules in one file that `format` says the firmware of.
    fn image(&self, format: &str, modules: &str, early: &Path, target: &Path) -> Result<()> {
        let platform = format.trim_end_matches("-eltorito");
        let mut arguments: Vec<OsString> = ["-O", format, "-p", "/boot/grub", "-d"].map(Into::into).into();
        arguments.push(self.root.join("usr/lib/grub").join(platform).into());
        arguments.extend(["-c".into(), early.into(), "-o".into(), target.into()]);
        arguments.extend(modules.split(' ').chain(MODULES.split(' ')).map(Into::into));
        self.run("grub-mkimage", arguments)
    }

    /// A FAT image with the UEFI program `efi` where firmware looks for it.
    fn fat(&self, efi: &Path, image: &Path) -> Result<()> {
        let on_image = |program: &str, words: &[&OsStr]| {
            self.run(program, [OsStr::new("-i"), image.as_os_str()].iter().chain(words))
        };
        on_image("mformat", &["-C", "-f", "2880", "-L", "16", "::"].map(OsStr::new))?;
        on_image("mmd", &["::/EFI", "::/EFI/BOOT"].map(OsStr::new))?;
        on_image("mcopy", &[efi.as_os_str(), OsStr::new("::/EFI/BOOT/BOOTX64.EFI")])
    }

    /// Writes an image with the hypervisor (an ELF file) and the archive `bundle` to `output`; what was there before is
    /// replaced, and only by a complete image.
    ///
    /// # Errors
    /// A program that fails, or no room beside `output`.
    pub fn iso(&self, hypervisor: &Path, bundle: &Path, menu: &Menu, output: &Path) -> Result<()> {
        let folder = output.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new("."));
        let scratch = tempfile::Builder::new().prefix(".tenon-").tempdir_in(folder);
        let scratch = scratch.with_context(|| format!("cannot write to {}", folder.display()))?;
        let [tree, early, efi, made] = ["tree", "early", "efi", "iso"].map(|name| scratch.path().join(name));
        let (grub, tenon) = (tree.join("boot/grub"), tree.join("boot/tenon"));
        for folder in [&grub, &tenon] {
            fs::create_dir_all(folder)?;
        }
        let copy = |from: &Path, to: &str| {
            fs::copy(from, tenon.join(to)).map(drop).with_context(|| format!("cannot copy {}", from.display()))
        };
        copy(hypervisor, "hypervisor")?;
        copy(bundle, "bundle")?;
        fs::write(grub.join("grub.cfg"), &menu.0)?;
        fs::write(&early, EARLY)?;
        self.image("i386-pc-eltorito", "biosdisk", &early, &grub.join("bios.img"))?;
        self.image("x86_64-efi", "fat", &early, &efi)?;
        self.fat(&efi, &grub.join("efi.img"))?;
        let mut arguments: Vec<OsString> =
            "-as mkisofs -quiet -r -iso-level 3 -V TENON -b boot/grub/bios.img -no-emul-boot -boot-load-size 4 \
             -boot-info-table --grub2-boot-info --efi-boot boot/grub/efi.img -efi-boot-part --efi-boot-image \
             --protective-msdos-label --grub2-mbr"
                .split_whitespace()
                .map(Into::into)
                .collect();
        arguments.push(self.root.join("usr/lib/grub/i386-pc/boot_hybrid.img").into());
        arguments.extend(["-o".into(), made.clone().into(), tree.into()]);
        self.run("xorriso", arguments)?;
        fs::rename(&made, output).with_context(|| format!("cannot write {}", output.display()))
    }
}

/// What GRUB shows and does: one entry, taken at once.
#[derive(Clone, Debug)]
pub struct Menu(String);

impl Menu {
    /// A menu that gives the hypervisor these options.
    ///
    /// # Errors
    /// An option that cannot be passed on because it means something to GRUB.
    pub fn new(options: &[String]) -> Result<Self> {
        let safe = |c: char| c.is_ascii_alphanumeric() || "_-=.,:/+".contains(c);
        for option in options {
            ensure!(option.chars().all(safe), "GRUB cannot pass on the hypervisor option {option:?}");
        }
        let options: String = options.iter().map(|option| format!(" {option}")).collect();
        // On BIOS machines GRUB speaks where the hypervisor does; UEFI firmware decides by itself where its console is.
        Ok(Self(format!(
            "if [ \"$grub_platform\" = pc ]; then\n  \
               serial --unit=0 --speed=115200\n  \
               terminal_input console serial\n  \
               terminal_output console serial\n\
             fi\n\
             set timeout=0\n\
             menuentry Tenon {{\n  \
               echo 'Tenon speaks on the first serial line, COM1, at 115200 baud.'\n  \
               multiboot2 /boot/tenon/hypervisor console=com1{options}\n  \
               module2 /boot/tenon/bundle\n\
             }}\n"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_reach_the_hypervisor_and_nothing_else() {
        let Menu(menu) = Menu::new(&["log=debug".into(), "dom0_max_vcpus=2".into()]).unwrap();
        assert!(menu.contains("hypervisor console=com1 log=debug dom0_max_vcpus=2\n"), "{menu}");
        for bad in ["log=debug; reboot", "a\nb", "'", "$root", "}"] {
            let refusal = Menu::new(&[bad.into()]).unwrap_err().to_string();
            assert_eq!(refusal, format!("GRUB cannot pass on the hypervisor option {bad:?}"));
        }
    }

    #[test]
    fn a_failing_program_is_named_and_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let tools = Tools { root: folder.path().join("nothing") };
        let (menu, output) = (Menu::new(&[]).unwrap(), folder.path().join("out.iso"));
        let here = std::env::current_exe().unwrap();
        let error = format!("{:#}", tools.iso(&here, &here, &menu, &output).unwrap_err());
        assert!(error.starts_with("cannot start grub-mkimage"), "{error}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "something was left behind");
        let error = format!("{:#}", tools.iso(&here, &here, &menu, &folder.path().join("no/out.iso")).unwrap_err());
        assert!(error.starts_with("cannot write to "), "{error}");
    }
}
