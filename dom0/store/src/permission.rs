//! Who may do what with a node (ABI io 3.5).

use alloc::format;
use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::domain::{Caller, DomainId, parse_domain};
use crate::error::StoreError;
use crate::quota::shared;

/// A set of rights: read, write, both, none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rights {
    /// May read the value, the children's names and the permissions.
    pub read: bool,
    /// May write the value, create children and remove the node.
    pub write: bool,
}

impl Rights {
    /// No rights.
    pub const NONE: Self = Self { read: false, write: false };
    /// The right to read only.
    pub const READ: Self = Self { read: true, write: false };
    /// The right to write only.
    pub const WRITE: Self = Self { read: false, write: true };
    /// Both rights.
    pub const BOTH: Self = Self { read: true, write: true };

    const fn letter(self) -> char {
        match (self.read, self.write) {
            (false, false) => 'n',
            (true, false) => 'r',
            (false, true) => 'w',
            (true, true) => 'b',
        }
    }

    const fn from_letter(letter: u8) -> Option<Self> {
        match letter {
            b'n' => Some(Self::NONE),
            b'r' => Some(Self::READ),
            b'w' => Some(Self::WRITE),
            b'b' => Some(Self::BOTH),
            _ => None,
        }
    }

    const fn include(self, wanted: Self) -> bool {
        (self.read || !wanted.read) && (self.write || !wanted.write)
    }
}

/// One entry of a permission list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permission {
    /// The domain that gets the rights.
    pub domain: DomainId,
    /// The rights it gets.
    pub rights: Rights,
}

impl Permission {
    /// Reads an entry such as `r5`.
    ///
    /// # Errors
    /// The letter is unknown, or no domain number follows.
    pub fn parse(text: &[u8]) -> Result<Self, StoreError> {
        let (letter, number) = text.split_first().ok_or(StoreError::Invalid)?;
        let rights = Rights::from_letter(*letter).ok_or(StoreError::Invalid)?;
        Ok(Self { domain: parse_domain(number)?, rights })
    }

    /// Writes the entry as [`parse`](Self::parse) reads it.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        format!("{}{}", self.rights.letter(), self.domain).into_bytes()
    }
}

/// A permission list. The first entry names the owner, who may do everything; the rights in this entry are those of
/// every domain that the list does not name. The other entries are the exceptions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Permissions {
    owner: DomainId,
    others: Rights,
    /// The entries after the first. Nodes that inherit a list share it; an empty list is `None`.
    exceptions: Option<Arc<[Permission]>>,
}

impl Permissions {
    /// A list by which only `owner` (and privileged callers) may do anything.
    #[must_use]
    pub const fn private(owner: DomainId) -> Self {
        Self { owner, others: Rights::NONE, exceptions: None }
    }

    fn with(owner: DomainId, others: Rights, exceptions: &[Permission]) -> Self {
        let exceptions = if exceptions.is_empty() { None } else { Some(exceptions.into()) };
        Self { owner, others, exceptions }
    }

    fn exceptions(&self) -> &[Permission] {
        self.exceptions.as_deref().unwrap_or_default()
    }

    /// Bytes of the heap that the list uses.
    pub(crate) fn heap_bytes(&self) -> usize {
        if self.exceptions.is_some() { shared(size_of_val(self.exceptions())) } else { 0 }
    }

    /// Builds a list from its entries.
    ///
    /// # Errors
    /// `entries` is empty.
    pub fn new(entries: &[Permission]) -> Result<Self, StoreError> {
        let (first, rest) = entries.split_first().ok_or(StoreError::Invalid)?;
        Ok(Self::with(first.domain, first.rights, rest))
    }

    /// Reads a list as configurations write it: `n0,r5`.
    ///
    /// # Errors
    /// An entry is malformed, or there is no entry.
    pub fn parse(text: &str) -> Result<Self, StoreError> {
        let entries: Result<Vec<_>, _> = text.split(',').map(|entry| Permission::parse(entry.as_bytes())).collect();
        Self::new(&entries?)
    }

