//! A port's state as one word, so that `send` reads it with one load and no lock (ABI core 5).

use crate::addr::{DomainId, Port, VcpuId};

/// What a port is joined to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Binding {
    /// Nothing: the port is free.
    Closed,
    /// Nothing yet: this domain may join the channel.
    Unbound(DomainId),
    /// The other end of the channel: this port of this domain.
    Interdomain(DomainId, Port),
    /// The virtual interrupt with this number.
    Virq(u32),
    /// Itself: vcpus of the domain send interprocessor interrupts through it.
    Ipi,
    /// The messages of a device that come with this vector.
    Message(u8),
}

/// A port: what it is joined to and which vcpu it notifies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PortState {
    /// What the port is joined to.
    pub binding: Binding,
    /// The vcpu that is notified when the port is raised.
    pub vcpu: VcpuId,
}

impl PortState {
    /// A free port.
    pub const CLOSED: Self = Self { binding: Binding::Closed, vcpu: VcpuId(0) };

    /// The word: kind in bits 0..4, vcpu in 4..16, domain in 16..32, port, virq or vector in 32..64.
    #[must_use]
    pub fn to_word(self) -> u64 {
        let word = |kind: u64, domain: u16, detail: u32| kind | u64::from(domain) << 16 | u64::from(detail) << 32;
        let binding = match self.binding {
            Binding::Closed => return 0,
            Binding::Unbound(domain) => word(1, domain.0, 0),
            Binding::Interdomain(domain, port) => word(2, domain.0, port.0),
            Binding::Virq(virq) => word(3, 0, virq),
            Binding::Ipi => word(4, 0, 0),
            Binding::Message(vector) => word(5, 0, vector.into()),
        };
        binding | u64::from(self.vcpu.0 & 0xfff) << 4
    }

    /// The state that [`PortState::to_word`] made `word` of; closed if the word has no known kind.
    #[must_use]
    pub fn from_word(word: u64) -> Self {
        let [_, _, d0, d1, p0, p1, p2, p3] = word.to_le_bytes();
        let domain = DomainId(u16::from_le_bytes([d0, d1]));
        let detail = u32::from_le_bytes([p0, p1, p2, p3]);
        let binding = match word & 0xf {
            1 => Binding::Unbound(domain),
            2 => Binding::Interdomain(domain, Port(detail)),
            3 => Binding::Virq(detail),
            4 => Binding::Ipi,
            5 => Binding::Message(p0),
            _ => return Self::CLOSED,
        };
        Self { binding, vcpu: VcpuId(u32::try_from(word >> 4 & 0xfff).unwrap_or(0)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_survives_its_word() {
        let bindings = [
            Binding::Unbound(DomainId(0x7fef)),
            Binding::Interdomain(DomainId(3), Port(4095)),
            Binding::Virq(23),
            Binding::Ipi,
            Binding::Message(0xdf),
        ];
        for binding in bindings {
            for vcpu in [0, 1, 31, 4095] {
                let state = PortState { binding, vcpu: VcpuId(vcpu) };
                assert_eq!(PortState::from_word(state.to_word()), state);
            }
        }
        assert_eq!(PortState::from_word(PortState::CLOSED.to_word()), PortState::CLOSED);
        assert_eq!(PortState::from_word(0xf), PortState::CLOSED);
    }
}
