//! What an audit may see of the books that the rules keep to themselves. For `tests/sim` alone: no image has this.

use crate::addr::{CpuId, FrameSlot, MAX_VCPUS};
use crate::prelude::*;

/// The frames in a list of places for them.
pub(crate) fn frames(list: &[FrameSlot]) -> impl Iterator<Item = Frame> {
    list.iter().filter_map(FrameSlot::get)
}

/// A handle of a domain: what it holds of whose grant.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Held {
    /// The granter.
    pub owner: DomainId,
    /// The reference.
    pub gref: u32,
    /// The frame.
    pub frame: Frame,
    /// Held for writing.
    pub writable: bool,
    /// An entry of a page table was made for it.
    pub host: bool,
}

impl World {
    /// Indexes of the vcpus that wait for a CPU, in order, and how many it believes there are.
    pub fn run_queue(&self, cpu: CpuId) -> (heapless::Deque<u16, MAX_VCPUS>, u16) {
        self.sched.cpu(cpu).queue()
    }
}

impl Domain {
    /// Frames of its ports.
    pub fn port_frames(&self) -> impl Iterator<Item = Frame> + '_ {
        frames(&self.port_frames)
    }

    /// Why it crashed, if it did.
    pub fn last_words(&self) -> hypercall_abi::tenon::CrashReport {
        self.papers.with(|papers| papers.report)
    }
}

impl Vcpu {
    /// The frame its record is in, if it has one.
    #[must_use]
    pub fn info_frame(&self) -> Option<Frame> {
        self.record().map(|(frame, _)| frame)
    }

    /// Whether the guest has brought it up.
    #[must_use]
    pub fn is_online(&self) -> bool {
        self.online.load(SeqCst)
    }

    /// The port a virtual interrupt is bound to.
    #[must_use]
    pub fn virq_port(&self, virq: usize) -> Option<Port> {
        let port = self.virqs.get(virq)?.load(Acquire);
        (port != 0).then_some(Port(u32::from(port)))
    }
}
