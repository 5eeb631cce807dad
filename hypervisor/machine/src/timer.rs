//! Time: the time-stamp counter measures it, the LAPIC's timer ends it.

use crate::Hardware;
use crate::apic::{self, register};
use crate::insn::{self, in8, msr, out8};
use crate::percpu::{self, Cpu};
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use hv_core::machine::{Clock, Interrupt};

/// Frequency of the time-stamp counter in kHz.
static TSC_KHZ: AtomicU64 = AtomicU64::new(0);
/// Its value at time 0.
static ORIGIN: AtomicU64 = AtomicU64::new(0);
/// Nanoseconds per tick, times 2^32.
static SCALE: AtomicU64 = AtomicU64::new(0);
/// Ticks of the LAPIC's timer per second; 0 if deadlines are given as time-stamp values.
static APIC_HZ: AtomicU64 = AtomicU64::new(0);
/// Seconds since 1970 at time 0.
static WALLCLOCK: AtomicU64 = AtomicU64::new(0);

/// Ticks of the PIT per second.
const PIT_HZ: u64 = 1_193_182;
/// What we count it down from: about 10 ms.
const PIT_COUNT: u16 = 11_932;

/// LAPIC timer modes.
const ONE_SHOT: u32 = 0;
const TSC_DEADLINE: u32 = 2 << 17;

/// Measures the clocks and sets time 0.
pub(crate) fn init() -> Result<(), &'static str> {
    let by_deadline = insn::cpuid(1, 0)[2] & 1 << 24 != 0;
    let told = told_khz();
    apic::write(register::DIVIDE, 0b1011);
    let measured = if told.is_none() || !by_deadline { measure() } else { (0, 0) };
    let khz = told.unwrap_or(measured.0);
    if khz == 0 {
        return Err("nothing to measure the time-stamp counter against: no PIT, and CPUID does not say");
    }
    if !by_deadline && measured.1 == 0 {
        return Err("nothing to measure the LAPIC's timer against: no PIT");
    }
    TSC_KHZ.store(khz, Relaxed);
    SCALE.store((1_000_000 << 32) / khz, Relaxed);
    APIC_HZ.store(if by_deadline { 0 } else { measured.1 }, Relaxed);
    ORIGIN.store(insn::tsc(), Relaxed);
    WALLCLOCK.store(rtc::seconds(), Relaxed);
    init_cpu();
    Ok(())
}

/// Sets this CPU's timer up, unarmed.
pub(crate) fn init_cpu() {
    let mode = if APIC_HZ.load(Relaxed) == 0 { TSC_DEADLINE } else { ONE_SHOT };
    apic::write(register::DIVIDE, 0b1011);
    apic::write(register::TIMER, mode | apic::TIMER);
}

/// The frequency as CPUID or a hypervisor below us gives it.
fn told_khz() -> Option<u64> {
    let below_us = insn::cpuid(1, 0)[2] & 1 << 31 != 0 && insn::max_leaf(0x4000_0000) >= 0x4000_0010;
    if below_us && insn::max_leaf(0x4000_0000) < 0x4001_0000 {
        let [khz, ..] = insn::cpuid(0x4000_0010, 0);
        if khz != 0 {
            return Some(khz.into());
        }
    }
    if insn::max_leaf(0) < 0x15 {
        return None;
    }
    let [denominator, numerator, crystal, _] = insn::cpuid(0x15, 0);
    let product = u64::from(crystal) * u64::from(numerator);
    product.checked_div(u64::from(denominator) * 1000).filter(|&khz| khz != 0)
}

/// The frequencies of the time-stamp counter (kHz) and the LAPIC's timer (Hz) by the PIT: the shortest of a few
/// measurements, since whatever disturbs one makes it longer.
fn measure() -> (u64, u64) {
    let runs = core::iter::from_fn(pit_run).take(5);
    let Some((tsc, count)) = runs.min_by_key(|&(tsc, _)| tsc) else { return (0, 0) };
    let per_second = |ticks: u64| ticks * PIT_HZ / u64::from(PIT_COUNT);
    (per_second(tsc) / 1000, per_second(count))
}

/// Ticks of both clocks while the PIT counts down once; `None` if there is no PIT.
fn pit_run() -> Option<(u64, u64)> {
    const COMMAND: u16 = 0x43;
    const CHANNEL_0: u16 = 0x40;
    let [low, high] = PIT_COUNT.to_le_bytes();
    apic::write(register::TIMER, apic::MASKED | apic::TIMER);
    apic::write(register::INITIAL_COUNT, u32::MAX);
    // One-shot: counts from the moment the high byte is there, and then its output, bit 7 of its status, goes up.
    out8(COMMAND, 0x30);
    out8(CHANNEL_0, low);
    // Before it starts and after it ends: a delay anywhere makes the run longer, never shorter.
    let (count, start) = (apic::read(register::CURRENT_COUNT), insn::tsc());
    out8(CHANNEL_0, high);
    let status = || {
        out8(COMMAND, 0xe2);
        in8(CHANNEL_0)
    };
    let done = (0..10_000_000).map(|_| status()).find(|status| status & 0x80 != 0);
    let (end, rest) = (insn::tsc(), apic::read(register::CURRENT_COUNT));
    apic::write(register::INITIAL_COUNT, 0);
    // The mode reads back as we set it, unless nobody is there.
    done.filter(|status| status & 0x3f == 0x30).map(|_| (end.wrapping_sub(start), count.wrapping_sub(rest).into()))
}

/// Nanoseconds for a number of ticks; the product needs 96 bits.
fn scale(ticks: u64, scale: u64) -> u64 {
    let product = u128::from(ticks) * u128::from(scale);
    u64::try_from(product >> 32).unwrap_or(u64::MAX)
}

