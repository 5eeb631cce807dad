//! How much of the store an unprivileged domain may use (ABI io 3.6), and how much heap that is at most.
//!
//! Bytes are counted as the heap spends them: an allocation counts with the allocator's overhead, an entry of a map or
//! queue with the space the map or queue keeps for it. So the sum of all domains' budgets bounds the server's heap.

use crate::wire::{HEADER_BYTES, PAYLOAD_MAX};

/// Bytes that one call of [`Store`](crate::Store) on behalf of an unprivileged domain may allocate in all, counting
/// also what it frees before it returns. The largest case is the removal of as many nodes as a domain may own. The
/// caller must make sure that this much contiguous heap is free before the call.
pub const TURN_BYTES: usize = 5 << 18;

/// Limits for each unprivileged domain. Privileged callers have no limits.
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
    /// Nodes touched in one transaction, or removed by one request.
    pub transaction_nodes: usize,
    /// Bytes of the heap for nodes, watches, open transactions, and changes that watchers have not been told of yet.
    pub memory_bytes: usize,
    /// Limit for the bytes of the domain's changes that watchers have not been told of: at this limit no request is
    /// taken.
    pub untold_bytes: usize,
    /// Limit for the bytes of the heap of replies not fetched: at this limit no request is taken.
    pub reply_bytes: usize,
    /// Limit for watch events not fetched; beyond this limit, only one event per watch is kept.
    pub events: usize,
    /// Bytes of the heap for watch events not fetched.
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
            memory_bytes: 512 * 1024,
            untold_bytes: 16 * 1024,
            reply_bytes: 16 * 1024,
            events: 256,
            event_bytes: 64 * 1024,
        }
    }
}

impl Quotas {
    /// The most heap that an unprivileged domain can make the store use, whatever it does: the quotas, and what may
    /// exceed them. That is one message in each direction, one reply and one change beyond their limits, the nodes that
    /// privileged callers write for a domain whose quota is used up, and the store's own records of the domain.
    #[must_use]
    pub const fn domain_bytes(&self) -> usize {
        let messages = 3 * heap(HEADER_BYTES + PAYLOAD_MAX);
        self.memory_bytes + self.reply_bytes + self.event_bytes + messages + GIVEN + RECORDS
    }
}

/// Nodes that a privileged caller writes for a domain whose quota is used up, and one change beyond the quota.
const GIVEN: usize = 16 * 1024;
/// The connection, with the least that its maps and queues allocate.
const RECORDS: usize = 16 * 1024;

/// Bytes of the heap that an allocation of `bytes` uses: a multiple of 32, with the allocator's record of 8 bytes.
pub(crate) const fn heap(bytes: usize) -> usize {
    if bytes == 0 { 0 } else { (bytes + 8).next_multiple_of(32) }
}

/// Bytes of the heap that one entry uses in a large `BTreeMap`, at most: a node of the map has room for eleven entries,
/// and may hold less than half as many.
pub(crate) const fn map_entry(bytes: usize) -> usize {
    (11 * bytes + 64) * 6 / 25
}

/// Bytes of the heap that a reference-counted text or byte string uses.
pub(crate) const fn shared(bytes: usize) -> usize {
    heap(2 * size_of::<usize>() + bytes)
}
