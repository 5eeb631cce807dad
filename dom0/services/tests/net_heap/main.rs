//! The heap that a network and a guest's network device use at the most, measured, and what dom0 sets aside for them.

#![forbid(unsafe_code)]
#![allow(unreachable_pub, dead_code, reason = "most modules are those of the test `net`")]
#![allow(clippy::cast_possible_truncation, reason = "random numbers are cut to size on purpose")]

#[path = "../common/mod.rs"]
mod common;
#[path = "../../../network/tests/common/mod.rs"]
mod frames;
#[path = "../net/front.rs"]
mod front;
#[path = "../net/machine.rs"]
mod machine;
#[path = "../net/wire.rs"]
mod wire;
#[path = "../net/world.rs"]
mod world;

use std::alloc::System;
use std::cell::Cell;
use std::rc::Rc;

use common::guest::Rounds;
use frames::world::FAR;
use frames::{Fill, ethernet, fill, ipv4, udp};
use front::{Front, Guest};
use net_backend::{LINEAR_PAGES, SCRATCH_PAGES, STAGING_PAGES};
use services::net::vif_bytes;
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use world::{INTERRUPT, World};

#[global_allocator]
static HEAP: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// The gateway's address on the network `nat`.
const GATEWAY_MAC: [u8; 6] = [0x02, 0x16, 0x3e, 0, 0, 0];
const FLOWS: usize = 1_024;

/// Counts the bytes that the services have allocated and not freed. What the test itself allocates does not count.
#[derive(Default)]
struct Meter {
    began: Cell<isize>,
    live: Cell<isize>,
}

impl Meter {
    /// The services begin or end to do something.
    fn mark(&self, begins: bool) {
        let stats = HEAP.stats();
        let now = stats.bytes_allocated.cast_signed() - stats.bytes_deallocated.cast_signed();
        if begins {
            self.began.set(now);
        } else {
            self.live.set(self.live.get() + now - self.began.get());
        }
    }

    /// Does `work` as the services' own.
    fn inside<T>(&self, work: impl FnOnce() -> T) -> T {
        self.mark(true);
        let done = work();
        self.mark(false);
        done
    }

    /// Returns how many bytes `work` left allocated. Frames on the wire do not count.
    fn left_by<T>(&self, what: &str, world: &World, work: impl FnOnce() -> T) -> (usize, T) {
        let before = self.live.get();
        let done = work();
        self.inside(|| {
            let mut wire = world.wire.0.borrow_mut();
            (wire.sent, wire.coming) = Default::default();
        });
        let left = self.live.get() - before;
        println!("{what}: {left} bytes");
        (usize::try_from(left).unwrap(), done)
    }
}

/// A guest with its vif on the network `nat`, connected, with full rings.
struct Station {
    guest: Guest,
    front: Front,
    address: [u8; 4],
}

impl Station {
    fn new(world: &World, meter: &Meter, mut guest: Guest) -> Self {
        // The pages of the guest do not count.
        for reference in 1_000..1_600 {
            world.machine.fake.page(guest.domain, reference);
        }
        meter.inside(|| world.attach(guest.domain, 0, "")).unwrap();
        let mut front = Front::new(0);
        common::front::FrontEnd::connect(&mut front, &mut guest);
        let ip = world.only(guest.domain).ip.unwrap();
        let address = ip.parse::<std::net::Ipv4Addr>().unwrap().octets();
        let mut station = Self { guest, front, address };
        let frame = station.datagram(1, FAR, 1, 0, 1_400);
        while station.front.send(&station.guest, &frame) {}
        world.machine.rounds(20);
        station.front.answers();
        station
    }

    /// A frame with a UDP datagram to `to`, or with its first part.
    fn datagram(&self, port: u16, to: [u8; 4], id: u16, fragment: u16, bytes: usize) -> Vec<u8> {
        let mut segment = udp((port, 53), &vec![7; bytes]);
        fill(&self.address, &to, 17, &mut segment, Fill::Whole);
        ethernet(GATEWAY_MAC, self.front.mac, 0x800, &ipv4(self.address, to, 17, id, fragment, &[], &segment))
    }

    fn send(&mut self, world: &World, frame: &[u8]) {
        assert!(self.front.send(&self.guest, frame));
        world.machine.rounds(2);
        self.front.answers();
    }

    /// Begins as many flows as a guest may have, and as many packets in parts.
    fn fill_tables(&mut self, world: &World) {
        for n in 0..FLOWS as u16 {
            let frame = self.datagram(2_000 + n, FAR, n, 0, 20);
            self.send(world, &frame);
        }
        for n in 0..16 {
            let frame = self.datagram(2_000, FAR, n, 0x2000, 64);
            self.send(world, &frame);
        }
        assert_eq!(world.only(self.guest.domain).flows, Some(FLOWS));
    }

    /// Sends long frames to more neighbours on the uplink than the gateway asks for.
    fn ask_for_neighbours(&mut self, world: &World) {
        for last in 100..200 {
            let frame = self.datagram(2_000, [192, 0, 2, last], 0, 0, 1_400);
            self.send(world, &frame);
            world.machine.rounds(10);
        }
    }
}

/// Asserts that what is set aside suffices for what was measured and for the allocator's own records, and is at most half as
/// much again.
fn judge(what: &str, measured: usize, estimate: usize) {
    println!("{what}: {measured} bytes measured, {estimate} set aside");
    assert!(measured + measured / 16 <= estimate, "{what}: {measured} bytes, and {estimate} are set aside");
    assert!(estimate <= measured * 3 / 2, "{what}: {measured} bytes, and as many as {estimate} are set aside");
}

/// The uplink's network gives the gateway an address.
fn serve_uplink(world: &World, meter: &Meter) {
    while !world.networks.networks().iter().any(|row| row.uplink.as_deref() == Some("eth0, 192.0.2.15")) {
        if meter.inside(|| world.wire.serve()) {
            world.machine.fake.raise_port(INTERRUPT);
        }
        world.machine.round();
    }
}

#[test]
fn networks_and_vifs_take_no_more_than_is_set_aside() {
    let world = World::bare();
    world.networks.add_device("eth0", Box::new(world.wire.clone()), INTERRUPT, ());
    let guests = [5, 6].map(|domain| world.guest(domain));
    world.machine.rounds(5);
    let meter = Rc::new(Meter::default());
    let counted = Rc::clone(&meter);
    world.machine.fake.watch(move |begins| counted.mark(begins));

    let [five, six] = guests;
    let reserved = world.machine.fake.reserved();
    let (with_network, mut five) = meter.left_by("a network and a vif", &world, || Station::new(&world, &meter, five));
    let network_bytes = world.machine.fake.reserved() - reserved - vif_bytes();
    let (connected, mut six) = meter.left_by("a vif", &world, || Station::new(&world, &meter, six));
    let (uplink, ()) = meter.left_by("an address", &world, || serve_uplink(&world, &meter));
    let (first, ()) = meter.left_by("the ports, and the flows of a vif", &world, || five.fill_tables(&world));
    let (flows, ()) = meter.left_by("the flows of a vif", &world, || six.fill_tables(&world));
    let (neighbours, ()) = meter.left_by("neighbours", &world, || five.ask_for_neighbours(&world));
    let buffers = (SCRATCH_PAGES + LINEAR_PAGES + STAGING_PAGES) * machine::PAGE;
    let network = (with_network - connected - buffers) + uplink + (first - flows) + neighbours;
    judge("a vif", connected + flows, vif_bytes());
    judge("a network", network, network_bytes);
}
