//! Locks whose order the compiler checks.
//!
//! Touches: nothing but the values it guards.
//! Keeps: a context that holds a lock of one level can take only locks of higher levels, so no cycle of waiting exists.
//!
//! A [`Held<L>`] is the proof that this CPU holds at most level `L`. Taking a lock borrows the proof mutably, and the
//! guard carries the proof of its own level; while the guard lives, the lower proof is out of reach:
//!
//! ```
//! use hv_core::lock::{Domain, Held, Lock, Nothing, Ports};
//! let domain: Lock<Domain, u32> = Lock::new(1);
//! let ports: Lock<Ports, u32> = Lock::new(2);
//! let mut held = Held::<Nothing>::entering_ring_0();
//! let mut d = domain.lock(&mut held);
//! let (value, held) = d.parts();
//! let p = ports.lock(held);
//! *value += *p;
//! ```
//!
//! Down the order does not compile, and neither does the same level twice:
//!
//! ```compile_fail,E0277
//! use hv_core::lock::{Domain, Held, Lock, Nothing, Ports};
//! let domain: Lock<Domain, u32> = Lock::new(1);
//! let ports: Lock<Ports, u32> = Lock::new(2);
//! let mut held = Held::<Nothing>::entering_ring_0();
//! let mut p = ports.lock(&mut held);
//! let d = domain.lock(p.parts().1); // Domain is not above Ports
//! ```
//!
//! nor does the lower proof while a guard is alive:
//!
//! ```compile_fail,E0499
//! use hv_core::lock::{Domain, Held, Lock, Nothing, Ports};
//! let domain: Lock<Domain, u32> = Lock::new(1);
//! let ports: Lock<Ports, u32> = Lock::new(2);
//! let mut held = Held::<Nothing>::entering_ring_0();
//! let p = ports.lock(&mut held);
//! let d = domain.lock(&mut held);
//! drop(p);
//! ```

use crate::fault::between;
use core::marker::PhantomData;
use core::ops::{Deref, DerefMut};
use spin::mutex::{TicketMutex, TicketMutexGuard};
use spin::{Once, RelaxStrategy};

/// What every waiting CPU does between two looks at a lock; set once at boot.
static WHILE_WAITING: Once<fn()> = Once::new();

/// Has every CPU that waits for a lock call `work` meanwhile. Ring 0 runs with interrupts off, so a CPU that waits for a
/// lock must answer the flush requests of the CPU that holds it, or both wait for ever. Only the first call counts.
pub fn while_waiting(work: fn()) {
    WHILE_WAITING.call_once(|| work);
}

/// The way our locks wait.
#[derive(Debug)]
pub struct Answering;

impl RelaxStrategy for Answering {
    fn relax() {
        core::hint::spin_loop();
        if let Some(work) = WHILE_WAITING.get() {
            work();
        }
    }
}

/// A place in the order of locks.
pub trait Level {}

/// Level `Self` comes after level `L`: whoever holds `L` may take `Self`.
pub trait Above<L: Level>: Level {}

