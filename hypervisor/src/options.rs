//! The hypervisor's command line.

use core::fmt;
use log::LevelFilter;

/// What can be chosen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Options {
    /// How much is logged: `log=off|error|warn|info|debug|trace`.
    pub(crate) log: LevelFilter,
    /// Vcpus of the first domain: `dom0_max_vcpus=1`.
    pub(crate) first_vcpus: u32,
    /// Whether ordinary things are done the fast path: `lean=on|off`. What a guest sees is the same.
    pub(crate) lean: bool,
}

/// An option that is none, or a value that makes no sense.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct BadOption<'a>(&'a str);

impl fmt::Display for BadOption<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "unknown hypervisor option `{}`; there are console=com1, log=LEVEL, dom0_max_vcpus=N, lean=on|off",
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
        let mut options = Self { log: LevelFilter::Info, first_vcpus: 1, lean: true };
        for word in line.split_ascii_whitespace() {
            let bad = BadOption(word);
            let (key, value) = word.split_once('=').ok_or(bad)?;
            match key {
                "console" if value == "com1" => {}
                "log" => options.log = value.parse().map_err(|_| bad)?,
                "dom0_max_vcpus" => options.first_vcpus = value.parse().map_err(|_| bad)?,
                "lean" if matches!(value, "on" | "off") => options.lean = value == "on",
                _ => return Err(bad),
            }
        }
        Ok(options)
    }
}
