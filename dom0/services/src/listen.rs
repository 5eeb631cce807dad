//! Turns of work that events of other domains and of devices bring about.

use alloc::boxed::Box;
use alloc::rc::Rc;
use core::cell::Cell;
use core::future::{Future, poll_fn};
use core::pin::{Pin, pin};
use core::task::{Context, Poll};

use crate::host::Host;
use crate::shape::PATIENCE_NS;
use crate::signal::Signal;

/// A port that is listened to. One future serves all events of the port and never ends, so that no event allocates memory.
pub(crate) struct Listener {
    raised: Rc<Cell<bool>>,
    listening: Pin<Box<dyn Future<Output = ()>>>,
}

impl Listener {
    pub(crate) fn new<H: Host>(host: &H, port: u32) -> Self {
        let (host, raised) = (host.clone(), Rc::new(Cell::new(false)));
        let flag = Rc::clone(&raised);
        let listening = Box::pin(async move {
            loop {
                host.raised(port).await;
                flag.set(true);
            }
        });
        Self { raised, listening }
    }

    /// Whether the port was raised since the last call.
    pub(crate) fn poll(&mut self, context: &mut Context<'_>) -> bool {
        let _never_ready = self.listening.as_mut().poll(context);
        self.raised.take()
    }
}

/// When the next turn is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Next {
    /// Whether the next turn is due as soon as other tasks have had theirs.
    pub(crate) again: bool,
    /// When the next turn is due at the latest. `None`: only after an event or a kick.
    pub(crate) wake_ns: Option<u64>,
}

/// Somebody who works in turns.
pub(crate) trait Turns {
    /// The maximum number of bytes of heap that a turn allocates.
    const TURN_BYTES: usize;

    /// Takes a turn, whose work is bounded.
    fn turn(&self) -> Next;

    /// Notes which ports were raised. Returns whether one was.
    fn listen(&self, context: &mut Context<'_>) -> bool;

    /// The signal that asks for a turn.
    fn kick(&self) -> &Signal;
}

/// Gives turns for ever.
pub(crate) async fn give_turns<H: Host, T: Turns>(host: &H, worker: &T) {
    // Most turns leave the deadline as it is.
    let (mut sleep, mut deadline_ns) = (pin!(None), None);
    loop {
        while !host.can_allocate(T::TURN_BYTES) {
            host.sleep_until(host.now_ns().saturating_add(PATIENCE_NS)).await;
        }
        let next = worker.turn();
        if next.again {
            host.yield_now().await;
            poll_fn(|context| {
                worker.listen(context);
                Poll::Ready(())
            })
            .await;
            continue;
        }
        if sleep.is_none() || next.wake_ns != deadline_ns {
            deadline_ns = next.wake_ns;
            sleep.set(deadline_ns.map(|at| host.sleep_until(at)));
        }
        wait(worker, sleep.as_mut()).await;
    }
}

/// Waits for a raised port, a kick, or the end of `sleep`, which is `None` after that.
async fn wait<T: Turns>(worker: &T, mut sleep: Pin<&mut Option<impl Future<Output = ()>>>) {
    let other = poll_fn(|context| {
        if worker.listen(context) {
            return Poll::Ready(());
        }
        let woken = sleep.as_mut().as_pin_mut().is_some_and(|sleep| sleep.poll(context).is_ready());
        if woken {
            sleep.set(None);
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    });
    worker.kick().or(other).await;
}
