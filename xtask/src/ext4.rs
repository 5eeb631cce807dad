//! File systems of guests, made and checked on the host by e2fsprogs, which is installed, or fetched into the cache.

use crate::apt::{self, Programs};
use anyhow::{Context, Result, ensure};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use xshell::Shell;

/// The programs that are needed, and the folders of a root in which they may be.
const PROGRAMS: [&str; 2] = ["mke2fs", "e2fsck"];
const FOLDERS: [&str; 2] = ["usr/sbin", "sbin"];
/// The exit code of `e2fsck` if the file system needs no repair.
const CLEAN: i32 = 0;

const NEEDED: Programs = Programs {
    kind: "e2fsprogs",
    packages: &["e2fsprogs"],
    why: "to make and check file systems",
    complete: |root| PROGRAMS.iter().all(|program| file(root, program).is_some()),
};

/// The programs of e2fsprogs.
#[derive(Clone, Debug)]
pub struct Tools {
    /// The folder below which the programs are: `/` if they are installed.
    root: PathBuf,
}

impl Tools {
    /// Finds the programs: installed, or in the cache. Fetches them into the cache if they are in neither place.
    ///
    /// # Errors
    /// The programs are not installed and cannot be fetched, or the package lacks one of them.
    pub fn find(sh: &Shell) -> Result<Self> {
        NEEDED.find(sh).map(|root| Self { root })
    }

    /// Returns, for `doctor`, whether the programs are there, and a text that tells where they are or would come from.
    ///
    /// # Errors
    /// No cache folder can be named.
    pub fn state() -> Result<(bool, String)> {
        Ok(match NEEDED.present()? {
            Some(root) => (true, format!("e2fsprogs below {}", root.display())),
            None => (false, "e2fsprogs would be fetched for `cargo xtask test` (1 MB)".into()),
        })
    }

    fn run(&self, program: &str, arguments: &[&OsStr]) -> Result<Output> {
        let file = file(&self.root, program).with_context(|| format!("no {program}"))?;
        let mut command = Command::new(file);
        command.envs(self.environment()).args(arguments).output().with_context(|| format!("cannot start {program}"))
    }

    /// The file of `mke2fs`.
    ///
    /// # Errors
    /// There is none.
    pub(crate) fn maker(&self) -> Result<PathBuf> {
        file(&self.root, "mke2fs").context("no mke2fs")
    }

    /// What the programs want in their environment: the libraries and the configuration that came with them.
    pub(crate) fn environment(&self) -> Vec<(OsString, OsString)> {
        let mut command = apt::command(&self.root, Path::new(""));
        if self.root != Path::new("/") {
            // The configuration file names the usual features of an ext4 file system.
            command.env("MKE2FS_CONFIG", self.root.join("etc/mke2fs.conf"));
        }
        command.get_envs().filter_map(|(key, value)| Some((key.to_owned(), value?.to_owned()))).collect()
    }

    /// Makes an empty ext4 file system that fills the existing file `image`.
    ///
    /// # Errors
    /// `mke2fs` cannot be run, or fails: with its message.
    pub fn make(&self, image: &Path) -> Result<()> {
        self.make_of(image, &[])
    }

    /// Makes an ext4 file system with the files of a folder, which fills the existing file `image`.
    ///
    /// # Errors
    /// As [`Tools::make`].
    pub fn fill(&self, image: &Path, folder: &Path) -> Result<()> {
        self.make_of(image, &[OsStr::new("-d"), folder.as_os_str()])
    }

    fn make_of(&self, image: &Path, more: &[&OsStr]) -> Result<()> {
        let arguments = ["-q", "-F", "-t", "ext4"].map(OsStr::new);
        let output = self.run("mke2fs", &[&arguments[..], more, &[image.as_os_str()]].concat())?;
        ensure!(output.status.success(), "mke2fs: {}", String::from_utf8_lossy(&output.stderr).trim_end());
        Ok(())
    }

    /// Checks the whole file system in the file `image`, and changes nothing.
    ///
    /// # Errors
    /// What is wrong with the file system.
    pub fn check(&self, image: &Path) -> Result<()> {
        let output = self.run("e2fsck", &[OsStr::new("-fn"), image.as_os_str()])?;
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.code() == Some(CLEAN), "e2fsck: {}: {}", output.status, said.trim_end());
        Ok(())
    }
}

/// Returns the file of a program below a root. `None` if there is no such file.
fn file(root: &Path, program: &str) -> Option<PathBuf> {
    FOLDERS.iter().map(|folder| root.join(folder).join(program)).find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, OpenOptions};
    use std::io::{Seek, SeekFrom, Write};

    #[test]
    fn a_damaged_file_system_is_found() {
        // Where they would have to be fetched, the system tests do so, and use them.
        let Some(root) = NEEDED.present().unwrap() else { return };
        let tools = Tools { root };
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        fs::write(&image, vec![0; 4 << 20]).unwrap();
        tools.make(&image).unwrap();
        tools.check(&image).unwrap();
        // The first group's bitmaps and tables follow the second block.
        let mut file = OpenOptions::new().write(true).open(&image).unwrap();
        file.seek(SeekFrom::Start(8 << 10)).unwrap();
        file.write_all(&[0xa5; 32 << 10]).unwrap();
        let why = tools.check(&image).unwrap_err().to_string();
        assert!(why.starts_with("e2fsck: exit status: "), "{why}");
    }
}
