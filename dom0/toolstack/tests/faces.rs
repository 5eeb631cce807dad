//! The two text faces of the manager: the prompt on the terminal, and `--exec`.
#![forbid(unsafe_code)]

mod archive;
#[allow(dead_code, reason = "shared by tests")]
mod common;
#[allow(dead_code, reason = "shared by tests")]
mod world;

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use toolstack::bundle::EXEC;
use toolstack::face::{After, CommandResult, script};
use toolstack::status::Failure;
use toolstack::terminal::{Cursor, Screen, Shows, Terminal, print};
use world::World;

const WEB: &str = "name = 'web'\nmemory = 16\nkernel = 'k'\n";
const DB: &str = "name = 'db'\nmemory = 8\nkernel = 'k'\n";

/// A screen that keeps what is written.
#[derive(Default)]
struct Paper {
    text: RefCell<Vec<u8>>,
    cursor: Cursor,
}

impl Screen for &Paper {
    fn write(&self, bytes: &[u8]) {
        self.text.borrow_mut().extend_from_slice(bytes);
    }

    fn cursor(&self) -> &Cursor {
        &self.cursor
    }
}

/// A person at a terminal.
struct Person {
    world: World,
    terminal: Rc<Terminal<&'static Paper>>,
    paper: &'static Paper,
}

impl Person {
    fn new(all: bool) -> Self {
        let paper: &Paper = Box::leak(Box::default());
        Self { world: World::running(&[WEB, DB]), terminal: Rc::new(Terminal::new(paper, all)), paper }
    }

    /// Types keys; answers what was written, and what came of it.
    fn types(&mut self, keys: &str) -> (String, CommandResult) {
        let (manager, terminal, keys) = (Rc::clone(&self.world.manager), Rc::clone(&self.terminal), keys.to_string());
        let done = Rc::new(RefCell::new(None));
        let to = Rc::clone(&done);
        self.world.spawn(async move {
            let done = terminal.keys(&manager, keys.as_bytes()).await;
            to.replace(Some(done));
        });
        self.world.settle();
        (self.written(), done.take().expect("all keys are read"))
    }

    fn written(&self) -> String {
        String::from_utf8(self.paper.text.take()).unwrap()
    }

    fn typed_for(&self, name: &str) -> String {
        String::from_utf8(self.world.manager.console(name).unwrap().typed.take()).unwrap()
    }
}

#[test]
fn keys_go_to_the_console_that_is_shown_or_to_the_prompt() {
    let mut person = Person::new(false);
    assert_eq!(person.types("domid we\t\r").0, "dom0> domid we\r\x1b[Kdom0> domid web \r\n7\r\ndom0> ");
    assert_eq!(person.terminal.shows("web"), Shows::Nothing);
    let (shown, _) = person.types("console web\rls\r\x1d");
    assert_eq!(shown, "console web\r\n[console of web; Ctrl-] leads to dom0]\r\ndom0> ");
    assert_eq!((person.typed_for("web"), person.terminal.attached()), ("ls\r".into(), None));
    assert_eq!(person.world.manager.console("web").unwrap().shown.get(), 1);
    person.types("console 8\rx");
    assert_eq!((person.typed_for("db"), person.terminal.attached()), ("x".into(), Some("db".into())));
    assert_eq!((person.terminal.shows("db"), person.terminal.shows("web")), (Shows::Bytes, Shows::Nothing));
    person.terminal.renamed("db", "shop");
    assert_eq!(person.terminal.shows("shop"), Shows::Bytes);
}

#[test]
fn what_is_typed_wrong_is_said_and_the_prompt_comes_back() {
    let mut person = Person::new(false);
    assert_eq!(person.types("lst\r").0, "dom0> lst\r\nlst: unknown command; try `help`\r\ndom0> ");
    assert_eq!(person.types("\r").0, "\r\ndom0> ");
    assert_eq!(person.types("pause x -j\r").0, "pause x -j\r\n{\"error\":\"there is no guest x\"}\r\ndom0> ");
    assert_eq!(person.types("ab\x03").0, "ab\r\ndom0> ");
    assert_eq!(person.types("re\t").0, "re\r\x1b[Kreboot  rename\r\ndom0> re");
    assert_eq!(person.types("\x15quit\r").1, CommandResult::Quit);
}

/// Text from elsewhere takes the place of the prompt, which is drawn again with what has been typed.
#[test]
fn messages_and_guests_do_not_run_into_the_prompt() {
    let mut person = Person::new(false);
    person.types("li");
    person.terminal.message("guest web crashed");
    assert_eq!(person.written(), "\r\x1b[Kguest web crashed\r\ndom0> li");
    print(&person.paper, "a log line\n");
    assert_eq!(person.written(), "\r\x1b[Ka log line\r\n");
    person.types("\x15console web\r");
    person.terminal.raw(b"login:");
    person.terminal.message("guest db crashed");
    assert!(person.written().ends_with("login:\r\nguest db crashed\r\n"));
}

