//! The rules of the hypervisor: what is allowed, and what follows from it.
//!
//! Touches: values, and memory through the traits of [`machine`].
//! Never touches: a register, a device, a raw pointer. It knows nobody but the ABI, so it runs in ring 0, in a unit
//! test and in `tests/sim` alike.
//! Keeps: P1-P13 of `hypervisor/ARCHITECTURE.md`.
#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]
#![expect(clippy::new_without_default, reason = "what lives in statics is made by constant functions")]

/// Leaves the function with an error unless a condition holds.
macro_rules! ensure {
    ($condition:expr, $error:expr) => {
        if !$condition {
            return Err($error.into());
        }
    };
}

/// A structure whose fields say what they begin with, and a `new` that makes it so.
macro_rules! with_new {
    ($(#[$meta:meta])* pub struct $name:ident {
        $($(#[$about:meta])* $visible:vis $field:ident: $ty:ty = $value:expr,)*
    }) => {
        $(#[$meta])*
        pub struct $name { $($(#[$about])* $visible $field: $ty,)* }

        impl $name {
            /// One whose fields have the values they begin with.
            #[must_use]
            pub const fn new() -> Self {
                Self { $($field: $value,)* }
            }
        }
    };
}

/// The same for what begins anew with each domain: each field is given the value it begins with, and no other list of them
/// exists ([`renew`]).
macro_rules! renewable {
    ($(#[$meta:meta])* pub struct $name:ident {
        $($(#[$about:meta])* $visible:vis $field:ident: $ty:ty = $value:expr,)*
    }) => {
        with_new! {
            $(#[$meta])*
            pub struct $name { $($(#[$about])* $visible $field: $ty = $value,)* }
        }

        impl $crate::renew::Renew for $name {
            fn renew(&self, _: impl FnOnce() -> Self, held: &mut $crate::lock::Held<$crate::lock::Domains>) {
                $(if !$crate::fault::forgets(stringify!($field)) {
                    $crate::renew::Renew::renew(&self.$field, || $value, held);
                })*
            }
        }

        #[cfg(feature = "planted-fault")]
        impl $crate::audit::Field for $name {
            fn soil(&self) {
                $($crate::audit::Field::soil(&self.$field);)*
            }

            fn look(&self, _name: &'static str, see: &mut dyn FnMut(&'static str, u64)) {
                $($crate::audit::Field::look(&self.$field, stringify!($field), see);)*
            }
        }
    };
}

pub mod addr;
#[cfg(feature = "planted-fault")]
pub mod audit;
pub mod call;
pub mod claim;
pub mod dispatch;
pub mod domain;
pub mod event;
pub mod fault;
pub mod flags;
pub mod frame;
pub mod grant;
pub mod host;
pub mod lean;
pub mod lock;
pub mod machine;
pub mod memory;
pub mod paging;
pub mod policy;
mod renew;
pub mod sched;
pub mod time;
pub mod trap;
pub mod vcpu;
pub mod world;

/// What nearly every rule speaks of.
mod prelude {
    pub(crate) use crate::addr::{
        DomainId, Frame, GuestVirt, PAGE_BYTES, PAGE_SIZE, Port, VcpuId, bytes_of, fill, index, long, low16, low32, nth,
    };
    pub(crate) use crate::call::{Answer, Call, Halt, Next};
    pub(crate) use crate::domain::Domain;
    pub(crate) use crate::machine::Machine;
    pub(crate) use crate::vcpu::{Place, Vcpu, VcpuState};
    pub(crate) use crate::world::{CpuCtx, Ctx, World};
    pub(crate) use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};
    pub(crate) use hypercall_abi::{Errno, domid};
}
