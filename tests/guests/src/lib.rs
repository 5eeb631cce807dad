//! What the test guests share. Expected values come from the ABI documents, never from what our hypervisor answers.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

pub use unikernel::{abi, test};
