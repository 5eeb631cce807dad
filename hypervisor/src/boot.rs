//! The first domain: planned beforehand and found in the boot bundle, so that ring 0 parses no kernel. What the plan says
//! is believed no more than any guest: its page tables are judged when they are pinned.

use crate::options::Options;
use core::ops::Range;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use hv_core::addr::{DomainId, Frame, PAGE_BYTES, VcpuId, index, long, low32};
use hv_core::call::Halt;
use hv_core::domain::{Domain, Powers, Spec};
use hv_core::machine::Frames;
use hv_core::paging::Stop;
use hv_core::vcpu::context;
use hv_core::world::{CpuCtx, World};
use hv_machine::{Hardware, Ranges};
use hypercall_abi::bundle::entries;
use hypercall_abi::context::{VcpuContext, flags};
use hypercall_abi::first::{FirstImage, MAGIC, MAX_PAGES, PAGE, Run};
use hypercall_abi::mmu::pte;
use hypercall_abi::selector;
use hypercall_abi::start_info::{self, StartInfo};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// Frames the hypervisor keeps for itself: 4 MiB.
const RESERVE: u64 = 1024;
/// Words in a page.
const WORDS: u64 = 512;
/// Lists of as many pages each that a first domain can have.
const LISTS: usize = index(low32(MAX_PAGES / WORDS));

/// Why there is no first domain.
type Why = &'static str;

/// Makes the first domain of the bundle and lets it run.
///
/// # Errors
/// What is wrong with the bundle, or what the machine lacks.
pub(crate) fn first_domain(
    cpu_ctx: &mut CpuCtx<'_, Hardware>,
    module: &[u8],
    devices: &Ranges,
    options: &Options,
) -> Result<(), Why> {
    let (hw, world) = (cpu_ctx.m, cpu_ctx.world);
    let entry = |name: &str| entries(module).find(|(it, _)| *it == name).map(|(_, content)| content);
    // Our dom0 gets every power and the bundle; a guest under test gets the console.
    let (dom0, image, ramdisk) = match (module, entry("dom0"), entry("first")) {
        ([], ..) => return Err("no boot bundle: the loader brought no module"),
        (_, Some(image), _) => (true, image, module),
        (_, None, Some(image)) => (false, image, entry("first.ramdisk").unwrap_or_default()),
        _ => return Err("the boot bundle has neither `dom0` nor `first`"),
    };
    let (plan, runs) = FirstImage::read_from_prefix(image).map_err(|_| "the first domain's image is cut off")?;
    if plan.magic != MAGIC {
        return Err("the first domain's image is none: it does not start with its magic");
    }
    let free = u64::from(world.frames.free_frames()).saturating_sub(RESERVE);
    if plan.nr_pages > free {
        log::error!("the first domain wants {} MiB, and {} MiB are free", plan.nr_pages / 256, free / 256);
        return Err("too little memory for the first domain");
    }
    let power = if dom0 { Powers::CONTROL | Powers::DEVICES } else { Powers::empty() };
    let powers = power | Powers::CONSOLE_WRITE | Powers::CONSOLE_READ | Powers::MACHINE;
    let spec =
        Spec { id: Some(DomainId(0)), powers, vcpus: options.first_vcpus, max_pages: plan.nr_pages, handle: [0; 16] };
    let domain = cpu_ctx.create(&spec).map_err(hypercall_abi::Errno::name)?;
    if powers.contains(Powers::DEVICES) {
        allow(domain, devices);
    }
    let pages = Pages::populate(hw, world, domain, plan.nr_pages)?;
    pages.fill(runs)?;
    let root = pages.relocate(&plan)?;
    pages.tell(&plan, domain, ramdisk)?;
    pages.list.iter().for_each(|list| world.frames.retire(*list));
    start(cpu_ctx, domain, &plan, root)
}

/// Lets a domain map the registers of devices: the largest ranges first, as a domain has only so many.
fn allow(domain: &Domain, devices: &Ranges) {
    let size = |range: &Range<u64>| range.end - range.start;
    let mut last = u64::MAX;
    while let Some(next) = devices.iter().map(|range| size(&range)).filter(|size| *size < last).max() {
        for range in devices.iter().filter(|range| size(range) == next) {
            let frames = low32(range.start)..low32(range.end.min(u64::from(u32::MAX)));
            if domain.space.devices.allow(frames).is_err() {
                log::warn!("{} gets no devices in frames {:#x} to {:#x}", domain.id(), range.start, range.end);
            }
        }
        last = next;
    }
}

/// The first domain's pages while it is built: a list of frames, in frames.
struct Pages<'a> {
    hw: &'a Hardware,
    list: heapless::Vec<Frame, LISTS>,
    count: u64,
}

impl<'a> Pages<'a> {
    /// Gives a domain its pages.
    fn populate(hw: &'a Hardware, world: &'a World, domain: &Domain, count: u64) -> Result<Self, Why> {
        const NO_MEMORY: Why = "no memory for the first domain";
        let mut pages = Self { hw, list: heapless::Vec::new(), count };
        for pfn in 0..count {
            if pfn.is_multiple_of(WORDS) {
                let list = world.frames.allocate(hw).map_err(|_| NO_MEMORY)?;
                pages.list.push(list).map_err(|_| "the first domain has more than 2 GiB")?;
            }
            let frame = world.frames.populate(hw, domain.id(), 0, pfn, count).map_err(|_| NO_MEMORY)?;
            let list = *pages.list.last().ok_or(NO_MEMORY)?;
            pages.word(list, pfn).store(frame.number(), Relaxed);
        }
        Ok(pages)
    }

