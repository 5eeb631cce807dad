//! The consoles of guests, from the beginning of a life to its end.

mod common;

use std::cell::RefCell;
use std::rc::Rc;

use common::Fake;
use hypercall_abi::grant::REF_CONSOLE;
use ring_protocol::console::{FrontEnd, is_connected};
use ring_protocol::{SharedPage, WordPage};
use services::console::{CONSOLE_BYTES, GuestConsole, Screen, Shows};
use services::{Class, PATIENCE_NS};
use toolstack::DomainId;
use toolstack::manager::Console;

/// Bytes of the ring for what a guest prints.
const RING: usize = 2048;

/// A screen that one guest at most has for itself.
#[derive(Default)]
struct Display {
    alone: RefCell<String>,
    lines: RefCell<bool>,
    seen: RefCell<String>,
}

impl Display {
    fn take(&self) -> String {
        self.seen.take()
    }
}

impl Screen for Display {
    fn shows(&self, name: &str) -> Shows {
        match () {
            () if *self.lines.borrow() => Shows::Lines,
            () if *self.alone.borrow() == name => Shows::Bytes,
            () => Shows::Nothing,
        }
    }

    fn raw(&self, bytes: &[u8]) {
        self.seen.borrow_mut().push_str(&String::from_utf8_lossy(bytes));
    }

    fn line(&self, line: &str) {
        self.seen.borrow_mut().push_str(&format!("<{line}>"));
    }

    fn message(&self, text: &str) {
        self.seen.borrow_mut().push_str(&format!("({text})"));
    }

    fn renamed(&self, from: &str, to: &str) {
        self.seen.borrow_mut().push_str(&format!("({from} is {to})"));
    }
}

struct World {
    host: Fake,
    display: Rc<Display>,
    console: Rc<GuestConsole<Fake, Display>>,
    page: Rc<WordPage>,
    guest: FrontEnd,
}

/// Guest `one`, alive as domain 5 and alone on the screen.
fn world() -> World {
    let host = Fake::default();
    let display = Rc::new(Display { alone: RefCell::new("one".into()), ..Display::default() });
    let console = GuestConsole::new(host.clone(), "one", Rc::clone(&display));
    assert!(console.reserve());
    console.connect(DomainId(5), 7).unwrap();
    let page = host.page(5, REF_CONSOLE);
    let guest = FrontEnd::attach(&*page).unwrap();
    World { host, display, console, page, guest }
}

impl World {
    fn print(&mut self, text: &str) -> usize {
        let written = self.guest.output.write(&*self.page, text.as_bytes()).unwrap();
        self.host.raise(5);
        written
    }

    /// Every byte of the page.
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        self.page.read(0, &mut bytes);
        bytes
    }
}

#[test]
fn what_is_printed_is_shown_and_what_is_typed_arrives() {
    let mut world = world();
    world.host.round();
    assert_eq!(world.host.notified(5), 0, "nothing has moved yet");
    world.print("login: ");
    world.host.round();
    assert_eq!((world.display.take().as_str(), world.host.notified(5)), ("login: ", 1));
    world.console.type_in(b"root\r");
    world.host.round();
    let mut typed = [0; 16];
    assert_eq!(world.guest.input.read(&*world.page, &mut typed), Ok(5));
    assert_eq!((&typed[..5], world.host.notified(5)), (&b"root\r"[..], 2));
    world.host.rounds(10);
    assert_eq!(world.host.notified(5), 2, "a stock kernel punishes idle events");
}

#[test]
fn a_flood_takes_one_turn_a_round_and_leaves_others_theirs() {
    let mut world = world();
    let other = GuestConsole::new(world.host.clone(), "two", Rc::clone(&world.display));
    other.connect(DomainId(6), 7).unwrap();
    let page = world.host.page(6, REF_CONSOLE);
    let mut quiet = FrontEnd::attach(&*page).unwrap();
    for round in 1..=20 {
        assert_eq!(world.print(&"x".repeat(3 * RING)), RING, "the ring is empty at each round");
        quiet.output.write(&*page, b"y").unwrap();
        world.host.raise(6);
        world.host.round();
        assert_eq!(world.display.take().len(), RING, "no more than a budget");
        assert_eq!((world.host.notified(5), world.host.notified(6)), (round, round));
    }
    assert_eq!(world.host.tasks(Class::Data), 2, "consoles move bytes");
    assert_eq!(world.host.tasks(Class::Control), 0);
}

/// A guest that prints while it is read: each look at its index finds a full ring again.
#[test]
fn a_turn_ends_however_fast_the_guest_prints() {
    struct Racing(RefCell<WordPage>);
    impl SharedPage for Racing {
        fn len_bytes(&self) -> usize {
            4096
        }
        fn load_u32(&self, offset: usize) -> u32 {
            let page = self.0.borrow();
            // out_cons at 3080, out_prod at 3084.
            if offset == 3084 { page.load_u32(3080).wrapping_add(2048) } else { page.load_u32(offset) }
        }
        fn store_u32(&self, offset: usize, value: u32) {
            self.0.borrow().store_u32(offset, value);
        }
        fn read(&self, offset: usize, into: &mut [u8]) {
            self.0.borrow().read(offset, into);
        }
        fn write(&self, offset: usize, from: &[u8]) {
            self.0.borrow().write(offset, from);
        }
    }
    let page = Racing(RefCell::default());
    let mut console = console_backend::Console::attach(&page, 4096).unwrap();
    for budget in [1, 700, console_backend::BUDGET] {
        let served = console.serve(&page, budget, |_| {}).unwrap();
        assert_eq!((served.taken, served.again), (budget, true));
    }
}

