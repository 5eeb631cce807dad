//! The failsafe callback: segment registers that do not load when their vcpu comes back to the CPU (core 3.5).
//!
//! The second vcpu keeps the CPU changing hands, and takes the descriptor away.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use guests::abi::callback::{CALLBACK_MASKS_EVENTS, CallbackRegister, CallbackType};
use guests::abi::{Hypercall, selector};
use guests::memory::{PAGE, Pages};
use guests::probe::{self, Code, Registers, Stop, UserSpace, call, execute, second, stack_end, trap_stack_end};
use guests::{code, events, flag, hypercall, pattern, test};
use unikernel::traps::{self, FAILSAFE};

/// Entry 3 of our table, at ring 3.
const BAD: u64 = 0x1b;
const FLAT_DATA: u64 = 0x00cf_f300_0000_ffff;

/// The machine address of the descriptor that goes.
static DESCRIPTOR: AtomicU64 = AtomicU64::new(0);
/// The address of a word that says when.
static WATCHED: AtomicU64 = AtomicU64::new(0);
static OVER: AtomicBool = AtomicBool::new(false);

fn update_descriptor(value: u64) {
    let at = DESCRIPTOR.load(Ordering::Relaxed);
    call(Hypercall::UpdateDescriptor, [at, value, 0, 0, 0]).expect("a descriptor is taken");
}

/// The second vcpu's job.
fn take_away() {
    while probe::load(WATCHED.load(Ordering::Relaxed)) == 0 {
        hypercall::yield_now();
    }
    update_descriptor(0);
    while !OVER.load(Ordering::SeqCst) {
        hypercall::yield_now();
    }
}

fn register(address: u64) {
    let kind = CallbackType::Failsafe as u16;
    let arg = CallbackRegister { kind, flags: CALLBACK_MASKS_EVENTS, pad: 0, address };
    call(Hypercall::CallbackOp, [0, probe::address(&arg), 0, 0, 0]).expect("a callback is taken");
}

/// Puts the words of the frame behind RCX and R11 into registers, and what DS and ES are now.
fn reader() -> Code {
    code!(
        "mov rax, [rsp + 0x10]",
        "mov rbx, [rsp + 0x18]",
        "mov rcx, [rsp + 0x20]",
        "mov rdx, [rsp + 0x28]",
        "mov rsi, [rsp + 0x30]",
        "mov rdi, [rsp + 0x38]",
        "mov rbp, [rsp + 0x40]",
        "mov r8, [rsp + 0x48]",
        "mov r9, [rsp + 0x50]",
        "mov r10, rsp",
        "mov r12d, ds",
        "mov r13d, es",
    )
}

/// What the reader found, whatever was interrupted.
fn check(stop: &Stop) {
    let frame = &stop.frame;
    assert_eq!(frame.vector, 6, "the reader ends the probe: {frame}");
    let wanted = [frame.rax, frame.rbx, frame.rcx, frame.rdx];
    assert_eq!(wanted, [BAD, u64::from(selector::GUEST_SS), 0, BAD], "DS, ES, FS, GS as the guest wanted them");
    assert_eq!(
        (frame.r12, frame.r13),
        (0, u64::from(selector::GUEST_SS)),
        "what does not load is null, the rest as it was"
    );
    assert_eq!(frame.r9, u64::from(selector::GUEST_SS));
    assert_eq!(frame.rbp & flag::IOPL, 0);
}

/// Runs a probe that loads the descriptor, says so at `watched`, and waits.
fn run(watched: u64, probe: impl FnOnce() -> Stop) -> Stop {
    let page = Pages::allocate(1).expect("a page is free");
    let frame = page.frame(0).expect("the page is ours");
    probe::write(page.address() + (BAD & !7), FLAT_DATA).expect("the page is writable");
    page.set_writable(0, false).expect("a page can be made read-only");
    call(Hypercall::SetGdt, [probe::address(&[frame]), 16, 0, 0, 0]).expect("the table is taken");
    DESCRIPTOR.store(frame * PAGE + (BAD & !7), Ordering::Relaxed);
    WATCHED.store(watched, Ordering::Relaxed);
    OVER.store(false, Ordering::SeqCst);
    register(reader().start);
    second::start(take_away);
    let stop = probe();
    let _ = events::mask_upcalls();
    OVER.store(true, Ordering::SeqCst);
    second::join();
    register(traps::handler_address(FAILSAFE));
    call(Hypercall::SetGdt, [0; 5]).expect("no table is taken");
    page.set_writable(0, true).expect("the page is free again");
    stop
}

fn in_kernel_mode() {
    let mut loaded = 0u64;
    let watched = probe::address_mut(&mut loaded);
    let code = code!(
        "mov ds, eax",
        "mov gs, eax",
        "mov eax, 0xe02b",
        "mov es, eax",
        "mov qword ptr [rbx], 1",
        // SCHEDOP_yield.
        "2: mov eax, 29",
        "xor edi, edi",
        "syscall",
        "jmp 2b",
    );
    let stop = run(watched, || execute(code, &Registers { rax: BAD, rbx: watched, ..pattern() }));
    check(&stop);
    let frame = &stop.frame;
    assert!((code.start..code.start + 64).contains(&frame.rsi), "it stopped in the loop: {frame}");
    assert_eq!(frame.rdi, u64::from(selector::GUEST_CS & !3) | 1 << 32, "CS with the mask, which was set");
    assert_eq!((frame.r8, frame.r10), (stack_end(), stack_end() - 11 * 8));
}
test!("failsafe.kernel", in_kernel_mode);

fn in_user_mode() {
    let space = UserSpace::new();
    let code = code!(
        "mov eax, 0x1b",
        "mov ds, eax",
        "mov gs, eax",
        "mov eax, 0xe02b",
        "mov es, eax",
        "mov qword ptr [rsp - 8], 1",
        "2: jmp 2b",
    );
    let watched = space.data() + PAGE - 8;
    let stop = run(watched, || space.run(code, &UserSpace::frame(), &pattern()));
    check(&stop);
    let frame = &stop.frame;
    assert!((UserSpace::CODE..UserSpace::CODE + 64).contains(&frame.rsi), "it stopped in the loop: {frame}");
    assert_eq!(frame.rdi, u64::from(selector::GUEST_CS), "CS, and the mask was clear");
    assert_eq!(frame.rbp & flag::IF, flag::IF);
    assert_eq!((frame.r8, frame.r10), (UserSpace::DATA + PAGE, trap_stack_end() - 11 * 8));
}
test!("failsafe.user", in_user_mode);