    /// The owner.
    #[must_use]
    pub const fn owner(&self) -> DomainId {
        self.owner
    }

    /// All entries, the owner's first.
    pub fn entries(&self) -> impl Iterator<Item = Permission> {
        let first = Permission { domain: self.owner, rights: self.others };
        core::iter::once(first).chain(self.exceptions().iter().copied())
    }

    /// Number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.exceptions().len() + 1
    }

    /// Always false: a list has an owner.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        false
    }

    /// Whether the list gives `caller` all of the `wanted` rights.
    #[must_use]
    pub fn allow(&self, caller: &Caller, wanted: Rights) -> bool {
        if caller.privileged || caller.acts_for(self.owner) {
            return true;
        }
        let exception = self.exceptions().iter().find(|entry| caller.acts_for(entry.domain));
        exception.map_or(self.others, |entry| entry.rights).include(wanted)
    }

    /// Whether `caller` may change this list.
    #[must_use]
    pub fn controlled_by(&self, caller: &Caller) -> bool {
        caller.privileged || caller.acts_for(self.owner)
    }

    /// This list with another owner: what a node inherits if its creator is unprivileged.
    #[must_use]
    pub fn owned_by(&self, owner: DomainId) -> Self {
        Self { owner, ..self.clone() }
    }

    /// This list with only those exceptions whose domain `keep` accepts.
    #[must_use]
    pub fn retaining(&self, keep: impl Fn(DomainId) -> bool) -> Self {
        let kept: Vec<_> = self.exceptions().iter().copied().filter(|entry| keep(entry.domain)).collect();
        Self::with(self.owner, self.others, &kept)
    }

    /// Whether an exception names this domain.
    #[must_use]
    pub fn mention(&self, domain: DomainId) -> bool {
        self.exceptions().iter().any(|entry| entry.domain == domain)
    }

    /// The list as GET_PERMS sends it: every entry ends with a zero byte.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut text = Vec::new();
        for entry in self.entries() {
            text.extend(entry.encode());
            text.push(0);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(domain: u16) -> Caller {
        Caller { domain: DomainId(domain), privileged: false, target: None }
    }

    #[test]
    fn the_owner_may_all_the_named_what_is_named_the_rest_the_default() {
        let list = Permissions::parse("r1,n2,w3,b4").unwrap();
        let expected = [
            (1, [true, true, true]),
            (2, [false, false, false]),
            (3, [false, true, false]),
            (4, [true, true, true]),
            (5, [true, false, false]),
        ];
        for (domain, rights) in expected {
            let seen = [Rights::READ, Rights::WRITE, Rights::BOTH].map(|wanted| list.allow(&caller(domain), wanted));
            assert_eq!(seen, rights, "domain {domain}");
        }
        assert!(list.allow(&Caller { privileged: true, ..caller(2) }, Rights::BOTH));
        assert!(list.allow(&Caller { target: Some(DomainId(1)), ..caller(2) }, Rights::BOTH));
        assert!(!list.allow(&caller(0), Rights::WRITE), "no number is privileged");
    }

    #[test]
    fn lists_are_read_and_written() {
        let list = Permissions::parse("n0,r5").unwrap();
        assert_eq!(list.encode(), b"n0\0r5\0");
        assert_eq!(list.owned_by(DomainId(7)).encode(), b"n7\0r5\0");
        assert_eq!(list.retaining(|domain| domain != DomainId(5)).encode(), b"n0\0");
        for bad in ["", "n", "x0", "n-1", "n0,", "n32752", "n99999", "r 1", "n0,r1x"] {
            assert_eq!(Permissions::parse(bad), Err(StoreError::Invalid), "{bad:?}");
        }
        assert_eq!(Permissions::new(&[]), Err(StoreError::Invalid));
    }
}
