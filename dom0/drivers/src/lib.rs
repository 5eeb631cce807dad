//! Drivers of the machine's devices: what they are found by ([`pci`]), how a virtio device is spoken to ([`virtio`]), and the
//! disks among them ([`Blk`]).
//!
//! ```text
//! pci::Scan -> Found -> virtio::Layout::find   where its registers are, or why it is not taken
//!                       virtio::Transport::open   windows over them, one message interrupt
//!                       Blk::new, Device::reset until it is done, Blk::identify, then as disk::Device says
//! ```
//!
//! A driver starts by a reset, believes nothing that it finds, and never waits: what takes time is a step that is called again.
//! What a device writes is judged as a guest's bytes are. Which devices are there, the machine decides; what a driver does not
//! take, its owner can name ([`pci::Found`], [`virtio::NotTaken`]).
//!
//! Touches: registers, configuration space and memory set aside for devices, each through a trait ([`hardware`]) that the
//! unikernel implements and tests imitate.
//! Never touches: what a guest granted. It has no address of ours here, only one for devices ([`disk::BusAddress`]), which this
//! crate takes and never makes.
//! Keeps: a ticket is answered once or ended by a reset; memory given to a device is the device's until it has answered or a
//! reset has been read back.
//!
//! Deliberately absent: the bus code of the crate `virtio-drivers`. Its configuration trait has an `unsafe` method, which a crate
//! that forbids `unsafe` cannot implement, its scan stops at bridges, and its message-interrupt registers are private; what
//! would be left is less than what adapts to it. Also absent: line interrupts, configuration in memory, legacy virtio.
#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

extern crate alloc;

pub mod blk;
pub mod hardware;
pub mod pci;
pub mod virtio;

pub use blk::Blk;
