//! A thousand random orders of what people and guests do.

use test_random::Random;

use crate::ALL;
use crate::common::front::FrontEnd;
use crate::common::guest::Rounds;
use crate::common::orders::{self, DOMAINS, meddle};
use crate::front::Front;
use crate::machine::Machine;
use crate::world::{World, test_frame, test_text};

const VIFS: [&str; 8] =
    ["", "", "bridge=a", "bridge=a", "bridge=b", "bridge=a,ip=10.77.1.9", "ip=10.77.0.9,rate=50KB/s", "bridge=uplink"];

/// Keys that tell where a ring is, and values that no stock driver writes there.
const WRONG: (&[&str], &[&str]) =
    (&["tx-ring-ref", "rx-ring-ref", "event-channel-tx", "event-channel-rx"], &["", "10000", "99", "x"]);

type Living = orders::Living<Machine, Front>;

struct Order {
    world: World,
    living: Vec<Living>,
    connected: usize,
    heard: usize,
}

impl Order {
    /// Each front end hears the frames of its own network alone.
    fn listen(&mut self) {
        for Living { guest, fronts } in &mut self.living {
            for front in fronts {
                for text in front.take(guest).iter().filter_map(|frame| test_text(frame)) {
                    assert_eq!(text, front.network);
                    self.heard += 1;
                }
            }
        }
    }
}

impl orders::Order for Order {
    type Machine = Machine;
    type Front = Front;

    const EVENTS: usize = 200;

    fn new() -> Self {
        Self { world: World::new(), living: Vec::new(), connected: 0, heard: 0 }
    }

    fn living(&mut self) -> &mut Vec<Living> {
        &mut self.living
    }

    fn arrive(&mut self, domain: u16) -> Living {
        Living { guest: self.world.guest(domain), fronts: [Front::new(0), Front::new(1)] }
    }

    fn event(&mut self, random: &mut Random, at: usize, device: usize, event: u32) {
        let Self { world, living, .. } = self;
        let macs: Vec<[u8; 6]> = living.iter().flat_map(|living| &living.fronts).map(|front| front.mac).collect();
        let Living { guest, fronts } = &mut living[at];
        let (domain, front) = (guest.domain, &mut fronts[device]);
        front.odd |= (73..84).contains(&event);
        match event {
            0..20 => {
                let attached = world.attach(domain, front.device, random.pick(&VIFS));
                world.machine.rounds(if attached.is_ok() { random.below(6) } else { 0 });
            }
            20..45 => {
                for _ in 0..3 {
                    front.step(guest);
                }
                self.connected += usize::from(front.back_state(guest) == 4);
            }
            45..65 | 92..97 => {
                for _ in 0..4 {
                    let to = if random.below(2) == 0 { ALL } else { random.pick(&macs) };
                    let frame = test_frame(to, front.mac, &front.network);
                    match random.below(12) {
                        0 => front.send_nothing(guest),
                        1 => front.send(guest, &frame[..random.below(14)]),
                        _ => front.send(guest, &frame),
                    };
                }
                world.machine.rounds(random.below(4));
                front.answers();
                self.listen();
            }
            65..83 => meddle(front, guest, (random, event), WRONG),
            83..84 => match random.below(3) {
                0 => front.send_endless(guest),
                ring => front.break_ring(guest, ring == 1),
            },
            84..89 => {
                let detach = world.networks.detach(domain, front.device, random.below(2) == 0);
                let _ = world.machine.run_for(1 + random.below(20), detach);
            }
            89..92 => {
                world.machine.fake.set_full(true);
                world.machine.rounds(random.below(4));
                let _ = world.attach(domain, front.device, random.pick(&VIFS));
                world.machine.fake.set_full(false);
            }
            _ => {
                drop(living.remove(at));
                self.end(domain);
                assert!(self.world.listed(domain).is_empty());
            }
        }
    }

    fn end(&mut self, domain: u16) {
        self.world.end(domain);
    }

    fn over(self) -> [usize; 2] {
        self.world.machine.rounds(20);
        self.world.assert_clean(&DOMAINS);
        [self.connected, self.heard]
    }
}

#[test]
fn a_thousand_random_orders_leave_nothing() {
    orders::run::<Order>();
}
