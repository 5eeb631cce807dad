//! The hypervisor's command line.

use core::fmt;
use log::LevelFilter;

/// What can be chosen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Options {
    /// How much is logged: `log=off|error|warn|info|debug|trace`.
    pub(crate) log: LevelFilter,
    /// Memory of the first domain in MiB: `first_mem=256` (also `dom0_mem`).
    pub(crate) first_memory: Option<u64>,
    /// Vcpus of the first domain: `first_vcpus=1` (also `dom0_max_vcpus`).
    pub(crate) first_vcpus: u32,
}

/// An option that is none, or a value that makes no sense.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct BadOption<'a>(&'a str);

impl fmt::Display for BadOption<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "unknown hypervisor option `{}`; there are console=com1, log=LEVEL, first_mem=MIB, first_vcpus=N",
            self.0
        )
    }
}

impl Options {
    /// Reads a command line.
    ///
    /// # Errors
    /// The first option that is none.
    pub(crate) fn parse(line: &str) -> Result<Self, BadOption<'_>> {
        let mut options = Self { log: LevelFilter::Info, first_memory: None, first_vcpus: 1 };
        for word in line.split_ascii_whitespace() {
            let bad = BadOption(word);
            let (key, value) = word.split_once('=').ok_or(bad)?;
            match key {
                "console" if value == "com1" => {}
                "log" => options.log = value.parse().map_err(|_| bad)?,
                "first_mem" | "dom0_mem" => {
                    let mib = value.strip_suffix('M').unwrap_or(value);
                    options.first_memory = Some(mib.parse().map_err(|_| bad)?);
                }
                "first_vcpus" | "dom0_max_vcpus" => options.first_vcpus = value.parse().map_err(|_| bad)?,
                _ => return Err(bad),
            }
        }
        Ok(options)
    }
}
