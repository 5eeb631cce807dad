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
//! Taking a lock of a lower level does not compile, nor does taking two of the same level:
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
//! nor does using the lower proof while a guard lives:
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

/// What a CPU does again and again while it waits for a lock; set once at boot.
static WHILE_WAITING: Once<fn()> = Once::new();

/// Makes every CPU that waits for a lock call `work` again and again. Ring 0 runs with interrupts off, so a CPU that
/// waits for a lock must answer the flush requests of the CPU that holds it, or both wait for ever. Only the first call
/// has an effect.
pub fn while_waiting(work: fn()) {
    WHILE_WAITING.call_once(|| work);
}

/// How a CPU waits for our locks: it spins, and calls [`while_waiting`]'s `work`.
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

/// A level in the order of locks.
pub trait Level {}

/// Level `Self` comes after level `L`: a CPU that holds a lock of level `L` may take one of level `Self`.
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
    /// No lock.
    Nothing,
    /// The table of domains.
    Domains,
    /// One domain's own state, including its page tables.
    Domain,
    /// The event ports of all domains: both ends of a channel change together.
    Ports,
    /// One domain's grants.
    Grants
);

/// The proof that this CPU holds no lock above level `L`.
#[derive(Debug)]
pub struct Held<L: Level>(PhantomData<*const L>);

impl Held<Nothing> {
    /// The first proof. Called in one place, where a CPU enters ring 0 without any lock (and by tests).
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
    /// A free lock with this value.
    pub const fn new(value: T) -> Self {
        Self { inner: TicketMutex::new(value), level: PhantomData }
    }

    /// The value of a lock that nobody else can use.
    pub(crate) fn into_inner(self) -> T {
        self.inner.into_inner()
    }

    /// Waits for the lock. The guard gives access to the value, and the proof for taking locks of higher levels.
    pub fn lock<'t, H: Level>(&'t self, _held: &'t mut Held<H>) -> Guard<'t, L, T>
    where
        L: Above<H>,
    {
        between();
        Guard { value: self.inner.lock(), held: Held(PhantomData) }
    }
}

/// The guard of a lock that is held.
#[must_use]
pub struct Guard<'t, L: Level, T> {
    value: TicketMutexGuard<'t, T, Answering>,
    held: Held<L>,
}

impl<L: Level, T> Guard<'_, L, T> {
    /// The value and the proof for locks of higher levels, usable at the same time.
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

/// A lock above all levels, such as the frame pool's or the console's. It needs no proof, so work under it must take no
/// other lock. Its value should be private to one module, and the work a few lines.
#[derive(Debug)]
pub struct Leaf<T>(TicketMutex<T, Answering>);

impl<T> Leaf<T> {
    /// A free lock with this value.
    pub const fn new(value: T) -> Self {
        Self(TicketMutex::new(value))
    }

    /// The value of a lock that nobody else can use.
    pub(crate) fn into_inner(self) -> T {
        self.0.into_inner()
    }

    /// Runs `work` under the lock. `work` must take no other lock, and must not wait.
    pub fn with<R>(&self, work: impl FnOnce(&mut T) -> R) -> R {
        between();
        work(&mut self.0.lock())
    }
}

/// A value that one CPU owns for as long as it likes, such as a vcpu while it runs. Code that holds a lock only tries
/// for it and never waits, so it needs no level.
#[derive(Debug)]
pub struct Owned<T>(TicketMutex<T, Answering>);

impl<T> Owned<T> {
    /// A value without an owner.
    pub const fn new(value: T) -> Self {
        Self(TicketMutex::new(value))
    }

    /// Takes the value, unless another CPU owns it.
    pub fn try_take(&self) -> Option<impl DerefMut<Target = T> + '_> {
        between();
        self.0.try_lock()
    }

    /// Waits until no other CPU owns the value, and takes it. The proof shows that nobody can wait for this CPU
    /// meanwhile.
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
