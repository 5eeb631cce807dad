//! The entry table: every call and sub-operation with every class of malformed argument (core, io; Xen itself).
//!
//! | argument | what is done |
//! | --- | --- |
//! | none, or `test=entry.table` | the whole table, but for cells by which the domain ends: these are only listed |
//! | `cell=<number>` | that cell of the list alone: the domain ends by it |
//!
//! What is expected is cited: a section of the ABI documents, or Xen 4.17, on which the table runs as it is; where we
//! refuse by design what Xen offers, the row says both. An answer that is not the one expected is a line, and the test fails.
#![no_std]
#![no_main]
#![forbid(unsafe_code)]

extern crate alloc;

#[path = "entry/calls.rs"]
mod calls;
#[path = "entry/cpu.rs"]
mod cpu;
#[path = "entry/domains.rs"]
mod domains;
#[path = "entry/events.rs"]
mod events;
#[path = "entry/ground.rs"]
mod ground;
#[path = "entry/memory.rs"]
mod memory;
#[path = "entry/mmu.rs"]
mod mmu;
#[path = "entry/shape.rs"]
mod shape;

use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};
use ground::{Ground, Made};
use guests::abi::callback::TrapInfo;
use guests::abi::mmu::{MmuextCommand, UpdateCommand};
use guests::abi::{Errno, Hypercall};
use guests::memory::PAGE;
use guests::tables::{BRANCH, LEAF, READ_ONLY};
use guests::{NOT_CANONICAL, probe, test};
use shape::{Answer, Class, Target};
use unikernel::boot::Boot;
use unikernel::{println, traps};

unikernel::entry!(main);

static PRIVILEGED: AtomicBool = AtomicBool::new(false);
static FIRST: AtomicBool = AtomicBool::new(false);

fn main(boot: &Boot) {
    PRIVILEGED.store(boot.is_privileged(), Ordering::Relaxed);
    FIRST.store(boot.is_first_domain(), Ordering::Relaxed);
    match boot.argument("cell").and_then(|cell| cell.parse().ok()) {
        Some(cell) => end_by(cell),
        None => unikernel::testing::run(boot),
    }
}

fn ground() -> Ground {
    Ground::new(PRIVILEGED.load(Ordering::Relaxed), FIRST.load(Ordering::Relaxed))
}

/// What the table comes to.
#[derive(Default)]
struct Sums {
    cells: u64,
    absent: u64,
    calls: u64,
    refused: u64,
    accepted: u64,
    ends: u64,
    wrong: u64,
}

fn the_table() {
    let ground = ground();
    let targets = calls::targets();
    let mut sums = Sums::default();
    for target in &targets {
        for class in Class::ALL {
            cell(&ground, target, class, &mut sums);
        }
    }
    println!(
        "entry table: {} calls x {} classes = {} cells, {} of them without such an argument; {} calls made: {} refused \
         as documented, {} accepted as documented, {} wrong; {} end the domain",
        targets.len(),
        Class::ALL.len(),
        sums.cells,
        sums.absent,
        sums.calls,
        sums.refused,
        sums.accepted,
        sums.wrong,
        sums.ends
    );
    core::mem::forget(ground);
    assert_eq!(sums.wrong, 0, "answers that nobody has documented");
}
test!("entry.table", the_table);

fn cell(ground: &Ground, target: &Target, class: Class, sums: &mut Sums) {
    sums.cells += 1;
    let trials = calls::shape(ground, target).trials(class);
    ground.tidy(target, 0);
    sums.absent += u64::from(trials == 0);
    for n in 0..trials {
        let mut shape = calls::shape(ground, target);
        let want = shape.want(class, n);
        let answer = want.xen.filter(|_| ground.xen).unwrap_or(want.answer);
        if answer == Answer::Ends {
            println!("entry cell {}: {target} {class:?} {n}: ends the domain ({})", sums.ends, want.cite);
            sums.ends += 1;
            ground.tidy(target, 0);
            continue;
        }
        let (made, first) = ground.make(target, &mut shape, class, n);
        sums.calls += 1;
        if !made.is(answer, first) {
            sums.wrong += 1;
            let told = Told(made, answer.status(first));
            println!("entry: {target} {class:?} {n}: {answer:?} was to come ({}), not {told}", want.cite);
        } else if answer.refuses() {
            sums.refused += 1;
        } else {
            sums.accepted += 1;
        }
        ground.tidy(target, first);
    }
}

/// An answer in words.
struct Told(Made, Option<i16>);

impl core::fmt::Display for Told {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self.0 {
            Made::Trapped(vector) => write!(f, "trap {vector}"),
            Made::Answered(rax) => match Errno::from_number(rax.wrapping_neg()) {
                Some(error) => write!(f, "{error:?}"),
                None => write!(f, "{rax:#x} with status {:?}", self.1),
            },
        }
    }
}

