//! A back end that dies in the middle of anything it does to the world.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

thread_local! {
    /// How much it may still do.
    static LEFT: Cell<u64> = const { Cell::new(u64::MAX) };
}

/// What it dies with.
struct Death;

/// It stores, or calls. It may be the last thing that it wanted to do.
pub fn mortal() {
    let left = LEFT.get();
    if left == 0 {
        // Not a panic, so nothing is printed.
        resume_unwind(Box::new(Death));
    }
    if left < u64::MAX {
        LEFT.set(left - 1);
    }
}

/// Does something that may do so much and no more. `None`: it died.
pub fn until_death<T>(left: u64, what: impl FnOnce() -> T) -> Option<T> {
    LEFT.set(left);
    let lived = catch_unwind(AssertUnwindSafe(what));
    LEFT.set(u64::MAX);
    match lived {
        Ok(result) => Some(result),
        Err(death) if death.is::<Death>() => None,
        Err(panic) => resume_unwind(panic),
    }
}

/// Somebody else does something, who does not die.
pub fn alive<T>(what: impl FnOnce() -> T) -> T {
    let left = LEFT.replace(u64::MAX);
    let result = what();
    LEFT.set(left);
    result
}

/// It does not die before it has done so much more.
pub fn spare(least: u64) {
    LEFT.set(LEFT.get().max(least));
}
