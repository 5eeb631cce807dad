//! Making and ending domains: what dom0 does by hand of the user.
//!
//! [`unpack`] turns what a distribution ships as a kernel into an ELF file.
//!
//! Touches: the bytes it is given; domains through traits.
//! Never touches: hypercalls, shared memory, devices. It runs as well on a host, against fakes.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod unpack;
