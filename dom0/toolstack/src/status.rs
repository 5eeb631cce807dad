//! The result of a run of guests as a number: the reason dom0 gives for its end, and the exit status of `cargo xtask
//! run`.

use hypercall_abi::sched::ShutdownReason;

/// The first thing that went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// A guest crashed.
    Crashed,
    /// A guest missed its watchdog.
    Watchdog,
    /// A guest rebooted, and is not to be made again.
    Rebooted,
    /// A guest suspended itself, or ended for a reason that dom0 does not handle.
    Ended,
    /// A guest could not be made.
    NotMade,
    /// A command of `--exec` was refused.
    Refused,
}

impl Failure {
    /// All failures.
    pub const ALL: [Self; 6] =
        [Self::Crashed, Self::Watchdog, Self::Rebooted, Self::Ended, Self::NotMade, Self::Refused];

    /// The reason that dom0 gives for its own end: a number less than 32 that the ABI does not define.
    #[must_use]
    pub const fn reason(self) -> u32 {
        self.exit_status() as u32 + 6
    }

    /// The failure for which dom0 gave this reason for its end.
    #[must_use]
    pub fn of_reason(reason: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|failure| failure.reason() == reason)
    }

    /// The exit status of `cargo xtask run`.
    #[must_use]
    pub const fn exit_status(self) -> u8 {
        match self {
            Self::Crashed => 10,
            Self::Watchdog => 11,
            Self::Rebooted => 12,
            Self::Ended => 13,
            Self::NotMade => 14,
            Self::Refused => 15,
        }
    }

    /// The failure that a guest's end counts as, if the guest is not made again; `None` for a power-off.
    #[must_use]
    pub fn of_end(reason: Option<ShutdownReason>) -> Option<Self> {
        Some(match reason {
            Some(ShutdownReason::Poweroff) => return None,
            Some(ShutdownReason::Reboot) => Self::Rebooted,
            Some(ShutdownReason::Crash) => Self::Crashed,
            Some(ShutdownReason::Watchdog) => Self::Watchdog,
            Some(ShutdownReason::Suspend | ShutdownReason::SoftReset) | None => Self::Ended,
        })
    }

    /// The failure in words.
    #[must_use]
    pub const fn explanation(self) -> &'static str {
        match self {
            Self::Crashed => "a guest crashed",
            Self::Watchdog => "a guest missed its watchdog",
            Self::Rebooted => "a guest rebooted and is not to be made anew",
            Self::Ended => "a guest ended, but did not power off",
            Self::NotMade => "a guest could not be made",
            Self::Refused => "a command was refused",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_no_guests_and_lead_back() {
        for failure in Failure::ALL {
            assert_eq!(Failure::of_reason(failure.reason()), Some(failure));
            assert!((6..32).contains(&failure.reason()));
            assert!(ShutdownReason::from_number(u64::from(failure.reason())).is_none());
            let same = Failure::ALL.iter().filter(|other| other.exit_status() == failure.exit_status()).count();
            assert_eq!(same, 1);
        }
        assert_eq!(Failure::of_reason(3), None);
        assert_eq!(Failure::of_end(Some(ShutdownReason::Poweroff)), None);
        assert_eq!(Failure::of_end(None), Some(Failure::Ended));
    }
}
