//! The first domain: which services this image runs, and nothing else.
//!
//! ```text
//! boot bundle -> guests -> hypervisor (domctl)      makes, watches and ends domains
//!                       -> services::store         the tree by which guests meet
//!                       -> verbs                   what is asked of it
//!                       -> services::console -> terminal   what guests print, and what is typed for them
//! ```
//!
//! Touches: other domains, by the calls it has authority for and the pages they grant it; the machine's console.
//! Keeps: a guest's bytes, indices and requests are judged by the crates that know them; here they only pass.
#![no_std]
#![no_main]
#![forbid(unsafe_code)]

extern crate alloc;

mod guests;
mod host;
mod hypervisor;
mod terminal;
mod verbs;

use hypercall_abi::event::Virq;
use hypercall_abi::sched::ShutdownReason;
use toolstack::DomainId;
use toolstack::bundle::{Bundle, EXEC};
use toolstack::status::Failure;
use unikernel::boot::Boot;
use unikernel::events::Channel;
use unikernel::memory::{self, lend_large};
use unikernel::{hypercall, println, tasks};

use guests::{Guests, OWN_BYTES};
use terminal::Terminal;

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
pub(crate) fn end(failure: Option<Failure>) -> ! {
    match failure {
        None => hypercall::shutdown(ShutdownReason::Poweroff),
        Some(failure) => hypercall::shutdown_with(failure.reason()),
    }
}

/// What we were booted with: the bundle, and whether all consoles are shown at once (`consoles=all`).
fn prepare(boot: &Boot) -> Result<(Bundle<'static>, bool), &'static str> {
    let mut all = false;
    for word in boot.command_line().split_ascii_whitespace() {
        match word {
            "consoles=all" => all = true,
            _ => return Err("unknown word on dom0's command line; there is consoles=all"),
        }
    }
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
    let terminal = Terminal::new(all);
    let Some(own) = memory::reserve(OWN_BYTES) else {
        log::error!("there are no {} KiB for serving guests", OWN_BYTES >> 10);
        return Some(Failure::NotMade);
    };
    let guests = Guests::new(OWN, bundle, terminal.clone());
    let ends = match hypercall::bind_virq(Virq::DomExc, 0) {
        Ok(port) => Channel::adopt(port),
        Err(errno) => {
            log::error!("nobody tells when guests end: {}", errno.name());
            return Some(Failure::NotMade);
        }
    };
    guests.plan_all();
    let commands = bundle.entry(EXEC);
    if commands.is_none() {
        guests.show_list();
    }
    // Whoever types need not wait until all are made.
    tasks::spawn(terminal.clone().read(guests.clone())).detach();
    guests.make_planned().await;
    if let Some(first) = guests.first_alive().filter(|_| !all && commands.is_none()) {
        // It is there, and one guest is shown at a time.
        drop(terminal.attach(&guests, &first));
    }
    if let Some(commands) = commands {
        match core::str::from_utf8(commands) {
            Ok(commands) => tasks::spawn(verbs::exec(guests.clone(), terminal.clone(), commands)).detach(),
            Err(_) => return Some(Failure::Refused),
        }
    }
    loop {
        guests.look();
        if guests.all_ended() {
            break;
        }
        terminal.follow(&guests);
        guests.changed.or(ends.wait()).await;
    }
    terminal.message("all guests have ended");
    drop(own);
    guests.failed()
}
