//! Two vcpus of one domain: coming and going, and races for page tables (core 4, 7).
//!
//! A vcpu gets its first state once in a domain's life, so each test wants a boot of its own.
#![no_std]
#![no_main]
#![forbid(unsafe_code)]

use core::hint::spin_loop;
use core::sync::atomic::{AtomicU64, Ordering};
use guests::abi::event::Virq;
use guests::abi::mmu::{MmuextCommand, uvmf};
use guests::abi::shared::vcpu_info;
use guests::abi::vcpu::{RegisterVcpuInfo, Runstate, VcpuOp};
use guests::abi::{Errno, Hypercall};
use guests::memory::{Pages, Window};
use guests::probe::second::{self, VCPU, first_context, initialise, join, race, start};
use guests::probe::{self, call, mmuext, update_va_mapping};
use guests::tables::{Chain, LEAF, READ_ONLY, pin};
use guests::{NOT_CANONICAL, events, hypercall, memory, test};
use unikernel::time;

unikernel::entry!(unikernel::testing::run);

/// How often racers do what they do.
const ROUNDS: u64 = 2000;

static SEEN: AtomicU64 = AtomicU64::new(0);

fn a_vcpu_comes_and_goes() {
    assert_eq!(hypercall::vcpu_is_up(VCPU), Ok(0));
    assert_eq!(hypercall::vcpu_is_up(VCPU + 1), Err(Errno::NoEnt), "there are two vcpus");
    assert!(hypercall::vcpu_up(VCPU).is_err(), "it has no state yet");
    assert_eq!(hypercall::runstate(VCPU).map(|info| info.state), Ok(Runstate::Offline as u32));
    for i in 1..=3 {
        start(|| {
            SEEN.fetch_add(1, Ordering::SeqCst);
        });
        join();
        assert_eq!(SEEN.load(Ordering::SeqCst), i, "it goes on behind its last call");
        assert_eq!(second::done(), i);
        assert_eq!(initialise(&mut first_context()), Err(Errno::Exist));
    }
    assert_eq!(hypercall::runstate(VCPU).map(|info| info.state), Ok(Runstate::Offline as u32));
}
test!("smp.up-down", a_vcpu_comes_and_goes);

/// core 7: a state that cannot be is refused, and another may follow.
fn a_bad_state_is_refused() {
    let refused = |change: &dyn Fn(&mut guests::abi::context::VcpuContext)| {
        let mut context = first_context();
        change(&mut context);
        let result = initialise(&mut context);
        assert!(result.is_err(), "{result:?}");
    };
    refused(&|context| context.ctrlreg[3] = 0x000f_ffff_ffff_f000);
    let plain = Pages::allocate(1).expect("a page is free");
    let frame = plain.frame(0).expect("the page is ours");
    refused(&|context| context.ctrlreg[3] = frame << 12);
    refused(&|context| context.event_callback_eip = NOT_CANONICAL);
    refused(&|context| context.gs_base_kernel = NOT_CANONICAL);
    refused(&|context| context.gdt_ents = 7169);
    refused(&|context| context.ldt_ents = 8193);
    start(|| ());
    join();
    plain.set_writable(0, false).expect("no refused state holds the page");
    pin(4, frame).expect("no refused state holds the page");
    mmuext(MmuextCommand::Unpin, frame, 0).expect("it is pinned");
    plain.set_writable(0, true).expect("no refused state holds the page");
}
test!("smp.bad-state", a_bad_state_is_refused);

/// core 5.2, 7, pitfall 52: ports for a vcpu that is down work, and set its bits.
fn events_of_another_vcpu() {
    let port = hypercall::bind_ipi(VCPU).expect("vcpu 1 exists");
    let record = events::shared_page().addr() as u64 + vcpu_info::SIZE as u64 * u64::from(VCPU);
    let word = |at: usize| probe::read(record + at as u64).expect("the page is mapped");
    assert_eq!(word(0) & 0xff00, 0x100, "all masks start set (core 1.3)");
    hypercall::send(port).expect("an IPI can be sent");
    assert!(events::is_pending(port));
    assert_eq!(word(0) & 0xff, 1);
    assert_eq!(word(vcpu_info::PENDING_SEL), 1 << (port / 64));
    let status = hypercall::port_status(guests::abi::domid::SELF, port).expect("the port is ours");
    assert_eq!(status.vcpu, VCPU);
    let timer = hypercall::bind_virq(Virq::Timer, VCPU).expect("each vcpu has one");
    assert_eq!(hypercall::bind_virq(Virq::Timer, VCPU), Err(Errno::Exist));
    for port in [port, timer] {
        hypercall::close(port).expect("the port is ours");
    }
    // core 6.3: the one-shot timer is the calling vcpu's.
    assert_eq!(hypercall::set_singleshot_timer(VCPU, time::now_ns()), Err(Errno::Inval));
    assert_eq!(hypercall::stop_singleshot_timer(VCPU), Err(Errno::Inval));
    hypercall::stop_periodic_timer(VCPU).expect("that one is not");
}
test!("smp.events", events_of_another_vcpu);

