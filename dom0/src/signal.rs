//! How one task wakes another.

use core::cell::{Cell, RefCell};
use core::future::poll_fn;
use core::pin::pin;
use core::task::{Poll, Waker};
use unikernel::events;

/// Remembers that somebody called, until somebody waited.
#[derive(Default)]
pub(crate) struct Signal {
    set: Cell<bool>,
    waiting: RefCell<Option<Waker>>,
}

impl Signal {
    /// Ends one wait, now or later.
    pub(crate) fn set(&self) {
        self.set.set(true);
        if let Some(waker) = self.waiting.take() {
            waker.wake();
        }
    }

    /// Waits until the signal is set.
    pub(crate) async fn wait(&self) {
        poll_fn(|context| {
            if self.set.take() {
                return Poll::Ready(());
            }
            self.waiting.replace(Some(context.waker().clone()));
            Poll::Pending
        })
        .await;
    }

    /// Waits until the signal is set or the port is raised.
    pub(crate) async fn or_port(&self, port: u32) {
        let mut event = pin!(events::wait(port));
        poll_fn(|context| {
            if self.set.take() || event.as_mut().poll(context).is_ready() {
                return Poll::Ready(());
            }
            self.waiting.replace(Some(context.waker().clone()));
            Poll::Pending
        })
        .await;
    }
}
