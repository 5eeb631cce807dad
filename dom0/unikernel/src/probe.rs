//! Runs arbitrary code and calls, and catches the resulting traps: for guests whose purpose is to test the
//! hypervisor.
//!
//! Nothing here is `unsafe` to call, and nothing here is safe: a test guest owns its whole domain and does to it what
//! it wants; only the hypervisor's isolation limits it. Images that do useful work leave the feature off.
//!
//! [`execute`] jumps to code written with [`crate::code!`], which ends in a mark. The first trap ends the run, whether
//! it comes from the mark or not. The result is the trap's frame, exactly as the hypervisor pushed it.

pub mod second;

use crate::sync::MaskMutex;
use crate::traps::{EVENT, TrapFrame};
use crate::{events, hypercall, memory, traps};
use core::arch::{asm, naked_asm};
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use hypercall_abi::callback::IretContext;
use hypercall_abi::mmu::{MmuextCommand, MmuextOp, pte};
use hypercall_abi::{Errno, Hypercall, domid, selector};
use memory::{PAGE, Pages};

/// The general registers at the start of a probe. RSP 0 stands for the probe's own stack.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
#[expect(missing_docs, reason = "the registers' own names")]
pub struct Registers {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rbp: u64,
    pub rsp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
}

/// How a probe ended.
#[derive(Clone, Copy, Debug)]
pub struct Stop {
    /// The trap's frame, as pushed.
    pub frame: TrapFrame,
    /// The address after the frame: where the hypervisor began to push (ABI core 3.3).
    pub base: u64,
    /// RFLAGS in the handler; its arithmetic flags have no meaning.
    pub handler_rflags: u64,
    /// The upcall mask in the handler.
    pub handler_mask: u8,
    /// CS and SS in the handler.
    pub handler_selectors: (u16, u16),
    /// Whether the code ran to its end.
    pub ended: bool,
}

impl Stop {
    /// Returns the frame of a run that reached the end of its code.
    ///
    /// # Panics
    /// If the run did not reach the end.
    #[track_caller]
    #[must_use]
    pub fn ended(self) -> TrapFrame {
        assert!(self.ended, "the code was to run to its end: {}", self.frame);
        self.frame
    }

    /// Returns the stop of a run that ended with the trap `vector`.
    ///
    /// # Panics
    /// If the run ended otherwise.
    #[track_caller]
    #[must_use]
    pub fn trapped(self, vector: u64) -> Self {
        assert!(!self.ended, "trap {vector} was to come, but the code ran to its end");
        assert_eq!(self.frame.vector, vector, "{}", self.frame);
        self
    }
}

/// Code for a probe, ending in [`MARK`].
#[derive(Clone, Copy, Debug)]
pub struct Code {
    /// Address of the first instruction.
    pub start: u64,
}

/// The mark at the end of code: UD2, and bytes that follow no other UD2 of the image.
const MARK: &[u8; 7] = b"\x0f\x0bprobe";

impl Code {
    /// Wraps code at an address; used by [`crate::code!`].
    #[must_use]
    pub fn at(start: u64) -> Self {
        Self { start }
    }

    /// The instructions, with the mark.
    ///
    /// # Panics
    /// If there is no mark within 1024 bytes.
    #[must_use]
    pub fn bytes(self) -> &'static [u8] {
        // SAFETY: `code!` puts the mark within this image, and images extend at least 1024 bytes beyond a code's start.
        let window = unsafe { core::slice::from_raw_parts(self.start as *const u8, 1024) };
        let mark = window.windows(MARK.len()).position(|bytes| bytes == MARK);
        &window[..mark.expect("code ends in a mark") + MARK.len()]
    }
}

/// Assembles instructions (Intel syntax, one string each) for [`execute`] and others.
#[macro_export]
macro_rules! code {
    ($($line:expr),* $(,)?) => {{
        #[unsafe(naked)]
        unsafe extern "C" fn code() -> ! {
            core::arch::naked_asm!($($line,)* "ud2", ".ascii \"probe\"")
        }
        $crate::probe::Code::at(code as *const () as u64)
    }};
}

#[repr(C, align(4096))]
struct Stack([u8; 16 * 1024]);

