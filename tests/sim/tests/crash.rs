//! How often a crash is told. A process of its own, for its log.

use hv_core::domain::crash::Crashed;
use hv_core::trap;
use hypercall_abi::Hypercall;
use hypercall_abi::vcpu::VcpuOp;
use sim::world::script::tell;
use std::cell::Cell;

thread_local! {
    static CRASHES: Cell<u32> = const { Cell::new(0) };
}

/// Counts the crashes that are told on this thread.
struct Told;

impl log::Log for Told {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }
    fn log(&self, record: &log::Record<'_>) {
        let told = u32::from(record.args().to_string().contains("crashed"));
        CRASHES.with(|n| n.set(n.get() + told));
    }
    fn flush(&self) {}
}

/// A vcpu whose stack is gone took an exception, crashed, and took an NMI and an event as well: each crashed it once more,
/// and the registers that were told last were not those of the crash.
#[test]
fn a_crash_is_told_once() {
    static TOLD: Told = Told;
    log::set_logger(&TOLD).expect("nobody else logs yet");
    log::set_max_level(log::LevelFilter::Warn);
    for failsafe in [false, true] {
        tell(200, move |stage| {
            let guest = stage.enter(false);
            let nmi = [VcpuOp::SendNmi.number(), 0, 0];
            assert_eq!(stage.call(&guest, Hypercall::VcpuOp, &nmi).result, Ok(0));
            let shared = stage.domain(&guest).shared_info().expect("it has one");
            stage.m.poke(shared, 0, 1); // an event is pending, and upcalls are not masked
            stage.on_cpu(&guest, |ctx, _| {
                ctx.state.regs.rsp = 0x1234_5678_9000;
                let before = ctx.state.regs;
                let end = if failsafe {
                    trap::failsafe(ctx, [0; 4])
                } else {
                    ctx.state.raise(13, Some(0));
                    trap::prepare(ctx)
                };
                assert_eq!((end, ctx.domain.runs()), (Err(Crashed), false));
                assert_eq!(CRASHES.with(Cell::get), 1, "told once");
                assert_eq!((ctx.state.regs, ctx.state.nmi_masked), (before, false), "nothing was delivered");
            });
        });
    }
}
