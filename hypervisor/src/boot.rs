//! The first domain: found in the boot bundle, built by the plan that every domain is built by.

use crate::options::Options;
use cpio_reader::iter_files;
use guest_image::{Builder, Config, Kernel, MachineFrame, Pfn, Plan, Start, Wiring};
use hv_core::addr::{DomainId, Frame};
use hv_core::dispatch::Progress;
use hv_core::domain::control::Spec;
use hv_core::domain::{Domain, Powers, context};
use hv_core::lock::{Held, Nothing};
use hv_core::machine::Frames;
use hv_core::paging::{BUDGET, Stop};
use hv_core::world::World;
use hv_machine::{BootInfo, Hardware};
use hypercall_abi::context::{VcpuContext, flags};
use hypercall_abi::{selector, start_info};

/// Frames the hypervisor keeps for itself when the first domain takes a share: 16 MiB.
const RESERVE: u64 = 4096;
/// The first domain's memory unless the command line says more.
const DEFAULT_MIB: u64 = 256;
/// Pages the list of the first domain's frames can hold: 2 GiB.
const LIST_FRAMES: usize = 1024;

/// What the bundle says of the first domain.
struct First<'a> {
    kernel: &'a [u8],
    ramdisk: &'a [u8],
    command_line: &'a [u8],
    /// It is our dom0 and gets every power; else a guest under test, which gets the console.
    dom0: bool,
}

/// Finds the first domain: `dom0`, or `first/kernel`.
fn find(module: &[u8]) -> Result<First<'_>, &'static str> {
    let entry = |name: &str| iter_files(module).find(|file| file.name() == name).map(|file| file.file());
    if module.is_empty() {
        return Err("no boot bundle: the loader brought no module");
    }
    if let Some(kernel) = entry("dom0") {
        let command_line = entry("dom0.cmdline").unwrap_or_default();
        return Ok(First { kernel, ramdisk: module, command_line, dom0: true });
    }
    let kernel = entry("first/kernel").ok_or("the boot bundle has neither `dom0` nor `first/kernel`")?;
    let [ramdisk, command_line] = ["first/ramdisk", "first/cmdline"].map(|name| entry(name).unwrap_or_default());
    Ok(First { kernel, ramdisk, command_line, dom0: false })
}

/// Makes the first domain and lets it run.
///
/// # Errors
/// What is wrong with the bundle or the kernel in it, printed where it was found; this is only that it was.
pub(crate) fn first_domain(
    boot: &BootInfo,
    world: &'static World,
    held: &mut Held<Nothing>,
    options: &Options,
) -> Result<(), ()> {
    let hw = boot.hardware;
    let first = find(boot.module).map_err(|why| log::error!("{why}"))?;
    let kernel = Kernel::parse(first.kernel).map_err(|why| log::error!("the first domain's kernel: {why}"))?;
    let available = u64::from(world.frames.free_frames()).saturating_sub(RESERVE);
    let wanted = options.first_memory.unwrap_or(DEFAULT_MIB).saturating_mul(256);
    let nr_pages = match options.first_memory {
        Some(_) => wanted,
        None => wanted.min(available),
    };
    if nr_pages > available {
        log::error!("the first domain wants {} MiB, but only {} MiB are free", nr_pages / 256, available / 256);
        return Err(());
    }
    let flags = if first.dom0 { start_info::flags::PRIVILEGED | start_info::flags::INITDOMAIN } else { 0 };
    let config = Config { nr_pages, ramdisk: first.ramdisk, command_line: first.command_line, flags, rings: false };
    let plan = Plan::new(kernel, config).map_err(|why| log::error!("the first domain: {why}"))?;
    let powers = Powers { control: first.dom0, console_write: true, console_read: true, machine: true };
    let spec = Spec { powers, vcpus: options.first_vcpus, max_pages: nr_pages, handle: [0; 16] };
    let domain = world.create(hw, held, &spec).map_err(|why| log::error!("making the first domain: {}", why.name()))?;
    let mut pages = Pages::populate(hw, world, domain, nr_pages)
        .ok_or_else(|| log::error!("no memory for the {} MiB of the first domain", nr_pages / 256))?;
    let wiring =
        Wiring { shared_info: MachineFrame(domain.shared_info().map_or(0, Frame::number)), ..Wiring::default() };
    let start = plan.construct(&mut pages, &wiring).map_err(|why| log::error!("building the first domain: {why}"))?;
    pages.retire();
    start_it(hw, world, held, domain, &start).map_err(|why| log::error!("starting the first domain: {why}"))?;
    log::info!("{} has {} MiB and starts at {:#x}", domain.id(), nr_pages / 256, start.entry);
    Ok(())
}

