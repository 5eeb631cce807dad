//! What the text faces of the manager (prompt, `--exec`) have in common: read a line, carry it out, show the reply.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use crate::command::{Command, Line};
use crate::manager::{Manager, Platform, Reply, Wait};
use crate::status::Failure;

/// Where the replies to commands are shown.
pub trait Face {
    /// Shows a text to a person, on lines of its own.
    fn message(&self, text: &str);
    /// Shows an answer to a program that reads the machine's console.
    fn answer(&self, text: &str);
    /// Shows the console of an existing guest.
    ///
    /// # Errors
    /// Why the console is not shown.
    fn attach(&self, name: &str) -> Result<(), String>;
}

/// The result of a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CommandResult {
    /// It was carried out.
    Succeeded,
    /// It was refused, and the reason has been shown.
    Refused,
    /// It was carried out, and will be complete when [`Manager::wait`] with this value returns.
    Pending(Wait),
    /// The machine is to be turned off.
    Quit,
}

/// Carries out the command of a line. `say` gets the reply, unless the reply is empty.
pub async fn obey<P: Platform>(
    manager: &Manager<P>,
    line: &Line,
    face: &impl Face,
    say: impl Fn(&str),
) -> CommandResult {
    let refused = |text: &str, json: String| {
        say(if line.json { &json } else { text });
        CommandResult::Refused
    };
    let reply = match manager.answer(&line.command).await {
        Ok(reply) => reply,
        Err(why) => return refused(&format!("{why}"), why.json()),
    };
    if let Reply::Console(name) = &reply
        && let Err(why) = face.attach(name)
    {
        return refused(&why, crate::json::Object::default().text("error", &why).end());
    }
    if reply == Reply::Quit {
        return CommandResult::Quit;
    }
    let text = if line.json { reply.json() } else { reply.text() };
    if !text.is_empty() {
        say(&text);
    }
    match (reply, &line.command) {
        (Reply::Asked { wait, .. }, Command::Shutdown { wait: true, .. } | Command::Reboot { wait: true, .. }) => {
            CommandResult::Pending(wait)
        }
        _ => CommandResult::Succeeded,
    }
}

/// What happens to the machine after the commands of `--exec`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// It stays on, because the last command opened a console.
    Stays,
    /// It is turned off, with this failure as its exit status.
    Off(Option<Failure>),
}

/// Carries out commands separated by `;`. The first one that is refused ends the script.
pub async fn script<P: Platform>(manager: &Manager<P>, commands: &str, face: &impl Face) -> After {
    let parsed: Result<Vec<Option<Line>>, String> = commands.split(';').map(Command::parse).collect();
    let lines: Vec<Line> = match parsed {
        Ok(lines) => lines.into_iter().flatten().collect(),
        Err(why) => {
            face.message(&format!("error: {why}"));
            return After::Off(Some(Failure::Refused));
        }
    };
    let stays = matches!(lines.last(), Some(Line { command: Command::Console(_), .. }));
    let say = |text: &str| if stays { face.message(text) } else { face.answer(text) };
    for line in &lines {
        let well = match obey(manager, line, face, say).await {
            CommandResult::Succeeded => true,
            CommandResult::Refused => false,
            CommandResult::Quit => return After::Off(manager.failed()),
            CommandResult::Pending(wait) => {
                let refused = manager.wait(&wait).await.err();
                refused.inspect(|why| say(&if line.json { why.json() } else { why.to_string() })).is_none()
            }
        };
        if !well {
            return After::Off(Some(manager.failed().unwrap_or(Failure::Refused)));
        }
    }
    if stays {
        manager.commands_done();
        return After::Stays;
    }
    After::Off(manager.failed())
}