/// The stack of probes.
static STACK: MaskMutex<Stack> = MaskMutex::new(Stack([0; 16 * 1024]));
/// The stack on which traps from user mode start.
static TRAP_STACK: MaskMutex<Stack> = MaskMutex::new(Stack([0; 16 * 1024]));
/// The stack pointer with which the probe's caller continues.
static RESUME_RSP: AtomicU64 = AtomicU64::new(0);
static TARGET: AtomicU64 = AtomicU64::new(0);
static ARMED: AtomicBool = AtomicBool::new(false);
static CATCH_EVENTS: AtomicBool = AtomicBool::new(false);
static STOP: MaskMutex<Option<Stop>> = MaskMutex::new(None);

/// First address after the stack of probes.
#[must_use]
pub fn stack_end() -> u64 {
    STACK.data_ptr().addr() as u64 + size_of::<Stack>() as u64
}

/// First address after the stack on which traps from user mode start.
#[must_use]
pub fn trap_stack_end() -> u64 {
    TRAP_STACK.data_ptr().addr() as u64 + size_of::<Stack>() as u64
}

/// Loads all registers but RSP from the [`Registers`] at RDI.
macro_rules! load_registers {
    () => {
        "mov rax, [rdi]
         mov rbx, [rdi + 0x08]
         mov rcx, [rdi + 0x10]
         mov rdx, [rdi + 0x18]
         mov rsi, [rdi + 0x20]
         mov rbp, [rdi + 0x30]
         mov r8,  [rdi + 0x40]
         mov r9,  [rdi + 0x48]
         mov r10, [rdi + 0x50]
         mov r11, [rdi + 0x58]
         mov r12, [rdi + 0x60]
         mov r13, [rdi + 0x68]
         mov r14, [rdi + 0x70]
         mov r15, [rdi + 0x78]
         mov rdi, [rdi + 0x28]"
    };
}

/// Saves the callee-saved registers, then jumps to [`TARGET`] with `registers`; `resume` returns to the caller of this.
#[unsafe(naked)]
unsafe extern "C" fn jump(registers: *const Registers) {
    naked_asm!(
        "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
        "mov [rip + {resume_rsp}], rsp",
        "mov rsp, [rdi + 0x38]",
        load_registers!(),
        "jmp qword ptr [rip + {target}]",
        resume_rsp = sym RESUME_RSP,
        target = sym TARGET,
    )
}

/// Like [`jump`], but enters by the `iret` hypercall with the frame at `frame`, which holds RAX, RCX and R11.
#[unsafe(naked)]
unsafe extern "C" fn iret(registers: *const Registers, frame: *const IretContext) {
    naked_asm!(
        "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
        "mov [rip + {resume_rsp}], rsp",
        "mov rsp, rsi",
        load_registers!(),
        "mov eax, 23",
        "syscall",
        "ud2",
        resume_rsp = sym RESUME_RSP,
    )
}

#[unsafe(naked)]
unsafe extern "C" fn resume() {
    naked_asm!("cld", "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx", "ret")
}

/// The trap hook: ends the running probe.
fn caught(frame: &mut TrapFrame) -> bool {
    let is_event = frame.vector == EVENT && !CATCH_EVENTS.load(Ordering::Relaxed);
    if is_event || !ARMED.swap(false, Ordering::Relaxed) {
        return false;
    }
    let handler_rflags: u64;
    let (cs, ss): (u16, u16);
    // SAFETY: reads registers, by way of the stack.
    unsafe {
        asm!("pushfq", "pop {}", out(reg) handler_rflags);
        asm!("mov {0:x}, cs", "mov {1:x}, ss", out(reg) cs, out(reg) ss, options(nomem, nostack));
    }
    *STOP.lock() = Some(Stop {
        frame: *frame,
        base: (&raw const *frame).addr() as u64 + size_of::<TrapFrame>() as u64,
        handler_rflags,
        handler_mask: events::upcall_mask(),
        handler_selectors: (cs, ss),
        ended: frame.vector == 6 && !frame.from_user() && is_mark(frame.rip),
    });
    frame.rip = resume as *const () as u64;
    frame.rsp = RESUME_RSP.load(Ordering::Relaxed);
    frame.cs = u64::from(selector::GUEST_CS & !3);
    frame.ss = u64::from(selector::GUEST_SS);
    // RFLAGS as the caller had them. Probes run with upcalls masked, unless they unmask them.
    frame.rflags = 0x2;
    true
}

fn is_mark(rip: u64) -> bool {
    // SAFETY: a UD2 was executed there in kernel mode, so the first bytes are readable; the rest lies in the same image.
    let bytes = unsafe { core::slice::from_raw_parts(rip as *const u8, MARK.len()) };
    bytes == MARK
}

fn finish() -> Stop {
    STOP.lock().take().expect("a probe ends in a trap")
}

