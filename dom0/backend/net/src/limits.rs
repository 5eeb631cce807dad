//! How much a guest gets of a turn, of floods, and of its rate.

/// The maximum number of vifs of a switch.
pub const MAX_VIFS: usize = 256;
/// The maximum number of TX slots taken from one ring before other rings have their turn.
pub const PER_VISIT: usize = 64;
/// How many guests without a backlog are visited in a row while one with a backlog waits: see `Vif::backlog`.
pub const PROMPT_IN_A_ROW: u32 = 4;
/// The maximum number of frames taken from the uplink in a turn.
pub const PER_TURN: usize = 64;
/// A visit ends when its packets had this many receivers or segments. Frames of the uplink wait for the next turn when those
/// before them had as many receivers.
pub(crate) const FRAMES: usize = 256;
/// A sender waits for a receiver without buffers at most this long.
pub const PATIENCE_NS: u64 = 10_000_000;
/// A receiver that was out of buffers counts as back when it has posted this many.
pub const BACK_BUFFERS: u32 = 64;
/// A guest may send this many frames to groups in a second; each receiver counts.
pub(crate) const FLOODS_PER_SECOND: u64 = 10_000;
/// Nanoseconds until a device that is being reset is asked again.
pub(crate) const RESET_NS: u64 = 1_000_000;
