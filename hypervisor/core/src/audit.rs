//! What an audit may see of state that modules keep private. Only for `tests/sim`: no image has this.

use crate::addr::{CpuId, FrameSlot, MAX_VCPUS};
use crate::domain::Life;
use crate::domain::life::Subsystem;
use crate::event::UpcallMask;
use crate::event::port::{Binding, PortState};
use crate::grant::Grants;
use crate::lock::{Above, Leaf, Level, Lock, Nothing, Owned};
use crate::prelude::*;
use crate::vcpu::context;
use core::fmt::{Debug, Write};
use core::ops::Range;
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64};
use hypercall_abi::event::PORTS;
use zerocopy::IntoBytes;

/// The frames in a list of slots, without the empty slots.
pub(crate) fn frames(list: &[FrameSlot]) -> impl Iterator<Item = Frame> {
    list.iter().filter_map(FrameSlot::get)
}

/// A handle of a domain: which grant it holds, and how.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Held {
    /// The granter.
    pub owner: DomainId,
    /// The reference.
    pub gref: u32,
    /// The frame.
    pub frame: Frame,
    /// Whether it is held for writing.
    pub writable: bool,
    /// Whether a page-table entry was made for it.
    pub host: bool,
}

impl World {
    /// Indexes of the vcpus in a CPU's queue, in order, and how many the CPU counts. `None` if the CPU miscounts the urgent
    /// ones.
    pub fn run_queue(&self, cpu: CpuId) -> Option<(heapless::Deque<u16, MAX_VCPUS>, u16)> {
        self.sched.cpu(cpu).queue()
    }

    /// The domain and port that a message of a device with this vector raises.
    #[must_use]
    pub fn message_taker(&self, vector: u8) -> Option<(DomainId, Port)> {
        self.messages.taker(vector)
    }

    /// Whether a vcpu sleeps though an event that wakes it is there.
    pub fn sleeps_through<M: Machine>(&self, m: &M, vcpu: &Vcpu) -> bool {
        let waited = vcpu.wakes_on_any_event() && UpcallMask::of(m, vcpu).is_awaited();
        vcpu.place() == Place::Blocked && (waited || self.upcall_due(m, vcpu))
    }

    /// Whether a CPU keeps the deadlines of a vcpu, and handles them in time.
    #[must_use]
    pub fn keeps_deadlines(&self, cpu: CpuId, vcpu: &Vcpu) -> bool {
        let (cpu, mut watched) = (self.sched.cpu(cpu), false);
        cpu.for_watched(|index| watched |= index == vcpu.index());
        watched && cpu.due() <= vcpu.earliest()
    }
}

impl Domain {
    /// Frames of the domain's ports.
    pub fn port_frames(&self) -> impl Iterator<Item = Frame> + '_ {
        frames(&self.port_frames)
    }

    /// The domain's crash report.
    pub fn last_words(&self) -> hypercall_abi::tenon::CrashReport {
        self.notes.with(|notes| notes.report)
    }
}

impl Vcpu {
    /// The frame that holds the vcpu's record, if it has one.
    #[must_use]
    pub fn info_frame(&self) -> Option<Frame> {
        self.record().map(|(frame, _)| frame)
    }

    /// When the vcpu's periodic timer fires next, if it is on.
    #[must_use]
    pub fn next_tick(&self) -> Option<u64> {
        (self.period.load(Relaxed) != 0).then(|| self.next_tick.load(Relaxed))
    }

    /// Whether the guest has brought the vcpu up.
    #[must_use]
    pub fn is_online(&self) -> bool {
        self.online.load(SeqCst)
    }

    /// The port that a virtual interrupt is bound to.
    #[must_use]
    pub fn virq_port(&self, virq: usize) -> Option<Port> {
        let port = self.virqs.get(virq)?.load(Acquire);
        (port != 0).then_some(Port(u32::from(port)))
    }
}

