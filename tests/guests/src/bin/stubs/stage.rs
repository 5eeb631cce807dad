//! A user program, a kernel stack whose pages can be exchanged, and what must be true of every trap of that program.

use guests::abi::callback::{CALLBACK_MASKS_EVENTS, CallbackRegister, CallbackType, IretContext, SegmentBase};
use guests::abi::mmu::uvmf;
use guests::abi::{Hypercall, selector};
use guests::memory::{PAGE, Pages};
use guests::probe::{self, Code, Registers, Stop, UserSpace, call, enter_by_iret_at, execute, update_va_mapping};
use guests::tables::{BRANCH, Chain, LEAF, current_root};
use guests::{code, events, flag, pattern, registers_of};
use unikernel::traps::{self, SYSCALL};
use zerocopy::IntoBytes;

/// Where the last page of the kernel's stack is mapped, and its entry in the L1 table.
pub(crate) const TOP: u64 = 2 * PAGE;
pub(crate) const TOP_INDEX: u64 = 2;
/// The end of the kernel's stack.
pub(crate) const SP: u64 = 3 * PAGE;
/// The bytes that the way back pops.
pub(crate) const POPPED: u64 = 72;
/// What a guest may choose of RFLAGS: the arithmetic flags, TF, DF, OF, NT, RF, AC, ID.
const CHOSEN: u64 = 0xd5 | flag::TF | flag::DF | 1 << 11 | flag::NT | flag::RF | flag::AC | 1 << 21;

/// What tests are made with.
pub(crate) struct Stage {
    pub(crate) space: UserSpace,
    /// The tables of the stack. Its plain pages take turns as the last page of the stack; page 0 is the first to be.
    pub(crate) chain: Chain,
    _below: Pages,
}

/// A way to user mode and back.
#[derive(Clone, Copy)]
pub(crate) struct Trip {
    /// What `iret` is told.
    pub(crate) frame: IretContext,
    /// Registers that are not in the frame.
    pub(crate) registers: Registers,
    /// The end of the kernel's stack.
    pub(crate) sp: u64,
    /// Where the frame lies.
    pub(crate) back: u64,
}

impl Trip {
    /// The ordinary one.
    pub(crate) fn new() -> Self {
        let registers = pattern();
        let frame = IretContext { rax: registers.rax, rcx: registers.rcx, r11: registers.r11, ..UserSpace::frame() };
        Self { frame, registers, sp: SP, back: SP - POPPED }
    }

    /// With another end of the stack; the frame lies where Linux has it.
    pub(crate) fn on_stack(sp: u64) -> Self {
        Self { sp, back: sp - POPPED, ..Self::new() }
    }

    /// With these flags.
    pub(crate) fn with_flags(rflags: u64) -> Self {
        let trip = Self::new();
        Self { frame: IretContext { rflags, ..trip.frame }, ..trip }
    }

    /// The flags that user code has then.
    pub(crate) fn user_flags(&self) -> u64 {
        self.frame.rflags & CHOSEN | flag::IF | 2
    }

    fn masked(&self) -> bool {
        self.frame.rflags & flag::IF == 0
    }
}

impl Stage {
    /// Opens the fast paths, for the calls and faults of the kernel as well: callbacks and gates mask events already.
    pub(crate) fn new() -> Self {
        set_cr4(FSGSBASE, true);
        let chain = Chain::new();
        let below = Pages::allocate(TOP_INDEX).expect("pages are free");
        for i in 0..TOP_INDEX {
            chain.poke(1, i, (below.frame(i).expect("the page is ours") * PAGE) | LEAF);
        }
        chain.poke(1, TOP_INDEX, chain.page_entry(0, LEAF));
        chain.protect(3);
        let stage = Self { space: UserSpace::new(), chain, _below: below };
        stage.hang_in(stage.chain.entry(3, BRANCH));
        stage.open(code!("nop"), &Trip::new());
        stage
    }

