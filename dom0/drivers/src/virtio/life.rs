//! The states of a driver, and the reset that all of them begin with.

use super::Transport;
use crate::hardware::{ConfigurationPorts, Registers};

/// How many calls find a reset unfinished before the device counts as dead. A caller that calls every millisecond waits 10 s.
pub const RESET_ASKED: u32 = 10_000;

/// The state of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Life {
    /// The device has no address of dom0's memory: this driver has not started it, or has stopped it.
    New,
    /// A reset was begun. So many calls have found it unfinished.
    Resetting(u32),
    Running,
    /// The device cannot be used, for this reason.
    Dead(&'static str),
}

/// Why a reset has not ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unfinished {
    /// The device is still at it.
    Pending,
    /// The device was asked [`RESET_ASKED`] times.
    Dead(&'static str),
}

impl Life {
    /// Begins or continues a reset. Returns `Ok` when the reset has ended: the device accesses no memory then.
    pub(crate) fn quiesce<C, R>(&mut self, transport: &Transport<C, R>) -> Result<(), Unfinished>
    where
        C: ConfigurationPorts,
        R: Registers,
    {
        let asked = match *self {
            Self::Resetting(asked) => asked,
            _ => {
                transport.begin_reset();
                0
            }
        };
        if transport.is_reset() {
            return Ok(());
        }
        if asked < RESET_ASKED {
            *self = Self::Resetting(asked + 1);
            return Err(Unfinished::Pending);
        }
        let why = "does not answer a reset";
        *self = Self::Dead(why);
        Err(Unfinished::Dead(why))
    }
}
