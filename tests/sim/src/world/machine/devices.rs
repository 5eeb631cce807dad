//! The clock, which advances when somebody looks at it, and the console.

use super::{WholeMachine, lock};
use hv_core::machine::{Clock, Console};
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
