//! Event channels: how domains, vcpus and the hypervisor call on each other (ABI core 5).
//!
//! Touches: port words, and the pending and mask bits in pages shared with guests.
//! Never touches: a guest's address; the bits are reached by frame.
//! Keeps: P5. `send` takes no lock and allocates nothing: it reads one word and sets three bits.

pub mod bind;
pub mod port;

use crate::addr::{ENTRIES, Frame, Port};
use crate::domain::vcpu::{Place, Vcpu, polling};
use crate::domain::{Domain, PORT_FRAMES};
use crate::machine::{Machine, Page};
use crate::world::World;
use core::sync::atomic::{AtomicU64, Ordering};
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
        let index = usize::try_from(port.0).ok().filter(|_| port.0 > 0 && port.0 < PORTS)?;
        let frame = domain.port_frames.get(index / ENTRIES).filter(|_| index / ENTRIES < PORT_FRAMES)?;
        match frame.load(Ordering::Acquire) {
            0 => None,
            number => m.page(Frame::from_u32(number)).get(index % ENTRIES),
        }
    }

    /// What a port is.
    pub fn port<M: Machine>(&self, m: &M, domain: &Domain, port: Port) -> PortState {
        self.port_word(m, domain, port)
            .map_or(PortState::CLOSED, |word| PortState::from_word(word.load(Ordering::Acquire)))
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
            Binding::Closed | Binding::Virq(_) => None,
        }
    }

    /// Makes a port of `domain` pending, and calls on the vcpu it notifies.
    pub fn raise<M: Machine>(&self, m: &M, domain: &Domain, port: Port) {
        let target = self.port(m, domain, port).vcpu;
        let (Some(shared), Some(vcpu)) = (domain.shared_info(), self.vcpu(domain, target)) else {
            return;
        };
        let Some((pending, mask, word, bit)) = bits(m.page(shared), port) else {
            return;
        };
        // The order pending, selector, upcall is the guest's guarantee that a scan it starts finds the port.
        if pending.fetch_or(bit, Ordering::SeqCst) & bit != 0 {
            return;
        }
        if mask.load(Ordering::SeqCst) & bit == 0 {
            self.mark(m, vcpu, word);
        }
        self.wake_pollers(m, domain, port);
    }

    /// Sets a bit of a vcpu's selector, then its upcall, then wakes it.
    fn mark<M: Machine>(&self, m: &M, vcpu: &Vcpu, word: usize) {
        let Some((head, selector)) = info_words(m, vcpu) else {
            return;
        };
        let bit = 1u64.wrapping_shl(u32::try_from(word).unwrap_or(0));
        if selector.fetch_or(bit, Ordering::SeqCst) & bit == 0 && head.fetch_or(1, Ordering::SeqCst) & PENDING_BYTE == 0
        {
            self.call_on(m, vcpu);
        }
    }

    /// Wakes a vcpu that sleeps, or makes the CPU that runs it look.
    fn call_on<M: Machine>(&self, m: &M, vcpu: &Vcpu) {
        match vcpu.place() {
            Place::Blocked if self.upcall_due(m, vcpu) => self.sched.wake(m, self, vcpu),
            Place::Running => self.sched.nudge(m, vcpu),
            _ => {}
        }
    }

    fn wake_pollers<M: Machine>(&self, m: &M, domain: &Domain, port: Port) {
        for number in domain.vcpu_numbers() {
            let Some(vcpu) = self.vcpu(domain, number) else {
                continue;
            };
            let polls = vcpu.polling.load(Ordering::SeqCst);
            if polls == port.0 || polls == polling::MANY {
                self.sched.wake(m, self, vcpu);
            }
        }
    }

    /// Raises a virtual interrupt of one vcpu, if its domain has bound it.
    pub fn raise_virq<M: Machine>(&self, m: &M, vcpu: &Vcpu, virq: Virq) {
        let bound = usize::try_from(virq.number()).ok().and_then(|n| vcpu.virqs.get(n));
        let port = bound.map_or(0, |port| port.load(Ordering::Acquire));
        if let (Some(domain), true) = (self.domain_of(vcpu), port != 0) {
            self.raise(m, domain, Port(u32::from(port)));
        }
    }

    /// Raises a virtual interrupt of the whole machine at the domains that have bound it.
    pub fn raise_global<M: Machine>(&self, m: &M, virq: Virq) {
        for domain in self.domains.iter().filter(|domain| domain.life() == crate::domain::Life::Alive) {
            if let Some(vcpu) = self.vcpu(domain, crate::addr::VcpuId(0)) {
                self.raise_virq(m, vcpu, virq);
            }
        }
    }

    /// Whether an upcall is pending and not masked.
    pub fn upcall_due<M: Machine>(&self, m: &M, vcpu: &Vcpu) -> bool {
        info_words(m, vcpu).is_some_and(|(head, _)| {
            let head = head.load(Ordering::SeqCst);
            head & PENDING_BYTE != 0 && head & MASK_BYTE == 0
        })
    }

    /// The guest's upcall mask; a vcpu without a record has them masked.
    pub fn upcall_mask<M: Machine>(&self, m: &M, vcpu: &Vcpu) -> bool {
        info_words(m, vcpu).is_none_or(|(head, _)| head.load(Ordering::SeqCst) & MASK_BYTE != 0)
    }

    /// Sets the guest's upcall mask.
    pub fn set_upcall_mask<M: Machine>(&self, m: &M, vcpu: &Vcpu, masked: bool) {
        let Some((head, _)) = info_words(m, vcpu) else { return };
        if masked {
            head.fetch_or(1 << 8, Ordering::SeqCst);
            // Whatever the guest had there, it now reads 1.
            head.fetch_and(!(MASK_BYTE & !(1 << 8)), Ordering::SeqCst);
        } else {
            head.fetch_and(!MASK_BYTE, Ordering::SeqCst);
        }
    }

    /// Whether a port is pending, masked or not.
    pub(crate) fn is_pending<M: Machine>(&self, m: &M, domain: &Domain, port: Port) -> bool {
        let shared = domain.shared_info();
        shared
            .and_then(|shared| bits(m.page(shared), port))
            .is_some_and(|(pending, _, _, bit)| pending.load(Ordering::SeqCst) & bit != 0)
    }

    /// Unmasks a port, and marks its vcpu if it was pending (ABI core 5.2).
    pub(crate) fn unmask<M: Machine>(&self, m: &M, domain: &Domain, port: Port) {
        let target = self.port(m, domain, port).vcpu;
        let (Some(shared), Some(vcpu)) = (domain.shared_info(), self.vcpu(domain, target)) else {
            return;
        };
        let Some((pending, mask, word, bit)) = bits(m.page(shared), port) else {
            return;
        };
        if mask.fetch_and(!bit, Ordering::SeqCst) & bit != 0 && pending.load(Ordering::SeqCst) & bit != 0 {
            self.mark(m, vcpu, word);
        }
    }

    /// Forgets that a port was pending: it is about to become another.
    pub(crate) fn clear_pending<M: Machine>(&self, m: &M, domain: &Domain, port: Port) {
        if let Some((pending, _, _, bit)) = domain.shared_info().and_then(|shared| bits(m.page(shared), port)) {
            pending.fetch_and(!bit, Ordering::SeqCst);
        }
    }
}

/// The pending and mask words of a port, the number of the word, and the port's bit in it.
fn bits(shared: &Page, port: Port) -> Option<(&AtomicU64, &AtomicU64, usize, u64)> {
    let index = usize::try_from(port.0).ok().filter(|_| port.0 < PORTS)?;
    let word = index / 64;
    let pending = shared.get(offset::EVTCHN_PENDING / 8 + word)?;
    let mask = shared.get(offset::EVTCHN_MASK / 8 + word)?;
    Some((pending, mask, word, 1u64.wrapping_shl(port.0 & 63)))
}

/// The first word of a vcpu's record (upcall and mask bytes) and its selector.
fn info_words<'m, M: Machine>(m: &'m M, vcpu: &Vcpu) -> Option<(&'m AtomicU64, &'m AtomicU64)> {
    let at = vcpu.info.load(Ordering::Acquire);
    let frame = Frame::containing(at).filter(|_| at != 0)?;
    let first = usize::try_from(at & 0xfff).ok()? / 8;
    let page = m.page(frame);
    Some((page.get(first)?, page.get(first + vcpu_info::PENDING_SEL / 8)?))
}
