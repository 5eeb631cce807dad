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
use std::ops::Range;
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread;

/// Bytes of stack of a thread that makes worlds: they are made there before they are put in their places.
const STACK: usize = 64 << 20;

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

/// A number that somebody who runs a test by hand may ask for, by a variable of the environment.
#[must_use]
pub fn wish(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(default)
}

/// Lives one life for each seed, on as many threads as there are CPUs, and gives what came of them in no order.
///
/// # Errors
/// That of the lowest seed whose life ended in one. No life begins after that.
///
/// # Panics
/// As the lives do.
pub fn live_each<T: Send>(seeds: Range<u64>, life: impl Fn(u64) -> Result<T, String> + Sync) -> Result<Vec<T>, String> {
    let next = AtomicU64::new(seeds.start);
    let take = || Some(next.fetch_add(1, SeqCst)).filter(|seed| *seed < seeds.end);
    let end = |seed, why| {
        next.store(seeds.end, SeqCst);
        (seed, why)
    };
    let live = || {
        let lives = std::iter::from_fn(take).map(|seed| life(seed).map_err(|why| end(seed, why)));
        lives.collect::<Result<Vec<T>, (u64, String)>>()
    };
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    let ends = thread::scope(|scope| {
        let begin = |_| thread::Builder::new().stack_size(STACK).spawn_scoped(scope, live).expect("a thread");
        let threads: Vec<_> = (0..cpus).map(begin).collect();
        threads.into_iter().map(|one| one.join().expect("a life without a panic")).collect::<Vec<_>>()
    });
    let first = ends.iter().filter_map(|end| end.as_ref().err()).min();
    first.map_or(Ok(()), |(_, why)| Err(why.clone()))?;
    Ok(ends.into_iter().flatten().flatten().collect())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_seed_has_its_life() {
        let mut seeds = live_each(3..40, Ok).unwrap();
        seeds.sort_unstable();
        assert_eq!(seeds, (3..40).collect::<Vec<u64>>());
    }

    #[test]
    fn the_lowest_seed_that_fails_is_told() {
        let life = |seed: u64| if seed % 10 == 7 { Err(seed.to_string()) } else { Ok(()) };
        assert_eq!(live_each(0..100, life), Err("7".into()));
        assert_eq!(live_each(8..17, life), Ok(vec![(); 9]));
    }
}
