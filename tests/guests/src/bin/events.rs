//! Event channels within one domain, block and poll (core 5).
#![no_std]
#![no_main]
#![forbid(unsafe_code)]

use guests::abi::event::{EventOp, PortStatus, Virq};
use guests::abi::sched::SchedOp;
use guests::abi::shared::vcpu_info;
use guests::abi::{Errno, Hypercall, domid};
use guests::probe::{self, Registers, UserSpace, call, execute_until_event};
use guests::{code, events, flag, hypercall, mask_address, pattern, test};
use unikernel::time;
use unikernel::traps::EVENT;

unikernel::entry!(unikernel::testing::run);

const SELF: u16 = domid::SELF;
/// A domain that does not exist.
const NOBODY: u16 = 0x7123;

/// Two ports of ours, joined, and quiet.
struct Pair {
    a: u32,
    b: u32,
}

impl Pair {
    fn new() -> Self {
        let a = hypercall::allocate_unbound(SELF, SELF).expect("a port is free");
        let b = hypercall::bind_interdomain(SELF, a).expect("an unbound port can be joined");
        for port in [a, b] {
            events::open(port);
        }
        let pair = Self { a, b };
        pair.settle();
        pair
    }

    /// Takes note of what is pending.
    fn settle(&self) {
        events::scan();
        for port in [self.a, self.b] {
            events::clear_pending(port);
        }
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        for port in [self.a, self.b] {
            let _ = hypercall::close(port);
        }
    }
}

fn ports_are_handed_out_lowest_first() {
    let ports: [u32; 4] = core::array::from_fn(|_| hypercall::allocate_unbound(SELF, 0).expect("a port is free"));
    assert!(ports[0] > 0, "port 0 is never valid");
    assert!(ports.windows(2).all(|two| two[0] < two[1]), "{ports:?}");
    hypercall::close(ports[2]).expect("the port is ours");
    hypercall::close(ports[1]).expect("the port is ours");
    assert_eq!(hypercall::allocate_unbound(SELF, 0), Ok(ports[1]));
    assert_eq!(hypercall::allocate_unbound(SELF, 0), Ok(ports[2]));
    for port in ports {
        hypercall::close(port).expect("the port is ours");
        assert_eq!(hypercall::close(port), Err(Errno::Inval));
    }
}
test!("events.ports", ports_are_handed_out_lowest_first);

fn two_ports_of_one_domain() {
    let a = hypercall::allocate_unbound(SELF, SELF).expect("a port is free");
    let status = hypercall::port_status(SELF, a).expect("the port is ours");
    assert_eq!(status.status, PortStatus::Unbound as u32);
    hypercall::send(a).expect("an unbound port swallows it");
    assert!(!events::is_pending(a));
    let b = hypercall::bind_interdomain(SELF, a).expect("an unbound port can be joined");
    // core 5.2: the new port is raised once, lest something sent before is lost.
    assert!(events::is_pending(b));
    assert!(!events::is_pending(a));
    for (port, other) in [(a, b), (b, a)] {
        let status = hypercall::port_status(SELF, port).expect("the port is ours");
        assert_eq!(status.status, PortStatus::Interdomain as u32);
        assert_eq!(status.remote_port, other);
    }
    assert_eq!(hypercall::bind_interdomain(SELF, a), Err(Errno::Inval), "joined already");
    events::clear_pending(b);
    for (from, to) in [(a, b), (b, a)] {
        hypercall::send(from).expect("it is joined");
        assert!(events::clear_pending(to));
        assert!(!events::is_pending(from));
    }
    // core 5.2: the other end goes back to unbound, and a pending bit dies with the port.
    hypercall::send(a).expect("it is joined");
    hypercall::close(b).expect("the port is ours");
    assert!(!events::is_pending(b));
    let status = hypercall::port_status(SELF, a).expect("the port is ours");
    assert_eq!(status.status, PortStatus::Unbound as u32);
    let status = hypercall::port_status(SELF, b).expect("a port number");
    assert_eq!(status.status, PortStatus::Closed as u32);
    let again = hypercall::bind_interdomain(SELF, a).expect("it can be joined again");
    hypercall::close(a).expect("the port is ours");
    hypercall::close(again).expect("the port is ours");
    events::scan();
}
test!("events.interdomain", two_ports_of_one_domain);

