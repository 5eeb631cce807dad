//! Drivers of the machine's devices: the search for devices ([`pci`]), what all virtio devices share ([`virtio`]), virtio disks
//! ([`Blk`]), and virtio network devices ([`Net`]).
//!
//! ```text
//! pci::Scan -> Found -> virtio::Layout::find   where the registers are, or why the device is not taken
//!                       virtio::Transport::open   windows over them, one message interrupt
//!                       Blk::new, Device::reset until Reset::Done, Blk::identify, then the other calls of disk::Device
//!                       Net::new, Uplink::reset until Reset::Done, then the other calls of network::Uplink
//! ```
//!
//! A driver begins with a reset, relies on no earlier state of the device, and never waits: the caller repeats calls that take
//! time. What a device writes is checked like bytes from a guest. For a device that no driver takes, the owner can show what it
//! is and why ([`pci::Found`], [`virtio::NotTaken`]).
//!
//! Touches: registers, configuration space and memory set aside for devices, each through a trait ([`hardware`]) that the
//! unikernel implements and tests imitate.
//! Never touches: pages that a guest granted. This crate only passes their addresses ([`disk::BusAddress`]) on to devices.
//! Guarantees: each ticket completes once, or is ended by a reset. Memory that a device was given is not used for anything else
//! until the device has completed the operation, or a register shows that its reset has ended.
//!
//! Deliberately absent: the bus code of the crate `virtio-drivers`. Its configuration trait has an `unsafe` method, which a
//! crate that forbids `unsafe` cannot implement; its scan stops at bridges; its message-interrupt registers are private. The
//! code to adapt to the rest of that crate would be longer than the rest. Also absent: line interrupts, configuration space
//! that is mapped in memory, legacy virtio.
#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

extern crate alloc;

pub mod blk;
pub mod hardware;
pub mod net;
pub mod pci;
pub mod virtio;

pub use blk::Blk;
pub use net::Net;
