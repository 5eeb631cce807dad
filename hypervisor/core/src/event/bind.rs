//! How free ports are found, and how ports are changed and closed.
//!
//! Every change of a port is made under the lock `World::ports`, so that both ends of a channel change together (P5).

use super::port::{Binding, PortState};
use crate::addr::ENTRIES;
use crate::fault::{Fault, planted};
use crate::prelude::*;
use hypercall_abi::event::PORTS;

impl World {
    pub(super) fn set_port<M: Machine>(&self, m: &M, domain: &Domain, port: Port, state: PortState) {
        if let Some(word) = self.port_word(m, domain, port) {
            word.store(state.to_word(), Release);
        }
    }

    /// Returns the lowest free port. If no port is free in the frames that the domain has for ports, allocates one more frame.
    /// `NoSpc` if the domain has as many frames of ports as a domain is allowed, and all are full.
    pub(super) fn free_port<M: Machine>(&self, m: &M, domain: &Domain) -> Result<Port, Errno> {
        for (first, slot) in (0..PORTS).step_by(ENTRIES).zip(&domain.port_frames) {
            if slot.get().is_none() {
                slot.set(self.frames.allocate_for(m, domain.id())?);
            }
            let free = |port: &Port| self.port_word(m, domain, *port).is_some_and(|word| word.load(Acquire) == 0);
            if let Some(port) = (first..PORTS).take(ENTRIES).map(Port).find(free) {
                return Ok(port);
            }
        }
        Err(Errno::NoSpc)
    }

    /// Closes a port; `Inval` if it is closed already. If the port was one end of a channel, the other end becomes unbound:
    /// `domain` may join it again. The caller holds the lock `World::ports`.
    pub(super) fn close<M: Machine>(&self, m: &M, domain: &Domain, port: Port) -> Result<(), Errno> {
        let state = self.port(m, domain, port);
        match state.binding {
            Binding::Closed => return Err(Errno::Inval),
            Binding::Interdomain(other, at) => {
                if let Some(other) = self.domain(other) {
                    let end = self.port(m, other, at);
                    if end.binding == Binding::Interdomain(domain.id(), port) {
                        self.set_port(m, other, at, PortState { binding: Binding::Unbound(domain.id()), ..end });
                    }
                }
            }
            Binding::Virq(virq) => {
                // The port of a machine-wide virtual interrupt is recorded in vcpu 0. The port of any other virtual interrupt
                // is recorded in the vcpu that the port notifies. Only a record that names this port is cleared.
                let vcpus = [state.vcpu, VcpuId(0)].map(|number| self.vcpu(domain, number));
                for slot in vcpus.into_iter().flatten().filter_map(|vcpu| nth(&vcpu.virqs, virq)) {
                    let _ = slot.compare_exchange(low16(u64::from(port.0)), 0, AcqRel, Acquire);
                }
            }
            Binding::Message(vector) if !planted(Fault::KeepVector) => self.messages.free(vector),
            Binding::Unbound(_) | Binding::Ipi | Binding::Message(_) => {}
        }
        self.set_port(m, domain, port, PortState::CLOSED);
        self.clear_pending(m, domain, port);
        Ok(())
    }

    /// Closes all ports of a domain. The caller holds the lock `World::ports`.
    pub(crate) fn close_all<M: Machine>(&self, m: &M, domain: &Domain) {
        for port in (1..PORTS).map(Port).take_while(|port| self.port_word(m, domain, *port).is_some()) {
            let _ = self.close(m, domain, port);
        }
    }
}
