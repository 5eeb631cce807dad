//! What a network is: frames, and who sends and receives frames. The net back end, the drivers of network devices and dom0's own
//! stations meet in these types.
//!
//! ```text
//! guest -> net back end (the switch) -> guest                 bytes move by grant copies and are not seen here
//!                                    -> Uplink::send          to a device of the machine
//!                                    -> Station::receive_guest   to what dom0 itself is on the network
//! Uplink::receive -> the switch -> guest, or Station::receive_uplink
//! ```
//!
//! Touches: bytes of frames that the caller passes.
//! Never touches: rings, grants, devices, clocks (the caller passes the time).
//! Guarantees: no bytes of a frame make a function of this crate panic; the work for a frame is bounded by the bytes of the frame;
//! state for a guest is bounded.
#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

extern crate alloc;

mod bytes;
pub mod checksum;
mod frame;
mod headers;
mod mac;
pub mod segment;
mod station;
mod uplink;

pub use frame::{Checksum, FrameInfo, MAX_FRAME, MAX_PACKET, MIN_FRAME, Protocol, Segmentation};
pub use headers::{Arp, Fragment, HEADER_BYTES, Headers, Ipv4, Ipv6, Kind, L4, Malformed, Transport};
pub use mac::{BadMac, Mac};
pub use station::{Output, PortId, Station};
pub use uplink::{Full, Offloads, Reset, Uplink};
