//! What is promised.

use super::report::short;
use serde_json::{Value, json};

/// A promise: a number that may not be exceeded.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Bar {
    /// What is promised, in words.
    pub(super) what: String,
    /// What was measured.
    pub(super) measured: f64,
    /// What it may be at most.
    pub(super) limit: f64,
}

impl Bar {
    pub(super) fn new(what: impl Into<String>, measured: f64, limit: f64) -> Self {
        Self { what: what.into(), measured, limit }
    }

    pub(super) fn is_met(&self) -> bool {
        self.measured <= self.limit
    }

    /// In a line of text.
    pub(super) fn line(&self) -> String {
        format!("{}: {}, at most {}", self.what, short(self.measured), short(self.limit))
    }

    pub(super) fn json(&self) -> Value {
        json!({ "what": self.what, "measured": self.measured, "limit": self.limit, "met": self.is_met() })
    }
}
