//! What must be left of a guest that is gone: nothing.

use services::Class;
use services::store::StoreService;
use toolstack::{DomainId, Store};

use super::guest::Rounds;

/// What any service can leak.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Bytes of the heap that are reserved.
    heap: usize,
    /// Pages and ports.
    held: (usize, usize),
    /// Tasks of control and of data.
    tasks: (usize, usize),
    sessions: usize,
}

/// Counts what the services have, once they are at rest.
pub fn count<M: Rounds>(machine: &M, store: &StoreService<M>) -> Counted {
    machine.rounds(3);
    let fake = machine.fake();
    Counted {
        heap: fake.reserved(),
        held: fake.held(),
        tasks: (fake.tasks(Class::Control), fake.tasks(Class::Data)),
        sessions: store.sessions(),
    }
}

/// Ends a domain in the store, as the manager does once the services have ended it.
pub fn release<M: Rounds>(machine: &M, store: &StoreService<M>, domain: u16) {
    store.domain_shut_down(DomainId(domain));
    store.release(DomainId(domain)).unwrap();
    machine.rounds(10);
}

/// Asserts that the store has no node of the domains' devices of a kind.
pub fn assert_no_nodes<M: Rounds>(store: &StoreService<M>, kind: &str, domains: &[u16]) {
    let session = store.session();
    for domain in domains {
        for path in [
            format!("/local/domain/{domain}/device/{kind}"),
            format!("/local/domain/0/backend/{kind}/{domain}"),
            format!("/local/domain/0/error/backend/{kind}/{domain}"),
        ] {
            let below = session.transaction(|t| t.list(&path)).unwrap_or_default();
            assert!(below.is_empty(), "{path}: {below:?}");
        }
    }
}
