//! Gives a domain memory, page tables and a first vcpu, the way `hypervisor/src/boot.rs` does for the first domain.

use super::machine::WholeMachine;
use hv_core::addr::{Frame, GuestVirt, VcpuId};
use hv_core::call::Halt;
use hv_core::domain::Domain;
use hv_core::lock::{Held, Nothing};
use hv_core::machine::Frames;
use hv_core::paging::{BUDGET, Stop};
use hv_core::vcpu::context;
use hv_core::world::{CpuCtx, World};
use hypercall_abi::callback::TrapInfo;
use hypercall_abi::context::{VcpuContext, flags};
use hypercall_abi::mmu::pte;
use hypercall_abi::selector;
use std::sync::atomic::Ordering::Relaxed;

/// Pages a domain starts with.
pub const PAGES: usize = 26;
/// Where page 0 of a domain is mapped; the others follow.
pub const BASE: u64 = 1 << 39 | 1 << 30 | 1 << 21;
/// Entries of the one L1 table that are played with; those after the pages are empty at first.
pub const SLOTS: usize = 64;
/// Where handlers are.
pub const HANDLER: u64 = BASE + page::CODE as u64 * 4096 + 0x800;

/// Two addresses that are stepped to, and where breakpoints are.
pub const BREAKPOINTS: u64 = BASE + page::CODE as u64 * 4096 + 0x900;

/// What a page is for.
#[expect(missing_docs, reason = "the names say it")]
pub mod page {
    pub const KERNEL_ROOT: usize = 0;
    pub const USER_ROOT: usize = 1;
    pub const L3: usize = 2;
    pub const L2: usize = 3;
    pub const L1: usize = 4;
    /// Empty pages mapped read-only, to become tables.
    pub const SPARE: [usize; 3] = [5, 6, 7];
    pub const ARGS: usize = 8;
    pub const MORE_ARGS: usize = 9;
    pub const STACK: usize = 10;
    pub const CODE: usize = 11;
    pub const GDT: usize = 12;
    pub const LDT: usize = 13;
    /// The first of those with no purpose.
    pub const DATA: usize = 14;
}

/// The address of a page.
#[must_use]
pub fn at(page: usize) -> u64 {
    BASE + page as u64 * 4096
}

/// Whether a guest has its handlers as Linux has them, so that fast paths are open to it. The others have them as nobody has.
#[must_use]
pub fn is_ordinary(pages: &[Frame]) -> bool {
    !pages[page::KERNEL_ROOT].number().is_multiple_of(4)
}

/// A context a vcpu of a built domain can start with.
#[must_use]
pub fn context(pages: &[Frame]) -> VcpuContext {
    let mut context = VcpuContext { flags: flags::IN_KERNEL | flags::ONLINE, ..VcpuContext::default() };
    let regs = &mut context.user_regs;
    (regs.rip, regs.rsp, regs.rflags) = (at(page::CODE), at(page::STACK + 1), 0x202);
    (regs.cs, regs.ss) = (selector::GUEST_CS, u64::from(selector::GUEST_SS));
    (context.kernel_ss, context.kernel_sp) = (regs.ss, at(page::STACK + 1));
    context.ctrlreg[1] = pages[page::USER_ROOT].address();
    context.ctrlreg[3] = pages[page::KERNEL_ROOT].address();
    let ordinary = is_ordinary(pages);
    if ordinary {
        context.flags |= flags::SYSCALL_MASKS_EVENTS;
        context.ctrlreg[4] |= 1 << 16; // FSGSBASE
    }
    for (vector, gate) in (0u8..=255).zip(context.trap_ctxt.iter_mut()) {
        let flags = if vector.is_multiple_of(2) && !(ordinary && vector == 14) { 3 } else { 7 };
        *gate = TrapInfo { vector, flags, address: HANDLER, ..TrapInfo::default() };
    }
    (context.event_callback_eip, context.failsafe_callback_eip, context.syscall_callback_eip) =
        (HANDLER, HANDLER, HANDLER);
    context
}

/// Gives a new, empty domain what it needs to run, with the first of its vcpus up, and lets it.
///
/// # Errors
/// What the machine lacks: then the domain stays as far as it came.
pub fn build(
    m: &'static WholeMachine,
    world: &'static World,
    held: &mut Held<Nothing>,
    domain: &Domain,
    vcpus: u32,
) -> Result<Vec<Frame>, String> {
    let id = domain.id();
    let limit = PAGES as u64 + 8;
    domain.max_pages.store(limit, Relaxed);
    let mut pages = Vec::new();
    for pfn in 0..PAGES as u64 {
        pages.push(world.frames.populate(m, id, 0, pfn, limit).map_err(|why| format!("{why:?}"))?);
    }
    let table = pte::PRESENT | pte::WRITE | pte::USER | pte::ACCESSED;
    let set = |page: usize, slot: u64, to: Frame, flags: u64| {
        let offset = (slot % 512) as usize * 8;
        m.write(pages[page], offset, &(to.address() | flags).to_le_bytes());
    };
    for root in [page::KERNEL_ROOT, page::USER_ROOT] {
        set(root, BASE >> 39, pages[page::L3], table);
    }
    set(page::L3, BASE >> 30, pages[page::L2], table);
    set(page::L2, BASE >> 21, pages[page::L1], table);
    for (n, frame) in pages.iter().enumerate() {
        let special = n < page::ARGS || n == page::GDT || n == page::LDT;
        // Some domains have enough pages that nobody may write for the longest GDT.
        let read_only = special || n > page::GDT && id.0 % 4 == 3;
        let flags = table | pte::DIRTY;
        set(page::L1, n as u64, *frame, if read_only { flags & !pte::WRITE } else { flags });
    }
    for root in [page::KERNEL_ROOT, page::USER_ROOT] {
        loop {
            match domain.space.open(m, &world.frames, BUDGET, held).pin(pages[root], 4) {
                Ok(()) => break,
                Err(Stop::More) => {}
                Err(Stop::Refused(why)) => return Err(format!("the tables are refused: {why:?}")),
            }
        }
    }
    let wanted = context(&pages);
    for number in (0..vcpus).map(VcpuId) {
        let Some(vcpu) = world.vcpu(domain, number) else { continue };
        let mut own = vcpu.state.try_take().ok_or("the vcpu is taken")?;
        while let Err(halt) = context::set(&mut CpuCtx { m, world, held }, domain, vcpu, &mut own, &wanted) {
            if halt != Halt::More {
                return Err(format!("the context: {halt:?}"));
            }
        }
    }
    assert!(GuestVirt(BASE).is_guests());
    world.unpause(m, domain);
    Ok(pages)
}