macro_rules! levels {
    ($($(#[$doc:meta])* $name:ident),+) => {
        $($(#[$doc])* #[derive(Debug)] pub enum $name {} impl Level for $name {})+
        levels!(@order $($name),+);
    };
    (@order $low:ident $(, $high:ident)*) => {
        $(impl Above<$low> for $high {})*
        levels!(@order $($high),*);
    };
    (@order) => {};
}

levels!(
    /// No lock is held.
    Nothing,
    /// The table of domains.
    Domains,
    /// One domain's own state; its page tables among it.
    Domain,
    /// The event ports of all domains: both ends of a channel change together.
    Ports,
    /// One domain's grants.
    Grants
);

/// The proof that this CPU holds locks of level `L` and below, and none above.
#[derive(Debug)]
pub struct Held<L: Level>(PhantomData<*const L>);

impl Held<Nothing> {
    /// The proof to start from. Called in one place: where a CPU enters the rules with no lock held (and by tests).
    #[must_use]
    pub fn entering_ring_0() -> Self {
        Self(PhantomData)
    }
}

/// A value under a lock of level `L`.
#[derive(Debug)]
pub struct Lock<L: Level, T> {
    inner: TicketMutex<T, Answering>,
    level: PhantomData<fn() -> L>,
}

impl<L: Level, T> Lock<L, T> {
    /// A free lock.
    pub const fn new(value: T) -> Self {
        Self { inner: TicketMutex::new(value), level: PhantomData }
    }

    /// The value of a lock that nobody else knows.
    pub(crate) fn into_inner(self) -> T {
        self.inner.into_inner()
    }

    /// Waits for the lock. The guard gives the value, and the proof for taking locks above.
    pub fn lock<'t, H: Level>(&'t self, _held: &'t mut Held<H>) -> Guard<'t, L, T>
    where
        L: Above<H>,
    {
        between();
        Guard { value: self.inner.lock(), held: Held(PhantomData) }
    }
}

/// A lock that is held.
#[must_use]
pub struct Guard<'t, L: Level, T> {
    value: TicketMutexGuard<'t, T, Answering>,
    held: Held<L>,
}

impl<L: Level, T> Guard<'_, L, T> {
    /// The value and the proof for locks above, both usable at once.
    pub fn parts(&mut self) -> (&mut T, &mut Held<L>) {
        (&mut self.value, &mut self.held)
    }
}

impl<L: Level, T> Deref for Guard<'_, L, T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.value
    }
}

impl<L: Level, T> DerefMut for Guard<'_, L, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

/// A lock above all levels: the frame pool's, the console's. It needs no proof, so the work done under it must take no
/// lock; keep its value private to one module and the work a few lines.
#[derive(Debug)]
pub struct Leaf<T>(TicketMutex<T, Answering>);

impl<T> Leaf<T> {
    /// A free lock.
    pub const fn new(value: T) -> Self {
        Self(TicketMutex::new(value))
    }

    /// The value of a lock that nobody else knows.
    pub(crate) fn into_inner(self) -> T {
        self.0.into_inner()
    }

    /// Does `work` under the lock. `work` takes no other lock and does not wait.
    pub fn with<R>(&self, work: impl FnOnce(&mut T) -> R) -> R {
        between();
        work(&mut self.0.lock())
    }
}

/// A value that one CPU owns for as long as it likes, a vcpu while it runs. It is only ever tried for, never waited for
/// by rules that hold a lock, so it needs no level.
#[derive(Debug)]
pub struct Owned<T>(TicketMutex<T, Answering>);

impl<T> Owned<T> {
    /// Nobody's.
    pub const fn new(value: T) -> Self {
        Self(TicketMutex::new(value))
    }

    /// Takes it, unless somebody owns it.
    pub fn try_take(&self) -> Option<impl DerefMut<Target = T> + '_> {
        between();
        self.0.try_lock()
    }

    /// Takes it, waiting until its owner lets go. The proof says that nobody can wait for us meanwhile.
    pub fn take<'t>(&'t self, _held: &mut Held<Nothing>) -> impl DerefMut<Target = T> + use<'t, T> {
        self.0.lock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guard_gives_the_value_and_the_proof_at_once() {
        let (a, b) = (Lock::<Domain, u32>::new(1), Lock::<Grants, u32>::new(2));
        let mut held = Held::entering_ring_0();
        let mut guard = a.lock(&mut held);
        let (value, held) = guard.parts();
        *value += *b.lock(held);
        *value += *b.lock(held);
        assert_eq!(*guard, 5);
    }

    #[test]
    fn what_is_owned_is_not_taken_again() {
        let owned = Owned::new(1);
        let first = owned.take(&mut Held::entering_ring_0());
        assert!(owned.try_take().is_none());
        drop(first);
        assert!(owned.try_take().is_some());
    }
}
