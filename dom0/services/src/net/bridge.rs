//! A network: its switch, the turns of the switch, and the events that it reports.

use alloc::boxed::Box;
use alloc::format;
use alloc::rc::{Rc, Weak};
use alloc::string::String;
use alloc::vec::Vec;
use core::any::Any;
use core::cell::{Cell, RefCell};
use core::task::Context;

use net_backend::{
    Buffers, ConnectError, Connection, Counters, Disconnected, Drop, Drops, Event, LINEAR_PAGES, MAX_VIFS, Mode,
    SCRATCH_PAGES, STAGING_PAGES, Switch, UplinkCounters, VifId,
};
use network::Uplink;
use toolstack::manager::NetworkDevice;

use super::device::Vif;
use super::host::{Backing, NetHost};
use super::station::Station;
use crate::host::Class;
use crate::listen::{Listener, Next, Turns, give_turns};
use crate::signal::Signal;

/// The maximum number of bytes of heap that a network uses for as long as it exists: its lists, room for a frame of its
/// station, and the gateway's table of ports and frames that wait for neighbours. `tests/net_heap` measures 380 KiB.
const NETWORK_BYTES: usize = 448 * 1024;
/// The maximum number of bytes of heap that a turn allocates: a gateway makes its table of flows, and the table of a guest
/// grows.
const TURN_BYTES: usize = 256 * 1024;
/// The heap keeps a block for the largest turn of any service. That is a turn of the store, and must suffice here.
const _: () = assert!(TURN_BYTES <= store::TURN_BYTES);

/// The maximum number of bytes of a packet between guests. Guests begin with what dom0's DHCP says, and may agree on more.
const MAX_MTU: u16 = 9_000;

/// Where a network leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Guests are translated to dom0's address at a device of the machine.
    Translated,
    /// The network of a device of the machine.
    Bridged,
    /// Guests alone.
    Isolated,
}

impl Kind {
    /// Returns the word for lists.
    pub(super) const fn word(self) -> &'static str {
        match self {
            Self::Translated => "translated",
            Self::Bridged => "bridged",
            Self::Isolated => "isolated",
        }
    }
}

/// A network device of the machine that is started.
pub(super) struct Device {
    pub(super) uplink: Box<dyn Uplink>,
    /// Its address and where it is, for messages.
    pub(super) name: String,
    /// The port that the device raises.
    pub(super) interrupt: u32,
    /// A value that keeps the port open.
    pub(super) kept: Box<dyn Any>,
}

/// A vif that the switch serves.
struct Served<H: NetHost> {
    id: VifId,
    vif: Weak<Vif<H>>,
    ports: [Option<Listener>; 2],
}

/// A network.
pub(super) struct Bridge<H: NetHost> {
    host: H,
    pub(super) name: String,
    pub(super) kind: Kind,
    /// The number of its addresses; 0 if dom0 gives out none.
    pub(super) number: u8,
    pub(super) station: Option<Station>,
    /// The device's name; `None` if the network leads nowhere.
    pub(super) uplink: Option<String>,
    switch: RefCell<Switch<Backing<H>>>,
    served: RefCell<Vec<Served<H>>>,
    interrupt: RefCell<Option<Listener>>,
    kick: Signal,
    /// How many vifs the network has, connected or not.
    pub(super) vifs: Cell<usize>,
    _kept: Option<Box<dyn Any>>,
    _reserved: H::Reserved,
}

/// A network and the task that gives its switch turns, until this value is dropped.
pub(super) struct Running<H: NetHost> {
    pub(super) bridge: Rc<Bridge<H>>,
    _task: H::Task,
}

impl<H: NetHost> Running<H> {
    /// Makes a network and starts its task.
    ///
    /// # Errors
    /// There is not enough memory; the device comes back then.
    pub(super) fn start(
        host: &H,
        (name, kind, number): (&str, Kind, u8),
        station: Option<Station>,
        device: Option<Device>,
    ) -> Result<Self, (&'static str, Option<Device>)> {
        const NO_MEMORY: &str = "not enough memory is left for the network";
        let memory = || {
            let [scratch, linear, staging] =
                [SCRATCH_PAGES, LINEAR_PAGES, STAGING_PAGES].map(|pages| host.buffer(pages));
            let mut served = Vec::new();
            served.try_reserve_exact(MAX_VIFS).ok()?;
            let buffers = Buffers { scratch: scratch?, linear: linear?, staging: staging? };
            Some((buffers, served, host.reserve(NETWORK_BYTES)?))
        };
        let Some((buffers, served, reserved)) = memory() else { return Err((NO_MEMORY, device)) };
        let mut switch = Switch::new(buffers, MAX_MTU);
        if let Some(station) = &station {
            switch.set_station(Box::new(station.clone()));
        }
        let (mut uplink, mut interrupt, mut kept) = (None, None, None);
        if let Some(device) = device {
            let mode = if kind == Kind::Bridged { Mode::Bridged } else { Mode::Routed };
            switch.set_uplink(device.uplink, mode);
            interrupt = Some(Listener::new(host, device.interrupt));
            (uplink, kept) = (Some(device.name), Some(device.kept));
        }
        let bridge = Rc::new(Bridge {
            host: host.clone(),
            name: name.into(),
            kind,
            number,
            station,
            uplink,
            switch: RefCell::new(switch),
            served: RefCell::new(served),
            interrupt: RefCell::new(interrupt),
            kick: Signal::default(),
            vifs: Cell::new(0),
            _kept: kept,
            _reserved: reserved,
        });
        let (working, domain) = (Rc::clone(&bridge), host.clone());
        let task = host.spawn(Class::Data, async move { give_turns(&domain, &*working).await });
        Ok(Self { bridge, _task: task })
    }
}

