//! The machine's console, shared: one guest's console at a time, or a prompt, or the lines of all guests.

use alloc::format;
use alloc::string::String;
use core::cell::{Cell, RefCell};
use core::sync::atomic::{AtomicU8, Ordering};

use console_backend::{LineEditor, Typed};

use crate::bundle::ANSWER;
use crate::command::{Command, complete};
use crate::face::{CommandResult, Face, obey};
use crate::manager::{Console, Manager, Platform};

/// Ctrl-]: leads from a guest's console to the prompt.
const LEAVE: u8 = 0x1d;
const PROMPT: &str = "dom0> ";

/// The screen behind a terminal: it takes bytes, and keeps what the cursor stands behind.
pub trait Screen {
    /// Shows bytes.
    fn write(&self, bytes: &[u8]);
    /// Where the cursor is.
    fn cursor(&self) -> &Cursor;
}

/// What the cursor of a screen stands behind.
#[derive(Debug)]
pub struct Cursor(AtomicU8);

mod line {
    /// Nothing.
    pub(super) const EMPTY: u8 = 0;
    /// Text of a guest: a message begins a new line.
    pub(super) const GUEST: u8 = 1;
    /// The prompt: a message takes its place.
    pub(super) const PROMPT: u8 = 2;
}

impl Cursor {
    /// At the beginning of a line.
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

/// Shows text on lines of its own, each ended as a terminal wants it.
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

/// How the output of a guest is shown.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shows {
    /// As it is.
    Bytes,
    /// In lines with the guest's name.
    Lines,
    /// Not now.
    Nothing,
}

/// What the terminal is for at the moment.
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
    /// All guests are shown, in lines; the keyboard is for commands.
    all: bool,
    focus: RefCell<Focus>,
    editor: RefCell<LineEditor>,
    /// The prompt is on the screen.
    prompted: Cell<bool>,
}

impl<S: Screen> Terminal<S> {
    /// A terminal that shows no guest yet, or all of them in lines (`all`).
    pub fn new(screen: S, all: bool) -> Self {
        let focus = RefCell::new(Focus::Prompt);
        Self { screen, all, focus, editor: RefCell::default(), prompted: Cell::new(false) }
    }

    /// How the output of this guest is to be shown now.
    pub fn shows(&self, name: &str) -> Shows {
        match &*self.focus.borrow() {
            _ if self.all => Shows::Lines,
            Focus::Guest(shown) if shown == name => Shows::Bytes,
            _ => Shows::Nothing,
        }
    }

    /// Shows bytes as they are.
    pub fn raw(&self, bytes: &[u8]) {
        if let Some(last) = bytes.last() {
            self.screen.write(bytes);
            self.screen.cursor().stands(if *last == b'\n' { line::EMPTY } else { line::GUEST });
        }
    }

    /// Shows a line of a guest, or a message of dom0's, on lines of its own.
    pub fn message(&self, text: &str) {
        print(&self.screen, &format!("{text}\n"));
        self.refresh();
    }

    /// Shows an answer to a program, in lines that begin with a mark.
    pub fn answer(&self, text: &str) {
        end_line(&self.screen);
        for line in text.lines() {
            self.screen.write(format!("{ANSWER}{line}\r\n").as_bytes());
        }
    }

    /// The guest whose console is shown alone.
    pub fn attached(&self) -> Option<String> {
        match &*self.focus.borrow() {
            Focus::Guest(name) => Some(name.clone()),
            Focus::Prompt => None,
        }
    }

    /// A guest has another name.
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
    /// Why it is not shown.
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

    /// If the guest that is shown has ended, shows the next one, or goes to the prompt if the others are only kept.
    pub fn follow<P: Platform>(&self, manager: &Manager<P>) {
        if self.attached().is_some_and(|name| !manager.is_alive(&name)) {
            match manager.first_alive() {
                // Cannot fail: the guest exists, and not all are shown at once.
                Some(next) => drop(self.attach(manager, &next)),
                None => self.detach(),
            }
        }
    }

    /// Goes to the prompt.
    pub fn detach(&self) {
        self.focus.replace(Focus::Prompt);
        self.prompt();
    }

    fn prompt(&self) {
        self.prompted.set(true);
        end_line(&self.screen);
        self.refresh();
    }

    /// Draws the prompt again after other text, with what has been typed so far.
    fn refresh(&self) {
        if self.prompted.get() && self.screen.cursor().is(line::EMPTY) {
            self.screen.write(PROMPT.as_bytes());
            self.screen.write(self.editor.borrow().line().as_bytes());
            self.screen.cursor().stands(line::PROMPT);
        }
    }

    /// Draws the line again that is being typed.
    fn redraw(&self) {
        end_line(&self.screen);
        self.refresh();
    }

    /// Routes keystrokes to the console that is shown, or to the prompt; answers [`CommandResult::Quit`] when the machine is to be
    /// turned off.
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

    /// A key of a command.
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

    /// A whole line was typed.
    async fn line<P: Platform>(&self, manager: &Manager<P>, line: &str) -> CommandResult {
        self.raw(b"\r\n");
        self.prompted.set(false);
        let done = match Command::parse(line) {
            // The end of a guest that is asked to end is told when it comes; nobody waits for it here.
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

/// A terminal at which somebody asks a manager.
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