fn start() {
    traps::set_hook(caught);
    ARMED.store(true, Ordering::Relaxed);
}

/// Runs `code` in kernel mode.
#[must_use]
pub fn execute(code: Code, registers: &Registers) -> Stop {
    let mut registers = *registers;
    if registers.rsp == 0 {
        registers.rsp = stack_end();
    }
    TARGET.store(code.start, Ordering::Relaxed);
    start();
    // SAFETY: the first trap returns here with the stack as it was; the test is responsible for what the code does.
    unsafe { jump(&raw const registers) };
    finish()
}

/// Runs a probe that an event upcall ends like any trap.
pub fn until_event(probe: impl FnOnce() -> Stop) -> Stop {
    CATCH_EVENTS.store(true, Ordering::Relaxed);
    let stop = probe();
    CATCH_EVENTS.store(false, Ordering::Relaxed);
    let _ = events::mask_upcalls();
    stop
}

/// Like [`execute`], but an event upcall also ends the probe.
#[must_use]
pub fn execute_until_event(code: Code, registers: &Registers) -> Stop {
    until_event(|| execute(code, registers))
}

/// Like [`enter_by_iret`], but an event upcall also ends the probe.
#[must_use]
pub fn enter_by_iret_until_event(frame: &IretContext, registers: &Registers) -> Stop {
    until_event(|| enter_by_iret(frame, registers))
}

/// Enters `frame` by the `iret` hypercall. RAX, RCX, R11 and RSP of `registers` have no effect.
#[must_use]
pub fn enter_by_iret(frame: &IretContext, registers: &Registers) -> Stop {
    enter_by_iret_at(address(frame), registers)
}

/// Like [`enter_by_iret`], with a frame that lies at any address.
#[must_use]
pub fn enter_by_iret_at(frame: u64, registers: &Registers) -> Stop {
    start();
    // SAFETY: as in `execute`.
    unsafe { iret(&raw const *registers, frame as *const IretContext) };
    finish()
}

/// A frame that continues in kernel mode at `code`, with upcalls masked.
#[must_use]
pub fn kernel_frame(code: Code) -> IretContext {
    IretContext {
        rip: code.start,
        cs: u64::from(selector::GUEST_CS & !3),
        rflags: 0x2,
        rsp: stack_end(),
        ss: u64::from(selector::GUEST_SS),
        ..IretContext::default()
    }
}

/// Makes a hypercall, whatever its arguments mean.
///
/// # Errors
/// The hypervisor's error.
pub fn call(which: Hypercall, args: [u64; 5]) -> Result<u64, Errno> {
    Errno::from_rax(call_number(which.number(), args))
}

/// Makes a hypercall by its number; returns RAX.
#[must_use]
pub fn call_number(number: u64, args: [u64; 5]) -> u64 {
    // SAFETY: none; see the head of this module.
    unsafe { hypercall::raw(number, args) }
}

/// The address of an object, as an argument of a call.
#[must_use]
pub fn address<T: ?Sized>(object: &T) -> u64 {
    (&raw const *object).cast::<u8>().addr() as u64
}

/// The address of an object that a call writes.
#[must_use]
pub fn address_mut<T: ?Sized>(object: &mut T) -> u64 {
    (&raw mut *object).cast::<u8>().addr() as u64
}

/// A fault that a probe ended with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Exception vector.
    pub vector: u64,
    /// Error code.
    pub error: u64,
    /// The faulting address of a page fault; otherwise 0.
    pub address: u64,
}

fn outcome(stop: &Stop) -> Result<u64, Fault> {
    if stop.ended {
        return Ok(stop.frame.rax);
    }
    Err(Fault {
        vector: stop.frame.vector,
        error: stop.frame.error,
        address: if stop.frame.vector == 14 { events::page_fault_address() } else { 0 },
    })
}

/// Reads a word by a probe.
///
/// # Errors
/// The fault.
pub fn read(va: u64) -> Result<u64, Fault> {
    let registers = Registers { rdi: va, ..Registers::default() };
    outcome(&execute(crate::code!("mov rax, [rdi]"), &registers))
}

/// Writes a word by a probe.
///
/// # Errors
/// The fault.
pub fn write(va: u64, value: u64) -> Result<(), Fault> {
    let registers = Registers { rdi: va, rax: value, ..Registers::default() };
    outcome(&execute(crate::code!("mov [rdi], rax"), &registers)).map(drop)
}

