//! Cooperative tasks on vcpu 0. Tasks run with upcalls masked. When no task is ready, the vcpu sleeps in `tenon_op(Wait)` or,
//! on a hypervisor without this call, in `sched_op(block)`.
//!
//! There are two ready queues. The control queue is for tasks that a guest or a person waits for, the data queue for tasks that
//! move bytes. The control queue goes first, but of nine turns at least one is for the data queue, unless the data queue is
//! empty. A task that yields, or is woken during its own turn, goes to the end of the data queue, whatever the class of the
//! task. Events are checked before every turn, so a task that an event wakes is in its queue before the next turn begins. When
//! tasks have run for a millisecond since dom0 last slept or yielded, dom0 yields the CPU to other domains.
//!
//! No wake-up is lost. The ready queues and the pending bits are checked with upcalls masked. The hypervisor looks for pending
//! events once more when the vcpu goes to sleep, in `Wait` or in `block` (ABI core 5.4); `block` also unmasks upcalls.

mod ready;

use crate::sync::MaskMutex;
use crate::{events, hypercall, time};
use async_task::{Runnable, ScheduleInfo, WithInfo};
use core::future::Future;
use core::pin::pin;
use core::sync::atomic::{AtomicBool, Ordering};
use core::task::{Context, Poll, Waker};
use ready::Ready;

pub use async_task::Task;
pub use ready::{CONTROL_IN_A_ROW, Class};

/// Nanoseconds for which tasks run, since dom0 last slept or yielded, before dom0 yields the CPU to other domains. So a guest
/// that dom0 has answered gets the CPU soon, even if the machine has only one CPU.
const YIELD_AFTER_NS: u64 = 1_000_000;

static READY: MaskMutex<Ready<Runnable>> = MaskMutex::new(Ready::new());

/// Starts a control task: see [`Class`]. Dropping the returned handle cancels the task; `detach` drops the handle and lets the
/// task continue.
#[must_use = "a task is cancelled when its handle is dropped"]
pub fn spawn<T: 'static>(future: impl Future<Output = T> + 'static) -> Task<T> {
    spawn_in(Class::Control, future)
}

/// Starts a data task: see [`Class`]. Dropping the returned handle cancels the task; `detach` drops the handle and lets the
/// task continue.
#[must_use = "a task is cancelled when its handle is dropped"]
pub fn spawn_data<T: 'static>(future: impl Future<Output = T> + 'static) -> Task<T> {
    spawn_in(Class::Data, future)
}

fn spawn_in<T: 'static>(class: Class, future: impl Future<Output = T> + 'static) -> Task<T> {
    let schedule = WithInfo(move |runnable, info: ScheduleInfo| {
        let mut ready = READY.lock();
        if info.woken_while_running { ready.yielded(runnable) } else { ready.woken(class, runnable) }
    });
    // SAFETY: the future and its output are 'static. They need not be `Send`: only vcpu 0 runs and drops runnables, in
    // `run_next`. The schedule function borrows nothing.
    let (runnable, task) = unsafe { async_task::spawn_unchecked(future, schedule) };
    runnable.schedule();
    task
}

/// Runs tasks until `future` is done and no task is ready. Returns the value of `future`.
pub fn block_on<T: 'static>(future: impl Future<Output = T> + 'static) -> T {
    let mut task = pin!(spawn(future));
    let mut begun = time::now_ns();
    loop {
        let _ = events::mask_upcalls();
        events::scan();
        if run_next() {
            if time::now_ns().saturating_sub(begun) >= YIELD_AFTER_NS {
                hypercall::yield_now();
                begun = time::now_ns();
            }
            continue;
        }
        // An unfinished task is not polled: the poll would only store this waker, which wakes nobody.
        let mut context = Context::from_waker(Waker::noop());
        if task.is_finished()
            && let Poll::Ready(value) = task.as_mut().poll(&mut context)
        {
            return value;
        }
        sleep();
        begun = time::now_ns();
    }
}

/// Sleeps until an event is pending. [`block_on`] looks for events itself, so an upcall at the end of the sleep would be
/// wasted. Therefore the vcpu sleeps by `Wait`, which ends without an upcall. Only on a hypervisor without `Wait` does it sleep
/// by `block`, which ends with one.
fn sleep() {
    static HAS_WAIT: AtomicBool = AtomicBool::new(true);
    if HAS_WAIT.load(Ordering::Relaxed) && hypercall::wait().is_err() {
        HAS_WAIT.store(false, Ordering::Relaxed);
    }
    if !HAS_WAIT.load(Ordering::Relaxed) {
        hypercall::block();
    }
}

/// Gives a turn to the next ready task; returns whether a task was ready.
fn run_next() -> bool {
    let next = READY.lock().next();
    next.is_some_and(|runnable| {
        runnable.run();
        true
    })
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

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::rc::Rc;
    use alloc::vec::Vec;
    use core::cell::RefCell;

    /// The only test that runs tasks, because all tests share the queues.
    #[test]
    fn turns_of_control_come_first_and_a_long_one_lets_data_in() {
        let turns: Rc<RefCell<Vec<&str>>> = Rc::default();
        let work = |name: &'static str, count: usize| {
            let turns = Rc::clone(&turns);
            async move {
                for _ in 0..count {
                    turns.borrow_mut().push(name);
                    yield_now().await;
                }
            }
        };
        spawn_data(work("data", 3)).detach();
        spawn(work("long", 4)).detach();
        spawn(work("short", 1)).detach();
        let cancelled = spawn(work("cancelled", 1));
        drop(cancelled);
        while run_next() {}
        assert_eq!(*turns.borrow(), ["long", "short", "data", "long", "data", "long", "data", "long"]);
    }
}
