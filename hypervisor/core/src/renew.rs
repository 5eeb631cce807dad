//! State that gets its initial value again for each new domain (P10, P11).
//!
//! Slots of domains and vcpus are used again and again. A structure made with `renewable!` gives each field's initial
//! value once; `new` and `renew` both come from that. So no list of fields can forget one, and nothing of a dead domain
//! is left for the next.

use crate::addr::FrameSlot;
use crate::lock::{Above, Domains, Held, Leaf, Level, Lock, Owned};
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering::SeqCst};

/// State that can get its initial value again in place, while others may read it.
pub(crate) trait Renew: Sized {
    /// Sets the state to the value of `fresh`. The proof shows that the maker of a domain may wait for the locks inside
    /// it.
    fn renew(&self, fresh: impl FnOnce() -> Self, held: &mut Held<Domains>);
}

macro_rules! renew_words {
    ($($word:ident),*) => {
        $(impl Renew for $word {
            fn renew(&self, fresh: impl FnOnce() -> Self, _held: &mut Held<Domains>) {
                self.store(fresh().into_inner(), SeqCst);
            }
        })*
    };
}
renew_words!(AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64);

impl Renew for FrameSlot {
    fn renew(&self, fresh: impl FnOnce() -> Self, _held: &mut Held<Domains>) {
        self.put(fresh().get());
    }
}

impl<T: Renew, const N: usize> Renew for [T; N] {
    fn renew(&self, fresh: impl FnOnce() -> Self, held: &mut Held<Domains>) {
        self.iter().zip(fresh()).for_each(|(old, new)| old.renew(|| new, held));
    }
}

impl<T> Renew for Leaf<T> {
    fn renew(&self, fresh: impl FnOnce() -> Self, _held: &mut Held<Domains>) {
        let new = fresh().into_inner();
        self.with(|value| *value = new);
    }
}

impl<L: Above<Domains> + Level, T> Renew for Lock<L, T> {
    fn renew(&self, fresh: impl FnOnce() -> Self, held: &mut Held<Domains>) {
        *self.lock(held) = fresh().into_inner();
    }
}

/// Does nothing: the owner sets a whole new value, and nobody else could.
impl<T> Renew for Owned<T> {
    fn renew(&self, _fresh: impl FnOnce() -> Self, _held: &mut Held<Domains>) {}
}
