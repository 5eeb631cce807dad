//! Who asks.

pub use hypercall_abi::DomainId;
use hypercall_abi::domid;

use crate::error::StoreError;

/// Reads a decimal domain number.
///
/// # Errors
/// No number, or one that no domain can have.
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
/// Privilege is given when the connection is made. It is never concluded from a domain's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The domain that asks: owner of what it creates, base of its relative paths.
    pub domain: DomainId,
    /// Whether permissions and quotas apply at all.
    pub privileged: bool,
    /// A domain whose rights the caller has as well (SET_TARGET).
    pub target: Option<DomainId>,
}

impl Caller {
    /// Whether a permission entry for `domain` speaks about this caller.
    pub(crate) fn acts_for(&self, domain: DomainId) -> bool {
        self.domain == domain || self.target == Some(domain)
    }
}

/// One client of the store. Domains have at most one connection; sessions inside the server's own
/// domain are numbered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ConnectionId {
    /// The ring of an introduced domain.
    Domain(DomainId),
    /// A session in the server's own domain.
    Local(u32),
}
