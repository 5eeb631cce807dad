//! The clock and the one-shot timer (ABI core 6).

use crate::sync::MaskMutex;
use crate::{events, hypercall};
use alloc::collections::BTreeMap;
use core::arch::x86_64::_rdtsc;
use core::future::Future;
use core::pin::Pin;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use core::task::{Context, Poll, Waker};
use hypercall_abi::event::Virq;
use hypercall_abi::shared::TimeInfo;

static PORT: AtomicU32 = AtomicU32::new(0);

/// The sleeping tasks, by deadline. The second part of the key distinguishes tasks with the same deadline.
static SLEEPERS: MaskMutex<BTreeMap<(u64, u64), Waker>> = MaskMutex::new(BTreeMap::new());

/// Stops the periodic timer, then binds the timer interrupt. In this order, because a tick after the binding would end
/// the first sleep early.
///
/// # Panics
/// If the hypervisor refuses what it must grant (ABI core 6.3).
pub(crate) fn init() {
    hypercall::stop_periodic_timer(0).expect("the tick does not stop");
    let port = hypercall::bind_virq(Virq::Timer, 0).expect("the timer interrupt is not bound");
    PORT.store(port, Ordering::Relaxed);
    events::on_event(port, |_| wake_sleepers());
}

/// The port of the timer interrupt.
#[must_use]
pub fn timer_port() -> u32 {
    PORT.load(Ordering::Relaxed)
}

/// The time record of vcpu 0, read consistently.
#[must_use]
pub fn record() -> TimeInfo {
    let record = events::time_record().cast::<TimeInfo>();
    if record.is_null() {
        return TimeInfo::default();
    }
    loop {
        // SAFETY: the shared page stays mapped and the record is aligned; the hypervisor may write the record
        // meanwhile, which its version shows (ABI core 6.1), hence volatile reads between fences.
        let (before, copy, after) = unsafe {
            let version = (&raw const (*record).version).read_volatile();
            fence(Ordering::Acquire);
            let copy = record.read_volatile();
            fence(Ordering::Acquire);
            (version, copy, (&raw const (*record).version).read_volatile())
        };
        if before == after && before & 1 == 0 {
            return copy;
        }
    }
}

/// The system time at counter value `tsc`, computed from a time record.
#[must_use]
pub fn system_time(record: &TimeInfo, tsc: u64) -> u64 {
    let delta = u128::from(tsc.saturating_sub(record.tsc_timestamp));
    let shift = u32::from(record.tsc_shift.unsigned_abs());
    let shifted = if record.tsc_shift < 0 { delta >> shift } else { delta << shift };
    let elapsed = (shifted * u128::from(record.tsc_to_system_mul)) >> 32;
    let elapsed = u64::try_from(elapsed).unwrap_or(u64::MAX);
    record.system_time.saturating_add(elapsed)
}

/// Nanoseconds since the hypervisor started.
#[must_use]
pub fn now_ns() -> u64 {
    let record = record();
    system_time(&record, counter())
}

/// The processor's time-stamp counter: for measuring, and as a seed.
#[must_use]
pub fn counter() -> u64 {
    // SAFETY: reading the counter is allowed in every ring.
    unsafe { _rdtsc() }
}

/// Waits for `ns` nanoseconds without sleeping.
pub fn spin_ns(ns: u64) {
    let end = now_ns() + ns;
    while now_ns() < end {
        core::hint::spin_loop();
    }
}

fn wake_sleepers() {
    loop {
        let due = {
            let mut sleepers = SLEEPERS.lock();
            match sleepers.first_entry() {
                Some(first) if first.key().0 <= now_ns() => first.remove(),
                Some(first) => {
                    let deadline = first.key().0;
                    drop(sleepers);
                    arm(deadline);
                    return;
                }
                None => return,
            }
        };
        due.wake();
    }
}

/// Sets the one-shot timer. A deadline that has passed fires at once, so no wake-up is lost between reading the clock
/// and this call.
fn arm(deadline_ns: u64) {
    let _ = hypercall::set_singleshot_timer(0, deadline_ns);
}

/// Sleeps until [`now_ns`] reaches `deadline_ns`.
pub fn sleep_until(deadline_ns: u64) -> impl Future<Output = ()> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    Sleep { key: (deadline_ns, NEXT.fetch_add(1, Ordering::Relaxed)) }
}

/// Sleeps for `ns` nanoseconds.
pub fn sleep_ns(ns: u64) -> impl Future<Output = ()> {
    sleep_until(now_ns() + ns)
}

struct Sleep {
    key: (u64, u64),
}

impl Future for Sleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        // A task stays among the sleepers until its deadline.
        if SLEEPERS.lock().get(&self.key).is_some_and(|waker| waker.will_wake(context.waker())) {
            return Poll::Pending;
        }
        if now_ns() >= self.key.0 {
            return Poll::Ready(());
        }
        let first = {
            let mut sleepers = SLEEPERS.lock();
            sleepers.insert(self.key, context.waker().clone());
            sleepers.keys().next().copied()
        };
        if first == Some(self.key) {
            arm(self.key.0);
        }
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        SLEEPERS.lock().remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// ABI core 6.1: for 2 GHz, mul is 2^31 and the shift 0; for 1 GHz the difference is doubled first.
    #[test]
    fn time_is_scaled_by_shift_and_multiplier() {
        let two_ghz =
            TimeInfo { tsc_timestamp: 1000, system_time: 5, tsc_to_system_mul: 1 << 31, ..TimeInfo::default() };
        assert_eq!(system_time(&two_ghz, 3000), 1005);
        let one_ghz = TimeInfo { tsc_shift: 1, ..two_ghz };
        assert_eq!(system_time(&one_ghz, 3000), 2005);
        let four_ghz = TimeInfo { tsc_shift: -1, ..two_ghz };
        assert_eq!(system_time(&four_ghz, 5000), 1005);
        assert_eq!(system_time(&two_ghz, 0), 5, "a counter behind the record");
    }
}
