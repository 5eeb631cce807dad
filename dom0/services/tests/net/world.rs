//! A store, networks and a device, and what must be left of a guest that is gone: nothing.

use services::net::Networks;
use services::store::StoreService;
use toolstack::DomainId;
use toolstack::manager::GuestVif;
use toolstack::vif::VifConfig;

use crate::common::front::FrontEnd;
use crate::common::guest::Rounds;
use crate::common::leaks::{self, assert_no_nodes, release};
use crate::frames::ethernet;
use crate::front::{Front, Guest};
use crate::machine::Machine;
use crate::wire::Device;

/// The port that the device of the network `nat` raises.
pub const INTERRUPT: u32 = 1_000_000;
/// The gateway's address on the side of the guests.
pub const GATEWAY_MAC: [u8; 6] = [0x02, 0x16, 0x3e, 0, 0, 0];
/// The type of frames that only tests send.
pub const TEST: u16 = 0x88b5;

pub struct World {
    pub machine: Machine,
    pub store: StoreService<Machine>,
    pub networks: Networks<Machine>,
    pub wire: Device,
    before: Counted,
}

/// What can leak: buffers, and what any service can leak.
type Counted = (usize, leaks::Counted);

pub fn config(text: &str) -> VifConfig {
    text.parse().unwrap()
}

impl World {
    /// A machine without network devices or networks.
    pub fn bare() -> Self {
        let machine = Machine::default();
        let store = StoreService::new(machine.clone(), DomainId(0));
        let networks = Networks::new(machine.clone(), store.clone(), 7);
        let mut world = Self { machine, store, networks, wire: Device::default(), before: Counted::default() };
        world.before = world.count();
        world
    }

    /// A machine with the device `eth0`, which the network `nat` uses.
    pub fn new() -> Self {
        let mut world = Self::bare();
        world.networks.add_device("eth0", Box::new(world.wire.clone()), INTERRUPT, ());
        world.attach(98, 0, "").unwrap();
        world.machine.run(world.networks.domain_died(98));
        world.before = world.count();
        world
    }

    pub fn attach(&self, domain: u16, device: u32, text: &str) -> Result<(), String> {
        self.networks.attach(domain, &format!("guest{domain}"), device, &config(text))
    }

    pub fn guest(&self, domain: u16) -> Guest {
        Guest::new(&self.machine, &self.store, domain)
    }

    /// A guest with this vif, connected.
    pub fn connected(&self, domain: u16, text: &str) -> (Guest, Front) {
        let mut guest = self.guest(domain);
        let front = self.plugged(&mut guest, 0, text);
        (guest, front)
    }

    /// Attaches a vif to the guest, and connects the vif.
    pub fn plugged(&self, guest: &mut Guest, device: u32, text: &str) -> Front {
        self.attach(guest.domain, device, text).unwrap();
        let mut front = Front::new(device);
        front.connect(guest);
        front
    }

    pub fn listed(&self, domain: u16) -> Vec<GuestVif> {
        self.networks.list(domain, &format!("guest{domain}"))
    }

    /// The only vif of a domain.
    pub fn only(&self, domain: u16) -> GuestVif {
        let mut listed = self.listed(domain);
        assert_eq!(listed.len(), 1);
        listed.remove(0)
    }

    /// The names of the networks, and how many vifs each has.
    pub fn networks(&self) -> Vec<(String, usize)> {
        self.networks.networks().into_iter().map(|row| (row.name, row.vifs)).collect()
    }

    /// Ends a domain as the manager does.
    pub fn end(&self, domain: u16) {
        self.machine.run(self.networks.domain_died(domain));
        release(&self.machine, &self.store, domain);
    }

    /// The uplink's network gives the gateway an address.
    pub fn serve_uplink(&self) {
        for _ in 0..200_000 {
            if self.wire.serve() {
                self.machine.fake.raise_port(INTERRUPT);
            }
            self.machine.round();
            let networks = self.networks.networks();
            if networks.iter().any(|row| row.uplink.as_deref() == Some("eth0, 192.0.2.15")) {
                return;
            }
        }
        panic!("the gateway asks for no address: {:?}", self.networks.networks());
    }

    fn count(&self) -> Counted {
        let any = leaks::count(&self.machine, &self.store);
        (self.machine.state.borrow().buffers, any)
    }

    /// All guests are gone: nothing of theirs is left.
    pub fn assert_clean(&self, domains: &[u16]) {
        assert_eq!(self.count(), self.before);
        assert!(self.networks().iter().all(|(_, vifs)| *vifs == 0));
        assert_no_nodes(&self.store, "vif", domains);
    }
}

/// A frame that only tests send.
pub fn test_frame(to: [u8; 6], from: [u8; 6], text: &str) -> Vec<u8> {
    ethernet(to, from, TEST, &[text.as_bytes(), &[0; 50]].concat())
}

/// The text of a frame that only tests send; `None` if it is another frame.
pub fn test_text(frame: &[u8]) -> Option<String> {
    let text = frame.get(14..).filter(|_| frame[12..14] == TEST.to_be_bytes())?;
    Some(String::from_utf8_lossy(text).trim_end_matches('\0').to_string())
}
