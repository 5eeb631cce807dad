//! What a call takes and what it must answer, as data.

use alloc::vec;
use alloc::vec::Vec;
use guests::abi::{Errno, Hypercall};
use zerocopy::{Immutable, IntoBytes};

/// A way in which an argument is malformed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Class {
    /// Address 0.
    Null,
    /// An address of the guest where nothing is mapped.
    Unmapped,
    /// A page that may not be written.
    ReadOnly,
    /// A good address and one byte (four for machine addresses, whose low bits are a command).
    Misaligned,
    /// An address of the hypervisor's: of the machine-to-physical table, which guests read, and of its own memory.
    Hypervisor,
    /// An address no CPU takes.
    NotCanonical,
    /// The structure begins on a page and ends on the next, which is not mapped.
    PageEnd,
    /// A domain that is not there, or one the caller has no authority over.
    Domain,
    /// A number or count that is too large.
    Count,
    /// Bits above the lower 32 of a register that holds no more.
    HighBits,
}

impl Class {
    /// Every class there is.
    pub(crate) const ALL: [Self; 10] = [
        Self::Null,
        Self::Unmapped,
        Self::ReadOnly,
        Self::Misaligned,
        Self::Hypervisor,
        Self::NotCanonical,
        Self::PageEnd,
        Self::Domain,
        Self::Count,
        Self::HighBits,
    ];
}

/// What a call answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Answer {
    /// This error.
    Refused(Errno),
    /// No error.
    Done,
    /// Exactly this.
    Value(u64),
    /// No error, and this status at that byte of the first structure.
    Status(u64, i16),
    /// Nothing: the domain ends.
    Ends,
}

impl Answer {
    /// Whether it says that something was malformed.
    pub(crate) fn refuses(self) -> bool {
        match self {
            Self::Refused(_) | Self::Ends => true,
            Self::Status(_, status) => status != 0,
            Self::Done | Self::Value(_) => false,
        }
    }
}

/// An answer and who says so.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Want {
    /// The answer.
    pub(crate) answer: Answer,
    /// Where it is written: a section of the ABI documents ("core", "io"), or Xen itself.
    pub(crate) cite: &'static str,
    /// What Xen answers where we do not offer what it does; the documents allow ours.
    pub(crate) xen: Option<Answer>,
}

impl Want {
    /// Xen's own answer, where it differs by design.
    pub(crate) fn xen(self, answer: Answer) -> Self {
        Self { xen: Some(answer), ..self }
    }
}

/// An error.
pub(crate) fn refused(error: Errno, cite: &'static str) -> Want {
    want(Answer::Refused(error), cite)
}

/// Success.
pub(crate) fn done(cite: &'static str) -> Want {
    want(Answer::Done, cite)
}

/// Any answer.
pub(crate) fn want(answer: Answer, cite: &'static str) -> Want {
    Want { answer, cite, xen: None }
}

/// The rule for all addresses: a range that touches the hypervisor's part, is not mapped or must be written and is
/// read-only is `-EFAULT`; nothing is said of alignment.
pub(crate) const HANDLES: &str = "core 1.7";

/// The answers for the classes of an address.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wants(pub [Want; 7]);

impl Wants {
    /// The call does not care: the same answer for every address.
    pub(crate) fn any(good: Want) -> Self {
        Self([good; 7])
    }

    /// The call reads a structure.
    pub(crate) fn input(good: Want) -> Self {
        let fault = refused(Errno::Fault, HANDLES);
        Self([fault, fault, good, good, fault, fault, fault])
    }

    /// The call writes a structure, or reads and writes it.
    pub(crate) fn output(good: Want) -> Self {
        Self::input(good).with(Class::ReadOnly, refused(Errno::Fault, HANDLES))
    }

    /// The same with another answer for `class`.
    pub(crate) fn with(mut self, class: Class, want: Want) -> Self {
        self.0[class as usize] = want;
        self
    }

    /// The same with another answer for every class that has `EFAULT`.
    pub(crate) fn faults(self, want: Want) -> Self {
        let fault = Answer::Refused(Errno::Fault);
        Self(self.0.map(|old| if old.answer == fault { want } else { old }))
    }

    /// What Xen answers instead.
    pub(crate) fn on_xen(mut self, other: Self) -> Self {
        for (want, other) in self.0.iter_mut().zip(other.0) {
            want.xen = Some(other.answer);
        }
        self
    }
}

/// Where an argument stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Place {
    /// A register.
    Arg(usize),
    /// Two bytes of the first structure.
    U16(usize),
    /// Four bytes of it.
    U32(usize),
    /// Eight bytes of it.
    U64(usize),
}

/// How an address is written down.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Form {
    /// As it is.
    Linear,
    /// As the machine address of what lies there.
    Machine,
}

