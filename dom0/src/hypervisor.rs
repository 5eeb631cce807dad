//! The toolstack's hypervisor: the real one, by hypercalls.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use guest_image::{MachineFrame, Pfn};
use hypercall_abi::Errno;
use hypercall_abi::context::VcpuContext;
use hypercall_abi::domctl::DomainInfo;
use toolstack::{DomainId, Hypervisor};
use unikernel::memory::Foreign;
use unikernel::{control, hypercall};

/// Frames mapped at once: a call costs as much as copying a page.
const BLOCK: usize = 64;
/// Blocks mapped at once: page tables are written in the order of their levels, each with pages of its own.
const BLOCKS: usize = 4;

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
    building: Option<Building>,
}

/// The domain that is being filled.
struct Building {
    domain: DomainId,
    /// Frame of each page.
    frames: Vec<u64>,
    /// The same, sorted by frame.
    pages: Vec<(u64, u64)>,
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
        Self { domain, frames: Vec::new(), pages: Vec::new(), blocks: Vec::new(), clock: 0 }
    }

    fn add(&mut self, first: u64, frames: &[u64]) -> Result<(), Errno> {
        if first != self.frames.len() as u64 {
            return Err(Errno::Inval);
        }
        self.frames.extend_from_slice(frames);
        self.pages.clear();
        Ok(())
    }

    fn write(&mut self, frame: u64, offset: usize, bytes: &[u8]) -> Result<(), Errno> {
        if self.pages.is_empty() {
            self.pages = self.frames.iter().copied().zip(0..).collect();
            self.pages.sort_unstable();
        }
        const SIZE: u64 = BLOCK as u64;
        let page = self.pages.binary_search_by_key(&frame, |(frame, _)| *frame);
        let page = page.ok().and_then(|index| self.pages.get(index)).map(|(_, page)| *page);
        let (wanted, index) = match page {
            Some(page) => (Shown::Pages(page - page % SIZE), page % SIZE),
            None => (Shown::Frame(frame), 0),
        };
        self.clock += 1;
        let clock = self.clock;
        let block = self.block(wanted)?;
        block.used = clock;
        block.view.write(index, offset, bytes)
    }

    /// The block that shows these frames, in place of the one not used for the longest time if none does.
    fn block(&mut self, wanted: Shown) -> Result<&mut Block, Errno> {
        let found = self.blocks.iter().position(|block| block.shown == Some(wanted));
        let index = match found {
            Some(index) => index,
            None => self.show(wanted)?,
        };
        self.blocks.get_mut(index).ok_or(Errno::Inval)
    }

    fn show(&mut self, wanted: Shown) -> Result<usize, Errno> {
        if self.blocks.len() < BLOCKS {
            let view = Foreign::reserve(BLOCK as u64)?;
            self.blocks.push(Block { view, shown: None, used: 0 });
        }
        let oldest = (0..).zip(&self.blocks).min_by_key(|(_, block)| block.used);
        let index = oldest.map_or(0, |(index, _)| index);
        let block = self.blocks.get_mut(index).ok_or(Errno::NoMem)?;
        block.shown = None;
        match wanted {
            Shown::Pages(first) => {
                let first = usize::try_from(first).map_err(|_| Errno::Inval)?;
                let frames = self.frames.get(first..).unwrap_or_default();
                let frames = frames.get(..BLOCK).unwrap_or(frames);
                block.view.show(self.domain.0, frames)?;
            }
            Shown::Frame(frame) => block.view.show(self.domain.0, &[frame])?,
        }
        block.shown = Some(wanted);
        Ok(index)
    }
}

impl Xen {
    /// Lets go of all frames of a domain: they may become page tables, or free.
    fn let_go(&mut self, domain: DomainId) {
        if self.building.as_ref().is_some_and(|building| building.domain == domain) {
            self.building = None;
        }
    }
}

impl Hypervisor for Xen {
    type Error = Refused;

    fn create(&mut self, uuid: &[u8; 16], vcpus: u32) -> Result<DomainId, Refused> {
        let domain = control::create(uuid, vcpus).map_err(by("creating a domain"))?;
        let domain = DomainId(domain);
        self.building = Some(Building::new(domain));
        Ok(domain)
    }

    fn set_max_memory(&mut self, domain: DomainId, kib: u64) -> Result<(), Refused> {
        control::set_max_memory(domain.0, kib).map_err(by("limiting memory"))
    }

    fn populate(&mut self, domain: DomainId, first: Pfn, frames: &mut [MachineFrame]) -> Result<usize, Refused> {
        let refused = by("giving memory");
        let mut numbers: Vec<u64> = alloc::vec![0; frames.len()];
        let got = match control::populate(domain.0, first.0, &mut numbers) {
            Ok(got) => got,
            Err(errno) => return Err(refused(errno)),
        };
        numbers.truncate(got);
        for (frame, number) in frames.iter_mut().zip(&numbers) {
            *frame = MachineFrame(*number);
        }
        if let Some(building) = self.building.as_mut().filter(|building| building.domain == domain) {
            building.add(first.0, &numbers).map_err(refused)?;
        }
        Ok(got)
    }

    fn write(&mut self, domain: DomainId, frame: MachineFrame, offset: usize, bytes: &[u8]) -> Result<(), Refused> {
        if self.building.as_ref().is_none_or(|building| building.domain != domain) {
            self.building = Some(Building::new(domain));
        }
        let building = self.building.as_mut();
        let written = building.map_or(Err(Errno::Inval), |building| building.write(frame.0, offset, bytes));
        written.map_err(by("mapping its memory"))
    }

    fn open_port(&mut self, domain: DomainId, remote: DomainId) -> Result<u32, Refused> {
        hypercall::allocate_unbound(domain.0, remote.0).map_err(by("opening a port"))
    }

    fn grant_table(&mut self, domain: DomainId) -> Result<MachineFrame, Refused> {
        let frame = control::grant_table(domain.0).map_err(by("its grant table"))?;
        Ok(MachineFrame(frame))
    }

    fn pin_root(&mut self, domain: DomainId, frame: MachineFrame) -> Result<(), Refused> {
        self.let_go(domain);
        control::pin_root(domain.0, frame.0).map_err(by("pinning"))
    }

    fn set_vcpu(&mut self, domain: DomainId, vcpu: u32, context: &VcpuContext) -> Result<(), Refused> {
        control::set_vcpu(domain.0, vcpu, context).map_err(by("setting a vcpu"))
    }

    fn vcpu(&mut self, domain: DomainId, vcpu: u32) -> Result<Box<VcpuContext>, Refused> {
        control::vcpu(domain.0, vcpu).map_err(by("reading a vcpu"))
    }

    fn unpause(&mut self, domain: DomainId) -> Result<(), Refused> {
        control::unpause(domain.0).map_err(by("unpausing"))
    }

    fn pause(&mut self, domain: DomainId) -> Result<(), Refused> {
        control::pause(domain.0).map_err(by("pausing"))
    }

    fn destroy(&mut self, domain: DomainId) -> Result<(), Refused> {
        self.let_go(domain);
        control::destroy(domain.0).map_err(by("destroying"))
    }

    fn info(&mut self, from: DomainId) -> Result<Option<DomainInfo>, Refused> {
        control::info(from.0).map_err(by("asking about domains"))
    }

    fn crash_report(&mut self, domain: DomainId) -> Result<Option<(u32, String)>, Refused> {
        control::crash_report(domain.0).map_err(by("asking for a crash report"))
    }
}
