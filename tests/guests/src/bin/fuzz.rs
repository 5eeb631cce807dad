//! Hostile noise (P7): random calls, page-table updates, instructions and returns. A test passes when the hypervisor is
//! still there afterwards and this domain can still do ordinary things.
//!
//! What would end this domain by right is left out: shutting down, sleeping for ever, replacing its own handlers or root.
//! The seed is printed; `seed=<number>` repeats a run, `rounds=<number>` makes it longer.
#![no_std]
#![no_main]
#![forbid(unsafe_code)]

extern crate alloc;

use alloc::sync::Arc;
use core::sync::atomic::{AtomicU64, Ordering};
use guests::abi::callback::IretContext;
use guests::abi::mmu::{MmuextCommand, MulticallEntry};
use guests::abi::{Hypercall, domid};
use guests::memory::{self, PAGE, Pages, Window};
use guests::probe::{self, Registers, UserSpace, call_number, second};
use guests::tables::{Chain, pin};
use guests::{events, hypercall, pattern, test};
use unikernel::boot::Boot;
use unikernel::sync::MaskMutex;
use unikernel::traps::{self, TrapFrame};
use unikernel::{println, time};

unikernel::entry!(main);

static SEED: AtomicU64 = AtomicU64::new(0);
static ROUNDS: AtomicU64 = AtomicU64::new(20_000);

fn main(boot: &Boot) {
    let number = |key| boot.argument(key).and_then(|text| text.parse().ok());
    SEED.store(number("seed").unwrap_or_else(time::counter), Ordering::Relaxed);
    if let Some(rounds) = number("rounds") {
        ROUNDS.store(rounds, Ordering::Relaxed);
    }
    println!("fuzz: seed={}", SEED.load(Ordering::Relaxed));
    unikernel::testing::run(boot);
}

fn rounds() -> u64 {
    ROUNDS.load(Ordering::Relaxed)
}

/// A small generator (splitmix).
struct Random(u64);

impl Random {
    fn new() -> Self {
        Self(SEED.load(Ordering::Relaxed))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn pick(&mut self, list: &[u64]) -> u64 {
        let at = self.below(list.len() as u64);
        list[usize::try_from(at).expect("an index")]
    }
}

/// Memory to be abused: none of it is needed for anything.
struct Ground {
    chain: Arc<Chain>,
    /// Four pages in a row that calls may read and write.
    buffer: Pages,
    /// A page, and behind it an address where nothing is.
    window: Window,
    random: Random,
}

const HOLE: u64 = 0xffff_8080_0000_0000;
const NO_FRAME: u64 = 0x000f_ffff_ffff;

impl Ground {
    fn new() -> Self {
        Self::around(Arc::new(Chain::new()), Random::new())
    }

    /// Ground that shares its tables with somebody else's.
    fn around(chain: Arc<Chain>, random: Random) -> Self {
        // An NMI may be sent by what follows; it is of no interest.
        fn ignore(frame: &mut TrapFrame) -> bool {
            frame.vector == 2
        }
        traps::set_hook(ignore);
        let buffer = Pages::allocate(4).expect("pages are free");
        let window = Window::reserve(2).expect("there is room");
        Self { chain, buffer, window, random }
    }

    /// A frame of ours that nobody needs, or one that is not ours.
    fn frame(&mut self) -> u64 {
        let chain = &self.chain;
        let shared = guests::memory::entry(events::shared_page().addr() as u64, 1).unwrap_or(0);
        let frames = [
            chain.frame(1),
            chain.frame(2),
            chain.frame(3),
            chain.frame(4),
            chain.page_frame(0),
            chain.page_frame(1),
            (shared & guests::abi::mmu::pte::FRAME) / PAGE,
            0,
            1,
            NO_FRAME,
            NO_FRAME + 1,
            u64::MAX / PAGE,
            u64::MAX,
        ];
        self.random.pick(&frames)
    }

    /// A page-table entry, likely or not.
    fn entry(&mut self) -> u64 {
        let flags = self.random.next();
        match self.random.below(8) {
            0 => flags & !1,
            // Addresses beyond all memory.
            1 => flags | (1 << 50) | 1,
            2 => (self.frame() << 12) | (flags & 0xfff0_0000_0000_0fff) | 1,
            _ => ((self.frame() & NO_FRAME) << 12) | (flags & 0x67) | 1,
        }
    }

