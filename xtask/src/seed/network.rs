//! The network configuration of a seed, version 2, as far as a guest without cloud-init carries it out by systemd-networkd:
//! Ethernet devices with addresses, routes and name servers.

use super::yaml::{self, Entry, Node, Value, Wrong};
use std::fmt::Write;
use std::net::IpAddr;

/// A file for systemd-networkd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) name: String,
    pub(crate) text: String,
}

/// What a configuration asks for, and the lines and names of keys that are not known here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Network {
    pub(crate) devices: Vec<Device>,
    pub(crate) unknown: Vec<(usize, String)>,
}

impl Network {
    /// Reads a configuration, whose keys stand at the top or below `network`.
    ///
    /// # Errors
    /// The text is no YAML, has another version, or a value cannot be what it is meant to be.
    pub(crate) fn read(text: &str) -> Result<Self, Wrong> {
        let root = yaml::read(text)?.ok_or_else(|| Wrong::new(1, "is empty"))?;
        let top = root.map("a network configuration")?;
        let entries = match top {
            [Entry { key, node, .. }] if key == "network" => node.map("network")?,
            _ => top,
        };
        let version = entries.iter().find(|entry| entry.key == "version");
        let version = version.ok_or_else(|| Wrong::new(root.line, "has no `version: 2`"))?;
        if version.node.text("version")? != "2" {
            return Err(Wrong::new(version.line, "version: only 2 can be read"));
        }
        let mut network = Self::default();
        for entry in entries {
            match &*entry.key {
                "version" => {}
                "ethernets" => {
                    for device in entry.node.map("ethernets")? {
                        let device = network.device(device)?;
                        network.devices.push(device);
                    }
                }
                _ => network.unknown.push((entry.line, entry.key.clone())),
            }
        }
        Ok(network)
    }

    fn device(&mut self, device: &Entry) -> Result<Device, Wrong> {
        let name = &device.key;
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || !name.chars().all(plain) {
            return Err(Wrong::new(device.line, format!("ethernets: {name:?} is no name of a device")));
        }
        let (mut found, mut dhcp) = (format!("Name={name}\n"), [false; 2]);
        let (mut lines, mut routes) = (String::new(), String::new());
        for entry in device.node.map(name)?.iter().filter(|entry| !entry.node.is_nothing()) {
            let (key, node) = (&*entry.key, &entry.node);
            match key {
                "match" => found = self.condition(node)?,
                "dhcp4" => dhcp[0] = node.flag(key)?,
                "dhcp6" => dhcp[1] = node.flag(key)?,
                "addresses" => {
                    for item in node.list(key)? {
                        let _ = writeln!(lines, "Address={}", prefix(item, key)?);
                    }
                }
                "gateway4" | "gateway6" => {
                    let _ = writeln!(lines, "Gateway={}", address(node, key)?);
                }
                "nameservers" => self.name_servers(node, &mut lines)?,
                "routes" => {
                    for item in node.list(key)? {
                        routes.push_str(&self.route(item)?);
                    }
                }
                _ => self.unknown.push((entry.line, format!("{name}: {key}"))),
            }
        }
        let dhcp = match dhcp {
            [true, true] => "yes",
            [true, false] => "ipv4",
            [false, true] => "ipv6",
            [false, false] => "no",
        };
        let text = format!("[Match]\nType=ether\n{found}\n[Network]\nDHCP={dhcp}\n{lines}{routes}");
        Ok(Device { name: name.clone(), text })
    }

    fn condition(&mut self, node: &Node) -> Result<String, Wrong> {
        let mut lines = String::new();
        for entry in node.map("match")? {
            let (key, text) = (&*entry.key, entry.node.line_of_text("match")?);
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_.:*?[]".contains(c);
            if text.is_empty() || !text.chars().all(plain) {
                return Err(Wrong::new(entry.line, format!("match: {key}: {text:?} names no device")));
            }
            let _ = match key {
                "macaddress" => writeln!(lines, "MACAddress={text}"),
                "name" => writeln!(lines, "Name={text}"),
                _ => {
                    // A device that is not meant must not get the address.
                    return Err(Wrong::new(entry.line, format!("match: {key} is not known: use macaddress or name")));
                }
            };
        }
        Ok(lines)
    }

    fn name_servers(&mut self, node: &Node, lines: &mut String) -> Result<(), Wrong> {
        for entry in node.map("nameservers")? {
            match &*entry.key {
                "addresses" => {
                    for item in entry.node.list("addresses")? {
                        let _ = writeln!(lines, "DNS={}", address(item, "nameservers")?);
                    }
                }
                "search" => {
                    let _ = writeln!(lines, "Domains={}", entry.node.lines("search")?.join(" "));
                }
                other => self.unknown.push((entry.line, format!("nameservers: {other}"))),
            }
        }
        Ok(())
    }