/// Pins the root, sets vcpu 0, and lets go.
fn start_it(
    hw: &'static Hardware,
    world: &'static World,
    held: &mut Held<Nothing>,
    domain: &Domain,
    start: &Start,
) -> Result<(), &'static str> {
    let root = Frame::new(start.root.0).ok_or("no root")?;
    loop {
        match domain.space.open(hw, &world.frames, BUDGET, held).pin(root, 4) {
            Ok(()) => break,
            Err(Stop::More) => {}
            Err(Stop::Refused(_)) => return Err("its page tables are refused"),
        }
    }
    let mut context = VcpuContext { flags: flags::IN_KERNEL | flags::ONLINE, ..VcpuContext::default() };
    let regs = &mut context.user_regs;
    (regs.rip, regs.rsp, regs.rsi) = (start.entry, start.stack, start.start_info);
    (regs.cs, regs.ss) = (selector::GUEST_CS, u64::from(selector::GUEST_SS));
    regs.rflags = 0x202;
    (context.kernel_ss, context.kernel_sp) = (regs.ss, start.stack);
    context.ctrlreg[3] = root.address();
    let vcpu = world.vcpu(domain, hv_core::addr::VcpuId(0)).ok_or("no vcpu 0")?;
    let mut own = vcpu.own.try_take().ok_or("vcpu 0 is taken")?;
    while context::set(world, hw, held, domain, vcpu, &mut own, &context).map_err(|_| "its state is refused")?
        == Progress::More
    {}
    drop(own);
    world.unpause(hw, domain);
    Ok(())
}

/// The first domain's pages while it is built: a list of frames, in frames.
struct Pages {
    hw: &'static Hardware,
    world: &'static World,
    list: heapless::Vec<Frame, LIST_FRAMES>,
    count: u64,
}

impl Pages {
    /// Gives a domain its pages.
    fn populate(hw: &'static Hardware, world: &'static World, domain: &Domain, count: u64) -> Option<Self> {
        let mut pages = Self { hw, world, list: heapless::Vec::new(), count };
        let id: DomainId = domain.id();
        for pfn in 0..count {
            if pfn.is_multiple_of(512) {
                pages.list.push(world.frames.allocate(hw).ok()?).ok()?;
            }
            let frame = world.frames.populate(hw, id, pfn).ok()?;
            let (list, at) = (*pages.list.last()?, usize::try_from(pfn % 512).ok()?);
            hw.write(list, at * 8, &frame.number().to_le_bytes());
        }
        domain.pages.store(count, core::sync::atomic::Ordering::Relaxed);
        Some(pages)
    }

    fn frame(&self, pfn: u64) -> Result<Frame, &'static str> {
        const NO_PAGE: &str = "no such page";
        let list = self.list.get(usize::try_from(pfn / 512).map_err(|_| NO_PAGE)?).filter(|_| pfn < self.count);
        let mut number = [0; 8];
        self.hw.read(*list.ok_or(NO_PAGE)?, usize::try_from(pfn % 512).map_err(|_| NO_PAGE)? * 8, &mut number);
        Frame::new(u64::from_le_bytes(number)).ok_or(NO_PAGE)
    }

    /// The list has served.
    fn retire(self) {
        for frame in self.list {
            self.world.frames.retire(frame);
        }
    }
}

impl Builder for Pages {
    type Error = &'static str;

    fn frame_of(&mut self, pfn: Pfn) -> Result<MachineFrame, Self::Error> {
        self.frame(pfn.0).map(|frame| MachineFrame(frame.number()))
    }

    fn write(&mut self, pfn: Pfn, offset: usize, bytes: &[u8]) -> Result<(), Self::Error> {
        let frame = self.frame(pfn.0)?;
        self.hw.write(frame, offset, bytes);
        Ok(())
    }

    fn zero(&mut self, _pfn: Pfn, _offset: usize, _len: usize) -> Result<(), Self::Error> {
        Ok(()) // frames of the pool are zero
    }
}
