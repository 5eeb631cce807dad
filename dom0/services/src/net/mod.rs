//! The networks of guests: this module makes each network when the first guest has a device on it, and serves the devices.
//!
//! ```text
//! Networks::attach   description -> Bridge: made, or found by its name -> device: both directories, in one transaction
//! Device             the endpoint of a vif: a task carries out the acts of its handshake
//! Bridge             a task per network: gives turns to a net_backend::Switch; a station of dom0's own gives out addresses
//! Networks::detach, Networks::domain_died    until nothing is mapped or written in the store
//! ```
//!
//! | module | question |
//! | --- | --- |
//! | `networks` | which networks are there, and which guest has which device? |
//! | `bridge` | when does a switch get its turn, and what becomes of its events? |
//! | `host` | what do networks need of the domain they run in? |
//! | `station` | what is dom0 itself on a network, and who gets which address? |
//! | `device` | what is a network device of a guest made of, and how are its rings served? |
//!
//! Touches: rings and ports of guests, through the [`NetHost`]; the store, through a session per device; the machine's network
//! devices, through [`network::Uplink`].
//! Guarantees: the memory for a network is set aside when the network is made, or the device is refused that needs it; a guest
//! makes dom0 allocate nothing while packets flow. Dropping [`Networks`] writes nothing and sends nothing.

mod bridge;
mod device;
mod host;
mod networks;
mod station;

pub use host::NetHost;
pub use networks::{MAX_NETWORKS, Networks, vif_bytes};
