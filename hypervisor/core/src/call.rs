//! A hypercall on its way, and what a step of it ends with.

use crate::machine::Registers;
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
}

/// What a step of a call ends with: the call's result, or why there is none.
pub type Answer = Result<u64, Halt>;

/// Why a call has not come to a result.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Halt {
    /// It is refused.
    Refused(Errno),
    /// There is more to do.
    More,
    /// It has replaced the registers, so there is nothing to answer.
    Gone,
}

impl Call {
    /// The call in a guest's registers (ABI core 1.7).
    #[must_use]
    pub fn from_registers(regs: &Registers) -> Self {
        Self {
            number: regs.rax,
            args: [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9],
            done: 0,
            multicall: None,
        }
    }
}

impl From<Errno> for Halt {
    fn from(errno: Errno) -> Self {
        Self::Refused(errno)
    }
}