/// An argument that is an address.
pub(crate) struct Part {
    /// Where it stands.
    pub(crate) place: Place,
    /// What lies there.
    pub(crate) bytes: Vec<u8>,
    /// The address that is good, if not any will do.
    pub(crate) good: Option<u64>,
    /// How it is written down.
    pub(crate) form: Form,
    /// Low bits that are no part of it.
    pub(crate) low: u64,
    /// What it may be.
    pub(crate) wants: Wants,
}

/// An argument that is a number.
pub(crate) struct Number {
    /// Where it stands.
    pub(crate) place: Place,
    /// A value that makes no sense.
    pub(crate) value: u64,
    /// What the call says to it.
    pub(crate) want: Want,
}

/// How a call is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Way {
    /// As any hypercall.
    Call,
    /// With the stack pointer for an argument, not to come back (core 3.7).
    Iret,
}

/// A call that is well-formed, and all that can be wrong with it.
pub(crate) struct Shape {
    /// Its registers.
    pub(crate) args: [u64; 5],
    /// How it is made.
    pub(crate) way: Way,
    /// Its addresses; those after the first may stand in the structure the first leads to.
    pub(crate) parts: Vec<Part>,
    /// Its domains.
    pub(crate) domains: Vec<Number>,
    /// Its counts and numbers. The first structure lies at the very end of a page when they are tried.
    pub(crate) counts: Vec<Number>,
    /// Its registers of 32 bits or less.
    pub(crate) words: &'static [usize],
}

impl Shape {
    pub(crate) fn new(args: [u64; 5]) -> Self {
        Self { args, way: Way::Call, parts: vec![], domains: vec![], counts: vec![], words: &[] }
    }

    /// A structure in memory.
    pub(crate) fn part(
        mut self,
        place: Place,
        structure: &(impl IntoBytes + Immutable + ?Sized),
        wants: Wants,
    ) -> Self {
        let bytes = structure.as_bytes().to_vec();
        self.parts.push(Part { place, bytes, good: None, form: Form::Linear, low: 0, wants });
        self
    }

    /// An address the call does not follow.
    pub(crate) fn address(self, place: Place, wants: Wants) -> Self {
        self.part(place, &[0u8; 0], wants)
    }

    /// The address of the last part shares its word with these bits.
    pub(crate) fn low(mut self, bits: u64) -> Self {
        if let Some(part) = self.parts.last_mut() {
            part.low = bits;
        }
        self
    }

    /// Only this address will do for the last part.
    pub(crate) fn at(mut self, address: u64) -> Self {
        if let Some(part) = self.parts.last_mut() {
            part.good = Some(address);
        }
        self
    }

    /// The address of the last part is a machine address.
    pub(crate) fn machine(mut self) -> Self {
        if let Some(part) = self.parts.last_mut() {
            part.form = Form::Machine;
        }
        self
    }

    pub(crate) fn domain(mut self, place: Place, value: u64, want: Want) -> Self {
        self.domains.push(Number { place, value, want });
        self
    }

    pub(crate) fn count(mut self, place: Place, value: u64, want: Want) -> Self {
        self.counts.push(Number { place, value, want });
        self
    }

    /// How many trials of a class there are, each with another argument or value.
    pub(crate) fn trials(&self, class: Class) -> usize {
        match class {
            Class::Domain => self.domains.len(),
            Class::Count => self.counts.len(),
            Class::HighBits => self.words.len(),
            Class::Hypervisor | Class::NotCanonical | Class::PageEnd => 2 * self.parts.len(),
            Class::Null | Class::Unmapped | Class::ReadOnly | Class::Misaligned => self.parts.len(),
        }
    }

    /// What is to come of trial `n` of a class.
    pub(crate) fn want(&self, class: Class, n: usize) -> Want {
        match class {
            Class::Domain => self.domains[n].want,
            Class::Count => self.counts[n].want,
            // They are not looked at: what is well-formed stays so, as it does wherever its structure lies.
            Class::HighBits => Want { cite: "Xen", ..self.parts[0].wants.0[Class::Misaligned as usize] },
            _ => self.parts[n % self.parts.len()].wants.0[class as usize],
        }
    }
}

/// A call, or one of its sub-operations.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target {
    /// The call.
    pub(crate) call: Hypercall,
    /// Its sub-operation, if it has any.
    pub(crate) op: u64,
    /// What that is called.
    pub(crate) op_name: &'static str,
    /// A second number of that kind.
    pub(crate) sub: u64,
    /// What that is called.
    pub(crate) sub_name: &'static str,
}

impl core::fmt::Display for Target {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.call.name())?;
        for name in [self.op_name, self.sub_name] {
            if !name.is_empty() {
                write!(f, ".{name}")?;
            }
        }
        Ok(())
    }
}