impl<H: NetHost> Bridge<H> {
    /// Begins to serve a vif. `ports` are our ends of its channels.
    pub(super) fn connect(&self, connection: Connection<Backing<H>>, vif: Weak<Vif<H>>) -> Result<VifId, ConnectError> {
        let ports = connection.ports;
        let id = self.switch.borrow_mut().connect(connection, self.host.now_ns())?;
        let second = (ports.rx != ports.tx).then(|| Listener::new(&self.host, ports.rx));
        let ports = [Some(Listener::new(&self.host, ports.tx)), second];
        self.served.borrow_mut().push(Served { id, vif, ports });
        self.kick.set();
        Ok(id)
    }

    /// Stops serving a vif and returns its parts. `None` if the vif is not served.
    pub(super) fn disconnect(&self, id: VifId) -> Option<Disconnected<Backing<H>>> {
        self.served.borrow_mut().retain(|served| served.id != id);
        let parts = self.switch.borrow_mut().disconnect(id);
        self.kick.set();
        parts
    }

    /// Returns the counters of a vif that is served. All are 0 if there is no such vif.
    pub(super) fn counters(&self, id: VifId) -> Counters {
        self.switch.borrow().vif(id).map(net_backend::Vif::counters).unwrap_or_default()
    }

    /// Returns what the network's device has done. `None` if the network has no device.
    pub(super) fn device(&self) -> Option<NetworkDevice> {
        let switch = self.switch.borrow();
        let UplinkCounters { received_packets, received_bytes, sent_packets, sent_bytes, resets, drops } =
            switch.uplink_counters()?;
        Some(NetworkDevice {
            link: switch.has_link(),
            received: received_packets,
            received_bytes,
            sent: sent_packets,
            sent_bytes,
            resets,
            drops: by_reason(&drops),
        })
    }

    fn handle(&self, event: Event) {
        match event {
            Event::Broken(id, why) => {
                let served = self.served.borrow();
                let vif = served.iter().find(|served| served.id == id).and_then(|served| served.vif.upgrade());
                drop(served);
                if let Some(vif) = vif {
                    vif.fail(&format!("{why}"));
                }
            }
            Event::UplinkDead(why) => {
                let device = self.uplink.as_deref().unwrap_or_default();
                log::warn!("the network device {device} is lost: {why}; the network {} goes on without it", self.name);
            }
        }
    }
}

/// Returns how much was dropped, by the names of the reasons.
pub(super) fn by_reason(drops: &Drops) -> Vec<(&'static str, u64)> {
    let dropped = Drop::ALL.iter().map(|reason| (reason.name(), drops.of(*reason)));
    dropped.filter(|(_, count)| *count > 0).collect()
}

impl<H: NetHost> Turns for Bridge<H> {
    const TURN_BYTES: usize = TURN_BYTES;

    fn turn(&self) -> Next {
        let turn = self.switch.borrow_mut().turn(&mut Backing(self.host.clone()), self.host.now_ns());
        loop {
            let event = self.switch.borrow_mut().event();
            let Some(event) = event else { break };
            self.handle(event);
        }
        Next { again: turn.again, wake_ns: turn.again_ns }
    }

    fn listen(&self, context: &mut Context<'_>) -> bool {
        let mut switch = self.switch.borrow_mut();
        let mut any = false;
        if self.interrupt.borrow_mut().as_mut().is_some_and(|port| port.poll(context)) {
            switch.attend_uplink();
            any = true;
        }
        for served in &mut *self.served.borrow_mut() {
            for port in served.ports.iter_mut().flatten() {
                if port.poll(context) {
                    switch.attend(served.id);
                    any = true;
                }
            }
        }
        any
    }

    fn kick(&self) -> &Signal {
        &self.kick
    }
}
