//! A thousand random orders of what people, guests and devices do.

use ring_protocol::block::operation;

use crate::common::guest::Rounds;
use crate::front::{Front, Guest};
use crate::targets::mbr;
use crate::world::{World, XVDA, XVDB, config};
use test_random::Random;

const ORDERS: u64 = 1_000;
const EVENTS: usize = 100;
const DOMAINS: [u16; 3] = [5, 6, 7];
const DISKS: [(u32, &str); 6] = [
    (XVDA, "serial:abc,,xvda,w,part=1"),
    (XVDA, "serial:abc,,xvda,w,overlay=16K,part=2"),
    (XVDA, "serial:abc,,xvda,!,late=1"),
    (XVDB, "memory:8K,,xvdb,w"),
    (XVDB, "serial:abc,,xvdb,r,part=2"),
    (XVDB, "memory:512,,xvdb,r"),
];

struct Living {
    guest: Guest,
    fronts: [Front; 2],
}

struct Order {
    world: World,
    random: Random,
    living: Vec<Living>,
    connected: usize,
    answered: usize,
}

impl Order {
    fn event(&mut self) {
        let Self { world, random, living, .. } = self;
        let domain = random.pick(&DOMAINS);
        let at = living.iter().position(|living| living.guest.domain == domain);
        let Some(at) = at else {
            living.push(Living {
                guest: Guest::new(&world.machine, &world.store, domain),
                fronts: [Front::new(XVDA), Front::new(XVDB)],
            });
            return;
        };
        let Living { guest, fronts } = &mut living[at];
        let front = &mut fronts[random.below(2)];
        let event = random.below(100);
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
            65..70 => front.set_state(guest, 5),
            70..73 => front.close(guest),
            73..77 => front.set_state(guest, 1),
            77..80 => front.set_state(guest, random.below(9)),
            80..82 => drop(guest.put(&front.path("ring-ref"), random.pick(&["", "1000", "102", "x"]))),
            82..83 => guest.remove(&format!("device/vbd/{}", front.device)),
            83..84 => front.break_ring(guest),
            84..90 => {
                let detach = world.disks.detach(domain, front.device, random.below(2) == 0);
                let _ = world.machine.run_for(1 + random.below(20), detach);
            }
            90..92 => world.media.borrow_mut().hangs = true,
            92..95 => world.media.borrow_mut().hangs = false,
            95..96 => world.disks.reset("abc").unwrap(),
            _ => {
                let Living { guest, .. } = living.remove(at);
                drop(guest);
                world.media.borrow_mut().hangs = false;
                world.end(domain);
            }
        }
    }

    /// Ends all guests; nothing is left of them.
    fn bring_to_an_end(&mut self) {
        self.world.media.borrow_mut().hangs = false;
        self.living.clear();
        for domain in DOMAINS {
            self.world.end(domain);
        }
        self.world.machine.rounds(20);
        self.world.assert_clean(&DOMAINS);
    }
}

#[test]
fn a_thousand_random_orders_leave_nothing() {
    let (mut connected, mut answered) = (0, 0);
    for seed in 0..ORDERS {
        let world = World::new();
        mbr(&mut world.media.borrow_mut().bytes);
        let mut order = Order { world, random: Random::seeded(seed), living: Vec::new(), connected: 0, answered: 0 };
        for _ in 0..EVENTS {
            order.event();
        }
        order.bring_to_an_end();
        connected += order.connected;
        answered += order.answered;
    }
    assert!(connected > 5_000 && answered > 5_000, "{connected} connected, {answered} answered");
}
