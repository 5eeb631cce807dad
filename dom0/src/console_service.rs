//! The guests' consoles, served: what they print is drained at once and kept, and shown if the terminal shows them.

use alloc::format;
use alloc::rc::{Rc, Weak};
use alloc::string::{String, ToString};
use core::cell::{Cell, RefCell};

use console_backend::{AttachError, BUDGET, Console, LineWriter, TURN_BYTES, console_bytes};
use hypercall_abi::grant::REF_CONSOLE;
use unikernel::events::Channel;
use unikernel::grants::GrantedPage;
use unikernel::memory::{self, Reserved};
use unikernel::tasks::{self, Task};
use unikernel::time;

use crate::signal::Signal;
use crate::terminal::{Shows, Terminal};

/// Bytes kept of what each guest prints.
const KEPT: usize = 64 * 1024;
/// What the console of a guest takes of the heap for good.
pub(crate) const CONSOLE_BYTES: usize = console_bytes(KEPT);
/// How long a guest waits for its turn when there is no memory for it.
const PATIENCE_NS: u64 = 100_000_000;

/// The console of a guest, through all its lives.
pub(crate) struct GuestConsole {
    name: RefCell<String>,
    terminal: Rc<Terminal>,
    /// Since the first connection.
    console: RefCell<Option<Console>>,
    /// The heap for it.
    reserved: RefCell<Option<Reserved>>,
    /// While the guest lives.
    connection: RefCell<Option<Connection>>,
    lines: RefCell<LineWriter>,
    /// How much of the output the terminal has shown.
    shown: Cell<u64>,
    /// How much there was when the guest last began to live.
    begun: Cell<u64>,
}

struct Connection {
    page: GrantedPage,
    channel: Channel,
    /// Something was typed.
    typed: Rc<Signal>,
    /// Ends with this structure.
    _task: Task<()>,
}

impl GuestConsole {
    /// A console nobody is connected to.
    pub(crate) fn new(name: &str, terminal: Rc<Terminal>) -> Rc<Self> {
        Rc::new(Self {
            name: RefCell::new(name.to_string()),
            terminal,
            console: RefCell::default(),
            reserved: RefCell::default(),
            connection: RefCell::default(),
            lines: RefCell::new(LineWriter::new(format!("{name}| "))),
            shown: Cell::new(0),
            begun: Cell::new(0),
        })
    }

    /// The guest's name.
    pub(crate) fn name(&self) -> String {
        self.name.borrow().clone()
    }

    /// The guest has another name now.
    pub(crate) fn rename(&self, name: &str) {
        let mut lines = self.lines.borrow_mut();
        lines.flush(|line| self.terminal.line(line));
        *lines = LineWriter::new(format!("{name}| "));
        self.name.replace(name.to_string());
    }

    /// Has the heap hold what the console may take; answers whether there is memory for it.
    pub(crate) fn reserve(&self) -> bool {
        let mut reserved = self.reserved.borrow_mut();
        if reserved.is_none() {
            *reserved = memory::reserve(CONSOLE_BYTES);
        }
        reserved.is_some()
    }

    /// No guest comes: what was reserved is free again, unless an earlier life has printed something.
    pub(crate) fn give_back(&self) {
        if self.console.borrow().is_none() {
            self.reserved.take();
        }
    }

    /// Begins to serve the guest as `domain`, whose end of the event channel is `port`.
    ///
    /// # Errors
    /// Why its page or port cannot be used.
    pub(crate) fn connect(self: &Rc<Self>, domain: u16, port: u32) -> Result<(), String> {
        let page =
            GrantedPage::map(domain, REF_CONSOLE).map_err(|errno| format!("its console page: {}", errno.name()))?;
        let channel = Channel::connect(domain, port).map_err(|errno| format!("its console port: {}", errno.name()))?;
        {
            let mut console = self.console.borrow_mut();
            let attached = match console.as_mut() {
                Some(console) => console.reattach(&page).map_err(AttachError::BadIndices),
                None => Console::attach(&page, KEPT).map(|new| *console = Some(new)),
            };
            attached.map_err(|why| match why {
                AttachError::BadIndices(_) => "its console page changes under us",
                AttachError::NoMemory => "there is no memory for what it prints",
            })?;
        }
        self.begun.set(self.printed());
        let typed = Rc::new(Signal::default());
        let task = serve(Rc::downgrade(self), channel.port(), Rc::clone(&typed));
        let connection = Connection { page, channel, typed, _task: tasks::spawn_data(task) };
        self.connection.replace(Some(connection));
        Ok(())
    }

    /// Bytes that the guest has printed in all its lives.
    fn printed(&self) -> u64 {
        self.console.borrow().as_ref().map_or(0, |console| console.scrollback().end())
    }

    /// Whether the guest has printed nothing in its last life.
    pub(crate) fn is_silent(&self) -> bool {
        self.printed() == self.begun.get()
    }

    /// Takes the guest's last words and lets go of its page.
    pub(crate) fn disconnect(&self) {
        // No more than a ring full waits, and a guest that is destroyed while it runs never stops.
        self.drain();
        self.lines.borrow_mut().flush(|line| self.terminal.line(line));
        self.connection.take();
    }

    /// Hands keystrokes to the guest; what it has no room for is lost.
    pub(crate) fn type_in(&self, bytes: &[u8]) {
        if let (Some(console), Some(connection)) = (&mut *self.console.borrow_mut(), &*self.connection.borrow()) {
            console.type_in(bytes);
            connection.typed.set();
        }
    }

    /// Shows on the terminal what was printed while it did not show this console.
    pub(crate) fn show_missed(&self) {
        if let Some(console) = &*self.console.borrow() {
            let since = console.scrollback().since(self.shown.get());
            if since.missed > 0 {
                self.terminal.message(&format!("[{} bytes are lost]", since.missed));
            }
            self.terminal.raw(since.first);
            self.terminal.raw(since.second);
            self.shown.set(since.next);
        }
    }

    /// Takes one ring full of output at most and gives what was typed; answers whether there is more.
    fn drain(&self) -> bool {
        let (Some(console), Some(connection)) = (&mut *self.console.borrow_mut(), &*self.connection.borrow()) else {
            return false;
        };
        let stopped_before = console.stopped().is_some();
        let shows = self.terminal.shows(&self.name.borrow());
        let served = console.serve(&connection.page, BUDGET, |bytes| match shows {
            Shows::Bytes => self.terminal.raw(bytes),
            Shows::Lines => self.lines.borrow_mut().push(bytes, |line| self.terminal.line(line)),
            Shows::Nothing => {}
        });
        if shows != Shows::Nothing {
            self.shown.set(console.scrollback().end());
        }
        match served {
            Ok(served) => {
                if served.notify {
                    connection.channel.notify();
                }
                served.again
            }
            Err(why) => {
                if !stopped_before {
                    log::warn!("the console of {} is served no longer: {why:?}", self.name());
                }
                false
            }
        }
    }
}

async fn serve(console: Weak<GuestConsole>, port: u32, typed: Rc<Signal>) {
    loop {
        while !memory::can_allocate(TURN_BYTES) {
            time::sleep_until(time::now_ns().saturating_add(PATIENCE_NS)).await;
        }
        let again = match console.upgrade() {
            Some(console) => console.drain(),
            None => return,
        };
        if again {
            tasks::yield_now().await;
        } else {
            typed.or_port(port).await;
        }
    }
}
