//! How much of the store an unprivileged domain may use (ABI 3.6).

/// Limits for each unprivileged domain. Privileged callers have none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quotas {
    /// Nodes owned.
    pub nodes: usize,
    /// Bytes of one node: value, names of children, permission entries.
    pub node_bytes: usize,
    /// Entries in a permission list.
    pub permissions: usize,
    /// Length of a path below the home of its domain.
    pub path_bytes: usize,
    /// Watches registered.
    pub watches: usize,
    /// Transactions open.
    pub transactions: usize,
    /// Nodes touched in one transaction.
    pub transaction_nodes: usize,
    /// Bytes of nodes, watches and open transactions together.
    pub memory_bytes: usize,
    /// Replies produced and not fetched, in bytes: above this no request is taken.
    pub reply_bytes: usize,
    /// Watch events produced and not fetched; above this, one event per watch is kept.
    pub events: usize,
    /// Bytes of such events.
    pub event_bytes: usize,
}

impl Default for Quotas {
    fn default() -> Self {
        Self {
            nodes: 1000,
            node_bytes: 2048,
            permissions: 5,
            path_bytes: 2048,
            watches: 128,
            transactions: 10,
            transaction_nodes: 1024,
            memory_bytes: 2_500_000,
            reply_bytes: 16 * 1024,
            events: 256,
            event_bytes: 64 * 1024,
        }
    }
}
