//! Two guests on one CPU: `role=owner` has breakpoints where `role=other`, the same image, steps without any (core 3.11).
#![no_std]
#![no_main]
#![forbid(unsafe_code)]

use guests::abi::Hypercall;
use guests::probe::{Registers, call, execute};
use guests::{code, flag, hypercall, pattern};
use unikernel::boot::Boot;
use unikernel::{println, time};

unikernel::entry!(main);

/// DR6 without any event, and with a step.
const CLEAR: u64 = 0xffff_0ff0;
const STEP: u64 = 1 << 14;
const ROUNDS: u32 = 20;

fn set(register: u64, value: u64) {
    call(Hypercall::SetDebugreg, [register, value, 0, 0, 0]).expect("the register takes it");
}

/// Steps over an instruction; answers where that led, and DR6.
fn step() -> (u64, u64) {
    set(6, 0);
    let registers = Registers { rax: flag::TF, ..pattern() };
    let stop = execute(code!("pushfq", "or [rsp], rax", "popfq", "nop", "nop"), &registers).trapped(1);
    (stop.frame.rip, call(Hypercall::GetDebugreg, [6, 0, 0, 0, 0]).expect("it is there"))
}

fn pause() {
    let _ = hypercall::poll(&[], time::now_ns() + 20_000_000);
}

fn main(boot: &Boot) {
    let owner = boot.argument("role") == Some("owner");
    let (here, _) = step();
    // Where the breakpoints are: on, with an address as the only thing left of them, and on again.
    for round in 0..ROUNDS {
        if owner {
            (0..4).for_each(|register| set(register, here));
            set(7, if round % 2 == 0 { 0x401 } else { 0 });
        }
        pause();
        let (rip, dr6) = step();
        let wanted = CLEAR | STEP | if owner { 0xf } else { 0 };
        // A breakpoint that is on comes by itself, before the step; its owner may see either.
        let seen = if owner { dr6 & !STEP == wanted & !STEP } else { dr6 == wanted };
        assert!(rip == here && seen, "round {round}: at {rip:#x}, DR6 {dr6:#x}");
    }
    let who = if owner { "its own" } else { "nobody's" };
    println!("breakpoints: {who} in {ROUNDS} rounds");
}
