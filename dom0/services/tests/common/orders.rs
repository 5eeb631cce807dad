//! A thousand random orders of what people, guests and devices do.

use test_random::Random;

use super::front::FrontEnd;
use super::guest::{Guest, Rounds};

const ORDERS: u64 = 1_000;
pub const DOMAINS: [u16; 3] = [5, 6, 7];

/// A guest that lives, with two devices of a kind.
pub struct Living<M, F> {
    pub guest: Guest<M>,
    pub fronts: [F; 2],
}

/// What happens in one order, to which guests and devices.
pub trait Order {
    type Machine: Rounds;
    type Front: FrontEnd<Self::Machine>;

    /// The number of events of an order.
    const EVENTS: usize;

    fn new() -> Self;

    fn living(&mut self) -> &mut Vec<Living<Self::Machine, Self::Front>>;

    fn arrive(&mut self, domain: u16) -> Living<Self::Machine, Self::Front>;

    /// The event `event` of a hundred happens to the guest `at` of the living, and to its device `device`.
    fn event(&mut self, random: &mut Random, at: usize, device: usize, event: u32);

    /// Ends a domain. Its guest is not living any more.
    fn end(&mut self, domain: u16);

    /// Asserts that all guests are gone, and returns how many devices were connected, and how much was served.
    fn over(self) -> [usize; 2];
}

/// Runs a thousand orders. Each has its own seed, which is printed, so the last one printed is the one that failed.
pub fn run<O: Order>() {
    let mut done = [0; 2];
    for seed in 0..ORDERS {
        println!("the order {seed}");
        let (mut order, mut random) = (O::new(), Random::seeded(seed));
        for _ in 0..O::EVENTS {
            let domain = random.pick(&DOMAINS);
            let Some(at) = order.living().iter().position(|living| living.guest.domain == domain) else {
                let arrived = order.arrive(domain);
                order.living().push(arrived);
                continue;
            };
            let (device, event) = (random.below(2), random.below(100));
            order.event(&mut random, at, device, event);
        }
        order.living().clear();
        for domain in DOMAINS {
            order.end(domain);
        }
        for (sum, more) in done.iter_mut().zip(order.over()) {
            *sum += more;
        }
    }
    let [connected, served] = done;
    assert!(connected > 5_000 && served > 5_000, "{connected} connected, {served} served");
}

/// A front end does what stock drivers do now and then (the events 65 to 76), or what they do not (up to 82).
///
/// The keys are those that tell where a ring is. `values` are wrong values for these keys.
pub fn meddle<M: Rounds, F: FrontEnd<M>>(
    front: &mut F,
    guest: &mut Guest<M>,
    (random, event): (&mut Random, u32),
    (keys, values): (&[&str], &[&str]),
) {
    match event {
        65..70 => front.set_state(guest, 5),
        70..73 => front.close(guest),
        73..77 => front.set_state(guest, 1),
        77..80 => front.set_state(guest, random.below(9)),
        80..82 => {
            let (key, value) = (random.pick(keys), random.pick(values));
            guest.put(&front.path(key), value);
        }
        82 => guest.remove(&format!("device/{}/{}", F::KIND, front.device())),
        _ => panic!("the event {event}"),
    }
}
