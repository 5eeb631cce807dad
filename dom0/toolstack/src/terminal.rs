//! The machine's console, shared: it shows one guest's console, or the prompt, or the lines of all guests.

use alloc::format;
use alloc::string::String;
use core::cell::{Cell, RefCell};
use core::sync::atomic::{AtomicU8, Ordering};

use console_backend::{LineEditor, Typed};

use crate::bundle::ANSWER;
use crate::command::{Command, complete};
use crate::face::{CommandResult, Face, obey};
use crate::manager::{Console, Manager, Platform};

/// Ctrl-]: switches from a guest's console to the prompt.
const LEAVE: u8 = 0x1d;
const PROMPT: &str = "dom0> ";

/// The screen of a terminal. It takes bytes, and keeps what the cursor's line holds.
pub trait Screen {
    /// Shows bytes.
    fn write(&self, bytes: &[u8]);
    /// What the cursor's line holds.
    fn cursor(&self) -> &Cursor;
}

/// What stands on the cursor's line before the cursor.
#[derive(Debug)]
pub struct Cursor(AtomicU8);

mod line {
    /// Nothing: the line is empty.
    pub(super) const EMPTY: u8 = 0;
    /// Text of a guest: a message begins on a new line.
    pub(super) const GUEST: u8 = 1;
    /// The prompt: a message overwrites it.
    pub(super) const PROMPT: u8 = 2;
}

impl Cursor {
    /// A cursor at the beginning of a line.
    #[must_use]
    pub const fn new() -> Self {
        Self(AtomicU8::new(line::EMPTY))
    }

    fn is(&self, what: u8) -> bool {
        self.0.load(Ordering::Relaxed) == what
    }

    fn stands(&self, behind: u8) {
        self.0.store(behind, Ordering::Relaxed);
    }
}

impl Default for Cursor {
    fn default() -> Self {
        Self::new()
    }
}

/// Shows text on lines of its own, with the line ends that a terminal needs.
pub fn print(screen: &impl Screen, text: &str) {
    end_line(screen);
    for piece in text.split_inclusive('\n') {
        match piece.strip_suffix('\n') {
            Some(line) => {
                screen.write(line.as_bytes());
                screen.write(b"\r\n");
            }
            None => screen.write(piece.as_bytes()),
        }
    }
}

/// Moves the cursor to an empty line.
fn end_line(screen: &impl Screen) {
    match screen.cursor().0.swap(line::EMPTY, Ordering::Relaxed) {
        line::EMPTY => {}
        line::PROMPT => screen.write(b"\r\x1b[K"),
        _ => screen.write(b"\r\n"),
    }
}

/// How the output of a guest is shown now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shows {
    /// Its bytes are shown as they are.
    Bytes,
    /// Its lines are shown, each with the guest's name.
    Lines,
    /// It is not shown.
    Nothing,
}

/// What the keyboard and the screen are connected to.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Focus {
    /// The console of a guest.
    Guest(String),
    /// Commands.
    Prompt,
}

/// The machine's console.
pub struct Terminal<S> {
    screen: S,
    /// Whether all guests are shown, in lines; the keyboard is then for commands.
    all: bool,
    focus: RefCell<Focus>,
    editor: RefCell<LineEditor>,
    /// Whether the prompt is active: it is on the screen, or drawn again after other text.
    prompted: Cell<bool>,
}

impl<S: Screen> Terminal<S> {
    /// A terminal that shows no guest yet; with `all`, the lines of all guests.
    pub fn new(screen: S, all: bool) -> Self {
        let focus = RefCell::new(Focus::Prompt);
        Self { screen, all, focus, editor: RefCell::default(), prompted: Cell::new(false) }
    }

    /// How the output of this guest is shown now.
    pub fn shows(&self, name: &str) -> Shows {
        match &*self.focus.borrow() {
            _ if self.all => Shows::Lines,
            Focus::Guest(shown) if shown == name => Shows::Bytes,
            _ => Shows::Nothing,
        }
    }

    /// Shows bytes unchanged.
    pub fn raw(&self, bytes: &[u8]) {
        if let Some(last) = bytes.last() {
            self.screen.write(bytes);
            self.screen.cursor().stands(if *last == b'\n' { line::EMPTY } else { line::GUEST });
        }
    }

    /// Shows a line of a guest, or a message of dom0, on lines of its own.
    pub fn message(&self, text: &str) {
        print(&self.screen, &format!("{text}\n"));
        self.refresh();
    }

    /// Shows an answer to a program. Each line begins with [`ANSWER`].
    pub fn answer(&self, text: &str) {
        end_line(&self.screen);
        for line in text.lines() {
            self.screen.write(format!("{ANSWER}{line}\r\n").as_bytes());
        }
    }

    /// The guest whose console is shown; `None` at the prompt.
    pub fn attached(&self) -> Option<String> {
        match &*self.focus.borrow() {
            Focus::Guest(name) => Some(name.clone()),
            Focus::Prompt => None,
        }
    }

    /// Tells that a guest has a new name.
    pub fn renamed(&self, from: &str, to: &str) {
        if let Focus::Guest(name) = &mut *self.focus.borrow_mut()
            && name == from
        {
            *name = to.into();
        }
    }