/// core 5.1: pending bit, then selector, then the upcall byte; a bit already pending changes nothing.
fn what_raising_a_port_sets() {
    let pair = Pair::new();
    let byte = |offset: usize| {
        let word = probe::read(events::shared_page().addr() as u64).expect("the page is mapped");
        word.to_le_bytes()[offset]
    };
    let selector = || {
        probe::read(events::shared_page().addr() as u64 + vcpu_info::PENDING_SEL as u64).expect("the page is mapped")
    };
    assert_eq!(byte(vcpu_info::UPCALL_PENDING), 0);
    hypercall::send(pair.a).expect("it is joined");
    assert!(events::is_pending(pair.b));
    assert_eq!(selector(), 1 << (pair.b / 64));
    assert_eq!(byte(vcpu_info::UPCALL_PENDING), 1);
    assert_eq!(byte(vcpu_info::UPCALL_MASK), 1, "the mask is the guest's");
    let before = events::count(pair.b);
    hypercall::send(pair.a).expect("it is joined");
    events::scan();
    assert_eq!(events::count(pair.b), before + 1, "two sends, one edge");

    // A masked port becomes pending and nothing more.
    events::set_port_mask(pair.b, true);
    hypercall::send(pair.a).expect("it is joined");
    assert!(events::is_pending(pair.b));
    assert_eq!((selector(), byte(vcpu_info::UPCALL_PENDING)), (0, 0));
    // core 5.2: the unmask call does what the send left out.
    hypercall::unmask(pair.b).expect("the port is ours");
    assert!(!events::is_masked(pair.b));
    assert_eq!(selector(), 1 << (pair.b / 64));
    assert_eq!(byte(vcpu_info::UPCALL_PENDING), 1);
    events::scan();
    assert_eq!(events::count(pair.b), before + 2);
    // Unmasking what is not masked raises nothing.
    hypercall::unmask(pair.b).expect("the port is ours");
    assert_eq!((selector(), byte(vcpu_info::UPCALL_PENDING)), (0, 0));
}
test!("events.raise", what_raising_a_port_sets);

/// `event_channel_op(send)` as code: RDI = command, RSI = argument, RBX = address of the upcall mask.
fn send_registers(port: &u32) -> Registers {
    Registers { rdi: EventOp::Send.number(), rsi: probe::address(port), rbx: mask_address(), ..pattern() }
}

/// core 3.8: the upcall comes at the exit of the call that raised it, with its frame.
fn an_upcall_comes_when_the_call_returns() {
    let pair = Pair::new();
    let code = code!("mov byte ptr [rbx], 0", "mov eax, 32", "syscall", "nop");
    let stop = execute_until_event(code, &send_registers(&pair.a)).trapped(EVENT);
    assert_eq!(stop.frame.rip, code.start + 3 + 5 + 2);
    assert_eq!(stop.frame.rax, 0);
    assert_eq!(stop.frame.saved_mask(), 0);
    assert_eq!(stop.frame.rflags & flag::IF, flag::IF);
    assert_eq!(stop.handler_mask, 1, "an upcall always masks");
    assert_eq!(stop.base, probe::stack_end());
    // The hypervisor does not clear what it set (pitfall 24 and core 3.8).
    assert!(events::upcall_pending());
    pair.settle();

    // Masked, it waits; unmasking alone is no exit; the next call delivers it.
    let code = code!(
        "mov eax, 32",
        "syscall",
        "mov byte ptr [rbx], 0",
        "nop",
        "mov eax, 17",
        "xor edi, edi",
        "syscall",
        "nop",
    );
    let stop = execute_until_event(code, &send_registers(&pair.a)).trapped(EVENT);
    assert_eq!(stop.frame.rip, code.start + 7 + 3 + 1 + 9);
    assert!(stop.frame.rax >> 16 >= 3, "the call was done first");
    pair.settle();
}
test!("events.upcall", an_upcall_comes_when_the_call_returns);

/// Pitfall 24: also after an exception that was emulated, and by an `iret` that unmasks.
fn an_upcall_comes_at_every_exit() {
    let pair = Pair::new();
    let code = code!("mov eax, 32", "syscall", "mov byte ptr [rbx], 0", "mov rax, cr0", "nop",);
    let stop = execute_until_event(code, &send_registers(&pair.a)).trapped(EVENT);
    assert_eq!(stop.frame.rip, code.start + 7 + 3 + 3);
    assert_eq!(stop.frame.rax & 1, 1, "the instruction was done first");
    pair.settle();

    hypercall::send(pair.a).expect("it is joined");
    let code = code!("nop");
    let frame = probe::kernel_frame(code);
    let frame = guests::abi::callback::IretContext { rflags: 0x202, ..frame };
    let stop = probe::enter_by_iret_until_event(&frame, &pattern()).trapped(EVENT);
    assert_eq!(stop.frame.rip, code.start, "before the first instruction");
    assert_eq!(stop.frame.saved_mask(), 0);
    pair.settle();

    // Into user space, where the frame then starts at the kernel's stack.
    hypercall::send(pair.a).expect("it is joined");
    let space = UserSpace::new();
    let stop = space.run_until_event(code!("nop"), &UserSpace::frame(), &pattern());
    let stop = stop.trapped(EVENT);
    assert_eq!(stop.frame.rip, UserSpace::CODE);
    assert!(stop.frame.from_user());
    assert_eq!(stop.base, probe::trap_stack_end());
    pair.settle();
}
test!("events.upcall.exits", an_upcall_comes_at_every_exit);

