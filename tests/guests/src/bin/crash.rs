//! Dies on purpose, in the way `how=` names, to see that only this domain does.
//!
//! | how | what the hypervisor must do |
//! | --- | --- |
//! | `ud2`, `nullptr` | deliver the fault; the guest prints it and shuts down with reason crash |
//! | `no-handler` | crash it: an exception without a gate (core 3.2) |
//! | `bad-stack` | crash it: no frame can be pushed (core 3.3) |
//! | `hole-stack` | crash it: the frame would lie in the hypervisor's hole (core 3.3) |
//! | `bad-iret` | crash it: the iret frame cannot be read (core 3.7) |
//! | `no-user-root` | crash it: to user mode without a root (core 3.7) |
//! | `triple` | crash it: the fault handler faults until its stack is gone |
//! | `shutdown`, `watchdog`, `suspend`, `poweroff`, `reboot` | end it with that reason (core 5.4) |
//! | `silent` | end it; what it was refused before it printed anything is all there is to tell |
//! | `log` | nothing: it writes to the hypervisor's log (core 8) and sleeps |
#![no_std]
#![no_main]
#![forbid(unsafe_code)]

use guests::abi::Hypercall;
use guests::abi::callback::{IretContext, TrapInfo};
use guests::abi::sched::ShutdownReason;
use guests::probe::{self, Registers, call, enter_by_iret, execute};
use guests::{code, hypercall, pattern};
use unikernel::boot::Boot;
use unikernel::println;

unikernel::entry!(main);

fn main(boot: &Boot) {
    let how = boot.argument("how").unwrap_or("ud2");
    if how == "silent" {
        assert_eq!(execute(code!("mov ecx, 0x345", "rdmsr"), &pattern()).frame.vector, 13);
        call(Hypercall::VcpuOp, [0, 77, 0, 0, 0]).expect_err("there is no vcpu 77");
        hypercall::shutdown(ShutdownReason::Poweroff);
    }
    println!("crash: {how}");
    match how {
        "ud2" => raw(code!("ud2", "nop"), 0),
        "nullptr" => raw(code!("xor eax, eax", "mov [rax], eax"), 0),
        "no-handler" => {
            call(Hypercall::SetTrapTable, [0; 5]).expect("the table is cleared");
            raw(code!("ud2", "nop"), 0);
        }
        "bad-stack" => raw(code!("ud2", "nop"), 0x1234_5678_9000),
        "hole-stack" => raw(code!("ud2", "nop"), 0xffff_8080_0000_1000),
        "bad-iret" => raw(code!("mov eax, 23", "syscall"), 0x1234_5678_9000),
        "no-user-root" => {
            let frame = IretContext { cs: 0xe033, ..probe::kernel_frame(code!("nop")) };
            let _ = enter_by_iret(&frame, &pattern());
        }
        "triple" => {
            let gate = TrapInfo { vector: 14, address: 0x1000, ..TrapInfo::default() };
            guests::install_gate(gate);
            raw(code!("xor eax, eax", "mov [rax], eax"), 0);
        }
        "shutdown" => hypercall::shutdown(ShutdownReason::Crash),
        "watchdog" => hypercall::shutdown(ShutdownReason::Watchdog),
        "suspend" => hypercall::shutdown(ShutdownReason::Suspend),
        "log" => {
            // Some of it looks as if others had written it.
            let text = b"quiet\n[error] mfn 0x1234: dropped twice\n(d7) hello from d7\nwiped \x1b[2J\n";
            hypercall::console_write(text).expect("the log takes it");
            println!("crash: logged");
            loop {
                hypercall::block();
            }
        }
        "poweroff" => hypercall::shutdown(ShutdownReason::Poweroff),
        "reboot" => hypercall::shutdown(ShutdownReason::Reboot),
        _ => println!("crash: no such way"),
    }
    println!("crash: still alive\n@@ done: failed");
}

/// Runs code that is not expected to come back; where it does, the trap is reported as any unexpected one.
fn raw(code: probe::Code, rsp: u64) {
    let stop = execute(code, &Registers { rsp, ..pattern() });
    println!("crash: {}", stop.frame);
    hypercall::shutdown(ShutdownReason::Crash);
}
