//! What a network is: frames, and who sends and receives frames. The net back end, the drivers of network devices and dom0's
//! own stations meet in these types.
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
//! Guarantees: no bytes of a frame make a function of this crate panic; the work for a frame is bounded by the bytes of the
//! frame; state for a guest is bounded.
#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

extern crate alloc;

mod bucket;
mod build;
mod bytes;
pub mod checksum;
mod client;
mod counters;
mod dhcp;
mod flows;
mod frame;
mod gateway;
mod guests;
mod headers;
mod ipv4net;
mod mac;
mod neighbours;
mod responder;
mod rewrite;
pub mod segment;
mod station;
mod sweep;
mod translator;
mod uplink;

pub use client::Address;
pub use counters::{Counters, Reason};
pub use device::Reset;
pub use frame::{Checksum, FrameInfo, MAX_FRAME, MAX_PACKET, MIN_FRAME, Protocol, Segmentation};
pub use gateway::{Addressing, BadSettings, Gateway, GatewaySettings};
pub use guests::{CannotAttach, Guests};
pub use headers::{Arp, Fragment, HEADER_BYTES, Headers, Ipv4, Ipv6, Kind, L4, Malformed, Transport};
pub use ipv4net::{BadNetwork, Network};
pub use mac::{BadMac, Mac};
pub use responder::{Responder, ResponderSettings};
pub use station::{Output, PortId, Station};
pub use translator::{CannotForward, Transported};
pub use uplink::{Full, Offloads, Uplink};