/// core 7, 10.2, pitfall 53: the record moves with its content, everything is to be scanned, and only once.
fn a_vcpu_info_moves() {
    let page = Pages::allocate(1).expect("a page is free");
    let frame = page.frame(0).expect("the page is ours");
    let register = |mfn, offset| {
        let arg = RegisterVcpuInfo { mfn, offset, reserved: 0 };
        let op = VcpuOp::RegisterVcpuInfo.number();
        call(Hypercall::VcpuOp, [op, u64::from(VCPU), probe::address(&arg), 0, 0])
    };
    assert!(register(frame, 4096 - 32).is_err(), "it would leave the page");
    assert!(register(frame, 4).is_err(), "not aligned");
    assert!(register(0x000f_ffff_ffff, 0).is_err(), "not ours");
    let table = memory::entry_address(0, 4).and_then(memory::frame_of).expect("there is a root");
    assert!(register(table, 0).is_err(), "a page table");
    register(frame, 64).expect("a place in our page");
    let word = |at: usize| probe::read(page.address() + 64 + at as u64).expect("the page is mapped");
    assert_eq!(word(0) & 0xffff, 0x101, "pending, and the mask as it was");
    assert_eq!(word(vcpu_info::PENDING_SEL), u64::MAX);
    assert!(word(vcpu_info::TIME + 24) & 0xffff_ffff > 0, "the time is there");
    assert!(register(frame, 128).is_err(), "only once");
    // The page cannot become a table under the hypervisor's pen (pitfall 46).
    page.set_writable(0, false).expect("our own mapping is ours");
    assert!(pin(1, frame).is_err(), "the hypervisor writes it");
    let _ = page.leak();
}
test!("smp.vcpu-info", a_vcpu_info_moves);

/// What the racers race for. Set before the second vcpu starts.
static PLACE: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];

fn place(i: usize) -> u64 {
    PLACE[i].load(Ordering::Relaxed)
}

fn set_places(values: [u64; 4]) {
    for (place, value) in PLACE.iter().zip(values) {
        place.store(value, Ordering::Relaxed);
    }
}

/// Entries that lead to either page, writable or not, or nowhere.
fn update_at_random(seed: u64) {
    let mut state = seed;
    for _ in 0..ROUNDS {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let entry = match state >> 60 {
            0..4 => place(1) | LEAF,
            4..8 => place(2) | LEAF,
            8..12 => place(1) | READ_ONLY,
            _ => 0,
        };
        let slot = place(0) + (state >> 32) % 4 * 8;
        // Every one of these is allowed, whatever the other vcpu does.
        if probe::mmu_update(slot, entry) != Ok(0) {
            SEEN.fetch_add(1, Ordering::SeqCst);
        }
    }
}

fn racing_updates_keep_the_counts() {
    let chain = Chain::new();
    chain.protect(1);
    chain.pin(1).expect("an L1 can be pinned");
    set_places([chain.machine_slot(1, 0), chain.page_frame(0) << 12, chain.page_frame(1) << 12, 0]);
    SEEN.store(0, Ordering::SeqCst);
    race(|| update_at_random(1), || update_at_random(2));
    assert_eq!(SEEN.load(Ordering::SeqCst), 0, "updates were refused");
    for index in 0..4 {
        chain.update(1, index, 0).expect("an entry can be removed");
    }
    chain.unpin(1).expect("it is pinned");
    chain.unprotect(1);
    // No use was lost or left: the pages can become tables, so nothing writes them, and pages again.
    for i in 0..2 {
        let (frame, va) = (chain.page_frame(i), chain.page_address(i));
        update_va_mapping(va, (frame << 12) | READ_ONLY, 2).expect("a page can be made read-only");
        probe::mmuext(MmuextCommand::ClearPage, frame, 0).expect("it is a plain page");
        pin(2, frame).expect("nothing writes the page");
        mmuext(MmuextCommand::Unpin, frame, 0).expect("it is pinned");
        update_va_mapping(va, (frame << 12) | LEAF, 2).expect("it is no table any more");
    }
}
test!("smp.race.updates", racing_updates_keep_the_counts);