    /// An address to read from or write to, good or bad.
    fn address(&mut self) -> u64 {
        let at = self.random.below(2 * PAGE);
        let addresses = [
            self.buffer.address() + (at & !7),
            self.buffer.address() + at,
            self.buffer.address() + PAGE - 8,
            self.window.address() + PAGE - self.random.below(64),
            self.window.address() + at,
            0,
            0x1234_5678_9000 + at,
            0x7fff_ffff_fff8,
            guests::NOT_CANONICAL,
            0xffff_7fff_ffff_fff0,
            0xffff_8000_0000_0000 + at * 8,
            HOLE + at,
            0xffff_87ff_ffff_fffc,
            u64::MAX - self.random.below(64),
        ];
        self.random.pick(&addresses)
    }

    /// What a structure field or an argument may be.
    fn value(&mut self) -> u64 {
        match self.random.below(12) {
            0 | 1 => self.random.below(8),
            2 => self.random.below(300),
            3 | 4 => self.frame(),
            5 => self.entry(),
            6 | 7 => self.address(),
            8 => self.chain.machine_slot(1, self.random.below(512)) | self.random.below(8),
            9 => u64::from(domid::SELF) | (self.random.below(4) << 32),
            10 => u64::MAX - self.random.below(4096),
            // Far from any frame number of ours.
            _ => self.random.next() | (1 << 52),
        }
    }

    /// Fills what the good addresses point to.
    fn fill(&mut self) {
        for at in (0..2 * PAGE + 256).step_by(8) {
            let low = self.value();
            let value = if self.random.below(3) == 0 { (self.value() << 32) | (low & 0xffff_ffff) } else { low };
            probe::store(self.buffer.address() + at, value);
        }
    }

