//! The networks, and which guest has which device on them.

use alloc::boxed::Box;
use alloc::format;
use alloc::rc::Rc;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::cell::{Cell, RefCell};
use core::fmt;

use net_backend::{Counters, Limits};
use network::{Mac, Uplink};
use toolstack::DomainId;
use toolstack::forward::Forward;
use toolstack::manager::{self, GuestVif, NetworkRow};
use toolstack::vif::{NAT, UPLINK, VifConfig};

use super::bridge::{Bridge, Device, Kind, Running, by_reason};
use super::device::Vif;
use super::host::NetHost;
use super::station::{MTU, Station};
use crate::device::{Attached, Identity, Paths, directories, word};
use crate::store::StoreService;

/// The maximum number of networks.
pub const MAX_NETWORKS: usize = 16;
/// Bytes of the heap for a network device of a guest: its names, its session of the store, its task, its place in the switch,
/// its flows. `tests/net_heap` measures 46 KiB.
const VIF_BYTES: usize = 64 * 1024;

/// Returns the maximum number of bytes of heap that a network device of a guest uses.
#[must_use]
pub const fn vif_bytes() -> usize {
    VIF_BYTES
}

struct Shared<H: NetHost> {
    host: H,
    attached: Rc<Attached<H, Vif<H>>>,
    networks: RefCell<Vec<Running<H>>>,
    /// Devices of the machine that no network has yet.
    devices: RefCell<Vec<Device>>,
    forwards: RefCell<Vec<Forward>>,
    seed: Cell<u64>,
}

/// The networks of the machine and the devices of its guests. Clones stand for the same networks.
pub struct Networks<H: NetHost>(Rc<Shared<H>>);

impl<H: NetHost> Clone for Networks<H> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

impl<H: NetHost> fmt::Debug for Networks<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Networks").field("attached", &self.0.attached.count()).finish_non_exhaustive()
    }
}

impl<H: NetHost> Networks<H> {
    /// Makes the service, without any network or device, for the guests of `store`. Ports of translated connections are chosen
    /// by `seed`.
    pub fn new(host: H, store: StoreService<H>, seed: u64) -> Self {
        Self(Rc::new(Shared {
            attached: Rc::new(Attached::new(host.clone(), store)),
            host,
            networks: RefCell::default(),
            devices: RefCell::default(),
            forwards: RefCell::default(),
            seed: Cell::new(seed),
        }))
    }

    /// Adds a network device of the machine that is started. It raises the port `interrupt` of this domain; `kept` keeps the
    /// port open. The networks `nat` and `uplink` take devices in the order in which they were added.
    pub fn add_device(&self, name: &str, uplink: Box<dyn Uplink>, interrupt: u32, kept: impl core::any::Any) {
        self.0.devices.borrow_mut().push(Device { uplink, name: name.into(), interrupt, kept: Box::new(kept) });
    }

    /// Leads connections from the uplink to a guest, from the next time on that the guest has a device on the network `nat`. No
    /// connection that a guest begins from now on gets the port of the uplink's address.
    pub fn add_forward(&self, forward: Forward) {
        let networks = self.0.networks.borrow();
        networks
            .iter()
            .filter_map(|running| running.bridge.station.as_ref())
            .for_each(|station| keep(station, &forward));
        self.0.forwards.borrow_mut().push(forward);
    }

    /// Attaches a network device to the guest with this domain and name: makes the network if there is none of that name, and
    /// writes both directories.
    ///
    /// # Errors
    /// A message that tells why the guest cannot have the device. Nothing is left of the device then.
    pub fn attach(&self, domain: u16, guest: &str, device: u32, config: &VifConfig) -> Result<(), String> {
        self.forget_empty();
        let done = self.try_attach(domain, guest, device, config);
        self.forget_empty();
        done
    }

