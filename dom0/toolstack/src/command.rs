//! What a person asks of dom0, as a line of text.

use alloc::format;
use alloc::string::{String, ToString};

/// A line understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Show all domains.
    List,
    /// Attach the terminal to a guest's console.
    Console(String),
    /// End a guest at once.
    Destroy(String),
    /// Show what can be asked.
    Help,
    /// Turn the machine off.
    Quit,
}

/// What can be asked, for a person.
pub const HELP: &str = "\
list            all domains
console NAME    attach to a guest's console; Ctrl-] leads back here
destroy NAME    end a guest at once
quit            turn the machine off, whatever runs
help            this text";

impl Command {
    /// Reads a line; `None` if there is nothing on it.
    ///
    /// # Errors
    /// What is wrong with it, for a person. The words of the line are escaped.
    pub fn parse(line: &str) -> Result<Option<Self>, String> {
        let mut words = line.split_whitespace();
        let Some(verb) = words.next() else {
            return Ok(None);
        };
        let name = words.next().map(ToString::to_string);
        if words.next().is_some() {
            return Err(format!("{}: too many words; try `help`", verb.escape_debug()));
        }
        let alone = |command: Self| match &name {
            None => Ok(command),
            Some(_) => Err(format!("{verb}: takes no name")),
        };
        let named = |command: fn(String) -> Self| {
            let name = name.clone();
            name.map(command).ok_or_else(|| format!("{verb}: which guest? Try `list`"))
        };
        match verb {
            "list" => alone(Self::List),
            "help" => alone(Self::Help),
            "quit" => alone(Self::Quit),
            "console" => named(Self::Console),
            "destroy" => named(Self::Destroy),
            _ => Err(format!("{}: unknown command; try `help`", verb.escape_debug())),
        }
        .map(Some)
    }
}
