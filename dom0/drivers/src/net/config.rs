//! The features and the configuration of a network device (V 5.1.3, 5.1.4), and the limits derived from them.

use crate::hardware::{ConfigurationPorts, Registers};
use crate::virtio::Transport;
use network::{MAX_PACKET, Mac};

/// Feature bits of a network device (V 5.1.3).
pub(super) mod feature {
    /// The device computes checksums of frames that it sends.
    pub(crate) const CSUM: u64 = 1 << 0;
    /// The driver takes frames without a checksum.
    pub(crate) const GUEST_CSUM: u64 = 1 << 1;
    pub(crate) const MTU: u64 = 1 << 3;
    pub(crate) const MAC: u64 = 1 << 5;
    /// The driver takes TCP segments that were joined.
    pub(crate) const GUEST_TSO4: u64 = 1 << 7;
    pub(crate) const GUEST_TSO6: u64 = 1 << 8;
    /// The device cuts TCP segments.
    pub(crate) const HOST_TSO4: u64 = 1 << 11;
    pub(crate) const HOST_TSO6: u64 = 1 << 12;
    /// A frame may use several receive buffers.
    pub(crate) const MRG_RXBUF: u64 = 1 << 15;
    pub(crate) const STATUS: u64 = 1 << 16;
}

/// Where the fields of the configuration are, and the bytes of a configuration that has the field.
const MAC: (usize, usize) = (0, 6);
const STATUS: (usize, usize) = (6, 8);
const MTU: (usize, usize) = (10, 12);
/// In the status: the link is up.
const LINK_UP: u16 = 1;
/// The MTU of a device that does not state one.
const USUAL_MTU: u16 = 1_500;
/// The smallest MTU that a device may state (V 5.1.4.1).
const LEAST_MTU: u16 = 68;
/// Bytes of an Ethernet header with one VLAN tag.
pub(super) const ETHERNET: usize = 18;

/// What a device is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    pub(super) features: u64,
    pub(super) mac: Mac,
    pub(super) mtu: u16,
}

/// The limits of a device whose configuration is not read yet.
pub(super) const UNKNOWN: Limits = Limits { features: 0, mac: Mac([0; 6]), mtu: USUAL_MTU };

/// Returns the features that the driver takes of those that a device with `bytes` bytes of configuration offers. A feature that
/// depends on another is taken only with the other one.
pub(super) fn choose(offered: u64, bytes: usize) -> u64 {
    let fields = [(feature::MAC, MAC), (feature::STATUS, STATUS), (feature::MTU, MTU)];
    let known: u64 = fields.iter().filter(|(_, (_, end))| *end <= bytes).map(|(feature, _)| feature).sum();
    let mut taken = offered & (known | feature::CSUM | feature::GUEST_CSUM | feature::MRG_RXBUF);
    if taken & feature::CSUM != 0 {
        taken |= offered & (feature::HOST_TSO4 | feature::HOST_TSO6);
    }
    // Only several buffers hold 64 KiB.
    if taken & feature::GUEST_CSUM != 0 && taken & feature::MRG_RXBUF != 0 {
        taken |= offered & (feature::GUEST_TSO4 | feature::GUEST_TSO6);
    }
    taken
}

impl Limits {
    /// Reads and checks the configuration of a device with these features.
    ///
    /// # Errors
    /// Why the device cannot be used.
    pub(super) fn read<C: ConfigurationPorts, R: Registers>(
        transport: &Transport<C, R>,
        features: u64,
    ) -> Result<Self, &'static str> {
        let device = transport.device().ok_or("does not state its address")?;
        let (mac, mtu) = transport.consistent(|_| {
            let mut mac = [0; 6];
            (MAC.0..).zip(&mut mac).for_each(|(offset, byte)| *byte = device.read8(offset));
            (Mac(mac), device.read16(MTU.0))
        })?;
        Self::judge(mac, mtu, features)
    }

    fn judge(mac: Mac, mtu: u16, features: u64) -> Result<Self, &'static str> {
        if features & feature::MAC == 0 {
            return Err("does not state its address");
        }
        if mac.is_group() || mac == Mac([0; 6]) {
            return Err("states an address that is not of a single station");
        }
        let mtu = if features & feature::MTU == 0 { USUAL_MTU } else { mtu };
        if mtu < LEAST_MTU {
            return Err("states an MTU below 68 bytes");
        }
        Ok(Self { features, mac, mtu })
    }

    pub(super) const fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    /// Returns the maximum number of bytes of a frame that is not cut.
    pub(super) fn frame(&self) -> usize {
        MAX_PACKET.min(usize::from(self.mtu) + ETHERNET)
    }
}

/// Returns whether the link is up, which needs the device's configuration only if the device has a status.
pub(super) fn link<R: Registers>(device: Option<&R>, features: u64) -> bool {
    features & feature::STATUS == 0 || device.is_some_and(|device| device.read16(STATUS.0) & LINK_UP != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATION: Mac = Mac([0x52, 0x54, 0, 0x12, 0x34, 0x56]);

    #[test]
    fn a_feature_is_taken_only_with_what_it_depends_on() {
        assert_eq!(choose(u64::MAX, 5), choose(u64::MAX, 12) & !(feature::MAC | feature::STATUS | feature::MTU));
        assert_eq!(choose(u64::MAX, 8) & feature::MTU, 0);
        let guest = feature::GUEST_TSO4 | feature::GUEST_TSO6;
        let host = feature::HOST_TSO4 | feature::HOST_TSO6;
        assert_eq!(choose(u64::MAX, 12) & (guest | host), guest | host);
        for missing in [feature::GUEST_CSUM, feature::MRG_RXBUF] {
            assert_eq!(choose(!missing, 12) & (guest | host), host);
        }
        assert_eq!(choose(!feature::CSUM, 12) & (guest | host), guest);
        // Not ECN, UFO, the control queue, several queues.
        assert_eq!(choose(u64::MAX, 12) & (1 << 9 | 1 << 10 | 1 << 13 | 1 << 14 | 1 << 17 | 1 << 22), 0);
        assert_eq!(choose(0, 12), 0);
    }

    #[test]
    fn nonsense_is_refused() {
        assert_eq!(Limits::judge(STATION, 0, 0), Err("does not state its address"));
        for mac in [Mac([0; 6]), Mac::BROADCAST, Mac([1, 0, 0x5e, 0, 0, 1])] {
            assert!(Limits::judge(mac, 0, feature::MAC).is_err());
        }
        assert_eq!(Limits::judge(STATION, 0, feature::MAC).map(|limits| limits.mtu), Ok(1500));
        let both = feature::MAC | feature::MTU;
        assert!(Limits::judge(STATION, 67, both).is_err());
        assert_eq!(Limits::judge(STATION, 9000, both).map(|limits| limits.frame()), Ok(9018));
        assert_eq!(Limits::judge(STATION, u16::MAX, both).map(|limits| limits.frame()), Ok(65_535));
    }
}
