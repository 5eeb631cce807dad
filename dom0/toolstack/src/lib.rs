//! Making and ending domains: what dom0 does on behalf of a person.
//!
//! [`bundle`] finds guests in the boot bundle, [`command`] reads what a person types, [`json`] writes answers for programs, [`config`] reads what a guest
//! should be, [`unpack`] turns what a distribution ships as a kernel into an ELF file, [`ramdisk`] says what a ramdisk takes, [`create`] makes a domain of
//! both and introduces it to the store, [`end`] says why a domain ended and does what its configuration wants then,
//! [`status`] turns that into a number.
//!
//! Touches: domains through the [`Hypervisor`] trait, the tree through the [`Store`] trait.
//! Never touches: hypercalls, shared memory, devices. It runs as well on a host, against fakes.
//! Keeps: a domain that could not be made leaves nothing behind.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod bundle;
pub mod command;
pub mod config;
pub mod create;
pub mod end;
pub mod json;
pub mod limit;
mod privileged;
pub mod ramdisk;
pub mod refusals;
pub mod status;
mod tree;
pub mod unpack;

pub use privileged::{DomainId, Hypervisor, Summary, domains, states};
pub use tree::{Access, Node, Store};
