//! What a guest may know of and ask from its host: version and features, the machine's console and log (ABI core 1.8,
//! 8).
//!
//! Touches: the console, the log, what is counted for the whole machine.
//! Never touches: other domains, except for their lines in the log.

pub mod console;
pub mod ops;