/// A part of a domain's state as a plain value. All facts together are enough to make another, equal domain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Fact<'a> {
    Kept {
        powers: u8,
        set_aside: u32,
    },
    /// A vcpu that runs on no CPU: its context, as in the ABI's structure.
    Vcpu(VcpuId, &'a [u8]),
    Memory {
        limit: u64,
        owned: u32,
    },
    /// Frames of devices that the domain may map.
    Devices {
        first: u32,
        end: u32,
    },
    /// A grant reference that is in use.
    Granted {
        gref: u32,
        frame: Frame,
        readers: u64,
        writers: u64,
    },
    Held(Held),
    /// A port that is not closed.
    Port(Port, PortState),
    Runs {
        vcpu: VcpuId,
        online: bool,
        deadlines: [u64; 2],
        period: u64,
        next_tick: u64,
    },
}

impl Subsystem {
    /// Shows a domain's state in this subsystem. Ring 0 needs none of it until domains can be saved or moved, except
    /// the context of a vcpu.
    fn get<M: Machine>(self, m: &M, world: &World, domain: &Domain, see: &mut dyn FnMut(Fact<'_>)) {
        match self {
            Self::Kept => {
                see(Fact::Kept { powers: domain.powers(), set_aside: world.frames.promised(domain.id()) });
            }
            Self::Vcpus => {
                for vcpu in world.vcpus_of(domain) {
                    if let Some(state) = vcpu.state.try_take() {
                        see(Fact::Vcpu(vcpu.number(), context::get(m, domain, vcpu, &state).as_bytes()));
                    }
                }
            }
            Self::Memory => {
                let (limit, owned) = (domain.max_pages.load(Relaxed), world.frames.owned(domain.id()));
                see(Fact::Memory { limit, owned });
                for Range { start: first, end } in domain.space.devices.known().filter(|range| !range.is_empty()) {
                    see(Fact::Devices { first, end });
                }
            }
            Self::Grants => {
                let active = domain.grants.active_frames().flat_map(|frame| m.page(frame));
                for (gref, word) in (0..).zip(active) {
                    let (frame, readers, writers) = Grants::read_active(word.load(Relaxed));
                    if readers + writers > 0 {
                        see(Fact::Granted { gref, frame, readers, writers });
                    }
                }
                for handle in domain.grants.handle_frames().flat_map(|frame| m.page(frame).as_chunks().0) {
                    let words: [u64; 2] = handle.each_ref().map(|word: &AtomicU64| word.load(Relaxed));
                    Grants::read_handle(words).into_iter().for_each(|held| see(Fact::Held(held)));
                }
            }
            Self::Ports => {
                for port in (0..PORTS).map(Port) {
                    let state = world.port(m, domain, port);
                    if state.binding != Binding::Closed {
                        see(Fact::Port(port, state));
                    }
                }
            }
            Self::Runs => {
                for vcpu in world.vcpus_of(domain) {
                    see(Fact::Runs {
                        vcpu: vcpu.number(),
                        online: vcpu.is_online(),
                        deadlines: [vcpu.deadline.load(Relaxed), vcpu.poll_deadline.load(Relaxed)],
                        period: vcpu.period.load(Relaxed),
                        next_tick: vcpu.next_tick.load(Relaxed),
                    });
                }
            }
        }
    }
}

/// State that a test can change and read, field by field.
pub trait Field {
    /// Changes every field, so that it differs from its initial value.
    fn soil(&self);
    /// Calls `see` with the name and the value, as a number, of every field.
    fn look(&self, name: &'static str, see: &mut dyn FnMut(&'static str, u64));
}

macro_rules! fields {
    ($($word:ident: $change:expr;)*) => {
        $(impl Field for $word {
            fn soil(&self) {
                self.store($change(self.load(SeqCst)), SeqCst);
            }
            fn look(&self, name: &'static str, see: &mut dyn FnMut(&'static str, u64)) {
                see(name, self.load(SeqCst).into());
            }
        })*
    };
}
fields! {
    AtomicBool: |old: bool| !old;
    AtomicU8: |old: u8| !old;
    AtomicU16: |old: u16| !old;
    AtomicU32: |old: u32| !old;
    AtomicU64: |old: u64| !old;
}

