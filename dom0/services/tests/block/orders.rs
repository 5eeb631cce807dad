//! A thousand random orders of what people, guests and devices do.

use ring_protocol::block::operation;
use test_random::Random;

use crate::common::front::FrontEnd;
use crate::common::guest::Rounds;
use crate::common::orders::{self, DOMAINS, meddle};
use crate::front::{Front, Guest};
use crate::machine::Machine;
use crate::targets::mbr;
use crate::world::{World, XVDA, XVDB, config};

const DISKS: [(u32, &str); 6] = [
    (XVDA, "serial:abc,,xvda,w,part=1"),
    (XVDA, "serial:abc,,xvda,w,overlay=16K,part=2"),
    (XVDA, "serial:abc,,xvda,!,late=1"),
    (XVDB, "memory:8K,,xvdb,w"),
    (XVDB, "serial:abc,,xvdb,r,part=2"),
    (XVDB, "memory:512,,xvdb,r"),
];

/// The key that tells where the ring is, and values that no stock driver writes there.
const WRONG: (&[&str], &[&str]) = (&["ring-ref"], &["", "1000", "102", "x"]);

type Living = orders::Living<Machine, Front>;

struct Order {
    world: World,
    living: Vec<Living>,
    connected: usize,
    answered: usize,
}

impl orders::Order for Order {
    type Machine = Machine;
    type Front = Front;

    const EVENTS: usize = 100;

    fn new() -> Self {
        let world = World::new();
        mbr(&mut world.media.borrow_mut().bytes);
        Self { world, living: Vec::new(), connected: 0, answered: 0 }
    }

    fn living(&mut self) -> &mut Vec<Living> {
        &mut self.living
    }

    fn arrive(&mut self, domain: u16) -> Living {
        let guest = Guest::new(&self.world.machine, &self.world.store, domain);
        Living { guest, fronts: [Front::new(XVDA), Front::new(XVDB)] }
    }

    fn event(&mut self, random: &mut Random, at: usize, device: usize, event: u32) {
        let Self { world, living, .. } = self;
        let Living { guest, fronts } = &mut living[at];
        let (domain, front) = (guest.domain, &mut fronts[device]);
        front.odd |= (73..84).contains(&event);
        match event {
            0..20 => {
                let (_, text) = random.pick(&DISKS);
                let (config, name) = (config(text), format!("guest{domain}"));
                let attached = world.disks.attach(domain, &name, &config);
                // Sometimes nobody waits for it.
                let _ = world.machine.run_for(1 + random.below(60), attached);
            }
            20..45 => {
                for _ in 0..3 {
                    front.step(guest);
                }
                self.connected += usize::from(front.state(guest) == 4);
            }
            45..65 => {
                for _ in 0..4 {
                    let op = random.pick(&[operation::READ, operation::WRITE, operation::FLUSH]);
                    front.send(guest, op, random.below(20) * 8, 8 + random.below(4));
                }
                world.machine.rounds(random.below(4));
                self.answered += front.answers().len();
            }
            65..83 => meddle(front, guest, (random, event), WRONG),
            83..84 => front.break_ring(guest),
            84..90 => {
                let detach = world.disks.detach(domain, front.device, random.below(2) == 0);
                let _ = world.machine.run_for(1 + random.below(20), detach);
            }
            90..92 => world.media.borrow_mut().hangs = true,
            92..95 => world.media.borrow_mut().hangs = false,
            95..96 => world.disks.reset("abc").unwrap(),
            _ => {
                drop(living.remove(at));
                self.end(domain);
            }
        }
    }

    fn end(&mut self, domain: u16) {
        self.world.media.borrow_mut().hangs = false;
        self.world.end(domain);
    }

    fn over(self) -> [usize; 2] {
        self.world.machine.rounds(20);
        self.world.assert_clean(&DOMAINS);
        [self.connected, self.answered]
    }
}

#[test]
fn a_thousand_random_orders_leave_nothing() {
    orders::run::<Order>();
}
