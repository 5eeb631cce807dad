//! State that begins anew with each domain (P10, P11).
//!
//! The slots of domains and vcpus are used again and again. A structure made with `renewable!` says once what each of its
//! fields begins with; `new` and `renew` both come from that, so no list of fields can forget one, and nothing of a dead
//! domain is left in the next.

use crate::addr::FrameSlot;
use crate::lock::{Above, Domains, Held, Leaf, Level, Lock, Owned};
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering::SeqCst};

/// State that can begin anew in its place, while others may look at it.
pub(crate) trait Renew: Sized {
    /// Gives it the value of `fresh`. The proof says that whoever makes a domain may wait for the locks in it.
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

/// Its owner gives it a whole new value: there is nobody else who could.
impl<T> Renew for Owned<T> {
    fn renew(&self, _fresh: impl FnOnce() -> Self, _held: &mut Held<Domains>) {}
}
