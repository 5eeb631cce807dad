//! How much of the store an unprivileged domain may use (ABI io 3.6), and what that takes of the heap at most.
//!
//! Bytes are counted as the heap sees them: with what an allocation costs beside its contents, and with the places that
//! maps and queues spend on an entry. So the budgets of all domains together are what the server's heap must have.

use crate::wire::{HEADER_BYTES, PAYLOAD_MAX};

/// Bytes that one call of [`Store`](crate::Store) on behalf of an unprivileged domain may allocate in all, the parts that
/// it frees again included: most for the removal of as many nodes as a domain may own. Who has so many in a row before the
/// call can carry it out.
pub const TURN_BYTES: usize = 5 << 18;

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
    /// Nodes touched in one transaction, or removed by one request.
    pub transaction_nodes: usize,
    /// Bytes of the heap for nodes, watches, open transactions, and changes that watchers are yet to hear of.
    pub memory_bytes: usize,
    /// Bytes of such changes above which no request is taken.
    pub untold_bytes: usize,
    /// Bytes of the heap for replies not fetched: above this no request is taken.
    pub reply_bytes: usize,
    /// Watch events produced and not fetched; above this, one event per watch is kept.
    pub events: usize,
    /// Bytes of the heap for such events.
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
    /// What an unprivileged domain can make the store take of the heap, whatever it does: the quotas, and what comes on
    /// top of them. That is one message in each direction, one reply and one change beyond their limits, the nodes that
    /// privileged callers give the domain however full it is, and the store's own records of it.
    #[must_use]
    pub const fn domain_bytes(&self) -> usize {
        let messages = 3 * heap(HEADER_BYTES + PAYLOAD_MAX);
        self.memory_bytes + self.reply_bytes + self.event_bytes + messages + GIVEN + RECORDS
    }
}

/// Nodes that a privileged caller writes for a domain whose quota is used up, and a change told on top of the quota.
const GIVEN: usize = 16 * 1024;
/// The connection, with the least that its maps and queues take.
const RECORDS: usize = 16 * 1024;

/// What an allocation of so many bytes takes of the heap: pieces of 32 bytes, with a record.
pub(crate) const fn heap(bytes: usize) -> usize {
    if bytes == 0 { 0 } else { (bytes + 8).next_multiple_of(32) }
}

/// What one entry takes in a large `BTreeMap`: nodes have eleven places, and may be used by less than half.
pub(crate) const fn map_entry(bytes: usize) -> usize {
    (11 * bytes + 64) * 6 / 25
}

/// What a shared text or byte string takes of the heap.
pub(crate) const fn shared(bytes: usize) -> usize {
    heap(2 * size_of::<usize>() + bytes)
}
