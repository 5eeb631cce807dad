//! A hypercall that is being carried out, and the result of one step of it. This file uses only the ABI.

use hypercall_abi::Errno;

/// A hypercall that is being carried out.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// The call's number, as the guest gave it.
    pub number: u64,
    /// The call's arguments. A call over an array moves them on as it progresses.
    pub args: [u64; 6],
    /// Elements of the call's array done so far.
    pub done: u64,
    /// The multicall that this call is an entry of.
    pub(crate) multicall: Option<Multicall>,
}

/// A multicall that is being carried out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Multicall {
    /// Address of the entry that is being carried out or comes next.
    pub(crate) at: u64,
    /// Number of entries left, from that one on.
    pub(crate) left: u64,
    /// Whether `Call` holds that entry; otherwise the entry is still to be read.
    pub(crate) running: bool,
    /// Whether the vcpu leaves its CPU when the step ends, because the last entry asked for it.
    pub(crate) leaves: bool,
}

impl Multicall {
    /// A multicall of which nothing has been done.
    pub(crate) fn new(at: u64, left: u64) -> Self {
        Self { at, left, running: false, leaves: false }
    }
}

/// The result of a step: the call's result, or why there is none yet.
pub type Answer = Result<u64, Halt>;

/// Why a step did not simply end with a result.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Halt {
    /// The call is refused.
    Refused(Errno),
    /// The call has more to do.
    More,
    /// The call's result is 0, and the vcpu leaves its CPU.
    Leave,
    /// The call has replaced the registers, so no result is written.
    Gone,
}

/// What a vcpu does next.
#[must_use = "a vcpu that must leave its CPU would run on"]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Next {
    /// It stays on its CPU.
    Stay,
    /// It leaves its CPU.
    Leave,
}

impl Call {
    /// A call of which nothing has been done.
    #[must_use]
    pub fn new(number: u64, args: [u64; 6]) -> Self {
        Self { number, args, done: 0, multicall: None }
    }

    /// The first argument of a call for which it has 32 bits, such as a command. The higher bits are ignored, as in
    /// Xen.
    #[must_use]
    pub fn command(&self) -> u64 {
        self.args[0] & 0xffff_ffff
    }
}

impl From<Errno> for Halt {
    fn from(errno: Errno) -> Self {
        Self::Refused(errno)
    }
}
