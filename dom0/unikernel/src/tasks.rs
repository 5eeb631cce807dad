//! Cooperative tasks on vcpu 0: they run with upcalls masked and sleep in `sched_op(block)` when none is ready.
//!
//! No wake-up is lost: the ready queue and the pending bits are looked at with upcalls masked, and `block` unmasks and
//! looks again in one step (core 5.4).

use crate::sync::MaskMutex;
use crate::{events, hypercall};
use alloc::collections::VecDeque;
use async_task::Runnable;
use core::future::Future;
use core::pin::pin;
use core::task::{Context, Poll, Waker};

pub use async_task::Task;

static READY: MaskMutex<VecDeque<Runnable>> = MaskMutex::new(VecDeque::new());

/// Starts a task. Dropping the handle cancels it; `detach` lets it run on.
#[must_use = "a task is cancelled when its handle is dropped"]
pub fn spawn<T: 'static>(future: impl Future<Output = T> + 'static) -> Task<T> {
    let schedule = |runnable| READY.lock().push_back(runnable);
    // SAFETY: the future and its output are 'static. They need not be `Send`: runnables are run and dropped by vcpu 0
    // alone, in `run_ready`. The schedule function borrows nothing.
    let (runnable, task) = unsafe { async_task::spawn_unchecked(future, schedule) };
    runnable.schedule();
    task
}

/// Runs tasks until `future` is done; answers its value.
pub fn block_on<T: 'static>(future: impl Future<Output = T> + 'static) -> T {
    let mut task = pin!(spawn(future));
    loop {
        let _ = events::mask_upcalls();
        events::scan();
        if run_ready() {
            continue;
        }
        let mut context = Context::from_waker(Waker::noop());
        if let Poll::Ready(value) = task.as_mut().poll(&mut context) {
            return value;
        }
        hypercall::block();
    }
}

/// Runs what is ready now, each once; answers whether anything was.
fn run_ready() -> bool {
    let count = READY.lock().len();
    for _ in 0..count {
        let next = READY.lock().pop_front();
        if let Some(runnable) = next {
            runnable.run();
        }
    }
    count > 0
}

/// Lets other tasks run.
pub async fn yield_now() {
    let mut yielded = false;
    core::future::poll_fn(|context| {
        if core::mem::replace(&mut yielded, true) {
            Poll::Ready(())
        } else {
            context.waker().wake_by_ref();
            Poll::Pending
        }
    })
    .await;
}
