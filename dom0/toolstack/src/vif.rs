//! The description of a network device (vif) in a guest's file: a text in xl's syntax.
//!
//! ```text
//! KEY=VALUE[,KEY=VALUE...]        "mac=00:16:3e:12:34:56,bridge=lan,rate=10Mb/s"  ""
//! ```
//!
//! | key | meaning |
//! | --- | --- |
//! | `mac` | the device's address; without the key, an address that is always the same for this guest and device |
//! | `bridge` | the network: `nat` (the default), `uplink`, or any other name for a network of guests alone |
//! | `ip` | the guest's IPv4 address: dom0 offers it by DHCP, and drops IPv4 packets from other addresses |
//! | `rate` | the limit for what the guest sends: a number followed by B/s, KB/s, MB/s, GB/s, b/s, Kb/s, Mb/s or Gb/s |
//! | `type` | `vif`, the only type there is |
//!
//! On the network `nat`, guests have addresses that dom0 gives them, and reach other networks by the address that dom0 has at a
//! network device of the machine. On the network `uplink`, guests are stations of the network that a device is connected to.
//! Each of the two takes the first device that the other does not have, when a guest first uses it.
//! Keys of xl that name scripts, models and driver domains are refused, each with its reason.

use alloc::format;
use alloc::string::{String, ToString};
use core::fmt;
use core::net::Ipv4Addr;
use core::str::FromStr;

use network::Mac;
use serde::{Deserialize, Serialize};

/// The network whose guests are translated to the machine's address. The default.
pub const NAT: &str = "nat";
/// The network that a network device of the machine is connected to.
pub const UPLINK: &str = "uplink";

/// The maximum number of bytes of a description.
const MAX_TEXT: usize = 256;
/// The maximum number of bytes of the name of a network.
const MAX_NAME: usize = 15;

/// A network device of a guest.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct VifConfig {
    /// The address. `None`: [`Mac::of_guest`].
    pub mac: Option<Mac>,
    /// The name of the network.
    pub bridge: String,
    /// The guest's IPv4 address. `None`: dom0 chooses one, and the guest may use any.
    pub ip: Option<Ipv4Addr>,
    /// The maximum number of bytes that the guest sends per second. `None`: no limit.
    pub rate: Option<u64>,
}

impl Default for VifConfig {
    fn default() -> Self {
        Self { mac: None, bridge: NAT.into(), ip: None, rate: None }
    }
}

/// Units of a rate, and what a byte per second is in each: bytes of one unit, and units of one byte.
const UNITS: [(&str, u64, u64); 8] = [
    ("GB/s", 1_000_000_000, 1),
    ("MB/s", 1_000_000, 1),
    ("KB/s", 1_000, 1),
    ("B/s", 1, 1),
    ("Gb/s", 1_000_000_000, 8),
    ("Mb/s", 1_000_000, 8),
    ("Kb/s", 1_000, 8),
    ("b/s", 1, 8),
];

fn rate(text: &str) -> Result<u64, String> {
    if text.contains('@') {
        return Err(format!("`rate={text}`: an interval is not supported; give the rate alone"));
    }
    let wrong =
        || format!("`rate={text}`: a number from 1 on, followed by B/s, KB/s, MB/s, GB/s, b/s, Kb/s, Mb/s or Gb/s");
    let unit = UNITS.iter().find_map(|(unit, factor, divisor)| Some((text.strip_suffix(unit)?, factor, divisor)));
    let (digits, factor, divisor) = unit.ok_or_else(wrong)?;
    let number: u64 =
        digits.parse().ok().filter(|_| digits.bytes().all(|digit| digit.is_ascii_digit())).ok_or_else(wrong)?;
    let bytes = number.checked_mul(*factor).map(|units| units / divisor);
    bytes.filter(|bytes| *bytes > 0).ok_or_else(wrong)
}

/// Checks the name of a network.
fn check_bridge(name: &str) -> Result<(), String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(plain) {
        return Err(format!("`bridge={name}`: 1 to {MAX_NAME} letters, digits, `-`, `_` or `.`"));
    }
    Ok(())
}

/// Why a key of xl is refused; `None` if it is no key of xl.
fn refused(key: &str) -> Option<&'static str> {
    Some(match key {
        "script" => "dom0 runs no scripts; `bridge`, `ip` and `rate` say what one would set",
        "backend" => "dom0 serves all devices",
        "model" => "no devices are emulated",
        "vifname" | "gatewaydev" | "vlan" | "accel" | "netdev" => "dom0 has no device of this kind for the guest's",
        "devid" | "trusted" => "this is not set by hand",
        _ => return None,
    })
}

