//! What dom0 itself is on a network: the gateway of a translated network, or a responder that only gives out addresses.

use alloc::format;
use alloc::rc::Rc;
use alloc::string::{String, ToString};
use core::cell::RefCell;
use core::net::Ipv4Addr;

use net_backend::VifId;
use network::{
    Addressing, FrameInfo, Gateway, GatewaySettings, Guests, Mac, Network, Output, PortId, Responder,
    ResponderSettings, Transported,
};
use toolstack::forward::{Forward, Transport};

/// The networks that guests get addresses of: 10.77.N.0/24, with N 0 for the translated one. dom0's own address is the first.
const PREFIX: u8 = 24;
/// Seconds of a lease.
const LEASE_SECONDS: u32 = 3_600;
/// The maximum number of bytes of a guest's packet.
pub(super) const MTU: u16 = 1_500;
/// The domain of guests' names.
const DOMAIN: &str = "tenon";

/// Returns the network with the number `number`, and dom0's address there.
fn network(number: u8) -> Option<(Network, Ipv4Addr)> {
    let network = Network::new(Ipv4Addr::new(10, 77, number, 0), PREFIX).ok()?;
    Some((network, Ipv4Addr::new(10, 77, number, 1)))
}

/// Returns dom0's Ethernet address on the network with this number.
const fn mac(number: u8) -> Mac {
    // Locally assigned, so it is no guest's and no device's.
    Mac([0x02, 0x16, 0x3e, 0, 0, number])
}

#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "a network has one, for as long as the network exists")]
enum Kind {
    Gateway(Gateway),
    Responder(Responder),
}

impl Kind {
    const fn guests(&mut self) -> &mut Guests {
        match self {
            Self::Gateway(gateway) => gateway.guests(),
            Self::Responder(responder) => responder.guests(),
        }
    }
}

/// A station of dom0's own. Clones stand for the same station.
#[derive(Clone, Debug)]
pub(super) struct Station {
    kind: Rc<RefCell<Kind>>,
    mac: Mac,
    network: Network,
    /// dom0's address.
    own: Ipv4Addr,
}

/// An address that is kept for a guest.
pub(super) struct Kept(Station, Ipv4Addr);

impl Drop for Kept {
    fn drop(&mut self) {
        self.0.kind.borrow_mut().guests().release(self.1);
    }
}

impl Station {
    /// Makes the gateway of the translated network. `uplink` is the address and the MTU of the device that it uses.
    ///
    /// # Errors
    /// Packets of the device are too short for a gateway.
    pub(super) fn gateway(uplink: Option<(Mac, u16)>, seed: u64) -> Result<Self, String> {
        let (network, own) = network(0).ok_or("the network has no address")?;
        let mac = mac(0);
        let (uplink_mac, uplink_mtu) = uplink.unwrap_or((mac, MTU));
        let settings = GatewaySettings {
            mac,
            network,
            address: own,
            dns: [None; 4],
            lease_seconds: LEASE_SECONDS,
            mtu: MTU,
            domain: DOMAIN.to_string(),
            uplink_mac,
            uplink_mtu,
            addressing: Addressing::Dhcp,
            seed,
        };
        let gateway = Gateway::new(settings).map_err(|why| why.to_string())?;
        Ok(Self { kind: Rc::new(RefCell::new(Kind::Gateway(gateway))), mac, network, own })
    }

    /// Makes the responder of the network of guests alone with this number.
    pub(super) fn responder(number: u8) -> Option<Self> {
        let (network, own) = network(number)?;
        let mac = mac(number);
        let settings = ResponderSettings {
            mac,
            address: own,
            network,
            router: None,
            dns: [None; 4],
            lease_seconds: LEASE_SECONDS,
            mtu: MTU,
            domain: DOMAIN.to_string(),
        };
        Some(Self { kind: Rc::new(RefCell::new(Kind::Responder(Responder::new(settings)))), mac, network, own })
    }

    /// Returns dom0's Ethernet address.
    pub(super) const fn ethernet(&self) -> Mac {
        self.mac
    }

    /// Returns dom0's address and the bits of the network's part, as text.
    pub(super) fn address(&self) -> String {
        format!("{}/{PREFIX}", self.own)
    }

