//! Connections from outside that lead to a guest: `PORT:GUEST:PORT`, as `cargo xtask run --forward` takes them and the boot
//! bundle holds them, one a line.

use alloc::format;
use alloc::string::{String, ToString};
use core::fmt;
use core::str::FromStr;

use crate::config::check_name;

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A port of dom0's address on the uplink, and the guest to which what arrives there is passed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forward {
    /// The protocol.
    pub transport: Transport,
    /// The port of dom0's address. xtask uses the same port of the host.
    pub outer: u16,
    /// The guest's name. Its first vif on the network `nat` gets the packets.
    pub guest: String,
    /// The port of the guest.
    pub inner: u16,
}

impl FromStr for Forward {
    type Err = String;

    /// Parses `PORT:GUEST:PORT`, for TCP, or `udp:PORT:GUEST:PORT`.
    fn from_str(text: &str) -> Result<Self, String> {
        let form = || format!("`{}`: a forward is PORT:GUEST:PORT, or udp:PORT:GUEST:PORT", text.escape_debug());
        let (transport, rest) = match text.split_once(':').ok_or_else(form)? {
            ("tcp", rest) => (Transport::Tcp, rest),
            ("udp", rest) => (Transport::Udp, rest),
            _ => (Transport::Tcp, text),
        };
        let mut parts = rest.split(':');
        let (Some(outer), Some(guest), Some(inner), None) = (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(form());
        };
        let port = |digits: &str| {
            let port =
                digits.parse().ok().filter(|port| *port != 0 && digits.bytes().all(|digit| digit.is_ascii_digit()));
            port.ok_or_else(|| format!("`{}`: {} is no port", text.escape_debug(), digits.escape_debug()))
        };
        check_name(guest).map_err(|why| format!("`{}`: the guest's name: {why}", text.escape_debug()))?;
        Ok(Self { transport, outer: port(outer)?, guest: guest.to_string(), inner: port(inner)? })
    }
}

/// Writes the form that [`Forward::from_str`] reads.
impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.transport {
            Transport::Tcp => "tcp",
            Transport::Udp => "udp",
        };
        write!(f, "{protocol}:{}:{}:{}", self.outer, self.guest, self.inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Forward, String> {
        text.parse()
    }

    #[test]
    fn a_forward_names_a_guest_and_two_ports() {
        let web = Forward { transport: Transport::Tcp, outer: 2222, guest: "web".into(), inner: 22 };
        assert_eq!(read("2222:web:22"), Ok(web.clone()));
        assert_eq!(read(&web.to_string()), Ok(web.clone()));
        let udp = Forward { transport: Transport::Udp, ..web };
        assert_eq!(read("udp:2222:web:22"), Ok(udp.clone()));
        assert_eq!(read(&udp.to_string()), Ok(udp));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, reason) in [
            ("", "``: a forward is PORT:GUEST:PORT, or udp:PORT:GUEST:PORT"),
            ("2222:web", "`2222:web`: a forward is PORT:GUEST:PORT, or udp:PORT:GUEST:PORT"),
            ("1:web:2:3", "`1:web:2:3`: a forward is PORT:GUEST:PORT, or udp:PORT:GUEST:PORT"),
            ("0:web:22", "`0:web:22`: 0 is no port"),
            ("+1:web:22", "`+1:web:22`: +1 is no port"),
            ("22:web:65536", "`22:web:65536`: 65536 is no port"),
        ] {
            assert_eq!(read(text).unwrap_err(), reason);
        }
        assert!(read("22:a b:22").unwrap_err().starts_with("`22:a b:22`: the guest's name: 1 to 64 letters"));
    }
}
