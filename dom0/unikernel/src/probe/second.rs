//! A second vcpu that runs jobs for tests.
//!
//! A job must not trap, print or unmask upcalls: the probes, the console and the upcall mask in use are those of vcpu
//! 0. A job may take a [`crate::sync::MaskMutex`] if vcpu 0 keeps its upcalls masked meanwhile, as tests do.

use crate::memory::{PAGE, Pages};
use crate::{hypercall, memory, traps};
use alloc::boxed::Box;
use core::arch::naked_asm;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use hypercall_abi::context::{VcpuContext, flags};
use hypercall_abi::{Errno, selector};

/// The second vcpu's number.
pub const VCPU: u32 = 1;
/// Pages of the vcpu's stack.
const STACK: u64 = 16;

static JOB: AtomicUsize = AtomicUsize::new(0);
static DONE: AtomicU64 = AtomicU64::new(0);

/// The vcpu's entry point: calls the function whose address is in RDI.
#[unsafe(naked)]
unsafe extern "C" fn enter() {
    naked_asm!("xor ebp, ebp", "call rdi", "ud2")
}

/// Runs a job each time the vcpu is brought up.
extern "C" fn work() {
    loop {
        let job = JOB.load(Ordering::Acquire);
        // SAFETY: `start` alone stores here, and it stores a `fn()`.
        let job = unsafe { core::mem::transmute::<usize, fn()>(job) };
        job();
        DONE.fetch_add(1, Ordering::Release);
        // When the vcpu is brought up again, it continues after this call (ABI core 7).
        let _ = hypercall::vcpu_down(VCPU);
    }
}

/// The initial state of the vcpu: flat selectors, our root table, our gates, no event callback.
///
/// # Panics
/// If there is no memory for the stack.
#[must_use]
pub fn first_context() -> Box<VcpuContext> {
    let mut context = Box::<VcpuContext>::default();
    context.flags = flags::IN_KERNEL;
    let stack = Pages::allocate(STACK).expect("pages are free").leak() + STACK * PAGE;
    let regs = &mut context.user_regs;
    regs.rip = enter as *const () as u64;
    regs.rdi = work as *const () as u64;
    regs.rsp = stack;
    regs.rflags = 0x202;
    regs.cs = selector::GUEST_CS;
    regs.ss = u64::from(selector::GUEST_SS);
    context.kernel_ss = u64::from(selector::GUEST_SS);
    context.kernel_sp = stack;
    for (vector, gate) in (0..=255).zip(&mut context.trap_ctxt) {
        *gate = traps::gate(vector, 0, true);
    }
    let root = memory::entry_address(0, 4).and_then(memory::frame_of);
    context.ctrlreg[3] = root.expect("there is a root") * PAGE;
    context
}

/// Sets the vcpu's initial state.
///
/// # Errors
/// The hypervisor's error.
pub fn initialise(context: &mut VcpuContext) -> Result<(), Errno> {
    // SAFETY: none; see the head of `probe`.
    unsafe { hypercall::vcpu_initialise(VCPU, context) }
}

/// Starts a job on the vcpu, which is initialised the first time.
///
/// # Panics
/// If there is no second vcpu, or the hypervisor refuses.
pub fn start(job: fn()) {
    match initialise(&mut first_context()) {
        Ok(()) | Err(Errno::Exist) => {}
        Err(why) => panic!("vcpu 1 is not initialised: {why:?}"),
    }
    JOB.store(job as usize, Ordering::Release);
    hypercall::vcpu_up(VCPU).expect("vcpu 1 comes up");
}

/// Jobs done so far.
#[must_use]
pub fn done() -> u64 {
    DONE.load(Ordering::Acquire)
}

/// Waits until the job is done and the vcpu is down.
///
/// # Panics
/// If this takes more than half a minute.
pub fn join() {
    let end = crate::time::now_ns() + 30_000_000_000;
    while hypercall::vcpu_is_up(VCPU) != Ok(0) {
        assert!(crate::time::now_ns() < end, "vcpu 1 does not come to an end");
        hypercall::yield_now();
    }
}

/// Runs `other` on the second vcpu and `own` here, at the same time.
pub fn race(own: impl FnOnce(), other: fn()) {
    start(other);
    own();
    join();
}