impl FromStr for VifConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.len() > MAX_TEXT || text.contains(char::is_control) {
            return Err(format!("a vif is described in at most {MAX_TEXT} bytes of text"));
        }
        let mut vif = Self::default();
        let mut seen = [""; 5];
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (key, value) = part.split_once('=').ok_or_else(|| format!("`{part}` is not KEY=VALUE"))?;
            let (key, value) = (key.trim(), value.trim());
            let number = match key {
                "mac" => {
                    vif.mac = Some(value.parse().map_err(|why| format!("`mac={value}`: {why}"))?);
                    0
                }
                "bridge" => {
                    check_bridge(value)?;
                    vif.bridge = value.to_string();
                    1
                }
                "ip" => {
                    let good = |ip: &Ipv4Addr| {
                        !(ip.is_unspecified() || ip.is_broadcast() || ip.is_multicast() || ip.is_loopback())
                    };
                    let ip = value.parse().ok().filter(good);
                    vif.ip = Some(
                        ip.ok_or_else(|| format!("`ip={value}`: an IPv4 address of a station, such as 10.77.0.9"))?,
                    );
                    2
                }
                "rate" => {
                    vif.rate = Some(rate(value)?);
                    3
                }
                "type" if value == "vif" => 4,
                "type" => return Err(format!("`type={value}`: the only type is vif")),
                _ => {
                    return Err(match refused(key) {
                        Some(why) => format!("`{key}` is refused: {why}"),
                        None => format!("`{key}` is no key of a vif; there are mac, bridge, ip, rate, type"),
                    });
                }
            };
            match seen.get_mut(number) {
                Some(before) if before.is_empty() => *before = key,
                _ => return Err(format!("`{key}` is given twice")),
            }
        }
        Ok(vif)
    }
}

impl TryFrom<String> for VifConfig {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<VifConfig> for String {
    fn from(vif: VifConfig) -> Self {
        vif.to_string()
    }
}

/// Writes the form that [`VifConfig::from_str`] reads.
impl fmt::Display for VifConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "bridge={}", self.bridge)?;
        if let Some(mac) = self.mac {
            write!(f, ",mac={mac}")?;
        }
        if let Some(ip) = self.ip {
            write!(f, ",ip={ip}")?;
        }
        self.rate.map_or(Ok(()), |rate| write!(f, ",rate={rate}B/s"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<VifConfig, String> {
        text.parse()
    }

    #[test]
    fn the_form_of_xl_is_read() {
        assert_eq!(read(""), Ok(VifConfig::default()));
        let vif = read("mac=00:16:3e:01:02:03, bridge=lan,type=vif,rate=10Mb/s,ip=10.0.0.9").unwrap();
        assert_eq!(vif.mac.unwrap().to_string(), "00:16:3e:01:02:03");
        assert_eq!((vif.bridge.as_str(), vif.rate, vif.ip), ("lan", Some(1_250_000), Some(Ipv4Addr::new(10, 0, 0, 9))));
        for (text, bytes) in [("8b/s", 1), ("3B/s", 3), ("2KB/s", 2_000), ("5MB/s", 5_000_000), ("1Gb/s", 125_000_000)]
        {
            assert_eq!(read(&format!("rate={text}")).unwrap().rate, Some(bytes), "{text}");
        }
    }

    #[test]
    fn what_was_written_is_read_as_the_same() {
        for text in ["", "bridge=uplink", "mac=00:16:3e:01:02:03,ip=10.77.0.5", "rate=7B/s,bridge=a.b-c_d"] {
            let vif = read(text).unwrap();
            assert_eq!(read(&vif.to_string()), Ok(vif.clone()), "{text}: {vif}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, reason) in [
            ("lan", "`lan` is not KEY=VALUE"),
            ("bridge=", "`bridge=`: 1 to 15 letters, digits, `-`, `_` or `.`"),
            ("bridge=a b", "`bridge=a b`: 1 to 15 letters, digits, `-`, `_` or `.`"),
            ("bridge=a,bridge=a", "`bridge` is given twice"),
            ("mac=1", "`mac=1`: an address has six pairs of hexadecimal digits, such as 00:16:3e:12:34:56"),
            ("mac=01:00:5e:00:00:01", "`mac=01:00:5e:00:00:01`: this is no address of a single station"),
            ("ip=10.0.0.256", "`ip=10.0.0.256`: an IPv4 address of a station, such as 10.77.0.9"),
            ("ip=224.0.0.1", "`ip=224.0.0.1`: an IPv4 address of a station, such as 10.77.0.9"),
            ("rate=1Mb/s@20ms", "`rate=1Mb/s@20ms`: an interval is not supported; give the rate alone"),
            ("type=ioemu", "`type=ioemu`: the only type is vif"),
            (
                "script=vif-bridge",
                "`script` is refused: dom0 runs no scripts; `bridge`, `ip` and `rate` say what one would set",
            ),
            ("model=e1000", "`model` is refused: no devices are emulated"),
            ("cow=1", "`cow` is no key of a vif; there are mac, bridge, ip, rate, type"),
        ] {
            assert_eq!(read(text).unwrap_err(), reason, "{text}");
        }
        for text in [
            "rate=",
            "rate=5",
            "rate=0B/s",
            "rate=7b/s",
            "rate=-1B/s",
            "rate=99999999999999999999B/s",
            "rate=99999999999GB/s",
        ] {
            assert!(read(text).unwrap_err().ends_with("b/s, Kb/s, Mb/s or Gb/s"), "{text}");
        }
        assert!(read("a\n").unwrap_err().starts_with("a vif is described"));
    }
}