    fn route(&mut self, node: &Node) -> Result<String, Wrong> {
        let mut lines = String::from("\n[Route]\n");
        for entry in node.map("routes")? {
            let (key, node) = (&*entry.key, &entry.node);
            let _ = match key {
                "to" if matches!(&node.value, Value::Text { text, .. } if text == "default") => Ok(()),
                "to" => writeln!(lines, "Destination={}", prefix(node, key)?),
                "via" => writeln!(lines, "Gateway={}", address(node, key)?),
                "metric" => {
                    let metric = node.text(key)?.parse::<u32>();
                    let metric = metric.map_err(|_| Wrong::new(node.line, "metric: must be a number"))?;
                    writeln!(lines, "Metric={metric}")
                }
                _ => {
                    self.unknown.push((entry.line, format!("routes: {key}")));
                    Ok(())
                }
            };
        }
        Ok(lines)
    }
}

fn address(node: &Node, key: &str) -> Result<IpAddr, Wrong> {
    let text = node.line_of_text(key)?;
    text.parse().map_err(|_| Wrong::new(node.line, format!("{key}: {text:?} is no address")))
}

/// An address and the length of its network's prefix.
fn prefix(node: &Node, key: &str) -> Result<String, Wrong> {
    let wrong =
        |text: &str| Wrong::new(node.line, format!("{key}: {text:?} is no address with a prefix, like 10.0.0.2/24"));
    let text = node.line_of_text(key)?;
    let (address, length) = text.split_once('/').ok_or_else(|| wrong(text))?;
    let (address, length) = (address.parse::<IpAddr>(), length.parse::<u8>());
    match (address, length) {
        (Ok(IpAddr::V4(_)), Ok(0..=32)) | (Ok(IpAddr::V6(_)), Ok(0..=128)) => Ok(text.to_owned()),
        _ => Err(wrong(text)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_static_address_is_told_to_networkd() {
        let text = "network:\n  version: 2\n  ethernets:\n    any:\n      match: {name: 'e*'}\n      \
                    addresses: [10.77.0.50/24]\n      routes:\n        - {to: default, via: 10.77.0.1}\n      \
                    nameservers: {addresses: [10.77.0.1], search: [a.org, b.org]}\n      mtu: 1400\n";
        let network = Network::read(text).unwrap();
        assert_eq!(network.unknown, [(10, "any: mtu".to_owned())]);
        assert_eq!(
            network.devices[0].text,
            "[Match]\nType=ether\nName=e*\n\n[Network]\nDHCP=no\nAddress=10.77.0.50/24\nDNS=10.77.0.1\n\
             Domains=a.org b.org\n\n[Route]\nGateway=10.77.0.1\n"
        );
        let network = Network::read("version: 2\nethernets: {eth0: {dhcp4: true}}\nbonds: {}\n").unwrap();
        assert_eq!(network.unknown, [(3, "bonds".to_owned())]);
        assert_eq!(network.devices[0].text, "[Match]\nType=ether\nName=eth0\n\n[Network]\nDHCP=ipv4\n");
    }

    #[test]
    fn wrong_values_are_told_with_their_lines() {
        for (text, line, why) in [
            ("", 1, "is empty"),
            ("ethernets: {}\n", 1, "has no `version: 2`"),
            ("version: 1\nconfig: []\n", 1, "version: only 2"),
            (
                "version: 2\nethernets:\n  eth0:\n    addresses: [10.0.0.1]\n",
                4,
                "addresses: \"10.0.0.1\" is no address",
            ),
            ("version: 2\nethernets:\n  eth0:\n    addresses: [10.0.0.1/33]\n", 4, "addresses: \"10.0.0.1/33\" is no"),
            ("version: 2\nethernets:\n  eth0:\n    gateway4: me\n", 4, "gateway4: \"me\" is no address"),
            ("version: 2\nethernets:\n  e/0: {}\n", 3, "ethernets: \"e/0\" is no name"),
            ("version: 2\nethernets:\n  a:\n    match: {driver: x}\n", 4, "match: driver is not known"),
            ("version: 2\nethernets:\n  a:\n    match: {name: \"x y\"}\n", 4, "match: name: \"x y\" names no device"),
        ] {
            let wrong = Network::read(text).unwrap_err();
            assert!(wrong.line == line && wrong.why.starts_with(why), "{text}: {wrong}");
        }
    }
}
