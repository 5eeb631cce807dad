//! The states of a driver, and the reset that all of them begin with.

use super::Transport;
use crate::hardware::{ConfigurationPorts, Registers};
use device::Reset;

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

impl Life {
    /// Begins or continues a reset. After [`Reset::Done`], the device accesses no memory.
    pub(crate) fn quiesce<C, R>(&mut self, transport: &Transport<C, R>) -> Reset
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
            return Reset::Done;
        }
        if asked < RESET_ASKED {
            *self = Self::Resetting(asked + 1);
            return Reset::Pending;
        }
        let why = "does not answer a reset";
        *self = Self::Dead(why);
        Reset::Dead(why)
    }

    /// Goes on after a reset has ended. `started` is the reason why the device cannot be used, if there is a reason.
    pub(crate) fn begin<C, R>(&mut self, transport: &Transport<C, R>, started: Result<(), &'static str>) -> Reset
    where
        C: ConfigurationPorts,
        R: Registers,
    {
        if let Err(why) = started {
            transport.give_up();
            *self = Self::Dead(why);
            return Reset::Dead(why);
        }
        *self = Self::Running;
        Reset::Done
    }

    /// Begins or continues to stop the device. After [`Reset::Done`], the device accesses no memory and sends no interrupt.
    pub(crate) fn stop<C, R>(&mut self, transport: &Transport<C, R>) -> Reset
    where
        C: ConfigurationPorts,
        R: Registers,
    {
        let reset = self.quiesce(transport);
        if reset == Reset::Done {
            transport.mask_interrupt(true);
            transport.give_up();
            *self = Self::New;
        }
        reset
    }
}
