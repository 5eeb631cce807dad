//! Does what Tenon answers otherwise than Xen, by decision, and prints each answer: the rows of
//! `hypercall-abi/doc/differences.md`, in its words. A story compares the two.
#![no_std]
#![no_main]
#![forbid(unsafe_code)]

extern crate alloc;

use alloc::string::String;
use guests::abi::domctl::{Domctl, INTERFACE_VERSION};
use guests::abi::event::{EventOp, InitControl};
use guests::abi::grant::SetVersion;
use guests::abi::memory::{Exchange, MemoryOp, Reservation};
use guests::abi::mmu::{MmuextCommand, pte};
use guests::abi::vcpu::VcpuOp;
use guests::abi::version::VersionOp;
use guests::abi::{Errno, Hypercall, domid, selector};
use guests::memory::{PAGE, Pages, Window};
use guests::probe::{self, address, address_mut, call, call_number, mmuext, update_va_mapping};
use guests::tables::{BRANCH, Chain, LEAF};
use unikernel::boot::Boot;
use unikernel::println;

unikernel::entry!(main);

type Answer = Result<u64, Errno>;

/// What a row says, and how it is done.
type Row = (&'static str, fn() -> Answer);

const ROWS: &[Row] = &[
    ("a table of level 2 or more that leads to itself", a_linear_table),
    ("a superpage in an L2 table", || upper_entry(2, BRANCH | pte::PAT_OR_PSE)),
    ("`mmuext_op(MARK_SUPER)`", || mmuext(MmuextCommand::MarkSuper, 0, 0)),
    ("a call gate in a descriptor table", a_call_gate),
    ("RAM mapped uncached", uncached_memory),
    ("`mmuext_op(FLUSH_CACHE)`", || mmuext(MmuextCommand::FlushCache, 0, 0)),
    ("grant tables: `set_version(2)`", || grant(8, &mut SetVersion { version: 2 })),
    ("grant tables: `get_status_frames`", || grant(9, &mut [0u64; 2])),
    ("grant tables: `dump_table`", || grant(3, &mut [0u64; 2])),
    ("grant tables: `transfer`", || grant(4, &mut [0u64; 3])),
    ("grant tables: `swap_grant_ref`", || grant(11, &mut [0u32; 3])),
    ("grant tables: `cache_flush`", || grant(12, &mut [0u64; 3])),
    ("FIFO events: `init_control`, well-formed", fifo_events),
    ("FIFO events: `expand_array`", || event(EventOp::ExpandArray, &mut [0u64; 1])),
    ("FIFO events: `set_priority`", || event(EventOp::SetPriority, &mut [1u32, 0])),
    ("`bind_pirq`", || event(EventOp::BindPirq, &mut [0u32; 3])),
    ("`memory_op(exchange)`, well-formed", exchange),
    ("`memory_op(machine_memory_map)`", || memory_op(MemoryOp::MachineMemoryMap.number(), &mut [0u64; 2])),
    ("`memory_op(add_to_physmap)`", || memory_op(7, &mut [0u64; 3])),
    ("`sched_op(shutdown_code)`", || sched(5)),
    ("`sched_op(watchdog)`", || sched(6)),
    ("`sched_op(pin_override)`", || sched(7)),
    ("`sched_op` of old guests (6)", || numbered(6)),
    ("`event_channel_op` of old guests (16)", || numbered(16)),
    ("`vcpu_op(get_physid)`", || vcpu(VcpuOp::GetPhysid.number())),
    ("`vcpu_op(register_runstate_phys_area)`", || vcpu(VcpuOp::RegisterRunstatePhysArea.number())),
    ("`xen_version(commandline)`", || version(VersionOp::Commandline)),
    ("`xen_version(build_id)`", || version(VersionOp::BuildId)),
    ("HVM: `hvm_op` (34)", || numbered(34)),
    ("shadow paging, log-dirty, live migration: `domctl`", shadow_control),
    ("`platform_op` (7)", || numbered(7)),
    ("`xsm_op` (27)", || numbered(27)),
    ("`kexec_op` (37)", || numbered(37)),
    ("`tmem_op` (38)", || numbered(38)),
    ("`argo_op` (39)", || numbered(39)),
    ("`xenpmu_op` (40)", || numbered(40)),
    ("`dm_op` (41)", || numbered(41)),
    ("`hypfs_op` (42)", || numbered(42)),
];

fn main(_boot: &Boot) {
    for (what, done) in ROWS {
        match done() {
            Ok(value) => tell(what, format_args!("{value:#x}")),
            Err(error) => tell(what, format_args!("E{}", error.name().to_ascii_uppercase())),
        }
    }
    tell("32-bit and HVM guests: `xen_version(capabilities)`", format_args!("{:?}", capabilities()));
}

/// One row as the document has it.
fn tell(what: &str, answer: core::fmt::Arguments<'_>) {
    println!("| {what} | `{answer}` |");
}

fn numbered(number: u64) -> Answer {
    Errno::from_rax(call_number(number, [0; 5]))
}

fn grant<T>(command: u64, arg: &mut T) -> Answer {
    call(Hypercall::GrantTableOp, [command, address_mut(arg), 1, 0, 0])
}

fn event<T>(command: EventOp, arg: &mut T) -> Answer {
    call(Hypercall::EventChannelOp, [command.number(), address_mut(arg), 0, 0, 0])
}

fn memory_op<T>(command: u64, arg: &mut T) -> Answer {
    call(Hypercall::MemoryOp, [command, address_mut(arg), 0, 0, 0])
}

fn sched(command: u64) -> Answer {
    call(Hypercall::SchedOp, [command, address(&[0u32; 2]), 0, 0, 0])
}

fn vcpu(command: u64) -> Answer {
    call(Hypercall::VcpuOp, [command, 0, address(&[0u64; 2]), 0, 0])
}

fn version(command: VersionOp) -> Answer {
    call(Hypercall::XenVersion, [command.number(), address(&[0u64; 128]), 0, 0, 0])
}

fn a_linear_table() -> Answer {
    let chain = Chain::new();
    let answers: [Answer; 3] = core::array::from_fn(|n| {
        let level = u32::try_from(n).expect("a level") + 2;
        chain.poke(level, 9, chain.entry(level, BRANCH));
        chain.protect(level);
        let pinned = chain.pin(level);
        chain.unprotect(level);
        chain.poke(level, 9, 0);
        pinned
    });
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
    answers[0]
}

/// An entry of an upper table of ours.
fn upper_entry(level: u32, flags: u64) -> Answer {
    let chain = Chain::new();
    chain.protect(level);
    chain.pin(level)?;
    let answer = chain.update(level, 5, chain.page_entry(0, flags));
    chain.unpin(level)?;
    chain.unprotect(level);
    answer
}

fn a_call_gate() -> Answer {
    const TO_FLAT_CODE: u64 = 0x8c00 << 32 | (selector::GUEST_CS as u64) << 16;
    let page = Pages::allocate(1).ok_or(Errno::NoMem)?;
    let frame = page.frame(0).ok_or(Errno::Fault)?;
    call(Hypercall::UpdateDescriptor, [frame * PAGE, TO_FLAT_CODE, 0, 0, 0])
}

fn uncached_memory() -> Answer {
    let (page, window) = (Pages::allocate(1).ok_or(Errno::NoMem)?, Window::reserve(1)?);
    let frame = page.frame(0).ok_or(Errno::Fault)?;
    update_va_mapping(window.address(), (frame * PAGE) | LEAF | pte::PCD, 0)
}

fn fifo_events() -> Answer {
    let page = Pages::allocate(1).ok_or(Errno::NoMem)?;
    let control_gfn = page.frame(0).ok_or(Errno::Fault)?;
    event(EventOp::InitControl, &mut InitControl { control_gfn, ..InitControl::default() })
}

fn exchange() -> Answer {
    let lists = [0u64; 2];
    let side = |n: usize| Reservation {
        extent_start: probe::address(&lists[n]),
        nr_extents: 1,
        domid: domid::SELF,
        ..Reservation::default()
    };
    let mut arg = Exchange { given: side(0), wanted: side(1), nr_exchanged: 0 };
    memory_op(MemoryOp::Exchange.number(), &mut arg)
}

fn shadow_control() -> Answer {
    let arg = Domctl { cmd: 10, interface_version: INTERFACE_VERSION, domain: domid::SELF, ..Domctl::default() };
    call(Hypercall::Domctl, [address(&arg), 0, 0, 0, 0])
}

fn capabilities() -> String {
    let mut text = [0u8; 1024];
    let arg = address_mut(&mut text);
    call(Hypercall::XenVersion, [VersionOp::Capabilities.number(), arg, 0, 0, 0]).expect("they are told");
    text.iter().take_while(|byte| **byte != 0).map(|byte| char::from(*byte)).collect()
}
