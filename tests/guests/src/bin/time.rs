//! Clock, timers and run states of vcpu 0 (core 6).
#![no_std]
#![no_main]
#![forbid(unsafe_code)]

use core::mem::offset_of;
use guests::abi::shared::{TIME_TSC_STABLE, WallClock, offset};
use guests::abi::vcpu::{Runstate, SetPeriodicTimer, VcpuOp};
use guests::abi::{Errno, Hypercall};
use guests::probe::{self, call};
use guests::{events, hypercall, test};
use unikernel::hypercall::RunstateArea;
use unikernel::time::{self, now_ns};

unikernel::entry!(unikernel::testing::run);

const MS: u64 = 1_000_000;

/// core 6.1.
fn the_record_is_sound() {
    let record = time::record();
    assert_eq!(record.version % 2, 0);
    assert!(record.tsc_to_system_mul >= 1 << 31, "normalised: {record:?}");
    assert!((-10..=10).contains(&record.tsc_shift));
    assert_eq!(record.flags & !(TIME_TSC_STABLE | 2), 0);
    // Linux computes this at once: 1 MHz to 100 GHz is believable.
    let khz = (1_000_000u64 << 32) / u64::from(record.tsc_to_system_mul);
    let khz = if record.tsc_shift < 0 { khz << record.tsc_shift.unsigned_abs() } else { khz >> record.tsc_shift };
    assert!((1000..100_000_000).contains(&khz), "{khz} kHz");
}
test!("time.record", the_record_is_sound);

fn time_does_not_run_backwards() {
    let mut last = now_ns();
    let end = last + 200 * MS;
    while last < end {
        let now = now_ns();
        assert!(now >= last, "{now} after {last}");
        last = now;
    }
    // Also across sleeps.
    for _ in 0..20 {
        hypercall::set_singleshot_timer(0, now_ns() + MS).expect("a timer is set");
        hypercall::block();
        let _ = events::mask_upcalls();
        let now = now_ns();
        assert!(now >= last, "{now} after {last}");
        last = now;
    }
}
test!("time.monotonic", time_does_not_run_backwards);

/// core 6.2: UTC at system time 0, under the same version protocol.
fn the_wall_clock() {
    let word = |at: usize| {
        let at = events::shared_page().addr() as u64 + (offset::WALLCLOCK + at) as u64;
        let word = probe::read(at & !7).expect("mapped");
        if at.is_multiple_of(8) { word & 0xffff_ffff } else { word >> 32 }
    };
    assert_eq!(word(offset_of!(WallClock, version)) % 2, 0);
    let seconds = word(offset_of!(WallClock, sec)) | word(offset_of!(WallClock, sec_hi)) << 32;
    assert!(word(offset_of!(WallClock, nsec)) < 1_000_000_000);
    // Between 2020 and 2100.
    assert!((1_577_836_800..4_102_444_800).contains(&seconds), "{seconds}");
}
test!("time.wall-clock", the_wall_clock);

/// Fires of the timer since the last look.
fn fires() -> u64 {
    events::scan();
    events::count(time::timer_port())
}

/// core 6.3: not before the deadline, and not much after.
fn one_shot_timers() {
    let before = fires();
    for ms in [1, 5, 20] {
        let start = now_ns();
        let count = fires();
        hypercall::set_singleshot_timer(0, start + ms * MS).expect("a timer is set");
        while fires() == count {
            assert!(now_ns() < start + 5000 * MS, "the timer never came");
        }
        assert!(now_ns() >= start + ms * MS, "too early");
    }
    assert_eq!(fires(), before + 3);
    // A deadline that is past is now.
    for deadline in [1, now_ns() - MS, now_ns()] {
        let count = fires();
        hypercall::set_singleshot_timer(0, deadline).expect("a timer is set");
        let start = now_ns();
        while fires() == count {
            assert!(now_ns() < start + 1000 * MS, "a past deadline was dropped");
        }
    }
    // Cancelled, and replaced by a later one.
    let count = fires();
    hypercall::set_singleshot_timer(0, now_ns() + 20 * MS).expect("a timer is set");
    hypercall::stop_singleshot_timer(0).expect("it is stopped");
    hypercall::stop_singleshot_timer(0).expect("there is none");
    time::spin_ns(60 * MS);
    assert_eq!(fires(), count, "a stopped timer fired");
    hypercall::set_singleshot_timer(0, now_ns() + 10 * MS).expect("a timer is set");
    let later = now_ns() + 80 * MS;
    hypercall::set_singleshot_timer(0, later).expect("a timer is set");
    while fires() == count {}
    assert!(now_ns() >= later, "the replaced deadline fired");
}
test!("time.one-shot", one_shot_timers);

