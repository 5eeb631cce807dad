//! Commands to dom0, as a person or a script writes them, one a line: verbs, options, help, completion.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use crate::disk::DiskConfig;
use crate::vif::VifConfig;

/// A parsed line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// What to do.
    pub command: Command,
    /// Whether the answer is to be JSON (`-j`).
    pub json: bool,
}

/// A command to the manager. A guest is given by its name or by the number of its domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Show all domains.
    List {
        /// Whether to show the guests that have ended, too.
        all: bool,
    },
    /// Make a guest again that has ended.
    Create(String),
    /// Attach the terminal to a guest's console.
    Console(String),
    /// Pause a guest.
    Pause(String),
    /// Unpause a guest.
    Unpause(String),
    /// Ask a guest to power off.
    Shutdown {
        /// The guest.
        name: String,
        /// Whether the command is complete only when the guest has ended.
        wait: bool,
    },
    /// Ask a guest to reboot.
    Reboot {
        /// The guest.
        name: String,
        /// Whether the command is complete only when the guest runs again.
        wait: bool,
    },
    /// End a guest at once.
    Destroy(String),
    /// Show the machine.
    Info,
    /// Show the machine's disks.
    Disks,
    /// Give a guest a disk.
    BlockAttach {
        /// The guest.
        name: String,
        /// The disk.
        disk: DiskConfig,
    },
    /// Take a disk away from a guest.
    BlockDetach {
        /// The guest.
        name: String,
        /// The name of the disk in the guest: `xvda`.
        vdev: String,
        /// Whether the guest is not asked.
        force: bool,
    },
    /// Reset the disk of the machine with this serial number.
    BlockReset(String),
    /// Show the disks of a guest, or of all.
    BlockList(Option<String>),
    /// Show the networks.
    Networks,
    /// Give a guest a network device.
    NetworkAttach {
        /// The guest.
        name: String,
        /// The device.
        vif: VifConfig,
    },
    /// Take a network device away from a guest.
    NetworkDetach {
        /// The guest.
        name: String,
        /// The number of the device in the guest, or its address.
        device: String,
        /// Whether the guest is not asked.
        force: bool,
    },
    /// Show the network devices of a guest, or of all.
    NetworkList(Option<String>),
    /// Show the hypervisor's log.
    Dmesg {
        /// Whether to clear the log afterwards.
        clear: bool,
    },
    /// Set how much memory a guest should have.
    MemSet {
        /// The guest.
        name: String,
        /// The memory in MiB.
        mib: u64,
    },
    /// Give a guest another name.
    Rename {
        /// The guest.
        name: String,
        /// The guest's new name.
        to: String,
    },
    /// Show the number of a guest's domain.
    Domid(String),
    /// Show how long the machine, or a guest, has run.
    Uptime(Option<String>),
    /// List all verbs, or explain one.
    Help(Option<&'static Verb>),
    /// Turn the machine off.
    Quit,
}

/// A verb, and its help.
#[derive(Debug, PartialEq, Eq)]
pub struct Verb {
    /// The word.
    pub name: &'static str,
    /// Its options and arguments.
    pub takes: &'static str,
    /// What it does, in one line.
    pub does: &'static str,
    /// More details; may be empty.
    pub more: &'static str,
}

const fn verb(name: &'static str, takes: &'static str, does: &'static str, more: &'static str) -> Verb {
    Verb { name, takes, does, more }
}

