//! What accompanies the bytes of a frame.

/// Bytes of the shortest frame that is taken: an Ethernet header.
pub const MIN_FRAME: usize = 14;
/// The maximum number of bytes of a packet in a ring (ABI io 6.2).
pub const MAX_PACKET: usize = 65_535;
/// The maximum number of bytes of a frame with the default MTU of 1,500 bytes, and one VLAN tag.
pub const MAX_FRAME: usize = 1_518;

/// What is known of the checksum of the TCP or UDP payload.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checksum {
    /// The field holds the checksum; nobody has verified it.
    #[default]
    Unverified,
    /// The checksum is right, or the bytes never left the machine.
    Verified,
    /// The field holds only the sum of the pseudo header: whoever sends the frame off the machine computes the rest.
    Blank,
}

/// The protocol whose segments a frame is to be cut into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
}

/// A frame that stands for several: it is cut into segments before it leaves the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segmentation {
    /// The protocol.
    pub protocol: Protocol,
    /// Bytes of TCP payload in each segment but the last.
    pub bytes: u16,
}

/// What accompanies the bytes of a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrameInfo {
    /// What is known of the checksum.
    pub checksum: Checksum,
    /// How the frame is to be cut. `None` if it is a frame of its own.
    pub segmentation: Option<Segmentation>,
}
