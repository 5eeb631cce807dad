//! Time as guests compute it: the scale of the time-stamp counter, and the records with a version (ABI core 6).

use crate::machine::Clock;
use crate::prelude::*;
use hypercall_abi::shared::{TIME_TSC_STABLE, TimeInfo, vcpu_info};
use zerocopy::{FromZeros, IntoBytes};

/// Multiplier and shift that turn a difference of counts into nanoseconds: `(delta << shift) * mul >> 32`.
#[must_use]
pub fn scale(khz: u64) -> (u32, i8) {
    let (mut hz, mut shift) = (u128::from(khz.max(1)) * 1000, 0i8);
    while hz > 2_000_000_000 {
        hz >>= 1;
        shift -= 1;
    }
    while hz <= 1_000_000_000 {
        hz <<= 1;
        shift += 1;
    }
    let mul = (1_000_000_000u128 << 32) / hz;
    (u32::try_from(mul).unwrap_or(u32::MAX), shift)
}

/// The record that follows `old`. Its version is odd, which tells that it is being changed; the caller then writes the
/// version plus 1. All vcpus have the same origin, so their records always agree.
#[must_use]
pub fn next_record(m: &impl Clock, old: &TimeInfo) -> TimeInfo {
    let (tsc_to_system_mul, tsc_shift) = scale(m.tsc_khz());
    TimeInfo {
        version: old.version | 1,
        tsc_timestamp: m.tsc_origin(),
        system_time: 0,
        tsc_to_system_mul,
        tsc_shift,
        flags: TIME_TSC_STABLE,
        ..TimeInfo::default()
    }
}

/// Writes a vcpu's time record, following the version protocol (ABI core 6.1).
pub fn write_record<M: Machine>(m: &M, vcpu: &Vcpu) {
    let Some((frame, at)) = vcpu.record() else { return };
    let offset = at + vcpu_info::TIME;
    let mut old = TimeInfo::new_zeroed();
    m.read(frame, offset, old.as_mut_bytes());
    let record = next_record(m, &old);
    m.write(frame, offset, record.as_bytes());
    m.write(frame, offset, &record.version.wrapping_add(1).to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nanoseconds by the formula that guests use.
    fn nanoseconds(delta: u64, (mul, shift): (u32, i8)) -> u64 {
        let delta = u128::from(delta);
        let shifted = if shift < 0 { delta >> shift.unsigned_abs() } else { delta << shift.unsigned_abs() };
        u64::try_from((shifted * u128::from(mul)) >> 32).unwrap_or(u64::MAX)
    }

    #[test]
    fn scales_are_exact_to_a_part_in_a_million() {
        for khz in [1_000, 32_768, 999_999, 1_000_000, 1_000_001, 2_400_000, 3_999_999, 6_000_000] {
            let (mul, shift) = scale(khz);
            assert!(mul >= 1 << 31, "{khz}: {mul:#x}");
            let second = nanoseconds(khz * 1000, (mul, shift));
            assert!(second.abs_diff(1_000_000_000) < 1000, "{khz} kHz: {second}");
        }
    }
}