/// core 6.3: `set_timer_op` drives the same timer.
fn the_other_call_sets_the_same_timer() {
    let count = fires();
    let start = now_ns();
    hypercall::set_timer(start + 10 * MS).expect("a timer is set");
    while fires() == count {
        assert!(now_ns() < start + 5000 * MS, "the timer never came");
    }
    assert!(now_ns() >= start + 10 * MS);
    let count = fires();
    hypercall::set_timer(now_ns() + 20 * MS).expect("a timer is set");
    hypercall::set_timer(0).expect("it is cancelled");
    time::spin_ns(60 * MS);
    assert_eq!(fires(), count);
    hypercall::set_singleshot_timer(0, now_ns() + 20 * MS).expect("a timer is set");
    hypercall::set_timer(0).expect("it is cancelled");
    time::spin_ns(60 * MS);
    assert_eq!(fires(), count);
}
test!("time.set-timer", the_other_call_sets_the_same_timer);

fn the_tick() {
    let short = SetPeriodicTimer { period_ns: MS - 1 };
    let op = VcpuOp::SetPeriodicTimer.number();
    assert_eq!(call(Hypercall::VcpuOp, [op, 0, probe::address(&short), 0, 0]), Err(Errno::Inval));
    let count = fires();
    let start = now_ns();
    hypercall::set_periodic_timer(0, 5 * MS).expect("a tick is set");
    while fires() < count + 5 {
        assert!(now_ns() < start + 10_000 * MS, "the tick stopped by itself");
    }
    assert!(now_ns() >= start + 20 * MS, "five ticks in less than four periods");
    hypercall::stop_periodic_timer(0).expect("the tick stops");
    let count = fires();
    time::spin_ns(50 * MS);
    assert!(fires() <= count + 1, "the tick goes on");
}
test!("time.tick", the_tick);

/// core 7: what vcpu calls answer for vcpus that are not there.
fn vcpus_that_do_not_exist() {
    assert_eq!(hypercall::vcpu_is_up(0), Ok(1));
    for vcpu in [4000, u32::MAX] {
        assert_eq!(hypercall::vcpu_is_up(vcpu), Err(Errno::NoEnt));
        assert_eq!(hypercall::vcpu_up(vcpu), Err(Errno::NoEnt));
        assert_eq!(hypercall::runstate(vcpu).map(|_| ()), Err(Errno::NoEnt));
        assert_eq!(hypercall::stop_periodic_timer(vcpu), Err(Errno::NoEnt));
    }
    assert_eq!(call(Hypercall::VcpuOp, [99, 0, 0, 0, 0]), Err(Errno::NoSys));
    assert_eq!(call(Hypercall::VcpuOp, [99, 4000, 0, 0, 0]), Err(Errno::NoEnt));
}
test!("time.no-vcpu", vcpus_that_do_not_exist);

static AREA: RunstateArea = RunstateArea::new();

/// Blocks for most of `ns`. A busy host may stop the machine between the setting of the timer and the call, and then
/// there is nothing left to wait for: that is no sleep, and it is tried again.
fn sleep_through(ns: u64) {
    let blocked = || hypercall::runstate(0).expect("vcpu 0 exists").time[Runstate::Blocked as usize];
    let before = blocked();
    for _ in 0..8 {
        hypercall::set_singleshot_timer(0, now_ns() + ns).expect("a timer is set");
        hypercall::block();
        let _ = events::mask_upcalls();
        if blocked() >= before + ns * 3 / 5 {
            return;
        }
    }
    panic!("no sleep of {ns} ns in eight tries");
}

/// core 6.4.
fn run_states() {
    let first = hypercall::runstate(0).expect("vcpu 0 exists");
    assert_eq!(first.state, Runstate::Running as u32);
    time::spin_ns(20 * MS);
    sleep_through(50 * MS);
    let second = hypercall::runstate(0).expect("vcpu 0 exists");
    let spent = |state: Runstate| {
        let index = state as usize;
        second.time[index] - first.time[index]
    };
    assert!(spent(Runstate::Running) >= 10 * MS, "{first:?} {second:?}");
    assert!(spent(Runstate::Blocked) >= 30 * MS, "{first:?} {second:?}");
    assert_eq!(spent(Runstate::Offline), 0);

    hypercall::register_runstate(0, &AREA).expect("an area is taken");
    assert_eq!(AREA.read().state, Runstate::Running as u32);
    sleep_through(50 * MS);
    let third = AREA.read();
    assert_eq!(third.state, Runstate::Running as u32);
    assert!(third.time[2] >= second.time[2] + 30 * MS, "{second:?} {third:?}");
    assert!(third.state_entry_time > second.state_entry_time);
    // A second registration replaces the first.
    hypercall::register_runstate(0, &AREA).expect("an area is taken");
}
test!("time.runstate", run_states);

fn tasks_sleep_in_their_order() {
    use core::cell::RefCell;
    extern crate alloc;
    use alloc::{rc::Rc, vec::Vec};
    let order = Rc::new(RefCell::new(Vec::new()));
    // Further apart than a busy machine takes from one to the next.
    let tasks: Vec<_> = [300, 100, 200]
        .into_iter()
        .map(|ms| {
            let order = Rc::clone(&order);
            unikernel::tasks::spawn(async move {
                time::sleep_ns(ms * MS).await;
                order.borrow_mut().push(ms);
            })
        })
        .collect();
    unikernel::tasks::block_on(async move {
        for task in tasks {
            task.await;
        }
    });
    assert_eq!(*order.borrow(), [100, 200, 300]);
}
test!("time.tasks", tasks_sleep_in_their_order);
