//! Why a request is refused; the only place that turns a refusal into a name of the protocol.

use core::fmt;

/// A refusal. Its name is sent in an ERROR reply (ABI io 3.2); clients compare the name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreError {
    /// The request is malformed: path, permission list, number, or number of strings.
    Invalid,
    /// The caller lacks the right, or the request is for privileged callers only.
    Access,
    /// This watch is registered already.
    Exists,
    /// No such node, watch, domain or transaction.
    NotFound,
    /// The caller's memory quota is used up.
    NoMemory,
    /// One of the caller's quotas (nodes, size, transactions) is used up.
    NoSpace,
    /// The server does not know this request.
    NotSupported,
    /// A transaction inside a transaction.
    Busy,
    /// The transaction met a concurrent change; start it again.
    Again,
    /// The reply, or an event, would not fit into a message; or the caller already has as many watches as its quota
    /// allows (xenstored uses this error there too).
    TooBig,
    /// An unprivileged caller tried to change a node's owner.
    NotPermitted,
}

impl StoreError {
    /// The refusal's name in the protocol.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Invalid => "EINVAL",
            Self::Access => "EACCES",
            Self::Exists => "EEXIST",
            Self::NotFound => "ENOENT",
            Self::NoMemory => "ENOMEM",
            Self::NoSpace => "ENOSPC",
            Self::NotSupported => "ENOSYS",
            Self::Busy => "EBUSY",
            Self::Again => "EAGAIN",
            Self::TooBig => "E2BIG",
            Self::NotPermitted => "EPERM",
        }
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl core::error::Error for StoreError {}