fn interprocessor_interrupts() {
    let port = hypercall::bind_ipi(0).expect("vcpu 0 exists");
    events::open(port);
    let status = hypercall::port_status(SELF, port).expect("the port is ours");
    assert_eq!((status.status, status.vcpu), (PortStatus::Ipi as u32, 0));
    hypercall::send(port).expect("an IPI can be sent");
    assert!(events::is_pending(port));
    events::scan();
    assert_eq!(events::count(port), 1);
    assert_eq!(hypercall::bind_vcpu(port, 0), Err(Errno::Inval));
    assert_eq!(hypercall::bind_ipi(4000), Err(Errno::NoEnt));
    hypercall::close(port).expect("the port is ours");
}
test!("events.ipi", interprocessor_interrupts);

fn virtual_interrupts() {
    let port = hypercall::bind_virq(Virq::Debug, 0).expect("nobody has it");
    let status = hypercall::port_status(SELF, port).expect("the port is ours");
    assert_eq!((status.status, status.detail), (PortStatus::Virq as u32, Virq::Debug as u32));
    assert_eq!(hypercall::bind_virq(Virq::Debug, 0), Err(Errno::Exist));
    assert_eq!(hypercall::bind_virq(Virq::Debug, 4000), Err(Errno::NoEnt));
    assert_eq!(hypercall::send(port), Err(Errno::Inval));
    assert_eq!(hypercall::bind_vcpu(port, 0), Err(Errno::Inval));
    hypercall::close(port).expect("the port is ours");
    let again = hypercall::bind_virq(Virq::Debug, 0).expect("it is free again");
    hypercall::close(again).expect("the port is ours");
    let arg = guests::abi::event::BindVirq { virq: 24, vcpu: 0, port: 0 };
    let op = EventOp::BindVirq.number();
    assert_eq!(call(Hypercall::EventChannelOp, [op, probe::address(&arg), 0, 0, 0]), Err(Errno::Inval));
}
test!("events.virq", virtual_interrupts);

fn what_is_refused() {
    for port in [0, 4095, 4096, u32::MAX] {
        assert_eq!(hypercall::send(port), Err(Errno::Inval), "send {port}");
        assert_eq!(hypercall::close(port), Err(Errno::Inval), "close {port}");
    }
    for port in [4096 * 1024, u32::MAX] {
        assert_eq!(hypercall::port_status(SELF, port).map(|_| ()), Err(Errno::Inval), "status {port}");
        assert_eq!(hypercall::unmask(port), Err(Errno::Inval), "unmask {port}");
    }
    assert_eq!(hypercall::bind_interdomain(NOBODY, 1), Err(Errno::Srch));
    assert_eq!(hypercall::bind_interdomain(SELF, 0), Err(Errno::Inval));
    assert_eq!(hypercall::bind_interdomain(SELF, 4095), Err(Errno::Inval));
    let refused = hypercall::allocate_unbound(NOBODY, SELF);
    assert!(matches!(refused, Err(Errno::Srch | Errno::Perm)), "{refused:?}");
    let op = |command, arg| call(Hypercall::EventChannelOp, [command, arg, 0, 0, 0]);
    assert_eq!(op(99, probe::address(&[0u64; 4])), Err(Errno::NoSys));
    assert_eq!(op(EventOp::Send.number(), 0x1234_5678_9000), Err(Errno::Fault));
    // core 5.2: the 2-level format has no priorities and no array.
    let arg = [1u32, 0];
    assert_eq!(op(EventOp::SetPriority.number(), probe::address(&arg)), Err(Errno::NoSys));
    let refused = op(EventOp::ExpandArray.number(), probe::address(&[0u64]));
    assert!(matches!(refused, Err(Errno::OpNotSupp | Errno::NoSys)), "{refused:?}");
    // core 5.2: the form of old guests may be missing; with nothing for an argument it fails anyway.
    let refused = call(Hypercall::EventChannelOpCompat, [0; 5]);
    assert!(matches!(refused, Err(Errno::NoSys | Errno::Fault)), "{refused:?}");
}
test!("events.refused", what_is_refused);