/// P1 under a race: one vcpu pins and unpins, the other maps writable and unmaps.
fn racing_types_keep_the_counts() {
    let page = Pages::allocate(1).expect("a page is free");
    let frame = page.frame(0).expect("the page is ours");
    let window = Window::reserve(1).expect("there is room");
    page.set_writable(0, false).expect("a page can be made read-only");
    set_places([frame, 0, 0, 0]);
    SEEN.store(0, Ordering::SeqCst);
    let mapped = AtomicU64::new(0);
    race(
        || {
            // However the vcpus take turns, in the end the page is free to be mapped.
            while mapped.load(Ordering::Relaxed) < ROUNDS {
                if update_va_mapping(window.address(), (frame << 12) | LEAF, 2).is_ok() {
                    mapped.fetch_add(1, Ordering::Relaxed);
                    update_va_mapping(window.address(), 0, 2).expect("nothing is mapped");
                } else {
                    hypercall::yield_now();
                }
            }
        },
        || {
            for _ in 0..ROUNDS {
                if pin(1, place(0)).is_ok() && mmuext(MmuextCommand::Unpin, place(0), 0).is_err() {
                    SEEN.fetch_add(1, Ordering::SeqCst);
                }
            }
        },
    );
    assert_eq!(SEEN.load(Ordering::SeqCst), 0, "a table pinned by one vcpu was unpinned by another");
    pin(1, frame).expect("nothing writes the page");
    assert!(update_va_mapping(window.address(), (frame << 12) | LEAF, 2).is_err());
    mmuext(MmuextCommand::Unpin, frame, 0).expect("it is pinned");
    page.set_writable(0, true).expect("it is no table any more");
}
test!("smp.race.types", racing_types_keep_the_counts);

/// core 4.7, pitfall 36: an emulated exchange is as atomic as the instruction.
fn racing_emulated_writes_lose_nothing() {
    call(Hypercall::VmAssist, [0, 2, 0, 0, 0]).expect("the assist is known");
    let chain = Chain::new();
    chain.protect(1);
    chain.pin(1).expect("an L1 can be pinned");
    set_places([chain.slot(1, 9), 0, 0, 0]);
    fn add_two() {
        for _ in 0..ROUNDS {
            probe::compare_and_add(place(0), 2);
        }
    }
    race(add_two, add_two);
    assert_eq!(chain.peek(1, 9), 4 * ROUNDS, "absent entries are plain numbers");
    chain.unpin(1).expect("it is pinned");
    chain.unprotect(1);
}
test!("smp.race.writes", racing_emulated_writes_lose_nothing);

static EPOCH: AtomicU64 = AtomicU64::new(0);
static STALE: AtomicU64 = AtomicU64::new(0);

/// core 4.5, 4.6: a flush for all vcpus is done when the call returns.
fn a_flush_reaches_the_other_vcpu() {
    let chain = Chain::new();
    for i in 0..2 {
        probe::write(chain.page_address(i), i).expect("the page is writable");
    }
    let window = Window::reserve(1).expect("there is room");
    let map = |epoch: u64| {
        update_va_mapping(window.address(), chain.page_entry(epoch % 2, LEAF), uvmf::INVLPG | uvmf::ALL)
            .expect("a page is mapped");
    };
    map(0);
    set_places([window.address(), 0, 0, 0]);
    EPOCH.store(0, Ordering::SeqCst);
    race(
        || {
            for epoch in 1..=ROUNDS / 4 {
                // Between epochs either page may be seen.
                EPOCH.store(2 * epoch - 1, Ordering::SeqCst);
                map(epoch);
                EPOCH.store(2 * epoch, Ordering::SeqCst);
                for _ in 0..100 {
                    spin_loop();
                }
            }
            EPOCH.store(u64::MAX, Ordering::SeqCst);
        },
        || loop {
            let before = EPOCH.load(Ordering::SeqCst);
            if before == u64::MAX {
                break;
            }
            let value = probe::load(place(0));
            let settled = before.is_multiple_of(2) && EPOCH.load(Ordering::SeqCst) == before;
            if settled && value != before / 2 % 2 {
                STALE.fetch_add(1, Ordering::SeqCst);
            }
        },
    );
    assert_eq!(STALE.load(Ordering::SeqCst), 0, "a stale translation was used after the flush");
    update_va_mapping(window.address(), 0, 2).expect("nothing is mapped");
}
test!("smp.flush", a_flush_reaches_the_other_vcpu);
