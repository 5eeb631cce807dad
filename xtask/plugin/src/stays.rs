//! Stays in ring 0, by what began them and by how many instructions they had.

use crate::owner::{OWNERS, Owner};
use std::collections::HashMap;
use std::fmt;

/// What brought the CPU to ring 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Cause {
    /// SYSCALL of a program.
    Program,
    /// SYSCALL of a kernel, with its RAX: a hypercall.
    Hypercall(u64),
    /// Something else, whose code in ring 0 begins at this address.
    At(u64),
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Program => f.write_str("syscall"),
            Self::Hypercall(number) => write!(f, "hypercall:{number}"),
            Self::At(address) => write!(f, "at:{address:x}"),
        }
    }
}

/// Stays that are counted together.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Stay {
    /// The number of the owner who executed before.
    from: usize,
    cause: Cause,
    /// Instructions.
    length: u64,
}

/// How many stays there were of each kind.
#[derive(Default)]
pub(crate) struct Stays {
    /// The index of a kind in `counts`.
    indices: HashMap<Stay, usize>,
    kinds: Vec<Stay>,
    counts: Vec<u64>,
    /// The SYSCALL that is executed now.
    call: Option<Cause>,
    /// The stay that goes on: its length is what ring 0 had executed when it began.
    open: Option<Stay>,
}

impl Stays {
    /// A program or a kernel executes SYSCALL; a kernel's RAX.
    pub(crate) fn call(&mut self, rax: Option<u64>) {
        self.call = Some(rax.map_or(Cause::Program, Cause::Hypercall));
    }

    /// Ring 0 is entered at an address, and has executed so many instructions before.
    pub(crate) fn begin(&mut self, from: usize, address: u64, executed: u64) {
        let cause = self.call.take().unwrap_or(Cause::At(address));
        self.open = Some(Stay { from, cause, length: executed });
    }

    /// Another owner is entered, and ring 0 has executed so many instructions.
    pub(crate) fn end(&mut self, executed: u64) {
        // On the bare machine SYSCALL leads to the kernel.
        self.call = None;
        let Some(begun) = self.open.take() else { return };
        let stay = Stay { length: executed - begun.length, ..begun };
        let index = *self.indices.entry(stay).or_insert(self.kinds.len());
        if index == self.kinds.len() {
            self.kinds.push(stay);
            self.counts.push(0);
        }
        self.counts[index] += 1;
    }

    /// The counts since power-on. Later ones are at least as many, in the same order.
    pub(crate) fn counts(&self) -> Vec<u64> {
        self.counts.clone()
    }

    /// The lines for what was counted between `then` and `now`.
    pub(crate) fn lines(&self, now: &[u64], then: &[u64]) -> String {
        let mut lines = String::new();
        for (index, (stay, now)) in self.kinds.iter().zip(now).enumerate() {
            let count = now - then.get(index).copied().unwrap_or(0);
            if count != 0 {
                let from = Owner::ALL[stay.from.min(OWNERS - 1)].name();
                lines += &format!("stay {from} {} {} {count}\n", stay.cause, stay.length);
            }
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USER: usize = Owner::User as usize;
    const KERNEL: usize = Owner::Kernel as usize;

    #[test]
    fn stays_of_a_window_are_counted_by_cause_and_length() {
        let mut stays = Stays::default();
        stays.call(None);
        stays.begin(USER, 0x10, 100);
        stays.end(136);
        let then = stays.counts();
        for start in [136, 172] {
            stays.call(None);
            stays.begin(USER, 0x10, start);
            stays.end(start + 36);
        }
        stays.call(Some(23));
        stays.begin(KERNEL, 0x10, 300);
        stays.end(351);
        stays.begin(KERNEL, 0xe0, 400);
        stays.end(1000);
        let lines = "stay user syscall 36 2\nstay kernel hypercall:23 51 1\nstay kernel at:e0 600 1\n";
        assert_eq!(stays.lines(&stays.counts(), &then), lines);
        assert_eq!(stays.lines(&then, &[]), "stay user syscall 36 1\n");
    }

    #[test]
    fn a_call_that_does_not_lead_to_ring_0_is_forgotten() {
        let mut stays = Stays::default();
        stays.call(None);
        stays.end(0);
        stays.begin(KERNEL, 0xe0, 0);
        stays.end(7);
        assert_eq!(stays.lines(&stays.counts(), &[]), "stay kernel at:e0 7 1\n");
    }
}
