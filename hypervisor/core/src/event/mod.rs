//! Event channels: how domains, vcpus and the hypervisor call on each other (ABI core 5).
//!
//! Touches: port words, and the pending and mask bits in pages shared with guests.
//! Never touches: a guest's address outside [`ops`], the calls; the bits are reached by frame.
//! Keeps: P5. `send` takes no lock and allocates nothing: it reads one word and sets three bits.

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

/// Byte 0 of a vcpu_info record: an upcall is due.
const PENDING_BYTE: u64 = 0xff;
/// Byte 1: upcalls are masked.
const MASK_BYTE: u64 = 0xff00;

impl World {
    /// The word of a port, if the domain has allocated that far.
    pub(crate) fn port_word<'m, M: Machine>(&self, m: &'m M, domain: &Domain, port: Port) -> Option<&'m AtomicU64> {
        word(m, &domain.port_frames, index(port.0)).filter(|_| (1..PORTS).contains(&port.0))
    }

    /// What a port is.
    pub fn port<M: Machine>(&self, m: &M, domain: &Domain, port: Port) -> PortState {
        let word = self.port_word(m, domain, port);
        word.map_or(PortState::CLOSED, |word| PortState::from_word(word.load(Acquire)))
    }

    /// Sends through a port of `domain`: to the other end, or to itself for an interprocessor interrupt. `None`: the port
    /// is none to send through. A port whose other end is gone or not there yet swallows what is sent.
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

    /// Makes a port of `domain` pending, and calls on the vcpu it notifies. Returns whether it was not pending already.
    pub fn raise<M: Machine>(&self, m: &M, domain: &Domain, port: Port) -> bool {
        let vcpu = self.vcpu(domain, self.port(m, domain, port).vcpu);
        let (Some(bits), Some(vcpu)) = (Bits::of(m, domain, port), vcpu) else { return false };
        // The order pending, selector, upcall is the guest's guarantee that a scan it starts finds the port.
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

    /// Wakes the vcpus that poll a port.
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

    /// Sets a bit of a vcpu's selector, then its upcall, then wakes it if it sleeps or makes the CPU that runs it look.
    fn mark<M: Machine>(&self, m: &M, vcpu: &Vcpu, bit: u64) {
        let selector = vcpu.record().and_then(|(frame, at)| m.page(frame).get((at + vcpu_info::PENDING_SEL) / 8));
        let (Some(head), Some(selector)) = (info_head(m, vcpu), selector) else { return };
        if selector.fetch_or(bit, SeqCst) & bit == 0 && head.fetch_or(1, SeqCst) & PENDING_BYTE == 0 {
            match vcpu.place() {
                Place::Blocked if self.upcall_due(m, vcpu) || vcpu.waits() => self.sched.wake(m, vcpu),
                Place::Running(_) => self.sched.nudge(m, vcpu),
                _ => {}
            }
        }
    }

    /// Raises a virtual interrupt of one vcpu, if its domain has bound it.
    pub fn raise_virq<M: Machine>(&self, m: &M, vcpu: &Vcpu, virq: Virq) {
        let port = nth(&vcpu.virqs, virq.number()).map_or(0, |port| port.load(Acquire));
        if let (Some(domain), true) = (self.domain_of(vcpu), port != 0) {
            self.raise(m, domain, Port(u32::from(port)));
        }
    }

    /// Raises a virtual interrupt of the whole machine at the domains that have bound it.
    pub fn raise_global<M: Machine>(&self, m: &M, virq: Virq) {
        for domain in self.domains.iter().filter(|domain| domain.life() == Life::Alive) {
            if let Some(vcpu) = self.vcpu(domain, VcpuId(0)) {
                self.raise_virq(m, vcpu, virq);
            }
        }
    }

    /// Whether an upcall is pending and not masked.
    #[inline]
    pub fn upcall_due<M: Machine>(&self, m: &M, vcpu: &Vcpu) -> bool {
        info_head(m, vcpu).is_some_and(|head| is_due(head.load(SeqCst)))
    }

    /// Whether a port is pending, masked or not.
    pub(crate) fn is_pending<M: Machine>(&self, m: &M, domain: &Domain, port: Port) -> bool {
        Bits::of(m, domain, port).is_some_and(|bits| bits.pending.load(SeqCst) & bits.bit != 0)
    }

    /// Unmasks a port, and marks its vcpu if it was pending (ABI core 5.2).
    pub(crate) fn unmask<M: Machine>(&self, m: &M, domain: &Domain, port: Port) {
        let vcpu = self.vcpu(domain, self.port(m, domain, port).vcpu);
        let (Some(bits), Some(vcpu)) = (Bits::of(m, domain, port), vcpu) else { return };
        if bits.mask.fetch_and(!bits.bit, SeqCst) & bits.pending.load(SeqCst) & bits.bit != 0 {
            self.mark(m, vcpu, bits.selector);
        }
    }

    /// Forgets that a port was pending: it is about to become another.
    pub(crate) fn clear_pending<M: Machine>(&self, m: &M, domain: &Domain, port: Port) {
        if let Some(bits) = Bits::of(m, domain, port) {
            bits.pending.fetch_and(!bits.bit, SeqCst);
        }
    }
}

/// Whether the first word of a record says that an upcall is pending and not masked.
#[inline]
pub(crate) const fn is_due(head: u64) -> bool {
    let head = head & (PENDING_BYTE | MASK_BYTE);
    0 < head && head <= PENDING_BYTE // the one is the lowest byte, the other above it
}

/// A vcpu's upcall mask, in a record that its guest changes as well.
pub(crate) struct UpcallMask<'m>(Option<&'m AtomicU64>);

impl<'m> UpcallMask<'m> {
    /// That of a vcpu. Its record stays where it is until the guest moves it.
    pub(crate) fn of<M: Machine>(m: &'m M, vcpu: &Vcpu) -> Self {
        Self(info_head(m, vcpu))
    }

    /// Whether an upcall is pending, masked or not.
    pub(crate) fn is_awaited(&self) -> bool {
        self.0.is_some_and(|head| head.load(SeqCst) & PENDING_BYTE != 0)
    }

    /// Whether upcalls are masked; without a record they are.
    pub(crate) fn is_set(&self) -> bool {
        self.0.is_none_or(|head| head.load(SeqCst) & MASK_BYTE != 0)
    }

    /// Lets upcalls in, or not.
    pub(crate) fn set(&self, masked: bool) {
        let Some(head) = self.0 else { return };
        if masked {
            head.fetch_or(1 << 8, SeqCst);
            // Whatever the guest had there, it now reads 1.
            head.fetch_and(!(MASK_BYTE & !(1 << 8)), SeqCst);
        } else {
            head.fetch_and(!MASK_BYTE, SeqCst);
        }
    }
}

/// Where a port's bits are in the shared_info page.
struct Bits<'m> {
    pending: &'m AtomicU64,
    mask: &'m AtomicU64,
    /// Its bit in both words.
    bit: u64,
    /// The bit that stands for the words in a vcpu's selector.
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

/// The first word of a vcpu's record: upcall and mask bytes.
fn info_head<'m, M: Machine>(m: &'m M, vcpu: &Vcpu) -> Option<&'m AtomicU64> {
    let at = vcpu.info.load(Acquire);
    if at == 0 { None } else { Some(m.word(at)) }
}
