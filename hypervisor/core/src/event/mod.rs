//! Event channels: how domains, vcpus and the hypervisor notify each other (ABI core 5).
//!
//! Touches: the word of each port, in which the hypervisor keeps what the port is joined to and which vcpu the port notifies
//! ([`port`]); in pages shared with guests, the pending and mask bits of ports, and each vcpu's selector, upcall byte and
//! upcall mask.
//! Never touches: a guest's virtual address, except for the arguments of calls in [`ops`] and [`message`]. Pages shared with
//! guests are reached by frame.
//! Keeps: P5, each end of a channel names the other end or nobody. Also the work of one event is bounded: [`World::send`] reads
//! the words of two ports, sets at most three bits, and allocates nothing. All vcpus that `send` wakes are of the domain whose
//! port it raises (the port's vcpu, and those that poll), so they are at most 32. Each wake takes the queue lock (a leaf lock)
//! of one CPU. If `send` also boosts the port's vcpu (`Scheduler::hand_over`), it takes the queue lock of each CPU that has
//! queued vcpus, one after the other, until it finds the vcpu. `send` takes no other lock.

mod bind;
pub mod message;
pub mod ops;
pub mod port;
pub mod vectors;

use crate::domain::Life;
use crate::machine::{Page, word};
use crate::prelude::*;
use crate::vcpu::polling;
use core::sync::atomic::AtomicU64;
use hypercall_abi::event::{PORTS, Virq};
use hypercall_abi::shared::{offset, vcpu_info};
use port::{Binding, PortState};

/// Byte 0 of a vcpu_info record, the upcall byte: not 0 if an upcall is pending.
const PENDING_BYTE: u64 = 0xff;
/// Byte 1 of the record, the upcall mask: not 0 if upcalls are masked.
const MASK_BYTE: u64 = 0xff00;