    /// A call whose outcome is not this domain's end by right.
    fn call(&mut self) -> (u64, [u64; 5]) {
        loop {
            let number = match self.random.below(10) {
                0 => self.random.below(70),
                1 => self.random.next(),
                _ => self.random.below(43),
            };
            let mut args = [0; 5];
            for arg in &mut args {
                *arg = self.value();
            }
            // The first argument is mostly a command or an address.
            args[0] = match self.random.below(4) {
                0 => self.value(),
                1 => self.address(),
                _ => self.random.below(33),
            };
            if is_fair(number, &args) {
                return (number, args);
            }
        }
    }
}

/// Whether a call leaves this domain alive, and what it prints readable.
fn is_fair(number: u64, args: &[u64; 5]) -> bool {
    use guests::abi::sched::SchedOp;
    use guests::abi::tenon::TenonOp;
    use guests::abi::vcpu::VcpuOp;
    let Some(which) = Hypercall::from_number(number) else {
        return true;
    };
    match which {
        // Our handlers, our breakpoints, our stack, our console.
        Hypercall::SetTrapTable
        | Hypercall::SetCallbacks
        | Hypercall::CallbackOp
        | Hypercall::SetDebugreg
        | Hypercall::Iret
        | Hypercall::SchedOpCompat
        | Hypercall::ConsoleIo => false,
        // Our own pages stay where they are.
        Hypercall::UpdateVaMapping | Hypercall::UpdateVaMappingOtherdomain => {
            !(memory::VIRT_BASE..memory::VIRT_BASE + (1 << 30)).contains(&args[0])
        }
        // Lists have a test of their own, where the calls in them are fair.
        Hypercall::Multicall => args[1] == 0,
        Hypercall::SchedOp => {
            let command = args[0] & 0xffff_ffff;
            command == SchedOp::Yield.number() || command > 7
        }
        Hypercall::Tenon => args[0] != TenonOp::Wait.number(),
        Hypercall::VcpuOp => {
            let op = VcpuOp::from_number(args[0] & 0xffff_ffff);
            let steers = matches!(op, Some(VcpuOp::Initialise | VcpuOp::Up | VcpuOp::Down | VcpuOp::RegisterVcpuInfo));
            !steers
        }
        _ => true,
    }
}

/// Ordinary life goes on: ports, pages and tables work as ever.
fn check_alive() {
    let port = hypercall::bind_ipi(0).expect("a port is free");
    hypercall::close(port).expect("the port is ours");
    let chain = Chain::new();
    chain.protect(4);
    chain.pin(4).expect("a chain can be pinned");
    chain.unpin(4).expect("it is pinned");
    chain.unprotect(4);
    let pages = Pages::allocate(1).expect("a page is free");
    probe::store(pages.address(), 1);
    let space = UserSpace::new();
    let stop = space.run(guests::code!("nop"), &UserSpace::frame(), &pattern());
    let _ = events::mask_upcalls();
    assert!(stop.ended, "{}", stop.frame);
}

fn random_calls() {
    let mut ground = Ground::new();
    for round in 0..rounds() {
        if round % 64 == 0 {
            ground.fill();
        }
        let (number, args) = ground.call();
        // New roots would leave us without ground: commands come from the buffer, too.
        if number == Hypercall::MmuextOp.number() {
            random_extended_operation(&mut ground);
        } else {
            let _ = call_number(number, args);
        }
    }
    close_all_ports();
    let _ = call_number(Hypercall::SetGdt.number(), [0, 0, 0, 0, 0]);
    check_alive();
}
test!("fuzz.calls", random_calls);

fn random_extended_operation(ground: &mut Ground) {
    let command = match ground.random.below(24) {
        5 => 6,
        command => command,
    };
    let op = guests::abi::mmu::MmuextOp {
        cmd: u32::try_from(command).expect("a small number"),
        pad: 0,
        arg1: if ground.random.below(4) == 0 { ground.address() } else { ground.frame() },
        arg2: ground.value(),
    };
    let domain = if ground.random.below(8) == 0 { ground.value() } else { u64::from(domid::SELF) };
    let _ = call_number(Hypercall::MmuextOp.number(), [probe::address(&op), 1, ground.address_or_none(), domain, 0]);
}

impl Ground {
    fn address_or_none(&mut self) -> u64 {
        if self.random.below(2) == 0 { 0 } else { self.buffer.address() }
    }
}

fn close_all_ports() {
    for port in 1..4096 {
        let _ = hypercall::close(port);
    }
}

/// Tables and pages change types as often as they can, by every way there is.
fn churn(ground: &mut Ground) {
    for _ in 0..rounds() {
        let level = u32::try_from(ground.random.below(4) + 1).expect("a level");
        let index = ground.random.pick(&[0, 1, 2, 255, 256, 271, 272, 511]);
        let (entry, frame) = (ground.entry(), ground.frame());
        let _ = match ground.random.below(8) {
            0 => ground.chain.set_writable(level, false).map(|()| 0),
            1 => ground.chain.set_writable(level, true).map(|()| 0),
            2 => pin(level, frame),
            3 => probe::mmuext(MmuextCommand::Unpin, frame, 0),
            4 => probe::mmu_update(ground.chain.machine_slot(level, index) | ground.random.below(4), entry),
            5 => ground.chain.update(level, index, entry),
            6 => {
                let va = ground.window.address() + PAGE * ground.random.below(2);
                probe::update_va_mapping(va, entry, ground.random.pick(&[0, 1, 2, 5, 6]))
            }
            _ => probe::mmuext(MmuextCommand::NewUserBaseptr, ground.chain.frame(level), 0),
        };
    }
    // What is this vcpu's own can be taken down.
    probe::mmuext(MmuextCommand::NewUserBaseptr, 0, 0).expect("no user root is taken");
    for i in 0..2 {
        probe::update_va_mapping(ground.window.address() + i * PAGE, 0, 2).expect("nothing is mapped");
    }
}

/// Every page is a plain page again: no count was lost or left.
fn check_plain(chain: &Chain) {
    for level in (1..=4).rev() {
        let _ = chain.unpin(level);
    }
    for i in 0..2 {
        let _ = probe::mmuext(MmuextCommand::Unpin, chain.page_frame(i), 0);
    }
    chain.unprotect(4);
    for level in 1..=4 {
        probe::mmuext(MmuextCommand::ClearPage, chain.frame(level), 0).expect("a plain page");
    }
    check_alive();
}

fn random_page_tables() {
    let mut ground = Ground::new();
    churn(&mut ground);
    check_plain(&ground.chain);
}
test!("fuzz.pages", random_page_tables);

static SHARED: MaskMutex<Option<Arc<Chain>>> = MaskMutex::new(None);

/// The same on two vcpus at once, for the same tables.
fn two_vcpus_and_the_same_tables() {
    let chain = Arc::new(Chain::new());
    *SHARED.lock() = Some(Arc::clone(&chain));
    second::race(
        || churn(&mut Ground::around(Arc::clone(&chain), Random::new())),
        || {
            let chain = SHARED.lock().clone().expect("it was set");
            let seed = SEED.load(Ordering::Relaxed);
            churn(&mut Ground::around(chain, Random(!seed)));
        },
    );
    *SHARED.lock() = None;
    check_plain(&chain);
}
test!("fuzz.race", two_vcpus_and_the_same_tables);

fn random_lists_of_calls() {
    let mut ground = Ground::new();
    for _ in 0..rounds() / 16 {
        ground.fill();
        let mut list = [MulticallEntry::default(); 16];
        for entry in &mut list {
            let (number, args) = ground.call();
            let number = if number == Hypercall::MmuextOp.number() { 17 } else { number };
            let [a, b, c, d, e] = args;
            *entry = MulticallEntry { op: number, result: 0, args: [a, b, c, d, e, ground.value()] };
        }
        let _ = call_number(Hypercall::Multicall.number(), [probe::address_mut(&mut list), 16, 0, 0, 0]);
    }
    close_all_ports();
    let _ = call_number(Hypercall::SetGdt.number(), [0, 0, 0, 0, 0]);
    check_alive();
}
test!("fuzz.multicall", random_lists_of_calls);

/// MOV to CS and to segment registers that do not exist is #UD, but QEMU 10.0 without KVM loads CS, LDTR and TR by it, at
/// any privilege. With REX.R, which a CPU ignores here, it writes elsewhere in the state of its CPU: the A20 gate is one of
/// the places. No hypervisor survives that, so such bytes become moves to DS, and such a prefix one without R.
fn leave_out_bad_moves(bytes: &mut [u8]) {
    const REX: u8 = 0x40;
    const REX_R: u8 = 4;
    for at in 1..bytes.len() {
        let register = bytes[at] >> 3 & 7;
        if bytes[at - 1] != 0x8e {
            continue;
        }
        if matches!(register, 1 | 6 | 7) {
            bytes[at] = bytes[at] & !0x38 | 0x18;
        }
        if at >= 2 && bytes[at - 2] & 0xf0 == REX {
            bytes[at - 2] &= !REX_R;
        }
    }
}

/// Any bytes as user code, from any start: whatever they do, a trap or the timer ends them.
fn random_instructions() {
    let mut random = Random::new();
    let space = UserSpace::new();
    // First bytes that lead to where the hypervisor has something to decide.
    let starts: [&[u8]; 12] = [
        &[],
        &[0x0f],
        &[0x0f, 0x01],
        &[0x0f, 0x20],
        &[0x0f, 0x22],
        &[0x0f, 0x0b, 0x78, 0x65, 0x6e, 0x0f, 0xa2],
        &[0x0f, 0x32],
        &[0xcd],
        &[0xe4],
        &[0xf3, 0x6c],
        &[0x66],
        &[0x8e],
    ];
    for _ in 0..rounds() / 8 {
        let mut bytes = [0; 48];
        for byte in &mut bytes {
            *byte = random.next().to_le_bytes()[0];
        }
        let start = starts[usize::try_from(random.below(12)).expect("an index")];
        bytes[..start.len()].copy_from_slice(start);
        leave_out_bad_moves(&mut bytes);
        let registers = Registers {
            rax: random.next(),
            rcx: random.below(0x2000),
            rdx: random.next(),
            rdi: UserSpace::DATA + random.below(4096),
            rsi: UserSpace::DATA + random.below(4096),
            ..pattern()
        };
        let frame = IretContext {
            rax: random.next(),
            rcx: random.below(0x2000),
            // Never masked: the timer is to get through.
            rflags: (random.next() & 0x4_4dd5) | 0x202,
            cs: random.pick(&[0xe033, 0xe033, 0xe033, 0xe023]),
            ..UserSpace::frame()
        };
        hypercall::set_singleshot_timer(0, time::now_ns() + 2_000_000).expect("a timer is set");
        let _ = space.run_bytes_until_event(&bytes, &frame, &registers);
        hypercall::stop_singleshot_timer(0).expect("it is stopped");
        events::scan();
    }
    drop(space);
    check_alive();
}
test!("fuzz.instructions", random_instructions);

/// Returns to nowhere: any selectors, addresses and flags.
fn random_returns() {
    let mut random = Random::new();
    let space = UserSpace::new();
    for _ in 0..rounds() / 8 {
        let selectors = [0xe033, 0xe023, 0xe02b, 0xe008, 0xe010, 0, 3, 0xf, 0x1230, 0xffff, 0xe040, 0xe050];
        let addresses = [
            UserSpace::CODE,
            UserSpace::CODE + 4095,
            UserSpace::DATA,
            0,
            guests::NOT_CANONICAL,
            0x7fff_ffff_fffe,
            0x8000_0000_0000,
            HOLE,
            u64::MAX,
        ];
        let frame = IretContext {
            rax: random.next(),
            r11: random.next(),
            rcx: random.next(),
            flags: random.pick(&[0, 0x100, u64::MAX]),
            rip: random.pick(&addresses),
            // To user mode, whose frames the hypervisor pushes on a stack that is always good.
            cs: random.pick(&selectors) | 3 | (random.next() << 16),
            rflags: random.next() | 0x200,
            rsp: random.pick(&addresses),
            ss: random.pick(&selectors) | (random.next() << 16),
        };
        hypercall::set_singleshot_timer(0, time::now_ns() + 2_000_000).expect("a timer is set");
        let _ = space.run_bytes_until_event(&[0x90, 0x90, 0x0f, 0x05], &frame, &pattern());
        hypercall::stop_singleshot_timer(0).expect("it is stopped");
        events::scan();
    }
    drop(space);
    check_alive();
}
test!("fuzz.iret", random_returns);
