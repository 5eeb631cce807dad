//! Serves the consoles of guests. The output of a guest is taken and kept even if nobody reads it. While the screen
//! shows a guest, that guest's output is also shown there.

use alloc::format;
use alloc::rc::Rc;
use alloc::string::{String, ToString};
use core::cell::{Cell, RefCell};
use core::fmt;

use console_backend::{AttachError, Console, LineWriter, console_bytes};
use hypercall_abi::grant::REF_CONSOLE;
use ring_protocol::console::set_connected;
use toolstack::DomainId;
use toolstack::terminal::Terminal;

pub use toolstack::terminal::Shows;

use crate::host::{Channel, Class, Host};
use crate::shape::{Attached, Ends, Service, Turn};

/// The most bytes of output that are kept for each guest.
const KEPT: usize = 64 * 1024;
/// Bytes of the heap that `reserve` sets aside for the console of a guest. They are used from the first connection on.
pub const CONSOLE_BYTES: usize = console_bytes(KEPT);

/// The screen on which the output of guests is shown.
pub trait Screen: 'static {
    /// How the output of the guest with this name is shown now.
    fn shows(&self, name: &str) -> Shows;

    /// Shows bytes unchanged.
    fn raw(&self, bytes: &[u8]);

    /// Shows a line of a guest.
    fn line(&self, line: &str);

    /// Shows a message of dom0 on lines of its own.
    fn message(&self, text: &str);

    /// Called when a guest has a new name.
    fn renamed(&self, from: &str, to: &str);
}

impl<S: toolstack::terminal::Screen + 'static> Screen for Terminal<S> {
    fn shows(&self, name: &str) -> Shows {
        self.shows(name)
    }

    fn raw(&self, bytes: &[u8]) {
        self.raw(bytes);
    }

    fn line(&self, line: &str) {
        self.message(line);
    }

    fn message(&self, text: &str) {
        self.message(text);
    }

    fn renamed(&self, from: &str, to: &str) {
        self.renamed(from, to);
    }
}

/// The console of a guest. A guest that is made again keeps its console.
pub struct GuestConsole<H: Host, S> {
    host: H,
    kept: Rc<Kept<S>>,
    /// The part of the heap that is set aside for the console; `None` if nothing is set aside.
    reserved: RefCell<Option<H::Reserved>>,
    /// The console as a service, while the guest is connected; `None` otherwise.
    life: RefCell<Option<Attached<H, Life<H, S>>>>,
}

/// The part of a console that is kept when the guest ends, in case the guest is made again.
struct Kept<S> {
    name: RefCell<String>,
    screen: Rc<S>,
    /// The guest's output and input; `None` before the guest is first connected.
    console: RefCell<Option<Console>>,
    lines: RefCell<LineWriter>,
    /// How many bytes the guest had printed when its output was last shown on the screen. `show_missed` shows what was printed
    /// since.
    shown: Cell<u64>,
    /// How many bytes the guest had printed in all when the console was last connected.
    begun: Cell<u64>,
}

/// A console as a service. It exists while the guest is connected.
struct Life<H: Host, S> {
    kept: Rc<Kept<S>>,
    ends: Ends<H>,
}

impl<H: Host, S> fmt::Debug for GuestConsole<H, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestConsole").field("name", &self.kept.name).field("life", &self.life).finish_non_exhaustive()
    }
}

impl<H: Host, S: Screen> GuestConsole<H, S> {
    /// A console, not connected yet, for the guest with this name.
    pub fn new(host: H, name: &str, screen: Rc<S>) -> Rc<Self> {
        let kept = Rc::new(Kept {
            name: RefCell::new(name.to_string()),
            screen,
            console: RefCell::default(),
            lines: RefCell::new(lines_of(name)),
            shown: Cell::new(0),
            begun: Cell::new(0),
        });
        Rc::new(Self { host, kept, reserved: RefCell::default(), life: RefCell::default() })
    }
}

impl<H: Host, S: Screen> toolstack::manager::Console for GuestConsole<H, S> {
    fn name(&self) -> String {
        self.kept.name.borrow().clone()
    }

    fn rename(&self, name: &str) {
        self.kept.end_line();
        self.kept.lines.replace(lines_of(name));
        let before = self.kept.name.replace(name.to_string());
        self.kept.screen.renamed(&before, name);
    }

    fn reserve(&self) -> bool {
        let mut reserved = self.reserved.borrow_mut();
        if reserved.is_none() {
            *reserved = self.host.reserve(CONSOLE_BYTES);
        }
        reserved.is_some()
    }

