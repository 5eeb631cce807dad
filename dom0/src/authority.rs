//! The hypervisor as the toolstack wants it, by the unikernel's calls.

use alloc::boxed::Box;
use alloc::string::String;
use core::fmt;
use guest_image::{MachineFrame, Pfn};
use hypercall_abi::Errno;
use hypercall_abi::context::VcpuContext;
use hypercall_abi::domctl::DomainInfo;
use toolstack::{DomainId, Hypervisor};
use unikernel::control::{self, ForeignWriter};
use unikernel::hypercall;

/// A call that was refused: which and why.
#[derive(Debug)]
pub(crate) struct Refused(&'static str, Errno);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the hypervisor refuses {}: {}", self.0, self.1.name())
    }
}

/// Puts a call's name to an error.
fn of(call: &'static str) -> impl FnOnce(Errno) -> Refused {
    move |why| Refused(call, why)
}

/// Our authority over domains.
pub(crate) struct Authority {
    writer: ForeignWriter,
}

impl Authority {
    pub(crate) fn new() -> Result<Self, Refused> {
        let writer = ForeignWriter::new().map_err(of("a window for foreign frames"))?;
        Ok(Self { writer })
    }
}

impl Hypervisor for Authority {
    type Error = Refused;

    fn create(&mut self, uuid: &[u8; 16], vcpus: u32) -> Result<DomainId, Refused> {
        control::create(uuid, vcpus).map(DomainId).map_err(of("createdomain"))
    }

    fn set_max_memory(&mut self, domain: DomainId, kib: u64) -> Result<(), Refused> {
        control::set_max_memory(domain.0, kib).map_err(of("max_mem"))
    }

    fn populate(&mut self, domain: DomainId, first: Pfn, frames: &mut [MachineFrame]) -> Result<usize, Refused> {
        let mut numbers = alloc::vec![0; frames.len()];
        let count = control::populate(domain.0, first.0, &mut numbers).map_err(of("populate_physmap"))?;
        for (frame, number) in frames.iter_mut().zip(numbers) {
            *frame = MachineFrame(number);
        }
        Ok(count)
    }

    fn write(&mut self, domain: DomainId, frame: MachineFrame, offset: usize, bytes: &[u8]) -> Result<(), Refused> {
        self.writer.write(domain.0, frame.0, offset, bytes).map_err(of("a mapping of a guest's frame"))
    }

    fn open_port(&mut self, domain: DomainId, remote: DomainId) -> Result<u32, Refused> {
        hypercall::allocate_unbound(domain.0, remote.0).map_err(of("alloc_unbound"))
    }

    fn grant_table(&mut self, domain: DomainId) -> Result<MachineFrame, Refused> {
        control::grant_table(domain.0).map(MachineFrame).map_err(of("setup_table"))
    }

    fn pin_root(&mut self, domain: DomainId, frame: MachineFrame) -> Result<(), Refused> {
        // A table that is still mapped writable here would be refused.
        self.writer.forget();
        control::pin_root(domain.0, frame.0).map_err(of("the page tables"))
    }

    fn set_vcpu(&mut self, domain: DomainId, vcpu: u32, context: &VcpuContext) -> Result<(), Refused> {
        control::set_vcpu(domain.0, vcpu, context).map_err(of("setvcpucontext"))
    }

    fn vcpu(&mut self, domain: DomainId, vcpu: u32) -> Result<Box<VcpuContext>, Refused> {
        control::vcpu(domain.0, vcpu).map_err(of("getvcpucontext"))
    }

    fn unpause(&mut self, domain: DomainId) -> Result<(), Refused> {
        control::unpause(domain.0).map_err(of("unpausedomain"))
    }

    fn pause(&mut self, domain: DomainId) -> Result<(), Refused> {
        control::pause(domain.0).map_err(of("pausedomain"))
    }

    fn destroy(&mut self, domain: DomainId) -> Result<(), Refused> {
        self.writer.forget();
        control::destroy(domain.0).map_err(of("destroydomain"))
    }

    fn info(&mut self, from: DomainId) -> Result<Option<DomainInfo>, Refused> {
        control::info(from.0).map_err(of("getdomaininfo"))
    }

    fn crash_report(&mut self, domain: DomainId) -> Result<Option<(u32, String)>, Refused> {
        control::crash_report(domain.0).map_err(of("a crash report"))
    }
}
