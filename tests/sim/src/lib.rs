//! A machine made of vectors, guests made of random numbers, and an audit that believes nobody.
//!
//! [`machine::SimMachine`] implements the traits of `hv_core::machine`, with translation caches that remember what a real
//! CPU may remember. [`paging`] lets random guests loose on the page-table rules and recounts everything after each call;
//! [`world`] does the same with the whole of the rules.
//! Seeds reproduce runs; every failure names its seed and step.
#![forbid(unsafe_code)]

pub mod machine;
pub mod paging;
pub mod rng;
pub mod tally;
pub mod world;

use std::cell::Cell;
use std::sync::Once;

thread_local! {
    static COMPLAINTS: Cell<u64> = const { Cell::new(0) };
}

struct Listener;

impl log::Log for Listener {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() == log::Level::Error
    }
    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            COMPLAINTS.with(|n| n.set(n.get() + 1));
        }
    }
    fn flush(&self) {}
}

/// Prints what a test has measured, also when it passes: the harness keeps back only what `println!` prints.
pub fn tell(measured: impl std::fmt::Display) {
    use std::io::Write;
    // Nobody listens: then nobody misses it.
    let _ = writeln!(std::io::stdout().lock(), "{measured}");
}

/// How often the rules have complained about themselves on this thread. They log an error where they find one of their
/// own promises broken, and go on.
#[must_use]
pub fn complaints() -> u64 {
    static LISTENER: Listener = Listener;
    static LISTEN: Once = Once::new();
    LISTEN.call_once(|| {
        // A second logger in the same process would be refused; then that one hears.
        if log::set_logger(&LISTENER).is_ok() {
            log::set_max_level(log::LevelFilter::Error);
        }
    });
    COMPLAINTS.with(Cell::get)
}