/// Reads a word that must be mapped, without a probe; so a second vcpu may call this.
#[must_use]
pub fn load(va: u64) -> u64 {
    // SAFETY: none; see the head of this module.
    unsafe { (va as *const u64).read_volatile() }
}

/// Writes a word that must be mapped, without a probe.
pub fn store(va: u64, value: u64) {
    // SAFETY: none; see the head of this module.
    unsafe { (va as *mut u64).write_volatile(value) };
}

/// Reads 32 bits that must be mapped, and that a peer may write, without a probe.
#[must_use]
pub fn load_word(va: u64) -> u32 {
    // SAFETY: none; see the head of this module.
    unsafe { AtomicU32::from_ptr(va as *mut u32) }.load(Ordering::Acquire)
}

/// Writes 32 bits that must be mapped, and that a peer may read, without a probe.
pub fn store_word(va: u64, value: u32) {
    // SAFETY: none; see the head of this module.
    unsafe { AtomicU32::from_ptr(va as *mut u32) }.store(value, Ordering::Release);
}

/// Reads bytes that must be mapped, without a probe.
pub fn load_bytes(va: u64, into: &mut [u8]) {
    // SAFETY: none; see the head of this module.
    unsafe { (va as *const u8).copy_to_nonoverlapping(into.as_mut_ptr(), into.len()) };
}

/// Writes bytes that must be mapped, without a probe.
pub fn store_bytes(va: u64, bytes: &[u8]) {
    // SAFETY: none; see the head of this module.
    unsafe { (va as *mut u8).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
}

/// Adds to a word by LOCK CMPXCHG, repeated until it succeeds, without a probe; so a second vcpu may call this.
pub fn compare_and_add(va: u64, add: u64) {
    // SAFETY: none; see the head of this module.
    let word = unsafe { AtomicU64::from_ptr(va as *mut u64) };
    let _ = word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |value| Some(value + add));
}

/// Makes an `update_va_mapping` call with any entry.
///
/// # Errors
/// The hypervisor's error.
pub fn update_va_mapping(va: u64, entry: u64, flags: u64) -> Result<u64, Errno> {
    call(Hypercall::UpdateVaMapping, [va, entry, flags, 0, 0])
}

/// Makes an `mmu_update` call with one update for SELF.
///
/// # Errors
/// The hypervisor's error.
pub fn mmu_update(ptr: u64, val: u64) -> Result<u64, Errno> {
    let update = hypercall_abi::mmu::MmuUpdate { ptr, val };
    call(Hypercall::MmuUpdate, [address(&update), 1, 0, u64::from(domid::SELF), 0])
}

/// Makes an `mmuext_op` call with one operation for SELF.
///
/// # Errors
/// The hypervisor's error.
pub fn mmuext(command: MmuextCommand, arg1: u64, arg2: u64) -> Result<u64, Errno> {
    let op = MmuextOp { cmd: command as u32, pad: 0, arg1, arg2 };
    call(Hypercall::MmuextOp, [address(&op), 1, 0, u64::from(domid::SELF), 0])
}

/// A user address space with its own root: one page of code and one of data, whose end is the stack.
#[derive(Debug)]
pub struct UserSpace {
    /// Root, L3, L2, L1, code, data.
    pages: Pages,
}

impl UserSpace {
    /// The address of the code page, low enough for 32-bit code.
    pub const CODE: u64 = 0x4000_0000;
    /// The address of the data page.
    pub const DATA: u64 = Self::CODE + PAGE;

    /// Builds the address space and pins its root.
    ///
    /// # Panics
    /// If the hypervisor refuses.
    #[must_use]
    pub fn new() -> Self {
        let pages = Pages::allocate(6).expect("six pages are free");
        let frame = |i| pages.frame(i).expect("the page is ours");
        let branch = pte::PRESENT | pte::WRITE | pte::USER | pte::ACCESSED | pte::DIRTY;
        let poke = |table: u64, index: u64, entry: u64| {
            let slot = (pages.address() + table * PAGE + index * 8) as *mut u64;
            // SAFETY: a page of ours that is no page table yet.
            unsafe { slot.write_volatile(entry) };
        };
        poke(0, 0, (frame(1) * PAGE) | branch);
        poke(1, Self::CODE >> 30, (frame(2) * PAGE) | branch);
        poke(2, 0, (frame(3) * PAGE) | branch);
        poke(3, 0, (frame(4) * PAGE) | pte::PRESENT | pte::USER | pte::ACCESSED);
        poke(3, 1, (frame(5) * PAGE) | branch);
        for table in 0..4 {
            pages.set_writable(table, false).expect("a page can be made read-only");
        }
        mmuext(MmuextCommand::PinL4, frame(0), 0).expect("the user root is pinned");
        Self { pages }
    }

