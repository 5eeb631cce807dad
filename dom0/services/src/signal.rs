//! How one task wakes another.

use core::cell::{Cell, RefCell};
use core::future::{Future, poll_fn};
use core::pin::pin;
use core::task::{Poll, Waker};

/// A flag that one task waits for. Once set, it stays set until that task has seen it.
#[derive(Debug, Default)]
pub struct Signal {
    set: Cell<bool>,
    waiting: RefCell<Option<Waker>>,
}

impl Signal {
    /// Sets the signal: ends the wait that is under way, or the next one.
    pub fn set(&self) {
        self.set.set(true);
        if let Some(waker) = self.waiting.take() {
            waker.wake();
        }
    }

    /// Waits until the signal is set.
    pub async fn wait(&self) {
        self.or(core::future::pending()).await;
    }

    /// Waits until the signal is set or `other` is done.
    pub async fn or(&self, other: impl Future<Output = ()>) {
        let mut other = pin!(other);
        poll_fn(|context| {
            if self.set.take() || other.as_mut().poll(context).is_ready() {
                return Poll::Ready(());
            }
            self.waiting.replace(Some(context.waker().clone()));
            Poll::Pending
        })
        .await;
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use alloc::sync::Arc;
    use core::sync::atomic::{AtomicU32, Ordering};
    use core::task::Context;
    use std::task::Wake;

    #[derive(Default)]
    struct Count(AtomicU32);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn polled(future: core::pin::Pin<&mut impl Future<Output = ()>>, woken: &Arc<Count>) -> bool {
        let waker = Waker::from(Arc::clone(woken));
        future.poll(&mut Context::from_waker(&waker)).is_ready()
    }

    #[test]
    fn a_call_ends_one_wait_now_or_later() {
        let (signal, woken) = (Signal::default(), Arc::default());
        signal.set();
        signal.set();
        assert!(polled(pin!(signal.wait()), &woken), "it was called before");
        let mut wait = pin!(signal.wait());
        assert!(!polled(wait.as_mut(), &woken), "two calls end one wait");
        signal.set();
        assert_eq!(woken.0.load(Ordering::Relaxed), 1);
        assert!(polled(wait, &woken));
    }

    #[test]
    fn whatever_comes_first_ends_the_wait() {
        let (signal, other, woken) = (Signal::default(), Signal::default(), Arc::default());
        let mut wait = pin!(signal.or(other.wait()));
        assert!(!polled(wait.as_mut(), &woken));
        other.set();
        assert!(polled(wait, &woken));
        let mut wait = pin!(signal.or(other.wait()));
        assert!(!polled(wait.as_mut(), &woken), "the other's call was used up");
        signal.set();
        assert!(polled(wait, &woken));
    }
}