/// All verbs.
pub const VERBS: &[Verb] = &[
    verb(
        "list",
        "[-a]",
        "all domains",
        "State: r runs, b blocked, p paused, s shut down, d dying. Memory is what a domain has now. A guest without a \
         number is yet to be made. -a: and the guests that have ended, with how and when: `create` makes them anew.",
    ),
    verb("create", "NAME", "make a guest that has ended anew", "From the same kernel and configuration as before."),
    verb("console", "NAME", "attach to a guest's console", "Ctrl-] leads back to the prompt."),
    verb("pause", "NAME", "stop a guest", "It keeps its memory and does not run until `unpause`."),
    verb("unpause", "NAME", "let a paused guest go on", ""),
    verb("shutdown", "[-w] NAME", "ask a guest to power off", "-w in --exec: the command is over when the guest is."),
    verb(
        "reboot",
        "[-w] NAME",
        "ask a guest to reboot",
        "-w in --exec: the command is over when the guest has been made anew.",
    ),
    verb("destroy", "NAME", "end a guest at once", "It is not asked. A guest about to be made anew is not."),
    verb(
        "info",
        "",
        "the machine: version, memory, CPUs, domains",
        "What the hypervisor and dom0 take of the memory is told apart from the boot bundle, which dom0 holds. dom0 sets \
         aside what its guests may make it hold.",
    ),
    verb(
        "disks",
        "",
        "the disks of the machine, by serial number",
        "Size, bytes of a logical block, and whether it can be written (rw) or not (ro). A guest gets one as \
         `serial:NUMBER`. What dom0 has no driver for was named when it started.",
    ),
    verb(
        "block-attach",
        "NAME DISK",
        "give a guest a disk until it ends",
        "DISK is as in a guest's file: TARGET,,VDEV,ACCESS, where TARGET is serial:NUMBER, bundle:FILE or memory:SIZE, VDEV \
         xvda to xvdzz, and ACCESS r, w or ! (write although another guest has it).",
    ),
    verb(
        "block-detach",
        "NAME VDEV [--force]",
        "take a disk away from a guest",
        "The guest is asked to release the disk, and has ten seconds; a disk in use goes when the guest releases it. --force: \
         the guest is not asked.",
    ),
    verb(
        "block-reset",
        "SERIAL",
        "reset a disk of the machine that does not answer",
        "What it has not answered is issued again, so that guests see no error. A description with late=SECONDS has this done.",
    ),
    verb(
        "block-list",
        "[NAME]",
        "the disks of a guest, or of all guests",
        "With what has been read and written since the disk was attached.",
    ),
    verb(
        "networks",
        "",
        "the networks, with the address of dom0 on each",
        "`nat` translates guests to the address at a network device of the machine, `uplink` is the network that another one is \
         connected to, and any other name is a network of guests alone.",
    ),
    verb(
        "network-attach",
        "NAME [VIF]",
        "give a guest a network device until it ends",
        "VIF is as in a guest's file: mac=ADDRESS,bridge=NETWORK,ip=ADDRESS,rate=10Mb/s, each of which may be missing.",
    ),
    verb(
        "network-detach",
        "NAME DEVICE [--force]",
        "take a network device away from a guest",
        "DEVICE is the device's number or address. The guest is asked to release the device, and has ten seconds. --force: the \
         guest is not asked.",
    ),
    verb(
        "network-list",
        "[NAME]",
        "the network devices of a guest, or of all guests",
        "With what has been sent and received since the device was attached, as the guest sees it.",
    ),
    verb(
        "dmesg",
        "[-c]",
        "what the hypervisor has logged last",
        "With what guests have written by console_io, each piece behind the domain's number. -c: and forget it.",
    ),
    verb(
        "mem-set",
        "NAME MIB",
        "set what memory a guest should have",
        "Its balloon driver follows. At most its `maxmem`; `list` shows what it has come to.",
    ),
    verb("rename", "NAME NEW", "give a guest another name", ""),
    verb("domid", "NAME", "the number of a guest's domain", ""),
    verb("uptime", "[NAME]", "how long the machine or a guest has run", ""),
    verb("quit", "", "turn the machine off, whatever runs", ""),
    verb("help", "[VERB]", "this text, or more about a verb", ""),
];

fn find(name: &str) -> Option<&'static Verb> {
    VERBS.iter().find(|verb| verb.name == name)
}

/// The help on all verbs, a line each.
#[must_use]
pub fn help() -> String {
    let line = |verb: &Verb| format!("{:<20} {}\n", format!("{} {}", verb.name, verb.takes), verb.does);
    let lines: String = VERBS.iter().map(line).collect();
    format!("{lines}-j answers in JSON; Tab completes; `help VERB` says more")
}

impl Verb {
    /// The help on this verb.
    #[must_use]
    pub fn help(&self) -> String {
        let text = format!("{} {}", self.name, self.takes);
        format!("{} [-j]\n{}\n{}", text.trim_end(), self.does, self.more).trim_end().to_string()
    }
}

impl Command {
    /// Parses a line; returns `None` if the line is empty.
    ///
    /// # Errors
    /// An error message for a person. Words of the line are escaped in it.
    pub fn parse(line: &str) -> Result<Option<Line>, String> {
        let mut words = line.split_whitespace();
        let Some(word) = words.next() else {
            return Ok(None);
        };
        let found = find(word).ok_or_else(|| format!("{}: unknown command; try `help`", word.escape_debug()))?;
        let (mut json, mut flag, mut rest) = (false, false, Vec::new());
        for word in words {
            match word {
                "-j" => json = true,
                "-w" if found.takes.starts_with("[-w]") => flag = true,
                "-a" if found.takes.starts_with("[-a]") => flag = true,
                "-c" if found.takes.starts_with("[-c]") => flag = true,
                "--force" if found.takes.ends_with("[--force]") => flag = true,
                _ if word.starts_with('-') => {
                    return Err(format!("{}: no option {}; try `help {0}`", found.name, word.escape_debug()));
                }
                _ => rest.push(word),
            }
        }
        Self::of(found, &rest, flag).map(|command| Some(Line { command, json }))
    }

