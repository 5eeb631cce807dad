//! The guests' lives: made as the bundle says, watched, and made anew or forgotten when they end.

use alloc::rc::Rc;
use alloc::vec::Vec;
use hypercall_abi::event::Virq;
use hypercall_abi::sched::ShutdownReason;
use toolstack::create::{CreateError, Guest, Request, create};
use toolstack::end::{Outcome, end_of};
use toolstack::{DomainId, Summary, domains};
use unikernel::events::Channel;
use unikernel::{hypercall, memory, println, time};

use crate::authority::Authority;
use crate::bundle::{self, Recipe};
use crate::consoles::Consoles;
use crate::stores::{OWN, Session, Stores};

/// A guest that lives, and what it was made of.
struct Living {
    guest: Guest,
    recipe: Recipe,
}

/// Everything a guest's life needs.
struct Keeper {
    hypervisor: Authority,
    session: Session,
    consoles: Rc<Consoles>,
    living: Vec<Living>,
    /// Guests that ended and stay to be looked at.
    preserved: Vec<Guest>,
}

/// Makes the guests and stays with them; answers how this domain is to end: well when the last guest is gone, as a crash
/// when not one could be made.
pub(crate) async fn run(bundle: &'static [u8], stores: Rc<Stores>, consoles: Rc<Consoles>) -> ShutdownReason {
    let hypervisor = match Authority::new() {
        Ok(hypervisor) => hypervisor,
        Err(why) => {
            log::error!("{why}");
            return ShutdownReason::Crash;
        }
    };
    let session = Session(stores);
    let mut keeper = Keeper { hypervisor, session, consoles, living: Vec::new(), preserved: Vec::new() };
    // Bound before there is a guest, so that no end is missed.
    let ends = match hypercall::bind_virq(Virq::DomExc, 0) {
        Ok(port) => Channel::adopt(port),
        Err(why) => {
            log::error!("the ends of domains are not told: {}", why.name());
            return ShutdownReason::Crash;
        }
    };
    for recipe in bundle::recipes(bundle) {
        match recipe {
            Ok(recipe) => keeper.make(recipe),
            Err(why) => log::error!("{why}"),
        }
    }
    if keeper.living.is_empty() {
        log::error!("no guest runs");
        return ShutdownReason::Crash;
    }
    keeper.list();
    while !keeper.living.is_empty() {
        keeper.look_after_ends();
        if keeper.living.is_empty() {
            break;
        }
        ends.wait().await;
    }
    ShutdownReason::Poweroff
}

impl Keeper {
    /// Makes a guest and lets it run.
    fn make(&mut self, recipe: Recipe) {
        let name = recipe.config.name.clone();
        let start = time::now_ns();
        match self.try_make(&recipe) {
            Ok(guest) => {
                let ms = (time::now_ns() - start) / 1_000_000;
                println!("dom0: guest {name} is domain {}, made in {ms} ms", guest.domain);
                self.living.push(Living { guest, recipe });
            }
            Err(why) => log::error!("{why}"),
        }
    }

    fn try_make(&mut self, recipe: &Recipe) -> Result<Guest, CreateError> {
        let half_of_memory = memory::free_pages() * memory::PAGE / 2;
        let request = Request {
            config: &recipe.config,
            kernel: recipe.kernel,
            ramdisk: recipe.ramdisk,
            uuid: uuid(),
            backend: DomainId(OWN),
            kernel_limit: usize::try_from(half_of_memory).unwrap_or(usize::MAX),
        };
        let guest = create(&mut self.hypervisor, &mut self.session, &request)?;
        self.consoles.attach(&guest);
        let attached = guest.clone();
        guest.start(&mut self.hypervisor, &mut self.session).inspect_err(|_| self.consoles.detach(&attached))
    }

    /// Prints what runs.
    fn list(&mut self) {
        println!("{:20} {:>5} {:>8} {:>5} {:5} {:>9}", "Name", "ID", "Mem/MiB", "VCPUs", "State", "Time(s)");
        match domains(&mut self.hypervisor) {
            Ok(domains) => {
                for domain in domains {
                    println!("{:20} {}", self.name_of(domain.domain), Summary(&domain));
                }
            }
            Err(why) => log::error!("{why}"),
        }
    }

    fn name_of(&self, domain: u16) -> &str {
        if domain == OWN {
            return "dom0";
        }
        let found = self.living.iter().find(|living| living.guest.domain.0 == domain);
        found.map_or("?", |living| &living.guest.config.name)
    }

    /// Looks at every guest: the interrupt says that one ended, not which.
    fn look_after_ends(&mut self) {
        let mut restarts = Vec::new();
        for living in core::mem::take(&mut self.living) {
            match end_of(&mut self.hypervisor, &living.guest) {
                Ok(None) => self.living.push(living),
                Ok(Some(end)) => {
                    self.consoles.detach(&living.guest);
                    self.session.0.domain_shut_down(living.guest.domain);
                    println!("dom0: {}", end.report);
                    let Living { guest, recipe } = living;
                    let (outcome, left_over) = guest.finish(&end, &mut self.hypervisor, &mut self.session);
                    for what in left_over {
                        log::error!("left over: {what}");
                    }
                    match outcome {
                        Outcome::Gone => {}
                        Outcome::Restart(config) => restarts.push(Recipe { config, ..recipe }),
                        Outcome::Preserved(guest) => self.preserved.push(guest),
                    }
                }
                Err(why) => {
                    log::error!("guest {}: {why}", living.guest.config.name);
                    self.living.push(living);
                }
            }
        }
        for recipe in restarts {
            self.make(recipe);
        }
    }
}

/// A name that differs from others: the counter and the clock, mixed. Nothing rests on its being unguessable.
fn uuid() -> [u8; 16] {
    let mut state = time::counter() ^ time::now_ns().rotate_left(32);
    let mut bytes = [0; 16];
    for half in bytes.chunks_mut(8) {
        // The finalizer of the splitmix generator.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = state;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        half.copy_from_slice(&(mixed ^ mixed >> 31).to_le_bytes());
    }
    // Version 4, variant 1.
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    bytes
}