    fn try_attach(&self, domain: u16, guest: &str, device: u32, config: &VifConfig) -> Result<(), String> {
        let attached = &self.0.attached;
        if attached.find((domain, device)).is_some() {
            return Err(format!("the guest has a vif {device} already"));
        }
        let mac = config.mac.unwrap_or_else(|| Mac::of_guest(guest, device));
        self.check(mac, config)?;
        let reserved = self.0.host.reserve(VIF_BYTES).ok_or("not enough memory is left for it")?;
        let bridge = self.bridge(&config.bridge)?;
        if bridge.station.as_ref().is_some_and(|station| station.ethernet() == mac) {
            return Err(format!("dom0 has the address {mac} on the network {}", config.bridge));
        }
        let kept = match (&bridge.station, config.ip) {
            (Some(station), Some(ip)) => Some(station.keep(ip)?),
            _ => None,
        };
        let own = attached.store.own();
        let paths = Paths::new(own, "vif", domain, device);
        let nodes = nodes(&paths, (own, domain), device, mac, config);
        let identity = Identity { own, domain, guest: guest.into(), number: device, name: device.to_string(), paths };
        let first = !attached.of(domain).iter().any(|vif| !vif.forwards.is_empty());
        let forwards = self.0.forwards.borrow();
        let mine = forwards.iter().filter(|forward| first && bridge.kind == Kind::Translated && forward.guest == guest);
        let forwards: Vec<Forward> = mine.cloned().collect();
        attached.attach(identity, &nodes, |handshake| {
            bridge.vifs.set(bridge.vifs.get() + 1);
            Vif {
                handshake,
                bridge,
                mac,
                limits: Limits { bytes_per_second: config.rate, address: config.ip },
                forwards,
                link: RefCell::new(None),
                before: Cell::default(),
                _kept: kept,
                _reserved: reserved,
            }
        })
    }

    /// Removes the networks of guests alone that have no device any more.
    fn forget_empty(&self) {
        let has_use = |running: &Running<H>| running.bridge.kind != Kind::Isolated || running.bridge.vifs.get() > 0;
        self.0.networks.borrow_mut().retain(has_use);
    }

    /// Checks that no other device of the same network has the Ethernet or the IPv4 address.
    fn check(&self, mac: Mac, config: &VifConfig) -> Result<(), String> {
        for vif in self.0.attached.all().iter().filter(|vif| vif.bridge.name == config.bridge) {
            let holder = &vif.handshake.identity.guest;
            if vif.mac == mac {
                return Err(format!("{holder} has the address {mac} on the network {}", config.bridge));
            }
            if let Some(ip) = config.ip.filter(|ip| vif.address() == Some(*ip)) {
                return Err(format!("{holder} has the address {ip} on the network {}", config.bridge));
            }
        }
        Ok(())
    }

    /// Returns the network with this name, which is made if there is none.
    fn bridge(&self, name: &str) -> Result<Rc<Bridge<H>>, String> {
        let mut networks = self.0.networks.borrow_mut();
        if let Some(running) = networks.iter().find(|running| running.bridge.name == name) {
            return Ok(Rc::clone(&running.bridge));
        }
        if networks.len() >= MAX_NETWORKS {
            return Err(format!("there are {MAX_NETWORKS} networks already"));
        }
        let mut devices = self.0.devices.borrow_mut();
        let mut device = || (!devices.is_empty()).then(|| devices.remove(0));
        let (kind, device) = match name {
            NAT => (Kind::Translated, device()),
            UPLINK => {
                let none = "the machine has no network device that another network does not use";
                (Kind::Bridged, Some(device().ok_or(none)?))
            }
            _ => (Kind::Isolated, None),
        };
        let (number, station) = match kind {
            Kind::Translated => {
                let uplink = device.as_ref().map(|device| (device.uplink.mac(), device.uplink.mtu()));
                let station = match Station::gateway(uplink, self.0.seed.get()) {
                    Ok(station) => station,
                    Err(why) => {
                        device.into_iter().for_each(|device| devices.insert(0, device));
                        return Err(format!("the network {name}: {why}"));
                    }
                };
                self.0.forwards.borrow().iter().for_each(|forward| keep(&station, forward));
                (0, Some(station))
            }
            Kind::Bridged => (0, None),
            Kind::Isolated => {
                let free = |number: &u8| networks.iter().all(|running| running.bridge.number != *number);
                let number = (1..=u8::MAX).find(free).unwrap_or(u8::MAX);
                (number, Station::responder(number))
            }
        };
        match Running::start(&self.0.host, (name, kind, number), station, device) {
            Ok(running) => {
                let bridge = Rc::clone(&running.bridge);
                networks.push(running);
                Ok(bridge)
            }
            Err((why, device)) => {
                if let Some(device) = device {
                    devices.insert(0, device);
                }
                Err(why.into())
            }
        }
    }