#[test]
fn a_turn_waits_until_there_is_memory_for_it() {
    let mut world = world();
    world.host.round();
    world.print("a");
    world.host.round();
    assert_eq!(world.display.take(), "a");
    world.host.set_full(true);
    world.print("b");
    world.host.rounds(3);
    world.host.set_full(false);
    world.host.rounds(3);
    assert_eq!(world.display.take(), "", "it sleeps");
    world.host.advance(PATIENCE_NS);
    world.host.rounds(2);
    assert_eq!(world.display.take(), "b");
}

#[test]
fn detaching_says_the_last_words_and_dropping_says_nothing() {
    let mut world = world();
    world.host.round();
    *world.display.lines.borrow_mut() = true;
    world.print("a\nlast words");
    world.console.disconnect();
    assert_eq!(world.display.take(), "<one| a><one| last words>");
    assert!(!is_connected(&*world.page), "the page says that nobody reads");
    assert_eq!((world.host.held(), world.host.tasks(Class::Data)), ((0, 0), 0));
    world.console.disconnect();
    assert_eq!(world.display.take(), "", "there is nothing more to say");

    world.console.connect(DomainId(5), 7).unwrap();
    world.host.rounds(2);
    world.display.take();
    world.print("unheard");
    let (before, notified) = (world.bytes(), world.host.notified(5));
    let World { host, display, console, page, .. } = world;
    drop(console);
    host.rounds(3);
    let mut after = vec![0; 4096];
    page.read(0, &mut after);
    assert!(before == after, "not a byte of the page has changed");
    assert_eq!((host.notified(5), display.take().as_str()), (notified, ""));
    assert_eq!((host.held(), host.tasks(Class::Data), host.reserved()), ((0, 0), 0, 0));
}

#[test]
fn what_was_printed_outlives_the_guest_and_is_shown_when_it_is_asked_for() {
    let mut world = world();
    *world.display.alone.borrow_mut() = String::new();
    world.print("first life\n");
    world.host.round();
    assert!(!world.console.is_silent());
    world.console.disconnect();
    world.console.give_back();
    assert_eq!(world.host.reserved(), CONSOLE_BYTES, "what it printed is kept");
    world.console.connect(DomainId(8), 7).unwrap();
    assert!(world.console.is_silent(), "in this life");
    let page = world.host.page(8, REF_CONSOLE);
    FrontEnd::attach(&*page).unwrap().output.write(&*page, b"second").unwrap();
    world.host.raise(8);
    world.host.round();
    assert_eq!(world.display.take(), "");
    world.console.show_missed();
    assert_eq!(world.display.take(), "first life\nsecond");
    world.console.show_missed();
    assert_eq!(world.display.take(), "");
}

#[test]
fn too_much_is_forgotten_and_counted() {
    let mut world = world();
    *world.display.alone.borrow_mut() = String::new();
    for _ in 0..40 {
        assert_eq!(world.print(&"x".repeat(RING)), RING);
        world.host.round();
    }
    world.console.show_missed();
    let shown = world.display.take();
    assert!(shown.starts_with("([16384 bytes are lost])x"), "{}", &shown[..40]);
    assert_eq!(shown.matches('x').count(), 64 * 1024);
}

#[test]
fn a_renamed_guest_ends_its_line_under_the_old_name() {
    let mut world = world();
    *world.display.lines.borrow_mut() = true;
    world.print("prompt");
    world.host.round();
    world.console.rename("two");
    world.print("more\n");
    world.host.rounds(2);
    assert_eq!(
        (world.console.name().as_str(), world.display.take().as_str()),
        ("two", "<one| prompt>(one is two)<two| more>")
    );
}

#[test]
fn impossible_indices_end_the_service_and_harm_nobody() {
    let world = world();
    world.host.round();
    // out_prod.
    world.page.store_u32(3084, 5000);
    world.host.raise(5);
    world.host.round();
    assert!(!is_connected(&*world.page));
    world.console.type_in(b"x");
    world.host.rounds(5);
    assert_eq!(world.host.notified(5), 0);
    world.console.disconnect();
    assert_eq!((world.host.held(), world.display.take().as_str()), ((0, 0), ""));
    assert_eq!(world.console.connect(DomainId(5), 7).unwrap_err(), "its console page changes under us");
    assert_eq!(world.host.held(), (0, 0));
}

#[test]
fn what_cannot_be_had_is_named_and_nothing_is_left() {
    let host = Fake::default();
    let console = GuestConsole::new(host.clone(), "one", Rc::new(Display::default()));
    host.set_full(true);
    assert!(!console.reserve());
    host.set_full(false);
    assert!(console.reserve() && console.reserve());
    assert_eq!(host.reserved(), CONSOLE_BYTES, "once");
    assert_eq!(console.connect(DomainId(99), 7).unwrap_err(), "its console page: Inval");
    assert_eq!(console.connect(DomainId(5), 99).unwrap_err(), "its console port: Inval");
    console.give_back();
    assert_eq!((host.held(), host.tasks(Class::Data), host.reserved()), ((0, 0), 0, 0));
    console.type_in(b"to nobody");
    console.show_missed();
    console.disconnect();
    assert!(console.is_silent());
}
