//! A lock that also masks event upcalls, so that an upcall never waits for a lock held by the code it interrupted.

use crate::events;
use core::sync::atomic::{AtomicBool, AtomicU8, Ordering};

/// The raw lock: other vcpus spin, upcalls on its own vcpu are masked.
pub struct RawMaskLock {
    held: AtomicBool,
    /// The upcall mask from before the lock was taken. Only the holder writes it.
    mask: AtomicU8,
}

/// A mutex that masks upcalls while it is held.
pub type MaskMutex<T> = lock_api::Mutex<RawMaskLock, T>;

// SAFETY: `held` makes the lock exclusive: only the caller whose exchange turned false into true holds it.
unsafe impl lock_api::RawMutex for RawMaskLock {
    const INIT: Self = Self { held: AtomicBool::new(false), mask: AtomicU8::new(0) };
    type GuardMarker = lock_api::GuardNoSend;

    fn lock(&self) {
        while !self.try_lock() {
            core::hint::spin_loop();
        }
    }

    fn try_lock(&self) -> bool {
        let mask = events::mask_upcalls();
        if self.held.swap(true, Ordering::Acquire) {
            events::restore_upcalls(mask);
            return false;
        }
        self.mask.store(mask, Ordering::Relaxed);
        true
    }

    unsafe fn unlock(&self) {
        let mask = self.mask.load(Ordering::Relaxed);
        self.held.store(false, Ordering::Release);
        events::restore_upcalls(mask);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_held_lock_is_not_taken_twice_and_is_free_again_after() {
        let lock = MaskMutex::new(1);
        let mut guard = lock.lock();
        *guard += 1;
        assert!(lock.try_lock().is_none());
        drop(guard);
        assert_eq!(*lock.lock(), 2);
    }
}