impl World {
    /// The word of a port; `None` if there is no port with this number, or the domain has no frame for the word yet.
    pub(crate) fn port_word<'m, M: Machine>(&self, m: &'m M, domain: &Domain, port: Port) -> Option<&'m AtomicU64> {
        word(m, &domain.port_frames, index(port.0)).filter(|_| (1..PORTS).contains(&port.0))
    }

    /// The state of a port. A port that has no word is closed.
    pub fn port<M: Machine>(&self, m: &M, domain: &Domain, port: Port) -> PortState {
        let word = self.port_word(m, domain, port);
        word.map_or(PortState::CLOSED, |word| PortState::from_word(word.load(Acquire)))
    }

    /// Sends an event through a port of `domain`: raises the other end of a channel, or the port itself if the port is for
    /// interprocessor interrupts. Returns `None` if the port is closed, or if the port is only raised by a virtual interrupt or
    /// a device. A channel has no other end if no domain has joined it yet, or if the other domain is gone; then the event is
    /// dropped, and `Some` is returned.
    pub fn send<M: Machine>(&self, m: &M, domain: &Domain, port: Port) -> Option<()> {
        let state = self.port(m, domain, port);
        match state.binding {
            Binding::Interdomain(other, at) => {
                if let Some(other) = self.domain(other) {
                    self.raise(m, other, at);
                }
                Some(())
            }
            Binding::Ipi => {
                self.raise(m, domain, port);
                Some(())
            }
            Binding::Unbound(_) => Some(()),
            Binding::Closed | Binding::Virq(_) | Binding::Message(_) => None,
        }
    }

    /// Makes a port of `domain` pending. If the port was not pending before, notifies the port's vcpu, unless the port is
    /// masked; and, masked or not, wakes vcpus that poll (see `wake_pollers`). Returns whether the port has become pending:
    /// `false` if the port was pending before, if there is no port with this number, or if the domain lacks the port's vcpu.
    /// Whether the port is bound makes no difference.
    pub fn raise<M: Machine>(&self, m: &M, domain: &Domain, port: Port) -> bool {
        let vcpu = self.vcpu(domain, self.port(m, domain, port).vcpu);
        let (Some(bits), Some(vcpu)) = (Bits::of(m, domain, port), vcpu) else { return false };
        self.sched.hand_over(m, vcpu);
        // The order is pending bit, selector bit, upcall byte. So a guest that sees the upcall byte finds the other two bits.
        if bits.pending.fetch_or(bits.bit, SeqCst) & bits.bit != 0 {
            return false;
        }
        if bits.mask.load(SeqCst) & bits.bit == 0 {
            self.mark(m, vcpu, bits.selector);
        }
        if domain.pollers.load(SeqCst) != 0 {
            self.wake_pollers(m, domain, port);
        }
        true
    }

    /// Wakes each vcpu of `domain` that polls `port` and nothing else, and each that polls several ports, whichever these are.
    fn wake_pollers<M: Machine>(&self, m: &M, domain: &Domain, port: Port) {
        let bits = domain.pollers.load(SeqCst);
        for number in (0..u32::BITS).filter(|number| bits >> number & 1 != 0) {
            if let Some(vcpu) = self.vcpu(domain, VcpuId(number))
                && [port.0, polling::MANY].contains(&vcpu.polling.load(SeqCst))
            {
                self.sched.wake(m, vcpu);
            }
        }
    }

    /// Sets `bit` in a vcpu's selector. If the bit was clear before, sets the upcall byte as well. If the upcall byte was also
    /// clear before, makes the vcpu notice: if another CPU runs the vcpu, kicks that CPU; if the vcpu sleeps, wakes it. A vcpu
    /// that sleeps with upcalls masked is only woken if it sleeps in `TenonOp::Wait`.
    fn mark<M: Machine>(&self, m: &M, vcpu: &Vcpu, bit: u64) {
        let selector = vcpu.record().and_then(|(frame, at)| m.page(frame).get((at + vcpu_info::PENDING_SEL) / 8));
        let (Some(head), Some(selector)) = (info_head(m, vcpu), selector) else { return };
        if selector.fetch_or(bit, SeqCst) & bit == 0 && head.fetch_or(1, SeqCst) & PENDING_BYTE == 0 {
            match vcpu.place() {
                Place::Blocked if self.upcall_due(m, vcpu) || vcpu.wakes_on_any_event() => self.sched.wake(m, vcpu),
                Place::Running(_) => self.sched.nudge(m, vcpu),
                _ => {}
            }
        }
    }

    /// Raises the port that is bound to virtual interrupt `virq` of one vcpu, if there is such a port.
    pub fn raise_virq<M: Machine>(&self, m: &M, vcpu: &Vcpu, virq: Virq) {
        let port = nth(&vcpu.virqs, virq.number()).map_or(0, |port| port.load(Acquire));
        if let (Some(domain), true) = (self.domain_of(vcpu), port != 0) {
            self.raise(m, domain, Port(u32::from(port)));
        }
    }

    /// Raises a virtual interrupt of the whole machine in all domains that have bound this interrupt.
    pub fn raise_global<M: Machine>(&self, m: &M, virq: Virq) {
        for domain in self.domains.iter().filter(|domain| domain.life() == Life::Alive) {
            if let Some(vcpu) = self.vcpu(domain, VcpuId(0)) {
                self.raise_virq(m, vcpu, virq);
            }
        }
    }

    /// Whether an upcall is due: pending and not masked.
    #[inline]
    pub fn upcall_due<M: Machine>(&self, m: &M, vcpu: &Vcpu) -> bool {
        info_head(m, vcpu).is_some_and(|head| is_due(head.load(SeqCst)))
    }

    /// Whether a port is pending, masked or not.
    pub(crate) fn is_pending<M: Machine>(&self, m: &M, domain: &Domain, port: Port) -> bool {
        Bits::of(m, domain, port).is_some_and(|bits| bits.pending.load(SeqCst) & bits.bit != 0)
    }

    /// Unmasks a port. If the port was masked and is pending, notifies the port's vcpu (ABI core 5.2).
    pub(crate) fn unmask<M: Machine>(&self, m: &M, domain: &Domain, port: Port) {
        let vcpu = self.vcpu(domain, self.port(m, domain, port).vcpu);
        let (Some(bits), Some(vcpu)) = (Bits::of(m, domain, port), vcpu) else { return };
        if bits.mask.fetch_and(!bits.bit, SeqCst) & bits.pending.load(SeqCst) & bits.bit != 0 {
            self.mark(m, vcpu, bits.selector);
        }
    }

    /// Clears the pending bit of a port that is being bound or closed, so that an event of the port's earlier use is not taken
    /// for an event of its next use.
    pub(crate) fn clear_pending<M: Machine>(&self, m: &M, domain: &Domain, port: Port) {
        if let Some(bits) = Bits::of(m, domain, port) {
            bits.pending.fetch_and(!bits.bit, SeqCst);
        }
    }
}

