//! Who has which interval of which physical disk.
//!
//! Many may read an interval, or one may write it. Another holder is refused, and told the name of the present one. A `!` in a
//! guest's configuration overrides that rule, as in xl; such a guest is noted as a holder, too.

use alloc::vec::Vec;
use core::fmt;

/// What a holder does with its interval.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads.
    Read,
    /// Reads and writes.
    Write,
}

/// An interval that is held. [`Holders::release`] takes it back.
#[must_use = "the interval stays held until it is released"]
#[derive(Debug, PartialEq, Eq)]
pub struct Claim(u64);

/// Why an interval is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InUse<N> {
    /// A holder writes sectors of the interval, or reads sectors of it that the new holder would write.
    By {
        /// The name of that holder.
        holder: N,
        /// What that holder does.
        access: Access,
    },
    /// No memory is left to note the holder.
    NoRoom,
}

impl<N: fmt::Display> fmt::Display for InUse<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::By { holder, access: Access::Write } => write!(f, "{holder} writes it"),
            Self::By { holder, access: Access::Read } => write!(f, "{holder} reads it"),
            Self::NoRoom => f.write_str("no memory is left to note who has it"),
        }
    }
}

#[derive(Debug)]
struct Held<N> {
    claim: u64,
    disk: u32,
    first: u64,
    end: u64,
    access: Access,
    name: N,
}

/// The intervals that are held, of all physical disks. `N` is the name of a holder, as messages show it.
#[derive(Debug)]
pub struct Holders<N> {
    held: Vec<Held<N>>,
    next: u64,
}

impl<N> Default for Holders<N> {
    fn default() -> Self {
        Self { held: Vec::new(), next: 0 }
    }
}

impl<N: Clone> Holders<N> {
    /// Notes that `name` holds `sectors` sectors of `disk` from `first` on. With `anyway`, other holders do not matter.
    ///
    /// # Errors
    /// [`InUse::By`] names a holder of one of these sectors, if either access is a write and `anyway` is false;
    /// [`InUse::NoRoom`] if no memory is left.
    pub fn hold(
        &mut self,
        (disk, first, sectors): (u32, u64, u64),
        access: Access,
        anyway: bool,
        name: N,
    ) -> Result<Claim, InUse<N>> {
        let end = first.saturating_add(sectors);
        let clash = self.held.iter().find(|held| {
            let meets = held.disk == disk && held.first < end && first < held.end;
            meets && (held.access == Access::Write || access == Access::Write)
        });
        if let Some(held) = clash.filter(|_| !anyway) {
            return Err(InUse::By { holder: held.name.clone(), access: held.access });
        }
        self.held.try_reserve(1).map_err(|_| InUse::NoRoom)?;
        let claim = self.next;
        self.next = self.next.wrapping_add(1);
        self.held.push(Held { claim, disk, first, end, access, name });
        Ok(Claim(claim))
    }

    /// Ends a claim. Other claims of the same interval stay.
    pub fn release(&mut self, claim: Claim) {
        let Claim(number) = claim;
        self.held.retain(|held| held.claim != number);
    }

    /// Returns the holders of intervals of `disk`, each with its access. A holder of two intervals is returned twice.
    pub fn of(&self, disk: u32) -> impl Iterator<Item = (&N, Access)> {
        self.held.iter().filter(move |held| held.disk == disk).map(|held| (&held.name, held.access))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_share_and_a_writer_is_alone() {
        let mut holders = Holders::default();
        let a = holders.hold((0, 0, 100), Access::Read, false, "a").unwrap();
        let b = holders.hold((0, 50, 100), Access::Read, false, "b").unwrap();
        let refused = holders.hold((0, 120, 1), Access::Write, false, "c").unwrap_err();
        assert_eq!(refused, InUse::By { holder: "b", access: Access::Read });
        assert_eq!(alloc::format!("{refused}"), "b reads it");
        let c = holders.hold((0, 150, 50), Access::Write, false, "c").unwrap();
        let other = holders.hold((1, 0, 500), Access::Write, false, "d").unwrap();
        let refused = holders.hold((0, 199, 1), Access::Read, false, "e").unwrap_err();
        assert_eq!(alloc::format!("{refused}"), "c writes it");
        for claim in [a, b, c, other] {
            holders.release(claim);
        }
        let all = holders.hold((0, 0, u64::MAX), Access::Write, false, "f").unwrap();
        assert_eq!(holders.of(0).collect::<Vec<_>>(), [(&"f", Access::Write)]);
        holders.release(all);
        assert_eq!(holders.of(0).count(), 0);
    }

    #[test]
    fn who_insists_is_a_holder_too() {
        let mut holders = Holders::default();
        let first = holders.hold((0, 0, 10), Access::Write, false, "first").unwrap();
        let second = holders.hold((0, 5, 10), Access::Write, true, "second").unwrap();
        holders.release(first);
        let refused = holders.hold((0, 14, 1), Access::Read, false, "third").unwrap_err();
        assert_eq!(refused, InUse::By { holder: "second", access: Access::Write });
        holders.release(second);
        assert!(holders.hold((0, 0, 100), Access::Write, false, "third").is_ok());
    }
}