/// Carries out the cell with this number among those that end the domain.
fn end_by(wanted: u64) {
    let ground = ground();
    let mut number = 0;
    for target in &calls::targets() {
        for class in Class::ALL {
            for n in 0..calls::shape(&ground, target).trials(class) {
                let mut shape = calls::shape(&ground, target);
                ground.tidy(target, 0);
                if shape.want(class, n).answer != Answer::Ends {
                    continue;
                }
                if number == wanted {
                    println!("entry cell {number}: {target} {class:?} {n}");
                    let (made, _) = ground.make(target, &mut shape, class, n);
                    println!("entry cell {number}: still alive: {}\n@@ done: failed", Told(made, None));
                    return;
                }
                number += 1;
            }
        }
    }
    println!("there is no cell {wanted}\n@@ done: failed");
}

/// core 10.4: a list of gates is as long as its end is far.
fn a_long_list_of_gates() {
    let mut gates: Vec<TrapInfo> = (0..1000).map(|_| traps::gate(0x41, 0, true)).collect();
    gates.push(TrapInfo { address: NOT_CANONICAL, ..TrapInfo::default() });
    gates.push(TrapInfo::default());
    let set = |gates: &[TrapInfo]| probe::call(Hypercall::SetTrapTable, [probe::address(gates), 0, 0, 0, 0]);
    assert_eq!(set(&gates), Err(Errno::Inval));
    gates.remove(1000);
    assert_eq!(set(&gates), Ok(0));
}
test!("entry.gates", a_long_list_of_gates);

/// core 3.10, 4.4, 4.6: frames of the hypervisor's, and frames that are not there. What maps them may say more than
/// `EINVAL` (core 4.2).
fn frames_of_others() {
    let ground = ground();
    let (window, chain) = (ground.window.address(), &ground.chain);
    chain.pin(2).expect("an L2 can be pinned");
    for frame in [0x200u64, 0xf_ffff_ffff] {
        let entry = |flags| (frame * PAGE) | flags;
        let gdt = [frame];
        let ext = |command| probe::mmuext(command, frame, 0);
        for (what, answer) in [
            ("update", probe::mmu_update(frame * PAGE, 0)),
            ("machphys", probe::mmu_update((frame * PAGE) | UpdateCommand::MachPhys.number(), 0)),
            ("entry of an L2", chain.update(2, 5, entry(BRANCH))),
            ("pin as L1", ext(MmuextCommand::PinL1)),
            ("pin as L4", ext(MmuextCommand::PinL4)),
            ("unpin", ext(MmuextCommand::Unpin)),
            ("kernel root", ext(MmuextCommand::NewBaseptr)),
            ("user root", ext(MmuextCommand::NewUserBaseptr)),
            ("clear", ext(MmuextCommand::ClearPage)),
            ("copy to", probe::mmuext(MmuextCommand::CopyPage, frame, chain.page_frame(0))),
            ("copy from", probe::mmuext(MmuextCommand::CopyPage, chain.page_frame(0), frame)),
            ("descriptors", probe::call(Hypercall::SetGdt, [probe::address(&gdt), 1, 0, 0, 0])),
            ("descriptor", probe::call(Hypercall::UpdateDescriptor, [frame * PAGE, 0, 0, 0, 0])),
        ] {
            assert_eq!(answer, Err(Errno::Inval), "{what} {frame:#x}");
        }
        for flags in [LEAF, READ_ONLY] {
            assert!(probe::update_va_mapping(window, entry(flags), 0).is_err(), "map {frame:#x}");
            assert!(chain.update(1, 5, entry(flags)).is_err(), "entry {frame:#x}");
        }
    }
    chain.unpin(2).expect("it is pinned");
    core::mem::forget(ground);
}
test!("entry.foreign-frames", frames_of_others);

/// core 1.7: a number nobody knows, whatever comes with it.
fn unknown_calls() {
    // Xen has more than we list, up to 55; above that nobody has any.
    let ours = |number| Hypercall::from_number(number).is_some();
    let xen = !ground_is_ours();
    let numbers = (0..64).filter(|number| !(ours(*number) || xen && *number < 56));
    for number in numbers.chain([64, 255, 1 << 20, u64::from(u32::MAX), 1 << 63, u64::MAX]) {
        assert_eq!(probe::call_number(number, [0xffff_8300_0000_0000; 5]), Errno::NoSys.to_rax(), "call {number}");
    }
}
test!("entry.unknown", unknown_calls);

fn ground_is_ours() -> bool {
    guests::hypercall::extraversion().is_ok_and(|name| name.windows(5).any(|word| word == b"tenon"))
}
