//! How one task wakes others.

use alloc::vec::Vec;
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
            let mut waiting = self.waiting.borrow_mut();
            if !waiting.as_ref().is_some_and(|waker| waker.will_wake(context.waker())) {
                *waiting = Some(context.waker().clone());
            }
            Poll::Pending
        })
        .await;
    }
}

/// The tasks that wait for conditions. Each looks at its condition again when the tasks are woken.
#[derive(Debug, Default)]
pub struct Waiters(RefCell<Vec<Waker>>);

impl Waiters {
    /// Wakes all tasks that wait.
    pub fn wake(&self) {
        let woken = self.0.take();
        woken.into_iter().for_each(Waker::wake);
    }

    /// Waits until `look` returns a value. Calls `look` now, and each time the tasks are woken.
    pub async fn until<R>(&self, mut look: impl FnMut() -> Option<R>) -> R {
        poll_fn(|context| {
            if let Some(found) = look() {
                return Poll::Ready(found);
            }
            let mut waiting = self.0.borrow_mut();
            if !waiting.iter().any(|waker| waker.will_wake(context.waker())) {
                waiting.push(context.waker().clone());
            }
            Poll::Pending
        })
        .await
    }
}

/// Waits for `work`, at most until `deadline` is done; returns `None` if `deadline` was done first.
pub async fn before<R>(deadline: impl Future<Output = ()>, work: impl Future<Output = R>) -> Option<R> {
    let (mut deadline, mut work) = (pin!(deadline), pin!(work));
    poll_fn(|context| match work.as_mut().poll(context) {
        Poll::Ready(result) => Poll::Ready(Some(result)),
        Poll::Pending => deadline.as_mut().poll(context).map(|()| None),
    })
    .await
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

    #[test]
    fn all_who_wait_look_again() {
        let (waiters, value, woken) = (Waiters::default(), Cell::new(0), Arc::default());
        let mut first = pin!(async { assert_eq!(waiters.until(|| Some(value.get()).filter(|now| *now > 0)).await, 2) });
        let mut second = pin!(waiters.until(|| (value.get() > 1).then_some(())));
        assert!(!polled(first.as_mut(), &woken) && !polled(second.as_mut(), &woken));
        value.set(2);
        waiters.wake();
        assert_eq!(woken.0.load(Ordering::Relaxed), 1, "one waker is kept once");
        assert!(polled(first, &woken) && polled(second, &woken));
    }

    #[test]
    fn work_is_waited_for_until_the_deadline() {
        let (deadline, work, woken) = (Signal::default(), Signal::default(), Arc::default());
        let mut late = pin!(async { assert_eq!(before(deadline.wait(), work.wait()).await, None) });
        assert!(!polled(late.as_mut(), &woken));
        deadline.set();
        assert!(polled(late, &woken));
        deadline.set();
        work.set();
        assert!(polled(pin!(async { assert_eq!(before(deadline.wait(), work.wait()).await, Some(())) }), &woken));
    }
}