/// What a timer interrupt means: the LAPIC's count may be too short for a far deadline, and its clock a little fast.
pub(crate) fn fired(cpu: &Cpu) -> Interrupt {
    let deadline = cpu.deadline.load(Relaxed);
    if deadline <= Hardware(()).now() {
        cpu.deadline.store(u64::MAX, Relaxed);
        return Interrupt::Timer;
    }
    program(deadline);
    Interrupt::Other
}

/// Sets the hardware for a deadline, or silences it.
fn program(deadline: u64) {
    let apic_hz = APIC_HZ.load(Relaxed);
    if apic_hz == 0 {
        let ticks = u128::from(deadline) * u128::from(TSC_KHZ.load(Relaxed)) / 1_000_000 + 1;
        let at = u64::try_from(ticks).unwrap_or(u64::MAX).saturating_add(ORIGIN.load(Relaxed));
        let value = if deadline == u64::MAX { 0 } else { at };
        // SAFETY: says when an interrupt comes, nothing else.
        return unsafe { insn::wrmsr(msr::TSC_DEADLINE, value) };
    }
    let left = deadline.saturating_sub(Hardware(()).now());
    let ticks = u128::from(left) * u128::from(apic_hz) / 1_000_000_000 + 1;
    let count = if deadline == u64::MAX { 0 } else { u32::try_from(ticks).unwrap_or(u32::MAX) };
    apic::write(register::INITIAL_COUNT, count);
}

impl Clock for Hardware {
    fn now(&self) -> u64 {
        scale(insn::tsc().saturating_sub(ORIGIN.load(Relaxed)), SCALE.load(Relaxed))
    }

    fn arm(&self, deadline: u64) {
        let cpu = percpu::this();
        if cpu.deadline.swap(deadline, Relaxed) != deadline {
            program(deadline);
        }
    }

    fn tsc(&self) -> u64 {
        insn::tsc()
    }

    fn tsc_khz(&self) -> u64 {
        TSC_KHZ.load(Relaxed)
    }

    fn tsc_origin(&self) -> u64 {
        ORIGIN.load(Relaxed)
    }

    fn wallclock(&self) -> (u64, u32) {
        (WALLCLOCK.load(Relaxed), 0)
    }
}

/// The battery-backed clock.
mod rtc {
    use crate::insn::{in8, out8};

    fn register(index: u8) -> u8 {
        out8(0x70, index);
        in8(0x71)
    }

    /// Seconds, minutes, hours, day, month, year, as the clock has them, not in the middle of a change.
    fn stable() -> [u8; 6] {
        let read = || [0, 2, 4, 7, 8, 9].map(register);
        let mut last = read();
        for _ in 0..100_000 {
            let updating = register(0xa) & 0x80 != 0;
            let now = read();
            if !updating && now == last {
                break;
            }
            last = now;
        }
        last
    }

    /// Seconds since 1970.
    pub(super) fn seconds() -> u64 {
        let format = register(0xb);
        unix_time(stable(), format & 4 != 0, format & 2 != 0)
    }

    /// Seconds since 1970 from the clock's registers, or 0 if those make no date. The century is ours.
    pub(super) fn unix_time(fields: [u8; 6], binary: bool, day_hours: bool) -> u64 {
        let plain = |value: u8| u64::from(if binary { value } else { (value >> 4) * 10 + (value & 0xf) });
        let [seconds, minutes, hours, day, month, year] = fields;
        if !(1..=12).contains(&plain(month)) || !(1..=31).contains(&plain(day)) {
            return 0;
        }
        let afternoon = !day_hours && hours & 0x80 != 0;
        let mut hour = plain(hours & 0x7f);
        if !day_hours {
            hour = hour % 12 + if afternoon { 12 } else { 0 };
        }
        let days = days(2000 + plain(year), plain(month), plain(day));
        ((days * 24 + hour) * 60 + plain(minutes)) * 60 + plain(seconds)
    }

    /// Days from 1970-01-01 to a date from 2000 on, by years that begin in March.
    fn days(year: u64, month: u64, day: u64) -> u64 {
        let year = year - u64::from(month <= 2);
        let month = (month + 9) % 12;
        let of_year = (153 * month + 2) / 5 + day - 1;
        year * 365 + year / 4 - year / 100 + year / 400 + of_year - 719_468
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        let bcd = |fields| rtc::unix_time(fields, false, true);
        assert_eq!(bcd([0, 0, 0, 1, 1, 0]), 946_684_800);
        assert_eq!(bcd([0x59, 0x59, 0x23, 0x29, 0x02, 0x24]), 1_709_251_199);
        assert_eq!(bcd([0, 0, 0, 1, 3, 0x24]), 1_709_251_200);
        let binary = |hours| rtc::unix_time([0, 0, hours, 1, 1, 0], true, false) - 946_684_800;
        assert_eq!(binary(12), 0);
        assert_eq!(binary(0x80 | 12), 12 * 3600);
        assert_eq!(binary(0x80 | 11), 23 * 3600);
        assert_eq!(bcd([0xff; 6]), 0);
    }

    #[test]
    fn scaling_keeps_precision_for_years() {
        // 3 GHz for ten years.
        let ticks = 3_000_000_000u64 * 86_400 * 3650;
        let exact = 1_000_000_000u64 * 86_400 * 3650;
        let found = scale(ticks, (1_000_000u64 << 32) / 3_000_000);
        assert!(found.abs_diff(exact) < exact / 1_000_000_000, "{found} for {exact}");
    }
}
