//! The first domain: which services this image runs, and nothing else.
//!
//! ```text
//! boot bundle -> toolstack::manager -> hypervisor (domctl)   makes, watches and ends domains
//!                                   -> services::store       the tree by which guests meet
//!                                   -> services::console     what guests print, and what is typed for them
//!                                   -> services::block       the disks of guests
//!                                   -> services::net         the networks of guests
//! the machine's devices -> services::machine                 disks and network devices, started
//! keyboard -> toolstack::terminal   -> the manager, or the console that is shown
//! ```
//!
//! Touches: other domains, by the calls it has authority for and the pages they grant it; the machine's console.
//! Keeps: a guest's bytes, indices and requests are judged by the crates that know them; here they only pass.
#![no_std]
#![no_main]
#![forbid(unsafe_code)]

extern crate alloc;

mod block;
mod host;
mod hypervisor;
mod net;
mod platform;

use alloc::rc::Rc;

use hypercall_abi::event::Virq;
use hypercall_abi::sched::ShutdownReason;
use toolstack::DomainId;
use toolstack::bundle::{Bundle, EXEC};
use toolstack::command::{Command, Line, shows_all_consoles};
use toolstack::face::{After, CommandResult, obey, script};
use toolstack::status::Failure;
use unikernel::boot::Boot;
use unikernel::events::Channel;
use unikernel::mark::{self, LISTED};
use unikernel::memory::{self, lend_large};
use unikernel::{hypercall, println, tasks};

use platform::{Manager, OWN_BYTES, Terminal};

unikernel::entry!(main);

/// The number of the first domain.
const OWN: DomainId = DomainId(0);

fn main(boot: &Boot) {
    println!("Tenon dom0 {}", env!("CARGO_PKG_VERSION"));
    match prepare(boot) {
        Ok((bundle, all)) => end(tasks::block_on(run(bundle, all))),
        Err(why) => {
            println!("error: {why}");
            hypercall::shutdown(ShutdownReason::Crash)
        }
    }
}

/// Turns the machine off, and says how it went.
fn end(failure: Option<Failure>) -> ! {
    match failure {
        None => hypercall::shutdown(ShutdownReason::Poweroff),
        Some(failure) => hypercall::shutdown_with(failure.reason()),
    }
}

/// What we were booted with: the bundle, and whether all consoles are shown at once (`consoles=all`).
fn prepare(boot: &Boot) -> Result<(Bundle<'static>, bool), &'static str> {
    let all = shows_all_consoles(boot.command_line())?;
    let archive = boot.ramdisk();
    if archive.is_empty() {
        return Err("no boot bundle in reach");
    }
    Ok((Bundle::new(archive), all))
}

/// Runs the guests until none is left.
async fn run(bundle: Bundle<'static>, all: bool) -> Option<Failure> {
    if let Err(errno) = lend_large() {
        log::warn!("kernels must be unpacked in what memory we have: {}", errno.name());
    }
    let terminal = platform::terminal(all);
    let Some(own) = memory::reserve(OWN_BYTES) else {
        log::error!("there are no {} KiB for serving guests", OWN_BYTES >> 10);
        return Some(Failure::NotMade);
    };
    let manager = platform::manager(OWN, bundle, terminal.clone());
    let ends = match hypercall::bind_virq(Virq::DomExc, 0) {
        Ok(port) => Channel::adopt(port),
        Err(errno) => {
            log::error!("cannot bind the interrupt that reports the end of a domain: {}", errno.name());
            return Some(Failure::NotMade);
        }
    };
    manager.plan_all();
    let commands = bundle.entry(EXEC);
    if commands.is_none() {
        show_list(&manager, &terminal).await;
    }
    let machine = manager.clone();
    tasks::spawn(async move { machine.platform().find_devices().await }).detach();
    // What is typed need not wait until all are made.
    tasks::spawn(read(manager.clone(), terminal.clone())).detach();
    tasks::spawn(report_ends(manager.clone(), ends)).detach();
    manager.make_planned().await;
    if let Some(first) = manager.first_alive().filter(|_| !all && commands.is_none()) {
        // Cannot fail: the guest exists, and not all are shown at once.
        drop(terminal.attach(&manager, &first));
    }
    if let Some(commands) = commands {
        match core::str::from_utf8(commands) {
            Ok(commands) => tasks::spawn(exec(manager.clone(), terminal.clone(), commands)).detach(),
            Err(_) => return Some(Failure::Refused),
        }
    }
    let parting = manager.clone();
    tasks::spawn(async move { parting.watch_parting().await }).detach();
    let made = manager.clone();
    tasks::spawn(async move { made.keep_making().await }).detach();
    loop {
        let seen = manager.changes();
        manager.bury().await;
        if manager.all_ended() {
            break;
        }
        terminal.follow(&manager);
        manager.changed(seen).await;
    }
    terminal.message("all guests have ended");
    drop(own);
    manager.failed()
}

/// Shows all domains, and marks that the machine is up.
async fn show_list(manager: &Manager, terminal: &Terminal) {
    let list = Line { command: Command::List { all: false }, json: false };
    obey(manager, &list, &terminal.face(manager), |text| terminal.message(text)).await;
    mark::point::<LISTED>();
}

/// Has the manager look at its guests whenever a domain may have ended.
async fn report_ends(manager: Rc<Manager>, ends: Channel) {
    loop {
        ends.wait().await;
        manager.look_again();
    }
}

/// Routes keystrokes, until the machine is turned off.
async fn read(manager: Rc<Manager>, terminal: Rc<Terminal>) {
    let channel = match hypercall::bind_virq(Virq::Console, 0) {
        Ok(port) => Channel::adopt(port),
        Err(errno) => return log::error!("nothing can be typed: {}", errno.name()),
    };
    let mut buffer = [0; 128];
    loop {
        match hypercall::console_read(&mut buffer) {
            Ok(0) => channel.wait().await,
            Ok(count) => {
                if terminal.keys(&manager, buffer.get(..count).unwrap_or_default()).await == CommandResult::Quit {
                    end(manager.failed())
                }
            }
            Err(errno) => return log::error!("nothing can be typed: {}", errno.name()),
        }
    }
}

/// Carries out the commands of `--exec`, and turns the machine off unless the last one leads to a console.
async fn exec(manager: Rc<Manager>, terminal: Rc<Terminal>, commands: &str) {
    if let After::Off(failure) = script(&manager, commands, &terminal.face(&manager)).await {
        end(failure)
    }
}