    /// Takes a device away from a guest, and returns when the device is gone. Without `force`, the guest is asked to release
    /// the device. The removal goes on even if the future is dropped.
    ///
    /// # Errors
    /// The guest has no such device, or has not released the device within ten seconds; the device is removed once the guest
    /// releases it.
    pub async fn detach(&self, domain: u16, device: u32, force: bool) -> Result<(), String> {
        let done = self.0.attached.detach((domain, device), force).await;
        self.forget_empty();
        done
    }

    /// Removes all devices of a domain that has ended, and returns when nothing of the devices is mapped or in the store. Only
    /// then may the number of the domain be used again.
    pub async fn domain_died(&self, domain: u16) {
        self.0.attached.domain_died(domain).await;
        self.forget_empty();
    }

    /// Returns the devices of a guest, in the order of their numbers.
    #[must_use]
    pub fn list(&self, domain: u16, guest: &str) -> Vec<GuestVif> {
        let row = |vif: &Rc<Vif<H>>| {
            let Counters { received_packets, received_bytes, sent_packets, sent_bytes, drops, .. } = vif.counters();
            let state = if vif.handshake.is_in_use() { "in use" } else { word(vif.handshake.back_state()) };
            GuestVif {
                guest: guest.into(),
                domain: DomainId(domain),
                device: vif.handshake.identity.number,
                mac: vif.mac.to_string(),
                bridge: vif.bridge.name.clone(),
                ip: vif.address().map(|address| address.to_string()),
                state,
                received: received_packets,
                received_bytes,
                sent: sent_packets,
                sent_bytes,
                drops: by_reason(&drops),
                flows: vif.flows(),
            }
        };
        self.0.attached.of(domain).iter().map(row).collect()
    }

    /// Returns the networks, for the command `networks`.
    #[must_use]
    pub fn networks(&self) -> Vec<NetworkRow> {
        self.forget_empty();
        let row = |Running { bridge, .. }: &Running<H>| {
            let at = bridge.station.as_ref().and_then(Station::uplink_address);
            let uplink = bridge.uplink.as_ref().map(|device| match at {
                Some(address) => format!("{device}, {address}"),
                None => device.clone(),
            });
            NetworkRow {
                name: bridge.name.clone(),
                kind: bridge.kind.word(),
                vifs: bridge.vifs.get(),
                address: bridge.station.as_ref().map(Station::address),
                uplink,
                device: bridge.device(),
            }
        };
        self.0.networks.borrow().iter().map(row).collect()
    }
}

/// The networks as the manager of guests uses them.
impl<H: NetHost> manager::Networks for Networks<H> {
    fn attach(&self, domain: DomainId, guest: &str, device: u32, vif: &VifConfig) -> Result<(), String> {
        Self::attach(self, domain.0, guest, device, vif)
    }

    async fn detach(&self, domain: DomainId, device: u32, force: bool) -> Result<(), String> {
        Self::detach(self, domain.0, device, force).await
    }

    async fn domain_died(&self, domain: DomainId) {
        Self::domain_died(self, domain.0).await;
    }

    fn list(&self, domain: DomainId, guest: &str) -> Vec<GuestVif> {
        Self::list(self, domain.0, guest)
    }

    fn networks(&self) -> Vec<NetworkRow> {
        Self::networks(self)
    }

    fn vif_bytes(&self) -> usize {
        vif_bytes()
    }
}

/// Keeps the port of a forward, also while its guest is not there: the port is no other guest's.
fn keep(station: &Station, forward: &Forward) {
    if let Err(why) = station.keep_port(forward) {
        log::warn!("the port is not kept: {why}");
    }
}

/// Returns both directories of a device as they are first written (ABI io 3.8).
fn nodes(paths: &Paths, ids: (DomainId, u16), device: u32, mac: Mac, config: &VifConfig) -> Vec<toolstack::Node> {
    let (handle, mac, mtu) = (device.to_string(), mac.to_string(), MTU.to_string());
    let of_front = [("handle", &*handle), ("mac", &mac), ("mtu", &mtu)];
    let mut of_back = alloc::vec![("handle", &*handle), ("mac", &mac), ("bridge", &config.bridge), ("type", "vif")];
    let ip = config.ip.map(|ip| ip.to_string());
    of_back.extend(ip.iter().map(|ip| ("ip", &**ip)));
    directories(paths, ids, &of_front, &of_back)
}
