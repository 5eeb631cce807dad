//! The machine's console: one guest's at a time, or a prompt, or the lines of all guests.

use alloc::format;
use alloc::rc::Rc;
use alloc::string::String;
use core::cell::{Cell, RefCell};
use core::sync::atomic::{AtomicU8, Ordering};

use console_backend::{LineEditor, Typed};
use hypercall_abi::event::Virq;
use services::console::Shows;
use toolstack::command::{Command, complete};
use unikernel::events::Channel;
use unikernel::{console, hypercall};

use crate::guests::Guests;
use crate::verbs::marked;

/// Ctrl-]: leads from a guest's console to the prompt.
const LEAVE: u8 = 0x1d;
const PROMPT: &str = "dom0> ";

/// What the cursor stands behind.
static LINE: AtomicU8 = AtomicU8::new(line::EMPTY);

mod line {
    /// Nothing.
    pub(super) const EMPTY: u8 = 0;
    /// Text of a guest: a message begins a new line.
    pub(super) const GUEST: u8 = 1;
    /// The prompt: a message takes its place.
    pub(super) const PROMPT: u8 = 2;
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
pub(crate) struct Terminal {
    /// All guests are shown, in lines; the keyboard is for commands.
    all: bool,
    focus: RefCell<Focus>,
    editor: RefCell<LineEditor>,
    /// The prompt is on the screen.
    prompted: Cell<bool>,
}

impl Terminal {
    /// A terminal that shows nobody yet, or in lines everybody (`all`).
    pub(crate) fn new(all: bool) -> Rc<Self> {
        console::set_sink(print);
        Rc::new(Self {
            all,
            focus: RefCell::new(Focus::Prompt),
            editor: RefCell::default(),
            prompted: Cell::new(false),
        })
    }

    /// How the output of this guest is to be shown now.
    pub(crate) fn shows(&self, name: &str) -> Shows {
        match &*self.focus.borrow() {
            _ if self.all => Shows::Lines,
            Focus::Guest(shown) if shown == name => Shows::Bytes,
            _ => Shows::Nothing,
        }
    }

    /// Shows bytes as they are.
    pub(crate) fn raw(&self, bytes: &[u8]) {
        if let Some(last) = bytes.last() {
            write(bytes);
            LINE.store(if *last == b'\n' { line::EMPTY } else { line::GUEST }, Ordering::Relaxed);
        }
    }

    /// Shows a line of a guest.
    pub(crate) fn line(&self, line: &str) {
        unikernel::println!("{line}");
        self.refresh();
    }

    /// Shows a message of ours on lines of its own.
    pub(crate) fn message(&self, text: &str) {
        unikernel::println!("{text}");
        self.refresh();
    }

    /// The guest whose console is shown alone.
    pub(crate) fn attached(&self) -> Option<String> {
        match &*self.focus.borrow() {
            Focus::Guest(name) => Some(name.clone()),
            Focus::Prompt => None,
        }
    }

    /// A guest has another name.
    pub(crate) fn renamed(&self, from: &str, to: &str) {
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
    pub(crate) fn attach(&self, guests: &Guests, name: &str) -> Result<(), String> {
        let console = guests.console(name).ok_or_else(|| format!("there is no guest {}", name.escape_debug()))?;
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
    pub(crate) fn follow(&self, guests: &Guests) {
        if self.attached().is_some_and(|name| !guests.is_alive(&name)) {
            match guests.first_alive() {
                // It is there, and one guest is shown at a time.
                Some(next) => drop(self.attach(guests, &next)),
                None => self.detach(),
            }
        }
    }

    /// Goes to the prompt.
    pub(crate) fn detach(&self) {
        self.focus.replace(Focus::Prompt);
        self.prompt();
    }

    fn prompt(&self) {
        self.prompted.set(true);
        end_line();
        self.refresh();
    }

    /// Draws the prompt again after other text, with what has been typed so far.
    fn refresh(&self) {
        if self.prompted.get() && LINE.load(Ordering::Relaxed) == line::EMPTY {
            write(PROMPT.as_bytes());
            write(self.editor.borrow().line().as_bytes());
            LINE.store(line::PROMPT, Ordering::Relaxed);
        }
    }

    /// Draws the line again that is being typed.
    fn redraw(&self) {
        end_line();
        self.refresh();
    }

    /// Shows an answer to a program, in lines that begin with a mark.
    pub(crate) fn answer(&self, text: &str) {
        end_line();
        for line in text.lines() {
            write(marked(line).as_bytes());
        }
    }

    /// Gives every key to whom it is for, for ever.
    pub(crate) async fn read(self: Rc<Self>, guests: Rc<Guests>) {
        let channel = match hypercall::bind_virq(Virq::Console, 0) {
            Ok(port) => Channel::adopt(port),
            Err(errno) => return log::error!("nothing can be typed: {}", errno.name()),
        };
        let mut buffer = [0; 128];
        loop {
            match hypercall::console_read(&mut buffer) {
                Ok(0) => channel.wait().await,
                Ok(count) => self.keys(&guests, buffer.get(..count).unwrap_or_default()).await,
                Err(errno) => return log::error!("nothing can be typed: {}", errno.name()),
            }
        }
    }

    async fn keys(&self, guests: &Rc<Guests>, mut keys: &[u8]) {
        while let Some((first, rest)) = keys.split_first() {
            let Some(console) = self.attached().and_then(|name| guests.console(&name)) else {
                keys = rest;
                self.key(guests, *first).await;
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
    }

    /// A key of a command.
    async fn key(&self, guests: &Rc<Guests>, key: u8) {
        if !self.prompted.get() {
            self.prompt();
        }
        let typed = self.editor.borrow_mut().key(key);
        match typed {
            Typed::Echo(text) => write(text.as_bytes()),
            Typed::Character(character) => write(character.encode_utf8(&mut [0; 4]).as_bytes()),
            Typed::Redraw => self.redraw(),
            Typed::Complete => {
                let names = guests.names();
                let completion = complete(self.editor.borrow().line(), names.iter().map(String::as_str));
                self.editor.borrow_mut().insert(&completion.add);
                if completion.add.is_empty() && !completion.choices.is_empty() {
                    self.message(&completion.choices.join("  "));
                } else {
                    self.redraw();
                }
            }
            Typed::Cancelled => {
                self.raw(b"\r\n");
                self.refresh();
            }
            Typed::Line(line) => {
                self.raw(b"\r\n");
                self.prompted.set(false);
                match Command::parse(&line) {
                    // The end of a guest that is asked to end is told when it comes; nobody waits for it here.
                    Ok(Some(line)) => drop(guests.obey(&line, &|text| self.message(text)).await),
                    Ok(None) => {}
                    Err(why) => self.message(&why),
                }
                if self.attached().is_none() {
                    self.prompt();
                }
            }
        }
    }
}

/// Where all text of this domain goes: on lines of its own, each ended as a terminal wants it.
fn print(text: &str) {
    end_line();
    for piece in text.split_inclusive('\n') {
        match piece.strip_suffix('\n') {
            Some(line) => {
                write(line.as_bytes());
                write(b"\r\n");
            }
            None => write(piece.as_bytes()),
        }
    }
}

/// Moves the cursor to an empty line.
fn end_line() {
    match LINE.swap(line::EMPTY, Ordering::Relaxed) {
        line::EMPTY => {}
        line::PROMPT => write(b"\r\x1b[K"),
        _ => write(b"\r\n"),
    }
}

fn write(bytes: &[u8]) {
    // There is nobody to tell if the console does not take it.
    let _ = hypercall::console_write(bytes);
}
