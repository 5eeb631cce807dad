//! The clients of the store: connections, and callers as the permission rules see them.

pub use hypercall_abi::DomainId;
use hypercall_abi::domid;

use crate::error::StoreError;

/// Reads a decimal domain number.
///
/// # Errors
/// The text is no number, or the number is reserved (`SELF` and above).
pub fn parse_domain(text: &[u8]) -> Result<DomainId, StoreError> {
    let number = parse_decimal(text)?;
    u16::try_from(number).ok().filter(|number| *number < domid::SELF).map(DomainId).ok_or(StoreError::Invalid)
}

/// Reads a decimal number: digits only, at least one, no sign.
pub(crate) fn parse_decimal(text: &[u8]) -> Result<u64, StoreError> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return Err(StoreError::Invalid);
    }
    let text = core::str::from_utf8(text).map_err(|_| StoreError::Invalid)?;
    text.parse().map_err(|_| StoreError::Invalid)
}

/// A caller as the permission rules see it.
///
/// A caller is privileged or not from the making of its connection on; the domain's number does not matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The domain that makes the request: owner of the nodes it creates, base of its relative paths.
    pub domain: DomainId,
    /// Whether the caller is exempt from permissions and quotas.
    pub privileged: bool,
    /// A domain whose rights the caller has in addition to its own (SET_TARGET).
    pub target: Option<DomainId>,
}

impl Caller {
    /// Whether a permission entry for `domain` applies to this caller.
    pub(crate) fn acts_for(&self, domain: DomainId) -> bool {
        self.domain == domain || self.target == Some(domain)
    }
}

/// One client of the store. A domain has at most one connection; sessions inside the server's own domain are numbered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ConnectionId {
    /// The ring of an introduced domain.
    Domain(DomainId),
    /// A session in the server's own domain.
    Local(u32),
}
