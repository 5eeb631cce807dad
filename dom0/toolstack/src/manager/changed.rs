//! How tasks that work on guests tell each other of changes.

use alloc::vec::Vec;
use core::cell::{Cell, RefCell};
use core::future::{Future, pending, poll_fn};
use core::pin::pin;
use core::task::{Poll, Waker};

/// Counts changes, and wakes the tasks that wait for one. A change is anything for which such a task should look at the guests
/// again: a guest's new state, the end of the commands of `--exec`, or a hint that a domain has ended or devices are gone.
#[derive(Debug, Default)]
pub(super) struct Changes {
    count: Cell<u64>,
    waiting: RefCell<Vec<Waker>>,
}

impl Changes {
    /// The number of changes so far.
    pub(super) const fn count(&self) -> u64 {
        self.count.get()
    }

    /// Counts a change, and wakes the tasks that wait.
    pub(super) fn add(&self) {
        self.count.set(self.count.get().wrapping_add(1));
        self.waiting.take().into_iter().for_each(Waker::wake);
    }

    /// Waits until [`count`](Self::count) differs from `seen`.
    pub(super) async fn after(&self, seen: u64) {
        poll_fn(|context| {
            if self.count.get() != seen {
                return Poll::Ready(());
            }
            let mut waiting = self.waiting.borrow_mut();
            if !waiting.iter().any(|waker| waker.will_wake(context.waker())) {
                waiting.push(context.waker().clone());
            }
            Poll::Pending
        })
        .await;
    }
}

/// Waits until `one` or `other` is done, whichever is first; without `other`, until `one` is done.
pub(super) async fn either(one: impl Future<Output = ()>, other: Option<impl Future<Output = ()>>) {
    let mut one = pin!(one);
    let mut other = pin!(async {
        match other {
            Some(other) => other.await,
            None => pending().await,
        }
    });
    poll_fn(|context| match one.as_mut().poll(context) {
        Poll::Pending => other.as_mut().poll(context),
        ready => ready,
    })
    .await;
}

/// Waits until `one` and `other` are both done.
pub(super) async fn both(one: impl Future<Output = ()>, other: impl Future<Output = ()>) {
    let (mut one, mut other) = (pin!(one), pin!(other));
    let (mut one_done, mut other_done) = (false, false);
    poll_fn(|context| {
        one_done = one_done || one.as_mut().poll(context).is_ready();
        other_done = other_done || other.as_mut().poll(context).is_ready();
        if one_done && other_done { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

/// Runs `work` and returns its value. Calls `wanted` before each poll of `work`. Once `wanted` returns false, drops `work`
/// unfinished and returns `None`.
pub(super) async fn while_wanted<T>(work: impl Future<Output = T>, wanted: impl Fn() -> bool) -> Option<T> {
    let mut work = pin!(work);
    poll_fn(|context| match wanted() {
        true => work.as_mut().poll(context).map(Some),
        false => Poll::Ready(None),
    })
    .await
}
