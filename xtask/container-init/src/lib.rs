//! What the first program of a container's guest is told by the host, and what it tells the host at the end.
//!
//! Both are on one small disk, which the guest has beside the disk with the container's files. Sector 0 and the seven that
//! follow hold the end of the process, [`End`], or zeros as long as it has not ended. Behind them is the process, [`Process`].
//! Both are JSON, filled up with zeros. Nothing that the process prints can be taken for its end.

#![forbid(unsafe_code)]

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

/// Bytes at the beginning of the disk that are for the end of the process.
pub const END_BYTES: usize = 4096;
/// The most bytes that a disk for a process has.
pub const MAX_BYTES: usize = 4 << 20;

/// The process of a container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Process {
    /// The program and its arguments. A program without `/` is looked for in `PATH`.
    pub args: Vec<String>,
    /// The whole environment: `KEY=VALUE`.
    pub env: Vec<String>,
    /// The working directory, which is made if it is missing.
    pub cwd: String,
    /// The user's number.
    pub uid: u32,
    /// The number of the user's group.
    pub gid: u32,
    /// The numbers of more groups.
    pub groups: Vec<u32>,
    /// The name of the guest.
    pub hostname: String,
    /// The signal that asks the process to end.
    pub stop_signal: u8,
    /// MiB of memory for what the process writes to files; `None` for half of the guest's memory.
    pub written_mib: Option<u32>,
}

/// How the process of a container ended.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// It exited with this status.
    Exited(u8),
    /// This signal ended it.
    Killed(u8),
    /// It was not started: why.
    Failed(String),
}

impl Process {
    /// The content of a new disk for this process.
    ///
    /// # Errors
    /// The process has too many arguments, or too large ones.
    pub fn to_disk(&self) -> Result<Vec<u8>> {
        let mut disk = vec![0; END_BYTES];
        disk.extend(serde_json::to_vec(self)?);
        disk.resize(disk.len().next_multiple_of(END_BYTES), 0);
        ensure!(disk.len() <= MAX_BYTES, "arguments and environment of more than {} MiB", MAX_BYTES >> 20);
        Ok(disk)
    }

    /// Reads the process from the content of a disk.
    ///
    /// # Errors
    /// There is none.
    pub fn of_disk(disk: &[u8]) -> Result<Self> {
        parse(disk.get(END_BYTES..).unwrap_or_default())?.context("no process")
    }
}

impl End {
    /// The first bytes of a disk, from an end.
    #[must_use]
    pub fn to_disk(&self) -> Vec<u8> {
        let short = |end: &Self| serde_json::to_vec(end).ok().filter(|json| json.len() <= END_BYTES);
        // Only a reason can be too long.
        let mut bytes = short(self).or_else(|| short(&Self::Failed("too long to be told".into()))).unwrap_or_default();
        bytes.resize(END_BYTES, 0);
        bytes
    }

    /// Reads the end from the content of a disk. `None` if the guest has not told any.
    ///
    /// # Errors
    /// The guest wrote something else.
    pub fn of_disk(disk: &[u8]) -> Result<Option<Self>> {
        parse(disk.get(..END_BYTES).unwrap_or(disk))
    }
}

/// Reads JSON that is filled up with zeros; `None` if there are zeros alone.
fn parse<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<Option<T>> {
    let length = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    bytes.get(..length).filter(|json| !json.is_empty()).map(serde_json::from_slice).transpose().map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_holds_process_and_end() {
        let process = Process {
            args: vec!["sh".into(), "\0\n\"ü".into()],
            env: vec!["A=b".into()],
            stop_signal: 15,
            ..Process::default()
        };
        let mut disk = process.to_disk().unwrap();
        assert_eq!(disk.len() % 512, 0);
        assert_eq!(Process::of_disk(&disk).unwrap(), process);
        assert_eq!(End::of_disk(&disk).unwrap(), None);
        for end in [End::Exited(7), End::Killed(9), End::Failed("no disk".into())] {
            disk[..END_BYTES].copy_from_slice(&end.to_disk());
            assert_eq!(End::of_disk(&disk).unwrap(), Some(end));
        }
        assert_eq!(Process::of_disk(&disk).unwrap(), process);
    }

    #[test]
    fn what_is_neither_is_told() {
        assert!(End::of_disk(b"{\"exited\":256}").is_err() && End::of_disk(&[0xff; 8192]).is_err());
        assert_eq!(End::of_disk(&[]).unwrap(), None);
        assert!(Process::of_disk(&[0; 8192]).is_err() && Process::of_disk(&[]).is_err());
        let long = Process { args: vec!["x".repeat(MAX_BYTES)], ..Process::default() };
        assert!(long.to_disk().is_err());
        assert_eq!(End::Failed("x".repeat(END_BYTES)).to_disk().len(), END_BYTES);
    }
}
