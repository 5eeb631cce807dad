//! Ethernet addresses.

use core::fmt;
use core::str::FromStr;

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// The address of all stations.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// Returns whether frames to this address go to several stations; the broadcast address is one of these.
    #[must_use]
    pub const fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// Returns whether this is the address of all stations.
    #[must_use]
    pub const fn is_broadcast(self) -> bool {
        matches!(self.0, [0xff, 0xff, 0xff, 0xff, 0xff, 0xff])
    }

    /// Returns the address of the vif with number `vif` of the guest `name`: the same for the same name, in the range that Xen
    /// assigns to guests (00:16:3e).
    #[must_use]
    pub fn of_guest(name: &str, vif: u32) -> Self {
        // FNV-1a, whose low bits are mixed well.
        let bytes = name.bytes().chain([0]).chain(vif.to_le_bytes());
        let hash =
            bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
        let [a, b, c, ..] = hash.to_le_bytes();
        Self([0x00, 0x16, 0x3e, a, b, c])
    }
}

/// Why a text is no Ethernet address of a station.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadMac {
    /// It is not six pairs of hexadecimal digits with colons between them.
    Form,
    /// It is the address of a group of stations, or zero.
    NoStation,
}

impl fmt::Display for BadMac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Form => "an address has six pairs of hexadecimal digits, such as 00:16:3e:12:34:56",
            Self::NoStation => "this is no address of a single station",
        })
    }
}

impl FromStr for Mac {
    type Err = BadMac;

    /// Parses the address of a station, such as `00:16:3e:12:34:56`.
    fn from_str(text: &str) -> Result<Self, BadMac> {
        let mut mac = [0; 6];
        let mut pairs = text.split(':');
        for byte in &mut mac {
            let pair =
                pairs.next().filter(|pair| pair.len() == 2 && pair.bytes().all(|digit| digit.is_ascii_hexdigit()));
            *byte = pair.and_then(|pair| u8::from_str_radix(pair, 16).ok()).ok_or(BadMac::Form)?;
        }
        if pairs.next().is_some() {
            return Err(BadMac::Form);
        }
        let mac = Self(mac);
        if mac.is_group() || mac.0 == [0; 6] { Err(BadMac::NoStation) } else { Ok(mac) }
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use std::string::ToString;

    #[test]
    fn an_address_is_read_as_it_is_written() {
        let mac: Mac = "00:16:3E:0a:ff:01".parse().unwrap();
        assert_eq!(mac, Mac([0, 0x16, 0x3e, 0x0a, 0xff, 1]));
        assert_eq!(mac.to_string(), "00:16:3e:0a:ff:01");
    }

    #[test]
    fn other_texts_are_refused() {
        for text in
            ["", "00:16:3e:0a:ff", "00:16:3e:0a:ff:01:02", "0:16:3e:0a:ff:01", "00:16:3e:0a:ff:+1", "00-16-3e-0a-ff-01"]
        {
            assert_eq!(text.parse::<Mac>(), Err(BadMac::Form), "{text}");
        }
        for text in ["ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01", "00:00:00:00:00:00"] {
            assert_eq!(text.parse::<Mac>(), Err(BadMac::NoStation), "{text}");
        }
    }

    #[test]
    fn guests_have_addresses_of_their_own() {
        let names = ["web", "web1", "db", "a"];
        let mut macs: std::vec::Vec<Mac> =
            names.iter().flat_map(|name| (0..4).map(|vif| Mac::of_guest(name, vif))).collect();
        assert!(macs.iter().all(|mac| mac.0.starts_with(&[0, 0x16, 0x3e])));
        macs.sort();
        macs.dedup();
        assert_eq!(macs.len(), 16);
        assert_eq!(Mac::of_guest("web", 0), Mac::of_guest("web", 0));
    }
}