    fn of(verb: &'static Verb, words: &[&str], flag: bool) -> Result<Self, String> {
        let usage = || format!("usage: {} {}", verb.name, verb.takes).trim_end().to_string();
        Ok(match (verb.name, words) {
            ("list", []) => Self::List { all: flag },
            ("info", []) => Self::Info,
            ("disks", []) => Self::Disks,
            ("block-attach", [name, disk @ ..]) if !disk.is_empty() => {
                let disk = disk.join(" ").parse().map_err(|why| format!("block-attach: {why}"))?;
                Self::BlockAttach { name: (*name).to_string(), disk }
            }
            ("block-detach", [name, vdev]) => {
                Self::BlockDetach { name: (*name).to_string(), vdev: (*vdev).to_string(), force: flag }
            }
            ("block-reset", [serial]) => Self::BlockReset((*serial).to_string()),
            ("block-list", []) => Self::BlockList(None),
            ("block-list", [name]) => Self::BlockList(Some((*name).to_string())),
            ("networks", []) => Self::Networks,
            ("network-attach", [name, vif @ ..]) => {
                let vif = vif.join(" ").parse().map_err(|why| format!("network-attach: {why}"))?;
                Self::NetworkAttach { name: (*name).to_string(), vif }
            }
            ("network-detach", [name, device]) => {
                Self::NetworkDetach { name: (*name).to_string(), device: (*device).to_string(), force: flag }
            }
            ("network-list", []) => Self::NetworkList(None),
            ("network-list", [name]) => Self::NetworkList(Some((*name).to_string())),
            ("dmesg", []) => Self::Dmesg { clear: flag },
            ("quit", []) => Self::Quit,
            ("help", []) => Self::Help(None),
            ("help", [word]) => {
                let found = find(word).ok_or_else(|| format!("help: no command {}", word.escape_debug()))?;
                Self::Help(Some(found))
            }
            ("uptime", []) => Self::Uptime(None),
            ("uptime", [name]) => Self::Uptime(Some((*name).to_string())),
            ("create", [name]) => Self::Create((*name).to_string()),
            ("console", [name]) => Self::Console((*name).to_string()),
            ("pause", [name]) => Self::Pause((*name).to_string()),
            ("unpause", [name]) => Self::Unpause((*name).to_string()),
            ("destroy", [name]) => Self::Destroy((*name).to_string()),
            ("domid", [name]) => Self::Domid((*name).to_string()),
            ("shutdown", [name]) => Self::Shutdown { name: (*name).to_string(), wait: flag },
            ("reboot", [name]) => Self::Reboot { name: (*name).to_string(), wait: flag },
            ("rename", [name, to]) => Self::Rename { name: (*name).to_string(), to: (*to).to_string() },
            ("mem-set", [name, mib]) => {
                let mib = mib.parse().map_err(|_| format!("mem-set: no number of MiB: {}", mib.escape_debug()))?;
                Self::MemSet { name: (*name).to_string(), mib }
            }
            _ => return Err(usage()),
        })
    }
}

/// How the last word of a line can be completed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Completion {
    /// The text to insert; ends in a blank if the word is complete.
    pub add: String,
    /// The candidates, if there are several.
    pub choices: Vec<String>,
}

/// Completes the last word of `line`: a verb, or the name of one of the `guests`.
#[must_use]
pub fn complete<'a>(line: &str, guests: impl Iterator<Item = &'a str>) -> Completion {
    let start = line.rfind(' ').map_or(0, |blank| blank + 1);
    let (before, word) = line.split_at(start);
    let mut earlier = before.split_whitespace().filter(|word| !word.starts_with('-'));
    let verbs = || VERBS.iter().map(|verb| verb.name);
    let words: Vec<&str> = match (earlier.next(), earlier.next()) {
        (None, _) => verbs().collect(),
        (Some("help"), None) => verbs().collect(),
        (Some(verb), None) if find(verb).is_some_and(|verb| verb.takes.contains("NAME")) => guests.collect(),
        _ => Vec::new(),
    };
    let mut fits: Vec<&str> = words.into_iter().filter(|candidate| candidate.starts_with(word)).collect();
    fits.sort_unstable();
    let rest = |candidate: &str| candidate.strip_prefix(word).unwrap_or_default().to_string();
    match fits.split_first() {
        None => Completion::default(),
        Some((only, [])) => Completion { add: rest(only) + " ", choices: Vec::new() },
        Some((first, others)) => {
            let mut common = rest(first);
            while !others.iter().all(|other| rest(other).starts_with(&common)) {
                common.pop();
            }
            Completion { add: common, choices: fits.iter().map(ToString::to_string).collect() }
        }
    }
}

/// Whether dom0's command line asks for all consoles to be shown at once.
///
/// # Errors
/// The line has an unknown word.
pub fn shows_all_consoles(line: &str) -> Result<bool, &'static str> {
    let mut all = false;
    for word in line.split_ascii_whitespace() {
        match word {
            "consoles=all" => all = true,
            _ => return Err("unknown word on dom0's command line; there is consoles=all"),
        }
    }
    Ok(all)
}