    /// Sets the entry of the root that leads to the stack.
    pub(crate) fn hang_in(&self, entry: u64) {
        probe::mmu_update(current_root() * PAGE, entry).expect("a slot of ours");
    }

    /// Makes page `i` the last of the stack, which this CPU knows at once.
    pub(crate) fn map(&self, i: u64) {
        update_va_mapping(TOP, self.chain.page_entry(i, LEAF), uvmf::INVLPG).expect("an entry is taken");
    }

    /// Everything but the way itself: what follows are the frame and `iret`.
    pub(crate) fn open(&self, code: Code, trip: &Trip) {
        self.space.open(code.bytes(), trip.sp);
    }

    /// Runs `code` until it traps.
    pub(crate) fn go(&self, code: Code, trip: &Trip) -> Stop {
        self.open(code, trip);
        // Where Linux has it lies another, which is nobody's to take unless it is this one.
        let wrong = IretContext { rip: 0xbad, rax: 0xbad, ..Trip::new().frame };
        probe::store_bytes(trip.sp - POPPED, wrong.as_bytes());
        probe::store_bytes(trip.back, trip.frame.as_bytes());
        enter_by_iret_at(trip.back, &trip.registers)
    }

    /// A system call, which must look as it does to the kernel; that it does.
    #[track_caller]
    pub(crate) fn ordinary(&self) {
        let trip = Trip::new();
        check_syscall(&self.go(code!("syscall"), &trip), &trip);
    }

    /// Fills both pages that the stack may end in.
    pub(crate) fn fill(&self, value: u64) {
        for i in 0..2 {
            fill(self.chain.page_address(i), value);
        }
    }

    /// Page `i` must hold nothing but `value`, and the other, where the stack ends, something else.
    #[track_caller]
    pub(crate) fn check_page(&self, i: u64, value: u64) {
        check_filled(self.chain.page_address(i), value);
        check_used(self.chain.page_address(1 - i), value);
    }

    /// Puts a frame where the way back looks for it, on page `i`, without using the address of the stack.
    pub(crate) fn put(&self, i: u64, frame: &IretContext) {
        probe::store_bytes(self.chain.page_address(i) + PAGE - POPPED, frame.as_bytes());
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let stack = [u64::from(selector::GUEST_SS), probe::trap_stack_end(), 0, 0, 0];
        call(Hypercall::StackSwitch, stack).expect("the trap stack is taken");
        self.hang_in(0);
        self.chain.unprotect(3);
    }
}

/// Fills a page.
pub(crate) fn fill(page: u64, value: u64) {
    for at in (0..PAGE).step_by(8) {
        probe::store(page + at, value);
    }
}

/// A page must hold nothing but `value`.
#[track_caller]
pub(crate) fn check_filled(page: u64, value: u64) {
    for at in (0..PAGE).step_by(8) {
        assert_eq!(probe::load(page + at), value, "byte {at:#x} of the page");
    }
}

/// The last words of a page must be something else: a frame, or what the way out of the probe made of it.
#[track_caller]
pub(crate) fn check_used(page: u64, value: u64) {
    for at in (PAGE - 40..PAGE).step_by(8) {
        assert_ne!(probe::load(page + at), value, "byte {at:#x} of the page");
    }
}

pub(crate) const FSGSBASE: u64 = 1 << 16;

/// Sets or clears bits of CR4.
pub(crate) fn set_cr4(bits: u64, set: bool) {
    let (keep, add) = if set { (u64::MAX, bits) } else { (!bits, 0) };
    let registers = Registers { rdi: keep, rsi: add, ..pattern() };
    let set = code!("mov rax, cr4", "and rax, rdi", "or rax, rsi", "mov cr4, rax", "mov rax, cr4");
    let now = execute(set, &registers).ended().rax;
    assert_eq!(now & bits, add, "CR4");
}

