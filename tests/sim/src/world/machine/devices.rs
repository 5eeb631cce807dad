//! The clock, which advances when somebody looks at it, the console, and PCI configuration.

use super::{WholeMachine, lock};
use hv_core::machine::{Clock, Console, Cpus, Devices};
use std::sync::atomic::Ordering::Relaxed;

impl Clock for WholeMachine {
    fn now(&self) -> u64 {
        self.clock.fetch_add(if self.steady.load(Relaxed) { 0 } else { 20 }, Relaxed)
    }
    fn arm(&self, deadline: u64) {
        self.here().armed.store(deadline, Relaxed);
    }
    fn tsc(&self) -> u64 {
        self.clock.load(Relaxed).wrapping_mul(3)
    }
    fn tsc_khz(&self) -> u64 {
        3_000_000
    }
    fn tsc_origin(&self) -> u64 {
        0
    }
    fn wallclock(&self) -> (u64, u32) {
        (1_800_000_000, 5)
    }
}

impl Console for WholeMachine {
    fn put(&self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(self.line.load(Relaxed));
        let mut printed = lock(&self.printed);
        if printed.len() < 1 << 16 {
            printed.extend(&bytes[..taken]);
        }
        taken
    }
    fn take(&self, to: &mut [u8]) -> usize {
        let some = to.len().min(3);
        to[..some].fill(b'x');
        some
    }
    fn kept(&self, from: u32, to: &mut [u8]) -> std::ops::Range<u32> {
        let log = lock(&self.logged);
        let rest = log.get(from as usize..).unwrap_or_default();
        let count = rest.len().min(to.len());
        to[..count].copy_from_slice(&rest[..count]);
        let from = (log.len() - rest.len()) as u32;
        from..from + count as u32
    }
}

impl Devices for WholeMachine {
    fn message(&self, vector: u8) -> Option<(u64, u32)> {
        Some((0xfee0_0000 | u64::from(self.this_cpu().0) << 12, vector.into()))
    }
    fn hold_messages(&self, hold: bool) {
        self.here().held.store(hold, Relaxed);
    }
    fn read_config(&self, port: u16, size: u8) -> u32 {
        u32::from(port) << 16 | u32::from(size)
    }
    fn write_config(&self, port: u16, size: u8, value: u32) {
        let mut configured = lock(&self.configured);
        if configured.len() < 1 << 10 {
            configured.push((port, size, value));
        }
    }
}