    /// Shows a guest's console.
    ///
    /// # Errors
    /// Why the console is not shown.
    pub fn attach<P: Platform>(&self, manager: &Manager<P>, name: &str) -> Result<(), String> {
        let console = manager.console(name).ok_or_else(|| format!("there is no guest {}", name.escape_debug()))?;
        if self.all {
            return Err("every console is shown already (consoles=all)".into());
        }
        self.prompted.set(false);
        self.message(&format!("[console of {name}; Ctrl-] leads to dom0]"));
        self.focus.replace(Focus::Guest(console.name()));
        console.show_missed();
        Ok(())
    }

    /// If the guest whose console is shown has ended, shows the next guest that runs, or the prompt if there is none.
    pub fn follow<P: Platform>(&self, manager: &Manager<P>) {
        if self.attached().is_some_and(|name| !manager.is_alive(&name)) {
            match manager.first_alive() {
                // Cannot fail: the guest exists, and `all` is off because a guest is attached.
                Some(next) => drop(self.attach(manager, &next)),
                None => self.detach(),
            }
        }
    }

    /// Switches to the prompt.
    pub fn detach(&self) {
        self.focus.replace(Focus::Prompt);
        self.prompt();
    }

    fn prompt(&self) {
        self.prompted.set(true);
        end_line(&self.screen);
        self.refresh();
    }

    /// Draws the prompt again after other text, with the line typed so far.
    fn refresh(&self) {
        if self.prompted.get() && self.screen.cursor().is(line::EMPTY) {
            self.screen.write(PROMPT.as_bytes());
            self.screen.write(self.editor.borrow().line().as_bytes());
            self.screen.cursor().stands(line::PROMPT);
        }
    }

    /// Draws the line being typed again.
    fn redraw(&self) {
        end_line(&self.screen);
        self.refresh();
    }

    /// Sends keystrokes to the console that is shown, or to the prompt. Returns [`CommandResult::Quit`] if the machine
    /// is to be turned off.
    pub async fn keys<P: Platform>(&self, manager: &Manager<P>, mut keys: &[u8]) -> CommandResult {
        while let Some((first, rest)) = keys.split_first() {
            let Some(console) = self.attached().and_then(|name| manager.console(&name)) else {
                keys = rest;
                if self.key(manager, *first).await == CommandResult::Quit {
                    return CommandResult::Quit;
                }
                continue;
            };
            let end = keys.iter().position(|key| *key == LEAVE).unwrap_or(keys.len());
            let (typed, after) = keys.split_at(end);
            console.type_in(typed);
            keys = after.get(1..).unwrap_or_default();
            if !after.is_empty() {
                self.detach();
            }
        }
        CommandResult::Succeeded
    }

    /// Handles a key typed at the prompt.
    async fn key<P: Platform>(&self, manager: &Manager<P>, key: u8) -> CommandResult {
        if !self.prompted.get() {
            self.prompt();
        }
        let typed = self.editor.borrow_mut().key(key);
        match typed {
            Typed::Echo(text) => self.screen.write(text.as_bytes()),
            Typed::Character(character) => self.screen.write(character.encode_utf8(&mut [0; 4]).as_bytes()),
            Typed::Redraw => self.redraw(),
            Typed::Complete => self.complete(manager),
            Typed::Cancelled => {
                self.raw(b"\r\n");
                self.refresh();
            }
            Typed::Line(line) => return self.line(manager, &line).await,
        }
        CommandResult::Succeeded
    }

    fn complete<P: Platform>(&self, manager: &Manager<P>) {
        let names = manager.names();
        let completion = complete(self.editor.borrow().line(), names.iter().map(String::as_str));
        self.editor.borrow_mut().insert(&completion.add);
        if completion.add.is_empty() && !completion.choices.is_empty() {
            self.message(&completion.choices.join("  "));
        } else {
            self.redraw();
        }
    }

    /// Carries out a line typed at the prompt.
    async fn line<P: Platform>(&self, manager: &Manager<P>, line: &str) -> CommandResult {
        self.raw(b"\r\n");
        self.prompted.set(false);
        let done = match Command::parse(line) {
            // `shutdown` and `reboot` do not wait here; the end of the guest is reported when it comes.
            Ok(Some(line)) => obey(manager, &line, &self.face(manager), |text| self.message(text)).await,
            Ok(None) => CommandResult::Succeeded,
            Err(why) => {
                self.message(&why);
                CommandResult::Refused
            }
        };
        if self.attached().is_none() {
            self.prompt();
        }
        done
    }

    /// The terminal as a face of the manager.
    pub const fn face<'a, P: Platform>(&'a self, manager: &'a Manager<P>) -> At<'a, S, P> {
        At { terminal: self, manager }
    }
}

/// A terminal, with the manager that its commands go to.
pub struct At<'a, S, P: Platform> {
    terminal: &'a Terminal<S>,
    manager: &'a Manager<P>,
}

impl<S: Screen, P: Platform> Face for At<'_, S, P> {
    fn message(&self, text: &str) {
        self.terminal.message(text);
    }

    fn answer(&self, text: &str) {
        self.terminal.answer(text);
    }

    fn attach(&self, name: &str) -> Result<(), String> {
        self.terminal.attach(self.manager, name)
    }
}