/// Registers a callback.
pub(crate) fn register(kind: CallbackType, flags: u16, address: u64) {
    let arg = CallbackRegister { kind: kind as u16, flags, pad: 0, address };
    call(Hypercall::CallbackOp, [0, probe::address(&arg), 0, 0, 0]).expect("a callback is taken");
}

/// The handler of system calls as it was.
pub(crate) fn register_ordinary() {
    register(CallbackType::Syscall, CALLBACK_MASKS_EVENTS, traps::handler_address(SYSCALL));
}

pub(crate) fn set_base(which: SegmentBase, base: u64) {
    call(Hypercall::SetSegmentBase, [which.number(), base, 0, 0, 0]).expect("a base is taken");
}

/// The GS base of kernel mode, which must have FSGSBASE on.
pub(crate) fn kernel_gs() -> u64 {
    execute(code!("rdgsbase rax"), &pattern()).ended().rax
}

/// What is true of every trap from user mode (core 3.3, 3.8).
#[track_caller]
pub(crate) fn check_entry(stop: &Stop, trip: &Trip) {
    let frame = &stop.frame;
    assert!(frame.from_user(), "{frame}");
    assert_eq!(stop.base, trip.sp & !15, "{frame}");
    assert_eq!(frame.cs, u64::from(selector::GUEST_CS) | u64::from(trip.masked()) << 32, "{frame}");
    assert_eq!(frame.ss, u64::from(selector::GUEST_SS), "{frame}");
    assert_eq!(frame.rflags & flag::IF == 0, trip.masked(), "{frame}");
    assert_eq!(stop.handler_selectors, (selector::GUEST_CS, selector::GUEST_SS));
    assert_eq!(stop.handler_mask, 1);
    let never = flag::AC | flag::NT | flag::TF | flag::IOPL | flag::RF | flag::VM;
    assert_eq!(stop.handler_rflags & (never | flag::IF), flag::IF);
}

/// What is true of a system call that was the first instruction.
#[track_caller]
pub(crate) fn check_syscall(stop: &Stop, trip: &Trip) {
    check_syscall_at(stop, trip, UserSpace::CODE + 2);
}

/// What is true of a system call before `rip`, with the flags the frame had.
#[track_caller]
pub(crate) fn check_syscall_at(stop: &Stop, trip: &Trip, rip: u64) {
    let frame = stop.trapped(SYSCALL).frame;
    check_entry(stop, trip);
    let flags = trip.user_flags() & !flag::RF; // SYSCALL clears it
    assert_eq!(frame.rip, rip, "{frame}");
    assert_eq!(frame.rflags | flag::IF, flags, "{frame}");
    assert_eq!(frame.error, 0, "{frame}");
    let IretContext { rax, rsp, .. } = trip.frame;
    let rcx_r11 = Registers { rax, rsp, rcx: rip, r11: flags, ..trip.registers };
    assert_eq!(registers_of(&frame), rcx_r11, "{frame}");
}

/// What is true of a fault of user code, whose registers are all as the frame had them.
#[track_caller]
pub(crate) fn check_fault(stop: &Stop, trip: &Trip, (vector, error, rip): (u64, u64, u64)) {
    let frame = stop.trapped(vector).frame;
    check_entry(stop, trip);
    assert_eq!((frame.rip, frame.error), (rip, error), "{frame}");
    // Hardware sets RF in the frame of a fault.
    let kept = !(flag::RF | flag::IF);
    assert_eq!(frame.rflags & kept, trip.user_flags() & kept, "{frame}");
    let IretContext { rax, rcx, r11, rsp, .. } = trip.frame;
    assert_eq!(registers_of(&frame), Registers { rax, rcx, r11, rsp, ..trip.registers }, "{frame}");
}

/// The address of the last page fault, which the guest may learn in two ways (core 3.6, 3.9).
#[track_caller]
pub(crate) fn check_fault_address(address: u64) {
    assert_eq!(events::page_fault_address(), address);
    assert_eq!(execute(code!("mov rax, cr2"), &pattern()).ended().rax, address);
}
