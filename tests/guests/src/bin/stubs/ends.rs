//! Ways to end: what the entry code must not do by itself, because no stack or handler is there. The domain ends as it does
//! without the fast paths, with the same words.

use crate::stage::{SP, Stage, TOP_INDEX, Trip};
use core::sync::atomic::{AtomicU64, Ordering};
use guests::abi::Hypercall;
use guests::abi::mmu::{MmuextCommand, uvmf};
use guests::abi::shared::offset;
use guests::probe::second::start;
use guests::probe::{self, Code, UserSpace, call, enter_by_iret_at, mmuext, update_va_mapping};
use guests::tables::READ_ONLY;
use guests::{code, events};
use unikernel::println;
use zerocopy::IntoBytes;

static WORD: AtomicU64 = AtomicU64::new(0);

/// The second vcpu takes the stack of the first away, once that is in user mode: before, the way there would need it.
fn unmap() {
    let word = WORD.load(Ordering::Relaxed);
    while probe::load(word + 8) == 0 {
        core::hint::spin_loop();
    }
    let _ = update_va_mapping(crate::stage::TOP, 0, uvmf::INVLPG | uvmf::ALL);
    probe::store(word, 1);
    loop {
        core::hint::spin_loop();
    }
}

/// Ends the domain.
pub(crate) fn end(how: &str) {
    let stage = Stage::new();
    for _ in 0..2 {
        stage.ordinary();
    }
    println!("stubs: {how}");
    // An event of the console's would come before the end, or not.
    let masks = events::shared_page().addr() as u64 + offset::EVTCHN_MASK as u64;
    (0..64).for_each(|word| probe::store(masks + 8 * word, u64::MAX));
    events::scan();
    let (what, cause) = how.split_once('-').unwrap_or((how, ""));
    let code = match what {
        "call" => code!("syscall"),
        "fault" => code!("mov eax, [0x123000]"),
        "wait" => code!("mov qword ptr [rdi + 8], 1", "2: mov rax, [rdi]", "test rax, rax", "jz 2b", "syscall"),
        _ => code!("nop"),
    };
    go(&stage, code, cause);
    println!("stubs: {how}: still alive\n@@ done: failed");
}

fn go(stage: &Stage, code: Code, cause: &str) {
    let mut trip = Trip::new();
    // A frame elsewhere, since the stack goes away before the way to user mode.
    let frame = trip.frame;
    trip.registers.rdi = UserSpace::DATA;
    stage.open(code, &trip);
    probe::store_bytes(SP - 72, frame.as_bytes());
    let entry = |entry: u64| stage.chain.update(1, TOP_INDEX, entry).expect("an entry is taken");
    let mut at = probe::address(&frame);
    match cause {
        "unmapped" => drop(entry(0)),
        "flushed" => drop(update_va_mapping(crate::stage::TOP, 0, uvmf::INVLPG).expect("an entry is taken")),
        "readonly" => {
            // The way back only reads it.
            entry(stage.chain.page_entry(0, READ_ONLY));
            at = trip.back;
        }
        "popped" => {
            entry(0);
            at = trip.back;
        }
        "hole" => drop(stack(0xffff_8300_0000_1000)),
        "nowhere" => drop(stack(0x8000_0000_0100)),
        "null" => drop(stack(0)),
        "rootless" => drop(mmuext(MmuextCommand::NewUserBaseptr, 0, 0).expect("no root is taken")),
        "gateless" => drop(call(Hypercall::SetTrapTable, [0; 5]).expect("the table is cleared")),
        "other" => {
            WORD.store(stage.space.data(), Ordering::Relaxed);
            probe::store_bytes(stage.space.data(), &[0; 16]);
            at = trip.back;
            start(unmap);
        }
        _ => panic!("no such end: {cause}"),
    }
    if cause == "rootless" || cause == "gateless" {
        at = trip.back;
    }
    let stop = enter_by_iret_at(at, &trip.registers);
    println!("stubs: {}", stop.frame);
}

fn stack(sp: u64) -> u64 {
    call(Hypercall::StackSwitch, [0xe02b, sp, 0, 0, 0]).expect("any number is taken")
}