    /// The frame of the root.
    ///
    /// # Panics
    /// Never.
    #[must_use]
    pub fn root(&self) -> u64 {
        self.pages.frame(0).expect("the page is ours")
    }

    /// The address of the data page in the kernel.
    #[must_use]
    pub fn data(&self) -> u64 {
        self.pages.address() + 5 * PAGE
    }

    /// Maps both pages a second time, at addresses 0 and 4096.
    ///
    /// # Panics
    /// If the hypervisor refuses.
    pub fn map_low(&self) {
        let table = |i| self.pages.frame(i).expect("the page is ours") * PAGE;
        let branch = pte::PRESENT | pte::WRITE | pte::USER | pte::ACCESSED | pte::DIRTY;
        mmu_update(table(1), table(2) | branch).expect("a table may be reached twice");
    }

    /// Copies bytes to the code page.
    fn load(&self, bytes: &[u8]) {
        let count = bytes.len().min(4096);
        let page = (self.pages.address() + 4 * PAGE) as *mut u8;
        // SAFETY: the page is ours, and no more than a page is written.
        unsafe { page.copy_from_nonoverlapping(bytes.as_ptr(), count) };
    }

    /// A frame that continues in user mode at the first instruction of the code page.
    #[must_use]
    pub fn frame() -> IretContext {
        IretContext {
            rip: Self::CODE,
            cs: u64::from(selector::GUEST_CS),
            rflags: 0x202,
            rsp: Self::DATA + PAGE,
            ss: u64::from(selector::GUEST_SS),
            ..IretContext::default()
        }
    }

    /// Runs `code` in user mode until its first trap or system call. [`Stop::ended`] tells whether it reached its end.
    ///
    /// # Panics
    /// If the hypervisor refuses the user root or the trap stack.
    #[must_use]
    pub fn run(&self, code: Code, frame: &IretContext, registers: &Registers) -> Stop {
        let bytes = code.bytes();
        let mut stop = self.run_bytes(bytes, frame, registers);
        let end = Self::CODE + (bytes.len() - MARK.len()) as u64;
        stop.ended = stop.frame.vector == 6 && stop.frame.from_user() && stop.frame.rip == end;
        stop
    }

    /// Like [`Self::run`], with any bytes as code. The bytes have no mark, so [`Stop::ended`] is not set.
    ///
    /// # Panics
    /// As [`Self::run`].
    #[must_use]
    pub fn run_bytes(&self, bytes: &[u8], frame: &IretContext, registers: &Registers) -> Stop {
        self.open(bytes, trap_stack_end());
        enter_by_iret(frame, registers)
    }

    /// Loads code, and makes this the address space of user mode. Traps from user mode start on the stack that ends at
    /// `stack`.
    ///
    /// # Panics
    /// As [`Self::run`].
    pub fn open(&self, bytes: &[u8], stack: u64) {
        self.load(bytes);
        mmuext(MmuextCommand::NewUserBaseptr, self.root(), 0).expect("the user root is taken");
        let stack = [u64::from(selector::GUEST_SS), stack, 0, 0, 0];
        call(Hypercall::StackSwitch, stack).expect("the trap stack is taken");
    }
}

impl UserSpace {
    /// Like [`Self::run`], but an event upcall also ends the probe.
    #[must_use]
    pub fn run_until_event(&self, code: Code, frame: &IretContext, registers: &Registers) -> Stop {
        until_event(|| self.run(code, frame, registers))
    }

    /// Like [`Self::run_bytes`], but an event upcall also ends the probe.
    #[must_use]
    pub fn run_bytes_until_event(&self, bytes: &[u8], frame: &IretContext, registers: &Registers) -> Stop {
        until_event(|| self.run_bytes(bytes, frame, registers))
    }
}

impl Default for UserSpace {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for UserSpace {
    fn drop(&mut self) {
        let unloaded = mmuext(MmuextCommand::NewUserBaseptr, 0, 0);
        let unpinned = mmuext(MmuextCommand::Unpin, self.root(), 0);
        assert!(unloaded.is_ok() && unpinned.is_ok(), "{unloaded:?} {unpinned:?}");
        for table in 0..4 {
            self.pages.set_writable(table, true).expect("no page is a table any more");
        }
    }
}