    fn give_back(&self) {
        if self.kept.console.borrow().is_none() {
            self.reserved.take();
        }
    }

    fn connect(&self, DomainId(domain): DomainId, port: u32) -> Result<(), String> {
        let life = Attached::attach(&self.host, &self.kept, domain, port)?;
        self.life.replace(Some(life));
        Ok(())
    }

    fn disconnect(&self) {
        let life = self.life.take();
        if let Some(life) = life {
            life.detach();
        }
    }

    fn is_silent(&self) -> bool {
        self.kept.printed() == self.kept.begun.get()
    }

    fn type_in(&self, bytes: &[u8]) {
        if let (Some(console), Some(life)) = (&mut *self.kept.console.borrow_mut(), &*self.life.borrow()) {
            console.type_in(bytes);
            life.kick();
        }
    }

    fn show_missed(&self) {
        let kept = &self.kept;
        if let Some(console) = &*kept.console.borrow() {
            let since = console.scrollback().since(kept.shown.get());
            if since.missed > 0 {
                kept.screen.message(&format!("[{} bytes are lost]", since.missed));
            }
            kept.screen.raw(since.first);
            kept.screen.raw(since.second);
            kept.shown.set(since.next);
        }
    }
}

/// A line writer for a guest with this name, for a screen that several guests share.
fn lines_of(name: &str) -> LineWriter {
    LineWriter::new(format!("{name}| "))
}

impl<S: Screen> Kept<S> {
    /// How many bytes the guest has printed in all, including what it printed before it was last made again.
    fn printed(&self) -> u64 {
        self.console.borrow().as_ref().map_or(0, |console| console.scrollback().end())
    }

    /// Shows the unfinished line that `lines` holds, if there is one.
    fn end_line(&self) {
        self.lines.borrow_mut().flush(|line| self.screen.line(line));
    }
}

impl<H: Host, S: Screen> Service<H> for Life<H, S> {
    type Kept = Rc<Kept<S>>;

    const NAME: &'static str = "console";
    const REFERENCE: u32 = REF_CONSOLE;
    const CLASS: Class = Class::Data;
    const TURN_BYTES: usize = console_backend::TURN_BYTES;
    /// The most bytes of output taken in one turn. Keystrokes do not count: the console holds at most
    /// [`console_backend::TYPED_MAX`], and a turn passes on no more than these.
    const BUDGET: usize = console_backend::BUDGET;

    fn attach(kept: &Rc<Kept<S>>, ends: Ends<H>) -> Result<Self, &'static str> {
        {
            let mut console = kept.console.borrow_mut();
            let attached = match console.as_mut() {
                Some(console) => console.reattach(&ends.page).map_err(AttachError::BadIndices),
                None => Console::attach(&ends.page, KEPT).map(|new| *console = Some(new)),
            };
            attached.map_err(|why| match why {
                AttachError::BadIndices(_) => "page changes under us",
                AttachError::NoMemory => "needs more memory than there is",
            })?;
        }
        kept.begun.set(kept.printed());
        Ok(Self { kept: Rc::clone(kept), ends })
    }

    /// Takes the guest's output, and gives the guest what was typed.
    fn serve(&self, budget: usize) -> Turn {
        let kept = &*self.kept;
        let Some(console) = &mut *kept.console.borrow_mut() else { return Turn::Idle };
        let stopped_before = console.stopped().is_some();
        let shows = kept.screen.shows(&kept.name.borrow());
        let served = console.serve(&self.ends.page, budget, |bytes| match shows {
            Shows::Bytes => kept.screen.raw(bytes),
            Shows::Lines => kept.lines.borrow_mut().push(bytes, |line| kept.screen.line(line)),
            Shows::Nothing => {}
        });
        if shows != Shows::Nothing {
            kept.shown.set(console.scrollback().end());
        }
        match served {
            Ok(served) => {
                if served.notify {
                    self.ends.channel.notify();
                }
                Turn::again_if(served.again)
            }
            Err(why) => {
                if !stopped_before {
                    log::warn!("the console of {} is served no longer: {why:?}", kept.name.borrow());
                }
                Turn::Idle
            }
        }
    }

    fn detach(&self) {
        // One turn takes as much as a full ring holds. A loop until the ring is empty could run for ever, because the guest may
        // still be printing.
        let _ = self.serve(Self::BUDGET);
        self.kept.end_line();
        set_connected(&self.ends.page, false);
    }
}