    /// Returns the address that dom0 has on the uplink, as text. `None` if it has none.
    pub(super) fn uplink_address(&self) -> Option<String> {
        match &*self.kind.borrow() {
            Kind::Gateway(gateway) => gateway.uplink_address().map(|address| address.address.to_string()),
            Kind::Responder(_) => None,
        }
    }

    /// Keeps the address `wanted` for a guest that will be attached with it, until the returned value is dropped.
    ///
    /// # Errors
    /// Why no guest can have the address, or there is no memory.
    pub(super) fn keep(&self, wanted: Ipv4Addr) -> Result<Kept, String> {
        if wanted == self.own {
            return Err(format!("{wanted} is dom0's own address on the network"));
        }
        let of_network = || format!("{wanted} is no address for a guest of the network {}", self.network);
        self.network.is_host(wanted).then_some(()).ok_or_else(of_network)?;
        let kept = self.kind.borrow_mut().guests().keep(wanted);
        kept.map(|()| Kept(self.clone(), wanted)).map_err(|why| why.to_string())
    }

    /// Gives an address to the guest of a vif: `wanted`, or one that depends on `mac` as long as it is free.
    ///
    /// # Errors
    /// Why the guest cannot have the address.
    pub(super) fn attach(
        &self,
        id: VifId,
        mac: Mac,
        wanted: Option<Ipv4Addr>,
        guest: &str,
    ) -> Result<Ipv4Addr, String> {
        let attached = self.kind.borrow_mut().guests().attach(id.port(), mac, wanted, guest);
        attached.map_err(|why| why.to_string())
    }

    /// Forgets the guest of a vif, with its flows and forwards.
    pub(super) fn detach(&self, id: VifId) {
        match &mut *self.kind.borrow_mut() {
            Kind::Gateway(gateway) => gateway.detach(id.port()),
            Kind::Responder(responder) => responder.detach(id.port()),
        };
    }

    /// Returns how many connections of the guest of a vif are translated. `None` if the network is not translated.
    pub(super) fn flows(&self, id: VifId) -> Option<usize> {
        match &*self.kind.borrow() {
            Kind::Gateway(gateway) => gateway.flows(id.port()),
            Kind::Responder(_) => None,
        }
    }

    /// Keeps a port of the uplink's address for a forward: no connection of a guest gets it.
    ///
    /// # Errors
    /// Why the port is not kept.
    pub(super) fn keep_port(&self, forward: &Forward) -> Result<(), String> {
        match &mut *self.kind.borrow_mut() {
            Kind::Gateway(gateway) => gateway.keep_port(forward.outer).map_err(|why| format!("{forward}: {why}")),
            Kind::Responder(_) => Ok(()),
        }
    }

    /// Leads connections from the uplink to the guest of a vif.
    ///
    /// # Errors
    /// Why they are not led there.
    pub(super) fn forward(&self, id: VifId, forward: &Forward) -> Result<(), String> {
        let protocol = match forward.transport {
            Transport::Tcp => Transported::Tcp,
            Transport::Udp => Transported::Udp,
        };
        match &mut *self.kind.borrow_mut() {
            Kind::Gateway(gateway) => {
                let done = gateway.forward(protocol, forward.outer, id.port(), forward.inner);
                done.map_err(|why| format!("{forward}: {why}"))
            }
            Kind::Responder(_) => Err(format!("{forward}: the network has no uplink")),
        }
    }

    fn with<R>(&self, act: impl FnOnce(&mut dyn network::Station) -> R) -> R {
        match &mut *self.kind.borrow_mut() {
            Kind::Gateway(gateway) => act(gateway),
            Kind::Responder(responder) => act(responder),
        }
    }
}

impl network::Station for Station {
    fn receive_guest(&mut self, port: PortId, frame: &mut [u8], info: FrameInfo, now_ns: u64, out: &mut dyn Output) {
        self.with(|station| station.receive_guest(port, frame, info, now_ns, out));
    }

    fn receive_uplink(&mut self, frame: &mut [u8], info: FrameInfo, now_ns: u64, out: &mut dyn Output) {
        self.with(|station| station.receive_uplink(frame, info, now_ns, out));
    }

    fn turn(&mut self, now_ns: u64, out: &mut dyn Output) -> Option<u64> {
        self.with(|station| station.turn(now_ns, out))
    }

    fn mac(&self) -> Mac {
        self.mac
    }
}
