//! A hypercall on its way, and what a step of it ends with. This file knows nobody but the ABI.

use hypercall_abi::Errno;

/// A hypercall on its way.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// Its number, as the guest gave it.
    pub number: u64,
    /// Its arguments; a call over an array moves them on as it goes.
    pub args: [u64; 6],
    /// Elements of its array done so far.
    pub done: u64,
    /// The list it is an entry of.
    pub(crate) multicall: Option<Multicall>,
}

/// A list of calls on its way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Multicall {
    /// Address of the entry that is being carried out, or comes next.
    pub(crate) at: u64,
    /// Entries from there on.
    pub(crate) left: u64,
    /// Whether `Call` holds that entry.
    pub(crate) running: bool,
    /// Whether the vcpu leaves its CPU when the step ends: the last entry wants it.
    pub(crate) leaves: bool,
}

impl Multicall {
    /// A list of which nothing has been done.
    pub(crate) fn new(at: u64, left: u64) -> Self {
        Self { at, left, running: false, leaves: false }
    }
}

/// What a step of a call ends with: the call's result, or why there is none.
pub type Answer = Result<u64, Halt>;

/// Why a call has not come to a result, or not to that alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Halt {
    /// It is refused.
    Refused(Errno),
    /// There is more to do.
    More,
    /// Its result is 0, and the vcpu leaves its CPU.
    Leave,
    /// It has replaced the registers, so there is nothing to answer.
    Gone,
}

/// What a vcpu does next.
#[must_use = "a vcpu that must leave its CPU would run on"]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Next {
    /// It goes on.
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

    /// Its first argument where that has 32 bits, as a command has: what is above means nothing, as in Xen.
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
