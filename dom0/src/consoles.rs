//! Consoles as a service: every guest's ring is drained at once, whoever reads; the first guest has the terminal.
//!
//! The first guest's bytes pass both ways as they are. Lines of others are shown with the guest's name in front, and
//! without what could fool a terminal.

use alloc::format;
use alloc::rc::Rc;
use alloc::vec::Vec;
use console_backend::{BUDGET, Console, LineWriter};
use core::cell::RefCell;
use hypercall_abi::event::Virq;
use hypercall_abi::grant::REF_CONSOLE;
use toolstack::create::Guest;
use unikernel::events::{self, Channel};
use unikernel::grants::GrantedPage;
use unikernel::tasks::{self, Bell, Task};
use unikernel::{console, hypercall, println};

use crate::stores::listen;

/// What we remember of a guest's output.
const SCROLLBACK: usize = 64 * 1024;

/// How a guest's output is shown.
enum Show {
    /// As it is: the guest has the terminal.
    Raw,
    /// Line by line.
    Lines(LineWriter),
}

impl Show {
    fn push(&mut self, bytes: &[u8]) {
        match self {
            Self::Raw => console::write_bytes(bytes),
            Self::Lines(lines) => lines.push(bytes, |line| println!("{line}")),
        }
    }
}

/// A guest's console while it is served.
struct Attached {
    domain: u16,
    console: Console,
    page: GrantedPage,
    channel: Rc<Channel>,
    show: Show,
    /// The ring is damaged and no longer served.
    dead: bool,
    /// Rings the bell when the guest does. Dropping it ends it.
    _listener: Task<()>,
}

/// All consoles.
pub(crate) struct Consoles {
    attached: RefCell<Vec<Attached>>,
    bell: Rc<Bell>,
}

/// Starts the service, and reads the terminal.
pub(crate) fn start() -> Rc<Consoles> {
    let consoles = Rc::new(Consoles { attached: RefCell::default(), bell: Rc::default() });
    tasks::spawn(serve(Rc::clone(&consoles))).detach();
    match hypercall::bind_virq(Virq::Console, 0) {
        Ok(port) => tasks::spawn(type_in(Rc::clone(&consoles), Channel::adopt(port))).detach(),
        Err(why) => log::warn!("nothing can be typed: {}", why.name()),
    }
    consoles
}

async fn serve(consoles: Rc<Consoles>) {
    loop {
        while consoles.serve_all() {
            tasks::yield_now().await;
        }
        consoles.bell.wait().await;
    }
}

/// Passes what is typed on the machine's console to the guest that has the terminal.
async fn type_in(consoles: Rc<Consoles>, channel: Channel) {
    let mut buffer = [0; 128];
    loop {
        while let Ok(count @ 1..) = console::read(&mut buffer) {
            let typed = buffer.get(..count).unwrap_or_default();
            if let Some(first) = consoles.attached.borrow_mut().first_mut() {
                // What finds no room is lost, as on a terminal nobody reads.
                first.console.type_in(typed);
            }
            consoles.bell.ring();
        }
        events::wait(channel.port()).await;
    }
}

impl Consoles {
    /// Serves every guest once; answers whether one of them has more.
    fn serve_all(&self) -> bool {
        let mut again = false;
        for attached in self.attached.borrow_mut().iter_mut() {
            again |= attached.serve();
        }
        again
    }

    /// Begins to serve a guest. A console that cannot be served is no reason to stop the guest.
    pub(crate) fn attach(&self, guest: &Guest) {
        let domain = guest.domain.0;
        let name = &guest.config.name;
        let attached = (|| {
            let page = GrantedPage::map(domain, REF_CONSOLE).map_err(|why| why.name())?;
            let channel = Rc::new(Channel::connect(domain, guest.console.port).map_err(|why| why.name())?);
            let console = Console::attach(&page, SCROLLBACK).map_err(|_| "its indices are impossible")?;
            let listener = tasks::spawn(listen(Rc::clone(&channel), Rc::clone(&self.bell)));
            let show = if self.attached.borrow().is_empty() {
                Show::Raw
            } else {
                Show::Lines(LineWriter::new(format!("({name}) ")))
            };
            Ok::<_, &'static str>(Attached { domain, console, page, channel, show, dead: false, _listener: listener })
        })();
        match attached {
            Ok(attached) => self.attached.borrow_mut().push(attached),
            Err(why) => log::error!("guest {name}: its console is not served: {why}"),
        }
        self.bell.ring();
    }

    /// Shows what a guest printed last, and lets go of its ring.
    pub(crate) fn detach(&self, guest: &Guest) {
        let mut all = self.attached.borrow_mut();
        if let Some(at) = all.iter().position(|attached| attached.domain == guest.domain.0) {
            let mut last = all.remove(at);
            // A ring holds less than one budget; what a guest that still runs adds meanwhile may be lost.
            while last.serve() {}
            if let Show::Lines(lines) = &mut last.show {
                lines.flush(|line| println!("{line}"));
            }
        }
    }
}

impl Attached {
    /// Moves bytes both ways; answers whether there are more.
    fn serve(&mut self) -> bool {
        if self.dead {
            return false;
        }
        let show = &mut self.show;
        match self.console.serve(&self.page, BUDGET, |bytes| show.push(bytes)) {
            Ok(served) => {
                if served.notify {
                    self.channel.notify();
                }
                served.again
            }
            Err(why) => {
                log::warn!("domain {}: its console ends: {why:?}", self.domain);
                self.dead = true;
                false
            }
        }
    }
}
