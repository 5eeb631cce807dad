//! Page-table torture (core 4).
#![no_std]
#![no_main]
#![forbid(unsafe_code)]

#[path = "pages/calls.rs"]
mod calls;
#[path = "pages/entries.rs"]
mod entries;
#[path = "pages/pins.rs"]
mod pins;
#[path = "pages/roots.rs"]
mod roots;
#[path = "pages/writes.rs"]
mod writes;

unikernel::entry!(unikernel::testing::run);