#[test]
fn all_consoles_are_shown_in_lines_and_keys_are_for_commands() {
    let mut person = Person::new(true);
    assert_eq!(person.terminal.shows("web"), Shows::Lines);
    let (shown, _) = person.types("console web\r");
    assert_eq!(shown, "dom0> console web\r\nevery console is shown already (consoles=all)\r\ndom0> ");
}

/// When the guest that is shown ends, the next one is shown; if the others are only kept, the prompt is.
#[test]
fn the_terminal_follows_the_guests() {
    let mut person = Person::new(false);
    person.types("console web\r");
    person.terminal.follow(&person.world.manager);
    assert_eq!(person.terminal.attached().as_deref(), Some("web"));
    person.world.shut_down(7, 0);
    person.terminal.follow(&person.world.manager);
    assert_eq!(person.terminal.attached().as_deref(), Some("db"));
    person.world.shut_down(8, 0);
    person.terminal.follow(&person.world.manager);
    assert_eq!(person.terminal.attached(), None);
}

/// Runs a script on a fresh machine with two guests; answers what came of it and what a program reads.
fn exec(commands: &'static str, meanwhile: impl FnOnce(&mut World)) -> (Option<After>, String) {
    let kernel = common::kernel();
    let mut world = World::of(&[
        ("guests/web/config", WEB.as_bytes()),
        ("guests/db/config", DB.as_bytes()),
        ("k", &kernel),
        (EXEC, commands.as_bytes()),
    ]);
    world.begin();
    world.settle();
    let paper: &Paper = Box::leak(Box::default());
    let after = Rc::new(Cell::new(None));
    let (manager, to) = (Rc::clone(&world.manager), Rc::clone(&after));
    world.spawn(async move {
        let terminal = Terminal::new(paper, false);
        to.set(Some(script(&manager, commands, &terminal.face(&manager)).await));
    });
    world.settle();
    meanwhile(&mut world);
    if after.get().is_some_and(|after| after == After::Stays) {
        world.shut_down(7, 0);
        world.shut_down(8, 0);
        assert!(world.manager.all_ended(), "the commands keep the machine on no longer");
    }
    (after.get(), String::from_utf8(paper.text.take()).unwrap())
}

#[test]
fn a_script_answers_in_marked_lines_up_to_the_first_refusal() {
    let off = |failure| Some(After::Off(failure));
    let nothing = |_: &mut World| {};
    assert_eq!(
        exec("domid web; ; domid db -j", nothing),
        (off(None), "\x1e7\r\n\x1e{\"name\":\"db\",\"domid\":8}\r\n".into())
    );
    assert_eq!(exec("disks; disks -j", nothing), (off(None), "\x1eno disks\r\n\x1e[]\r\n".into()));
    let refused = exec("pause x; list", nothing);
    assert_eq!(refused, (off(Some(Failure::Refused)), "\x1ethere is no guest x\r\n".into()));
    let unknown = exec("list; lst", nothing);
    assert_eq!(unknown, (off(Some(Failure::Refused)), "error: lst: unknown command; try `help`\r\n".into()));
    assert_eq!(exec("quit; list", nothing), (off(None), String::new()));
    let stays = exec("domid web; console web", nothing);
    assert_eq!(stays, (Some(After::Stays), "7\r\n[console of web; Ctrl-] leads to dom0]\r\n".into()));
}

#[test]
fn a_script_waits_for_what_was_wished() {
    assert_eq!(exec("shutdown -w web; list", |_| {}).0, None, "the guest does not obey");
    let (after, text) = exec("shutdown -w web; domid web", |world| world.shut_down(7, 0));
    assert_eq!((after, text.as_str()), (Some(After::Off(Some(Failure::Refused))), "\x1eguest web has ended\r\n"));
    let reboots = |world: &mut World| {
        world.shut_down(7, 1);
        world.pass(1_000_000_000);
    };
    assert_eq!(exec("reboot -w web; domid web", reboots), (Some(After::Off(None)), "\x1e9\r\n".into()));
    let (after, text) = exec("reboot -w web; list", |world| world.shut_down(7, 3));
    assert_eq!(
        (after, text.as_str()),
        (Some(After::Off(Some(Failure::Crashed))), "\x1eguest web did not come back\r\n")
    );
    let (_, text) = exec("reboot -w web -j; list", |world| world.shut_down(7, 3));
    let refused = "{\"error\":\"guest web did not come back\"}";
    assert_eq!(text, format!("\x1e{{\"done\":\"reboot\",\"name\":\"web\"}}\r\n\x1e{refused}\r\n"));
    assert_eq!(exec("shutdown web; list -j", |_| {}).0, Some(After::Off(None)), "it need not wait");
}
