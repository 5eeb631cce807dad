//! The toolstack's hypervisor: the real one, by hypercalls.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use core::cell::RefCell;
use core::fmt;

use guest_image::{MachineFrame, Pfn};
use hypercall_abi::Errno;
use hypercall_abi::context::VcpuContext;
use hypercall_abi::domctl::DomainInfo;
use hypercall_abi::sysctl::PhysInfo;
use hypercall_abi::tenon::Refusals;
use toolstack::blocks::{Blocks, View};
use toolstack::runs::{RUN_ORDER, populate};
use toolstack::{DomainId, Hypervisor, Progress};
use unikernel::memory::Foreign;
use unikernel::{control, hypercall};

/// A hypercall was refused.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Refused {
    call: &'static str,
    errno: Errno,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} refused: {}", self.call, self.errno.name())
    }
}

fn by(call: &'static str) -> impl FnOnce(Errno) -> Refused {
    move |errno| Refused { call, errno }
}

/// Authority over domains.
#[derive(Default)]
pub(crate) struct Xen {
    building: RefCell<Option<Blocks<Mapped>>>,
}

/// Frames of the domain that is being filled, mapped.
struct Mapped(Foreign);

impl View for Mapped {
    fn reserve(count: u64) -> Result<Self, Errno> {
        Foreign::reserve(count).map(Self)
    }

    fn show(&mut self, domain: u16, frames: &[u64]) -> Result<(), Errno> {
        self.0.show(domain, frames)
    }

    fn write(&self, index: u64, offset: usize, bytes: &[u8]) -> Result<(), Errno> {
        self.0.write(index, offset, bytes)
    }
}

impl Xen {
    /// Works on the domain being filled, which is this one from now on.
    fn building<T>(&self, domain: DomainId, work: impl FnOnce(&mut Blocks<Mapped>) -> T) -> T {
        let building = &mut *self.building.borrow_mut();
        if building.as_ref().is_none_or(|building| building.domain() != domain.0) {
            *building = None;
        }
        work(building.get_or_insert_with(|| Blocks::new(domain.0)))
    }

    /// Lets go of all frames of a domain: they may become page tables, or free.
    fn let_go(&self, domain: DomainId) {
        let building = &mut *self.building.borrow_mut();
        if building.as_ref().is_some_and(|building| building.domain() == domain.0) {
            *building = None;
        }
    }
}

impl Hypervisor for Xen {
    type Error = Refused;

    fn create(&self, uuid: &[u8; 16], vcpus: u32) -> Result<DomainId, Refused> {
        let domain = control::create(uuid, vcpus).map_err(by("creating a domain"))?;
        Ok(DomainId(domain))
    }

    fn set_max_memory(&self, domain: DomainId, kib: u64) -> Result<(), Refused> {
        control::set_max_memory(domain.0, kib).map_err(by("limiting memory"))
    }

    fn populate(&self, domain: DomainId, first: Pfn, frames: &mut [MachineFrame]) -> Result<usize, Refused> {
        let run = |page| control::populate_run(domain.0, page, RUN_ORDER);
        let pages = |page, numbers: &mut [u64]| control::populate(domain.0, page, numbers);
        populate(first, frames, run, pages).map_err(by("giving memory"))
    }

    fn fill(
        &self,
        domain: DomainId,
        frames: &[MachineFrame],
        pfn: Pfn,
        offset: usize,
        bytes: &[u8],
    ) -> Result<(), Refused> {
        self.building(domain, |it| it.fill(frames, pfn.0, offset, bytes)).map_err(by("mapping its memory"))
    }

    fn write(&self, domain: DomainId, frame: MachineFrame, offset: usize, bytes: &[u8]) -> Result<(), Refused> {
        self.building(domain, |it| it.write(frame.0, offset, bytes)).map_err(by("mapping its memory"))
    }

    fn open_port(&self, domain: DomainId, remote: DomainId) -> Result<u32, Refused> {
        hypercall::allocate_unbound(domain.0, remote.0).map_err(by("opening a port"))
    }

    fn grant_table(&self, domain: DomainId) -> Result<MachineFrame, Refused> {
        let frame = control::grant_table(domain.0).map_err(by("its grant table"))?;
        Ok(MachineFrame(frame))
    }

    fn pin_leaves(&self, domain: DomainId, frames: &[MachineFrame]) -> Result<(), Refused> {
        self.let_go(domain);
        control::pin_leaves(domain.0, frames.iter().map(|frame| frame.0)).map_err(by("pinning"))
    }

    fn unpin_leaves(&self, domain: DomainId, frames: &[MachineFrame]) -> Result<(), Refused> {
        control::unpin(domain.0, frames.iter().map(|frame| frame.0)).map_err(by("unpinning"))
    }

    fn pin_root(&self, domain: DomainId, frame: MachineFrame) -> Result<(), Refused> {
        self.let_go(domain);
        control::pin_root(domain.0, frame.0).map_err(by("pinning"))
    }

    fn set_vcpu(&self, domain: DomainId, vcpu: u32, context: &VcpuContext) -> Result<(), Refused> {
        control::set_vcpu(domain.0, vcpu, context).map_err(by("setting a vcpu"))
    }

    fn vcpu(&self, domain: DomainId, vcpu: u32) -> Result<Box<VcpuContext>, Refused> {
        control::vcpu(domain.0, vcpu).map_err(by("reading a vcpu"))
    }

    fn unpause(&self, domain: DomainId) -> Result<(), Refused> {
        control::unpause(domain.0).map_err(by("unpausing"))
    }

    fn pause(&self, domain: DomainId) -> Result<(), Refused> {
        control::pause(domain.0).map_err(by("pausing"))
    }

    fn destroy(&self, domain: DomainId) -> Result<Progress, Refused> {
        self.let_go(domain);
        let gone = control::destroy_gradually(domain.0).map_err(by("destroying"))?;
        Ok(if gone { Progress::Done } else { Progress::More })
    }

    fn info(&self, from: DomainId) -> Result<Option<DomainInfo>, Refused> {
        control::info(from.0).map_err(by("asking about domains"))
    }

    fn crash_report(&self, domain: DomainId) -> Result<Option<(u32, String)>, Refused> {
        control::crash_report(domain.0).map_err(by("asking for a crash report"))
    }

    fn refusals(&self, domain: DomainId) -> Result<Refusals, Refused> {
        control::refusals(domain.0).map_err(by("asking what was refused"))
    }

    fn physical_info(&self) -> Result<PhysInfo, Refused> {
        hypercall::physical_info().map_err(by("physinfo"))
    }

    fn version(&self) -> String {
        let number = hypercall::version();
        let extra = hypercall::extraversion().unwrap_or_default();
        let extra: String = extra.iter().take_while(|byte| **byte != 0).map(|byte| char::from(*byte)).collect();
        format!("{}.{}{}", number >> 16, number & 0xffff, extra.escape_debug())
    }

    fn read_log(&self, from: u32, clear: bool, to: &mut [u8]) -> Result<(usize, u32), Refused> {
        hypercall::read_log(from, clear, to).map_err(by("readconsole"))
    }
}
