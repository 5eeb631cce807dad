//! Tests that run inside a guest: `test!` puts a record in the `.tests` section, and [`run`] runs the tests that the
//! command line selects (`test=<name>`; all with `test=*` or without `test=`).
//!
//! The host reads the names from the image file. A test passes by returning. The console shows one line
//! `@@ test <name>: ok` for each test, and `@@ done: passed` or `@@ done: failed` at the end.

use crate::boot::Boot;
use crate::println;

/// Bytes of a name in a record.
pub const NAME_BYTES: usize = 56;

/// One test. The host reads this layout: 56 bytes of name, zero padded, and the function.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Test {
    /// The name, zero padded.
    pub name: [u8; NAME_BYTES],
    /// The function to run.
    pub run: fn(),
}

impl Test {
    /// Makes a record; a name that does not fit is an error at compile time.
    #[must_use]
    pub const fn new(name: &str, run: fn()) -> Self {
        let bytes = name.as_bytes();
        assert!(bytes.len() < NAME_BYTES, "the name of a test is too long");
        let mut padded = [0; NAME_BYTES];
        let mut i = 0;
        while i < bytes.len() {
            padded[i] = bytes[i];
            i += 1;
        }
        Self { name: padded, run }
    }

    /// The name as text.
    #[must_use]
    pub fn name(&self) -> &str {
        let end = self.name.iter().position(|&b| b == 0);
        let bytes = self.name.get(..end.unwrap_or(NAME_BYTES)).unwrap_or(&[]);
        core::str::from_utf8(bytes).unwrap_or("?")
    }
}

/// Registers a test: `test!("name", function)`.
#[macro_export]
macro_rules! test {
    ($name:literal, $run:path) => {
        const _: () = {
            #[used]
            #[cfg_attr(target_os = "none", unsafe(link_section = ".tests"))]
            static RECORD: $crate::testing::Test = $crate::testing::Test::new($name, $run);
        };
    };
}

/// All tests linked into this image.
#[cfg(target_os = "none")]
fn all() -> &'static [Test] {
    unsafe extern "C" {
        static tests_start: u8;
        static tests_end: u8;
    }
    let start = (&raw const tests_start).cast::<Test>();
    let count = ((&raw const tests_end).addr() - start.addr()) / size_of::<Test>();
    // SAFETY: the linker script puts exactly the records of `test!` between the two symbols.
    unsafe { core::slice::from_raw_parts(start, count) }
}

#[cfg(not(target_os = "none"))]
fn all() -> &'static [Test] {
    &[]
}

/// Whether `wanted` (the value of `test=`) selects the test `name`.
fn selects(wanted: &str, name: &str) -> bool {
    match wanted.strip_suffix('*') {
        Some(prefix) => name.starts_with(prefix),
        None => wanted == name,
    }
}

/// The main program of a test guest.
pub fn run(boot: &Boot) {
    let wanted = boot.argument("test").unwrap_or("*");
    let mut count = 0;
    for test in all().iter().filter(|test| selects(wanted, test.name())) {
        println!("@@ test {}", test.name());
        (test.run)();
        println!("@@ test {}: ok", test.name());
        count += 1;
    }
    assert!(count > 0, "no test is named {wanted}");
    println!("@@ done: passed");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_survives_its_padding() {
        assert_eq!(Test::new("events.send", || ()).name(), "events.send");
    }

    #[test]
    fn a_star_selects_by_prefix_and_a_name_only_itself() {
        assert!(selects("*", "anything"));
        assert!(selects("events*", "events.send"));
        assert!(!selects("events", "events.send"));
        assert!(selects("events.send", "events.send"));
    }
}
