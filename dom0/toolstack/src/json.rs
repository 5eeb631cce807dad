//! Writing JSON, as far as dom0's answers need it.

use alloc::format;
use alloc::string::String;
use core::fmt::{Display, Write};

/// A JSON string. What is not printable ASCII is escaped, because the answer goes to a terminal as well.
#[must_use]
pub fn text(value: &str) -> String {
    let mut quoted = String::from("\"");
    for unit in value.encode_utf16() {
        match u8::try_from(unit) {
            Ok(b'"') => quoted.push_str("\\\""),
            Ok(b'\\') => quoted.push_str("\\\\"),
            Ok(b'\n') => quoted.push_str("\\n"),
            Ok(byte @ b' '..=b'~') => quoted.push(char::from(byte)),
            // Writing to a string does not fail.
            _ => drop(write!(quoted, "\\u{unit:04x}")),
        }
    }
    quoted.push('"');
    quoted
}

/// An object being written.
#[derive(Clone, Debug, Default)]
pub struct Object(String);

impl Object {
    /// Adds a string.
    #[must_use]
    pub fn text(self, key: &str, value: &str) -> Self {
        let value = text(value);
        self.raw(key, value)
    }

    /// Adds a value that is JSON already: a number, a boolean, an array, an object.
    #[must_use]
    pub fn raw(mut self, key: &str, value: impl Display) -> Self {
        let comma = if self.0.is_empty() { "" } else { "," };
        self.0.push_str(&format!("{comma}{}:{value}", text(key)));
        self
    }

    /// Returns the whole object.
    #[must_use]
    pub fn end(self) -> String {
        format!("{{{}}}", self.0)
    }
}

/// An array of items that are JSON already.
pub fn array(items: impl Iterator<Item = String>) -> String {
    let mut text = String::from("[");
    for item in items {
        let comma = if text.len() == 1 { "" } else { "," };
        text.push_str(&format!("{comma}{item}"));
    }
    text.push(']');
    text
}
