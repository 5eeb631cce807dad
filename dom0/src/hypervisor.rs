//! The toolstack's hypervisor: the real one, by hypercalls.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::fmt;

use guest_image::{MachineFrame, Pfn};
use hypercall_abi::Errno;
use hypercall_abi::context::VcpuContext;
use hypercall_abi::domctl::DomainInfo;
use hypercall_abi::sysctl::PhysInfo;
use hypercall_abi::tenon::Refusals;
use toolstack::{DomainId, Hypervisor, Progress};
use unikernel::memory::Foreign;
use unikernel::{control, hypercall};

/// Frames mapped at once: a call costs as much as copying a page.
const BLOCK: usize = 64;
/// Blocks mapped at once: page tables are written in the order of their levels, each with pages of its own.
const BLOCKS: usize = 4;
/// Pages given at once where the machine has as many in a row.
const RUN: usize = 1 << RUN_ORDER;
const RUN_ORDER: u32 = 9;

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
    building: RefCell<Option<Building>>,
}

/// The domain that is being filled.
struct Building {
    domain: DomainId,
    /// What is mapped, and since when.
    blocks: Vec<Block>,
    clock: u64,
}

struct Block {
    view: Foreign,
    /// The first page, or the frame alone for one that is none of the domain's pages.
    shown: Option<Shown>,
    used: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Shown {
    Pages(u64),
    Frame(u64),
}

impl Building {
    fn new(domain: DomainId) -> Self {
        Self { domain, blocks: Vec::new(), clock: 0 }
    }

    /// Writes into page `pfn`; `frames` are those of all pages.
    fn fill(&mut self, frames: &[MachineFrame], pfn: u64, offset: usize, bytes: &[u8]) -> Result<(), Errno> {
        const SIZE: u64 = BLOCK as u64;
        let first = pfn - pfn % SIZE;
        let block = self.block(Shown::Pages(first), || {
            let first = usize::try_from(first).map_err(|_| Errno::Inval)?;
            let frames = frames.get(first..).unwrap_or_default();
            Ok(frames.iter().take(BLOCK).map(|frame| frame.0))
        })?;
        block.view.write(pfn % SIZE, offset, bytes)
    }

    fn write(&mut self, frame: u64, offset: usize, bytes: &[u8]) -> Result<(), Errno> {
        self.block(Shown::Frame(frame), || Ok([frame].into_iter()))?.view.write(0, offset, bytes)
    }

    /// The block that shows what is wanted, in place of the one not used for the longest time if none does.
    fn block<F: Iterator<Item = u64>>(
        &mut self,
        wanted: Shown,
        frames: impl FnOnce() -> Result<F, Errno>,
    ) -> Result<&mut Block, Errno> {
        let found = self.blocks.iter().position(|block| block.shown == Some(wanted));
        let index = match found {
            Some(index) => index,
            None => self.show(wanted, frames()?)?,
        };
        self.clock += 1;
        let block = self.blocks.get_mut(index).ok_or(Errno::Inval)?;
        block.used = self.clock;
        Ok(block)
    }

    fn show(&mut self, wanted: Shown, frames: impl Iterator<Item = u64>) -> Result<usize, Errno> {
        if self.blocks.len() < BLOCKS {
            let view = Foreign::reserve(BLOCK as u64)?;
            self.blocks.push(Block { view, shown: None, used: 0 });
        }
        let oldest = (0..).zip(&self.blocks).min_by_key(|(_, block)| block.used);
        let index = oldest.map_or(0, |(index, _)| index);
        let block = self.blocks.get_mut(index).ok_or(Errno::NoMem)?;
        block.shown = None;
        let (mut numbers, mut count) = ([0; BLOCK], 0);
        for (slot, frame) in numbers.iter_mut().zip(frames) {
            *slot = frame;
            count += 1;
        }
        block.view.show(self.domain.0, numbers.get(..count).unwrap_or_default())?;
        block.shown = Some(wanted);
        Ok(index)
    }
}

impl Xen {
    /// Works on the domain being filled, which is this one from now on.
    fn building<T>(&self, domain: DomainId, work: impl FnOnce(&mut Building) -> T) -> T {
        let building = &mut *self.building.borrow_mut();
        if building.as_ref().is_none_or(|building| building.domain != domain) {
            *building = None;
        }
        work(building.get_or_insert_with(|| Building::new(domain)))
    }

    /// Lets go of all frames of a domain: they may become page tables, or free.
    fn let_go(&self, domain: DomainId) {
        let building = &mut *self.building.borrow_mut();
        if building.as_ref().is_some_and(|building| building.domain == domain) {
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
        let refused = |errno| Refused { call: "giving memory", errno };
        let mut done = 0;
        for part in frames.chunks_mut(RUN) {
            let page = first.0 + done as u64;
            // A whole run takes one call, while there are such.
            if part.len() == RUN
                && let Some(start) = control::populate_run(domain.0, page, RUN_ORDER).map_err(refused)?
            {
                (start..).zip(part).for_each(|(number, frame)| *frame = MachineFrame(number));
                done += RUN;
                continue;
            }
            let mut numbers = [0; RUN];
            let numbers = numbers.get_mut(..part.len()).unwrap_or_default();
            let got = control::populate(domain.0, page, numbers).map_err(refused)?;
            part.iter_mut().zip(&*numbers).for_each(|(frame, number)| *frame = MachineFrame(*number));
            done += got;
            if got < part.len() {
                break;
            }
        }
        Ok(done)
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