/// Whether `head`, the first word of a vcpu_info record, says that an upcall is pending and not masked.
#[inline]
pub(crate) const fn is_due(head: u64) -> bool {
    let head = head & (PENDING_BYTE | MASK_BYTE);
    0 < head && head <= PENDING_BYTE // not 0: one of the bytes is set; at most 0xff: it is the upcall byte alone
}

/// A vcpu's upcall mask, a byte of the vcpu's vcpu_info record. The guest changes this byte as well.
pub(crate) struct UpcallMask<'m>(Option<&'m AtomicU64>);

impl<'m> UpcallMask<'m> {
    /// The upcall mask of `vcpu`, in the record that the vcpu has now. A call of the guest may give the vcpu another record
    /// later.
    pub(crate) fn of<M: Machine>(m: &'m M, vcpu: &Vcpu) -> Self {
        Self(info_head(m, vcpu))
    }

    /// Whether an upcall is pending, masked or not.
    pub(crate) fn is_awaited(&self) -> bool {
        self.0.is_some_and(|head| head.load(SeqCst) & PENDING_BYTE != 0)
    }

    /// Whether upcalls are masked; `true` if the vcpu has no record.
    pub(crate) fn is_set(&self) -> bool {
        self.0.is_none_or(|head| head.load(SeqCst) & MASK_BYTE != 0)
    }

    /// Masks or unmasks upcalls.
    pub(crate) fn set(&self, masked: bool) {
        let Some(head) = self.0 else { return };
        if masked {
            head.fetch_or(1 << 8, SeqCst);
            // The guest reads 1 afterwards, whatever bits it had set in this byte.
            head.fetch_and(!(MASK_BYTE & !(1 << 8)), SeqCst);
        } else {
            head.fetch_and(!MASK_BYTE, SeqCst);
        }
    }
}

/// Where the bits of a port are in the shared_info page.
struct Bits<'m> {
    pending: &'m AtomicU64,
    mask: &'m AtomicU64,
    /// The port's bit in `pending` and `mask`.
    bit: u64,
    /// The bit in a vcpu's selector that stands for all ports of the word `pending`.
    selector: u64,
}

impl<'m> Bits<'m> {
    fn of<M: Machine>(m: &'m M, domain: &Domain, port: Port) -> Option<Self> {
        let shared: &Page = m.page(domain.shared_info().filter(|_| port.0 < PORTS)?);
        let word = index(port.0) / 64;
        Some(Self {
            pending: shared.get(offset::EVTCHN_PENDING / 8 + word)?,
            mask: shared.get(offset::EVTCHN_MASK / 8 + word)?,
            bit: 1 << (port.0 % 64),
            selector: 1 << (port.0 / 64 % 64),
        })
    }
}

/// The first word of a vcpu's vcpu_info record, with the upcall byte and the upcall mask; `None` if the vcpu has no record.
fn info_head<'m, M: Machine>(m: &'m M, vcpu: &Vcpu) -> Option<&'m AtomicU64> {
    let at = vcpu.info.load(Acquire);
    if at == 0 { None } else { Some(m.word(at)) }
}
