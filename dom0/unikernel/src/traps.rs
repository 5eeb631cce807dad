//! Traps and callbacks that the hypervisor delivers to this domain, all in one form (ABI core 3.2-3.8).

use crate::entry::Stubs;
use crate::{events, hypercall, println};
use core::sync::atomic::{AtomicUsize, Ordering};
use hypercall_abi::callback::{CALLBACK_MASKS_EVENTS, CallbackType, TRAP_MASKS_EVENTS, TrapInfo};
use hypercall_abi::sched::ShutdownReason;
use hypercall_abi::selector;

/// The value of [`TrapFrame::vector`] for an event upcall.
pub const EVENT: u64 = 256;
/// The value of [`TrapFrame::vector`] for SYSCALL from user mode.
pub const SYSCALL: u64 = 257;
/// The value of [`TrapFrame::vector`] for the failsafe callback.
pub const FAILSAFE: u64 = 258;

/// The interrupted state. The handler may change it; the `iret` hypercall restores it (ABI core 3.7).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
#[expect(missing_docs, reason = "the registers' own names")]
pub struct TrapFrame {
    /// Exception vector, or [`EVENT`], [`SYSCALL`], [`FAILSAFE`].
    pub vector: u64,
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rbp: u64,
    pub rdi: u64,
    pub rsi: u64,
    pub rdx: u64,
    pub rbx: u64,
    pub rax: u64,
    pub r11: u64,
    pub rcx: u64,
    /// Error code; 0 for vectors without one.
    pub error: u64,
    pub rip: u64,
    /// The selector in bits 0..16 (RPL 0 = from kernel mode), the upcall mask before the trap in bits 32..40.
    pub cs: u64,
    /// IF is the inverted upcall mask.
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

impl TrapFrame {
    /// Whether the trap interrupted user mode.
    #[must_use]
    pub fn from_user(&self) -> bool {
        self.cs & 3 != 0
    }

    /// The upcall mask as it was before the trap.
    #[must_use]
    pub fn saved_mask(&self) -> u8 {
        self.cs.to_le_bytes()[4]
    }
}

impl core::fmt::Display for TrapFrame {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        writeln!(
            f,
            "trap {} error {:#x} at {:#x} cs {:#x} rflags {:#x} rsp {:#x} ss {:#x}",
            self.vector, self.error, self.rip, self.cs, self.rflags, self.rsp, self.ss
        )?;
        writeln!(f, "rax {:016x} rbx {:016x} rcx {:016x} rdx {:016x}", self.rax, self.rbx, self.rcx, self.rdx)?;
        writeln!(f, "rsi {:016x} rdi {:016x} rbp {:016x} r8  {:016x}", self.rsi, self.rdi, self.rbp, self.r8)?;
        writeln!(f, "r9  {:016x} r10 {:016x} r11 {:016x} r12 {:016x}", self.r9, self.r10, self.r11, self.r12)?;
        write!(f, "r13 {:016x} r14 {:016x} r15 {:016x}", self.r13, self.r14, self.r15)
    }
}

/// A hook gets every trap first; it returns whether it handled the trap.
pub type Hook = fn(&mut TrapFrame) -> bool;

static HOOK: AtomicUsize = AtomicUsize::new(0);

/// Installs a hook in place of the previous one.
pub fn set_hook(hook: Hook) {
    HOOK.store(hook as usize, Ordering::Release);
}

fn hook() -> Option<Hook> {
    let hook = HOOK.load(Ordering::Acquire);
    // SAFETY: `set_hook` alone stores here, and it stores a `Hook`.
    (hook != 0).then(|| unsafe { core::mem::transmute::<usize, Hook>(hook) })
}

/// The gate of `vector` as [`init`] installs it. `dpl` is the highest ring number that may raise it by INT n.
#[must_use]
pub fn gate(vector: u8, dpl: u8, masks_events: bool) -> TrapInfo {
    TrapInfo {
        vector,
        flags: dpl & 3 | if masks_events { TRAP_MASKS_EVENTS } else { 0 },
        cs: selector::GUEST_CS,
        pad: 0,
        address: handler_address(u64::from(vector)),
    }
}

/// The address of the stub for a value of [`TrapFrame::vector`].
#[must_use]
pub fn handler_address(vector: u64) -> u64 {
    let stubs = Stubs::get();
    match vector {
        EVENT => stubs.event,
        SYSCALL => stubs.syscall,
        FAILSAFE => stubs.failsafe,
        _ => stubs.traps + vector * Stubs::SIZE,
    }
}

/// The gate that [`init`] installs. User programs may raise breakpoint, overflow and the old system call by INT n.
fn default_gate(vector: u8) -> TrapInfo {
    let dpl = if matches!(vector, 3 | 4 | 0x80) { 3 } else { 0 };
    gate(vector, dpl, true)
}

/// Installs the callbacks, and a gate for every vector. All of them mask events.
pub(crate) fn init() {
    let mut table = [TrapInfo::default(); 257];
    for (vector, slot) in (0..=255).zip(&mut table) {
        *slot = default_gate(vector);
    }
    // SAFETY: the stubs follow the convention, and the last element is zero.
    unsafe { hypercall::set_trap_table(&table) }.expect("set_trap_table is refused");
    let stubs = Stubs::get();
    let callbacks = [
        (CallbackType::Event, stubs.event),
        (CallbackType::Failsafe, stubs.failsafe),
        (CallbackType::Syscall, stubs.syscall),
    ];
    for (kind, handler) in callbacks {
        // SAFETY: the stubs follow the convention.
        unsafe { hypercall::register_callback(kind, CALLBACK_MASKS_EVENTS, handler) }
            .unwrap_or_else(|e| panic!("callback {} is refused: {e:?}", kind.name()));
    }
}

/// Handles every trap and callback; called by the stubs.
#[unsafe(no_mangle)]
extern "C" fn trap_entry(frame: &mut TrapFrame) {
    if hook().is_some_and(|hook| hook(frame)) {
        return;
    }
    match frame.vector {
        EVENT => events::upcall(),
        _ => die(frame),
    }
}

/// Handles an unexpected trap: prints it and crashes the domain.
fn die(frame: &TrapFrame) -> ! {
    println!("\nunexpected {frame}\ncr2 {:#x}", events::page_fault_address());
    println!("@@ done: failed");
    hypercall::shutdown(ShutdownReason::Crash)
}
