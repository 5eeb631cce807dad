//! A thousand random orders of what people and guests do.

use crate::ALL;
use crate::common::guest::Rounds;
use crate::front::{Front, Guest};
use crate::world::{World, test_frame, test_text};
use test_random::Random;

const ORDERS: u64 = 1_000;
const EVENTS: usize = 200;
const DOMAINS: [u16; 3] = [5, 6, 7];
const VIFS: [&str; 8] =
    ["", "", "bridge=a", "bridge=a", "bridge=b", "bridge=a,ip=10.77.1.9", "ip=10.77.0.9,rate=50KB/s", "bridge=uplink"];

struct Living {
    guest: Guest,
    fronts: [Front; 2],
}

struct Order {
    world: World,
    random: Random,
    living: Vec<Living>,
    connected: usize,
    heard: usize,
}

impl Order {
    fn event(&mut self) {
        let Self { world, random, living, .. } = self;
        let domain = random.pick(&DOMAINS);
        let Some(at) = living.iter().position(|living| living.guest.domain == domain) else {
            living.push(Living { guest: world.guest(domain), fronts: [Front::new(0), Front::new(1)] });
            return;
        };
        let macs: Vec<[u8; 6]> = living.iter().flat_map(|living| &living.fronts).map(|front| front.mac).collect();
        let Living { guest, fronts } = &mut living[at];
        let front = &mut fronts[random.below(2)];
        let event = random.below(100);
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
            65..70 => front.set_state(guest, 5),
            70..73 => front.close(guest),
            73..77 => front.set_state(guest, 1),
            77..80 => front.set_state(guest, random.below(9)),
            80..82 => {
                let key = random.pick(&["tx-ring-ref", "rx-ring-ref", "event-channel-tx", "event-channel-rx"]);
                guest.put(&front.path(key), random.pick(&["", "10000", "99", "x"]));
            }
            82..83 => guest.remove(&format!("device/vif/{}", front.device)),
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
                world.end(domain);
                assert!(world.listed(domain).is_empty());
            }
        }
    }

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

    /// Ends all guests; nothing is left of them.
    fn bring_to_an_end(&mut self) {
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
    let (mut connected, mut heard) = (0, 0);
    for seed in 0..ORDERS {
        let mut order =
            Order { world: World::new(), random: Random::seeded(seed), living: Vec::new(), connected: 0, heard: 0 };
        for _ in 0..EVENTS {
            order.event();
        }
        order.bring_to_an_end();
        connected += order.connected;
        heard += order.heard;
    }
    assert!(connected > 5_000 && heard > 5_000, "{connected} connected, {heard} frames heard");
}