impl Field for FrameSlot {
    fn soil(&self) {
        self.set(Frame::from_u32(u32::MAX));
    }
    fn look(&self, name: &'static str, see: &mut dyn FnMut(&'static str, u64)) {
        see(name, self.get().map_or(0, Frame::number));
    }
}

impl<T: Field, const N: usize> Field for [T; N] {
    fn soil(&self) {
        self.iter().for_each(T::soil);
    }
    fn look(&self, name: &'static str, see: &mut dyn FnMut(&'static str, u64)) {
        self.iter().for_each(|field| field.look(name, see));
    }
}

/// A value under a lock that a test can change.
pub trait Spoil: Debug {
    /// Changes the value, so that it differs from its initial value.
    fn spoil(&mut self);
}

impl Spoil for () {
    fn spoil(&mut self) {}
}

impl<T: Spoil> Field for Leaf<T> {
    fn soil(&self) {
        self.with(T::spoil);
    }
    fn look(&self, name: &'static str, see: &mut dyn FnMut(&'static str, u64)) {
        see(name, self.with(|value| number_of(value)));
    }
}

impl<L: Above<Nothing> + Level, T: Spoil> Field for Lock<L, T> {
    fn soil(&self) {
        self.lock(&mut crate::lock::Held::entering_ring_0()).spoil();
    }
    fn look(&self, name: &'static str, see: &mut dyn FnMut(&'static str, u64)) {
        see(name, number_of(&*self.lock(&mut crate::lock::Held::entering_ring_0())));
    }
}

impl<T: Spoil> Field for Owned<T> {
    fn soil(&self) {
        self.try_take().iter_mut().for_each(|value| value.spoil());
    }
    fn look(&self, name: &'static str, see: &mut dyn FnMut(&'static str, u64)) {
        see(name, self.try_take().map_or(u64::MAX, |value| number_of(&*value)));
    }
}

impl Spoil for VcpuState {
    fn spoil(&mut self) {
        self.regs.rip = 1;
        self.raise(1, None);
        (self.time_area, self.iopl, self.initialised) = (Some(GuestVirt(8)), 3, true);
    }
}

/// The FNV hash of a value's `Debug` output.
fn number_of(value: &impl Debug) -> u64 {
    struct Sum(u64);
    impl Write for Sum {
        fn write_str(&mut self, text: &str) -> core::fmt::Result {
            self.0 = text.bytes().fold(self.0, |sum, byte| (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
            Ok(())
        }
    }
    let mut sum = Sum(0xcbf2_9ce4_8422_2325);
    let _ = write!(sum, "{value:?}");
    sum.0
}

impl World {
    /// Changes every free slot, as the worst domain could have left it.
    pub fn soil(&self) {
        for domain in self.domains.iter().filter(|domain| domain.life() == Life::Free) {
            domain.soil();
            domain.mark_free();
        }
        for vcpu in self.vcpus.iter().filter(|vcpu| vcpu.domain.load(SeqCst) == 0) {
            vcpu.soil();
            vcpu.domain.store(0, SeqCst);
        }
    }

    /// Shows the whole state of a domain, subsystem by subsystem.
    pub fn facts<M: Machine>(&self, m: &M, domain: &Domain, see: &mut dyn FnMut(Fact<'_>)) {
        Subsystem::ALL.iter().for_each(|subsystem| subsystem.get(m, self, domain, see));
    }

    /// Shows all fields of a domain and its vcpus.
    pub fn look(&self, domain: &Domain, see: &mut dyn FnMut(&'static str, u64)) {
        domain.look("domain", see);
        self.vcpus_of(domain).for_each(|vcpu| vcpu.look("vcpu", see));
    }
}
