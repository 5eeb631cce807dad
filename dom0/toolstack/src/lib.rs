//! Making and ending domains: what dom0 does on behalf of a person.
//!
//! ```text
//! boot bundle   -> bundle, config -+
//! a person      -> terminal -+     |        unpack, ramdisk   a kernel and a ramdisk as they are shipped
//! a script      -> face -----+-> command    create, tree      a domain made of both, and its place in the store
//!                                  |        end, refusals     why a domain ended, and what follows
//!                                  v        status            the first failure, as the exit status
//!                               manager --> Hypervisor, Store, Console, Platform
//! ```
//!
//! [`manager`] keeps the guests; it answers a [`command`] with a reply, which can be shown as text or as JSON. [`face`]
//! is what the text faces have in common; [`terminal`] is the face at the machine's console.
//!
//! Touches: domains through the [`Hypervisor`] trait, the tree through the [`Store`] trait.
//! Never touches: hypercalls, shared memory, devices. It runs as well on a host, against fakes.
//! Keeps: a domain that could not be made leaves nothing behind; making and ending a domain let other tasks run after
//! each piece.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod blocks;
pub mod bundle;
pub mod command;
pub mod config;
pub mod create;
pub mod disk;
pub mod end;
pub mod face;
pub mod forward;
pub mod json;
pub mod limit;
pub mod manager;
mod privileged;
pub mod ramdisk;
pub mod refusals;
pub mod runs;
pub mod status;
pub mod terminal;
mod tree;
pub mod unpack;
pub mod vif;

pub use privileged::{DomainId, Hypervisor, Progress, Summary, domains, states};
pub use tree::{Access, Node, Store};