    /// The word of a frame for an element of a longer list.
    fn word(&self, frame: Frame, element: u64) -> &AtomicU64 {
        &self.hw.page(frame)[index(low32(element % WORDS))]
    }

    /// The frame of a page.
    fn frame(&self, pfn: u64) -> Result<Frame, Why> {
        const NO_PAGE: Why = "the first domain's image names a page it has not";
        let list = usize::try_from(pfn / WORDS).ok().and_then(|n| self.list.get(n)).filter(|_| pfn < self.count);
        Frame::new(self.word(*list.ok_or(NO_PAGE)?, pfn).load(Relaxed)).ok_or(NO_PAGE)
    }

    /// Copies bytes into pages in a row.
    fn copy(&self, first: u64, bytes: &[u8]) -> Result<(), Why> {
        for (pfn, page) in (first..).zip(bytes.chunks(PAGE)) {
            self.hw.write(self.frame(pfn)?, 0, page);
        }
        Ok(())
    }

    /// Fills the pages that the image has content for.
    fn fill(&self, mut rest: &[u8]) -> Result<(), Why> {
        const CUT: Why = "the first domain's image is cut off";
        while !rest.is_empty() {
            let (run, after) = Run::read_from_prefix(rest).map_err(|_| CUT)?;
            let bytes = usize::try_from(run.count).ok().and_then(|count| count.checked_mul(PAGE)).ok_or(CUT)?;
            let (content, after) = after.split_at_checked(bytes).ok_or(CUT)?;
            self.copy(run.page, content)?;
            rest = after;
        }
        Ok(())
    }

    /// Writes frames where the plan has pages: the p2m list and the page tables. Returns the root.
    fn relocate(&self, plan: &FirstImage) -> Result<Frame, Why> {
        for pfn in 0..self.count {
            let list = self.frame(plan.p2m_page.saturating_add(pfn / WORDS))?;
            self.word(list, pfn).store(self.frame(pfn)?.number(), Relaxed);
        }
        for [first, end] in [plan.tables, plan.more_tables] {
            for table in first..end {
                for slot in self.hw.page(self.frame(table)?) {
                    let entry = slot.load(Relaxed);
                    if entry & pte::PRESENT != 0 {
                        let frame = self.frame((entry & pte::FRAME) / PAGE_BYTES)?;
                        slot.store(entry & !pte::FRAME | frame.address(), Relaxed);
                    }
                }
            }
        }
        self.frame(plan.root_page)
    }

    /// Completes the start-info page; the ramdisk goes into the last pages.
    fn tell(&self, plan: &FirstImage, domain: &Domain, ramdisk: &[u8]) -> Result<(), Why> {
        let page = self.frame(plan.start_info_page)?;
        let mut info = StartInfo::new_zeroed();
        self.hw.read(page, 0, info.as_mut_bytes());
        info.shared_info = domain.shared_info().map_or(0, Frame::address);
        if !ramdisk.is_empty() {
            if plan.takes_ramdisk == 0 {
                return Err("the first domain's kernel takes no ramdisk by page number");
            }
            let count = long(ramdisk.len().div_ceil(PAGE));
            let first = self.count.checked_sub(count).ok_or("the ramdisk is larger than the first domain")?;
            self.copy(first, ramdisk)?;
            (info.mod_start, info.mod_len) = (first, long(ramdisk.len()));
            info.flags |= start_info::flags::MOD_START_PFN;
        }
        self.hw.write(page, 0, info.as_bytes());
        Ok(())
    }
}

/// Pins the root, sets vcpu 0, and lets go.
fn start(cpu_ctx: &mut CpuCtx<'_, Hardware>, domain: &Domain, plan: &FirstImage, root: Frame) -> Result<(), Why> {
    loop {
        match cpu_ctx.session(domain).pin(root, 4) {
            Ok(()) => break,
            Err(Stop::More) => {}
            Err(Stop::Refused(_)) => return Err("the first domain's page tables are refused"),
        }
    }
    let mut context = VcpuContext { flags: flags::IN_KERNEL | flags::ONLINE, ..VcpuContext::default() };
    let regs = &mut context.user_regs;
    (regs.rip, regs.rsp, regs.rsi, regs.rflags) = (plan.entry, plan.stack, plan.start_info, 0x202);
    (regs.cs, regs.ss) = (selector::GUEST_CS, u64::from(selector::GUEST_SS));
    (context.kernel_ss, context.kernel_sp) = (regs.ss, plan.stack);
    context.ctrlreg[3] = root.address();
    let vcpu = cpu_ctx.world.vcpu(domain, VcpuId(0)).ok_or("the first domain has no vcpu")?;
    let mut state = vcpu.state.try_take().ok_or("the first domain's vcpu is taken")?;
    while let Err(halt) = context::set(cpu_ctx, domain, vcpu, &mut state, &context) {
        if halt != Halt::More {
            return Err("the first domain's registers are refused");
        }
    }
    drop(state);
    cpu_ctx.world.unpause(cpu_ctx.m, domain);
    log::info!("{} has {} MiB and starts at {:#x}", domain.id(), plan.nr_pages / 256, plan.entry);
    Ok(())
}