/// A call whose answer cannot be written has no effect: the answer is written before the deed. (Xen keeps the port.)
fn an_answer_that_cannot_be_written() {
    let before = hypercall::allocate_unbound(SELF, 0).expect("a port is free");
    let window = guests::memory::Window::reserve(1).expect("there is room");
    let page = guests::memory::Pages::allocate(1).expect("a page is free");
    probe::write(page.address(), u64::from(SELF)).expect("the page is writable");
    let entry = (page.frame(0).expect("the page is ours") << 12) | guests::tables::READ_ONLY;
    probe::update_va_mapping(window.address(), entry, 2).expect("a page is mapped");
    let op = EventOp::AllocUnbound.number();
    let result = call(Hypercall::EventChannelOp, [op, window.address(), 0, 0, 0]);
    assert_eq!(result, Err(Errno::Fault));
    assert_eq!(hypercall::allocate_unbound(SELF, 0), Ok(before + 1), "no port was lost");
    hypercall::close(before).expect("the port is ours");
    hypercall::close(before + 1).expect("the port is ours");
}
test!("events.answer-fault", an_answer_that_cannot_be_written);

/// core 5.1: 4095 ports, and then none.
fn every_port_can_be_had() {
    let mut last = 0;
    let mut count = 0;
    while let Ok(port) = hypercall::allocate_unbound(SELF, 0) {
        last = port;
        count += 1;
        assert!(count < 200_000, "there is an end");
    }
    assert_eq!(hypercall::allocate_unbound(SELF, 0), Err(Errno::NoSpc));
    assert_eq!(hypercall::bind_ipi(0), Err(Errno::NoSpc));
    assert_eq!(last, 4095);
    for port in 1..=last {
        let status = hypercall::port_status(SELF, port).expect("a port number");
        if status.status == PortStatus::Unbound as u32 {
            hypercall::close(port).expect("the port is ours");
        }
    }
    let port = hypercall::allocate_unbound(SELF, 0).expect("ports are free again");
    hypercall::close(port).expect("the port is ours");
}
test!("events.exhaustion", every_port_can_be_had);

/// core 5.4: `block` unmasks, sleeps, and answers 0 after the upcall.
fn block_wakes_up_with_the_event() {
    let pair = Pair::new();
    let before = events::count(pair.b);
    hypercall::send(pair.a).expect("it is joined");
    assert_eq!(events::upcall_mask(), 1);
    assert_eq!(call(Hypercall::SchedOp, [SchedOp::Block.number(), 0, 0, 0, 0]), Ok(0));
    assert_eq!(events::upcall_mask(), 0, "block unmasks first");
    let _ = events::mask_upcalls();
    assert_eq!(events::count(pair.b), before + 1);
    // And really sleeps: only the timer wakes it.
    let start = time::now_ns();
    hypercall::set_singleshot_timer(0, start + 30_000_000).expect("a timer is set");
    while time::now_ns() < start + 30_000_000 {
        assert_eq!(call(Hypercall::SchedOp, [SchedOp::Block.number(), 0, 0, 0, 0]), Ok(0));
    }
    let _ = events::mask_upcalls();
}
test!("events.block", block_wakes_up_with_the_event);

/// core 5.4: `poll` looks at pending bits whatever the masks say, and leaves the upcall mask alone.
fn poll_waits_for_ports() {
    let pair = Pair::new();
    events::set_port_mask(pair.b, true);
    hypercall::send(pair.a).expect("it is joined");
    let start = time::now_ns();
    hypercall::poll(&[pair.a, pair.b], start + 2_000_000_000).expect("it is pending");
    assert!(time::now_ns() < start + 1_000_000_000, "at once");
    assert_eq!(events::upcall_mask(), 1);
    pair.settle();
    // Not pending: until the timeout.
    let start = time::now_ns();
    hypercall::poll(&[pair.b], start + 20_000_000).expect("the ports are ours");
    assert!(time::now_ns() >= start + 20_000_000, "until the timeout");
    assert_eq!(events::upcall_mask(), 1);
    // A timer set for another port does not end it early... but its own event does: poll on the timer's port.
    let start = time::now_ns();
    hypercall::set_singleshot_timer(0, start + 20_000_000).expect("a timer is set");
    hypercall::poll(&[time::timer_port()], start + 5_000_000_000).expect("the port is ours");
    assert!((start + 20_000_000..start + 3_000_000_000).contains(&time::now_ns()));
    events::scan();
    // core 5.4.
    assert_eq!(hypercall::poll(&[pair.b, 4000], 0), Err(Errno::Inval), "a port that is not bound");
    assert_eq!(hypercall::poll(&[0], 0), Err(Errno::Inval));
    assert_eq!(hypercall::poll(&[pair.b; 129], 1), Err(Errno::Inval), "too many");
    events::set_port_mask(pair.b, false);
}
test!("events.poll", poll_waits_for_ports);

fn yield_returns() {
    for _ in 0..10 {
        assert_eq!(call(Hypercall::SchedOp, [SchedOp::Yield.number(), 0, 0, 0, 0]), Ok(0));
    }
    assert_eq!(call(Hypercall::SchedOp, [99, 0, 0, 0, 0]), Err(Errno::NoSys));
}
test!("events.yield", yield_returns);
