//! Why a station dropped frames, and how many.

use core::fmt;

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident => $text:literal,)*) => {
        /// Why a station dropped a frame.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Reason {
            $($(#[$doc])* $name,)*
        }

        impl Reason {
            /// All reasons.
            pub const ALL: &[Self] = &[$(Self::$name),*];
        }

        impl fmt::Display for Reason {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self {
                    $(Self::$name => $text,)*
                })
            }
        }
    };
}

reasons! {
    /// Headers that contradict the frame's length or each other.
    Malformed => "malformed",
    /// Nothing that the station answers or routes.
    NotForUs => "not for the gateway",
    /// A port to which no guest is attached.
    Unattached => "not attached",
    /// The source address is not the guest's.
    Source => "source address",
    /// A destination that is not routed: the guests' own network, a group, this machine, a link-local address.
    Destination => "destination",
    /// More questions than a guest may ask in a second.
    Rate => "rate",
    /// A message that DHCP does not answer.
    Dhcp => "DHCP",
    /// IPv4 options, which are not routed.
    Options => "IP options",
    /// A protocol that is not translated.
    Protocol => "protocol",
    /// The packet may pass no further router.
    Hops => "hops",
    /// The packet is longer than the next network takes.
    TooLong => "too long",
    /// A packet of no flow that is known: from the uplink, or in the middle of a connection.
    NoFlow => "no flow",
    /// No port on the uplink's address is free.
    Ports => "ports",
    /// A fragment whose first part is not known.
    Fragment => "fragment",
    /// The uplink has no address.
    NoUplink => "no uplink",
    /// The next router did not answer, or its queue is full.
    Neighbour => "no neighbour",
    /// A checksum that is wrong, or that does not fit the protocol.
    Checksum => "checksum",
    /// No memory was left.
    Memory => "memory",
}

/// How many frames a station dropped for each reason.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters([u64; Reason::ALL.len()]);

impl Counters {
    pub(crate) const fn new() -> Self {
        Self([0; Reason::ALL.len()])
    }

    pub(crate) fn count(&mut self, reason: Reason) {
        if let Some(count) = self.0.get_mut(reason as usize) {
            *count += 1;
        }
    }

    /// Returns how many frames were dropped for a reason.
    #[must_use]
    pub fn dropped(&self, reason: Reason) -> u64 {
        self.0.get(reason as usize).copied().unwrap_or(0)
    }

    /// Returns how many frames were dropped.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }
}
