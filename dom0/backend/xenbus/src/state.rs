//! The states of a device, as both ends write them.

/// A state (ABI io 3.9).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum State {
    /// There is no node, or the node holds no state.
    #[default]
    Unknown = 0,
    /// The device is new.
    Initialising = 1,
    /// The back end has published its features.
    InitWait = 2,
    /// The front end has published its rings.
    Initialised = 3,
    /// The device is in use.
    Connected = 4,
    /// The device is about to be closed.
    Closing = 5,
    /// The device is closed; it may be connected again.
    Closed = 6,
    /// The device is being changed.
    Reconfiguring = 7,
    /// The device has been changed.
    Reconfigured = 8,
}

impl State {
    /// All states, by number.
    pub const ALL: [Self; 9] = [
        Self::Unknown,
        Self::Initialising,
        Self::InitWait,
        Self::Initialised,
        Self::Connected,
        Self::Closing,
        Self::Closed,
        Self::Reconfiguring,
        Self::Reconfigured,
    ];

    /// Parses the value of a `state` node. A front end may write anything: a value that is no state is `Unknown`.
    #[must_use]
    pub fn parse(value: &[u8]) -> Self {
        match value {
            [digit @ b'0'..=b'8'] => Self::ALL.get(usize::from(digit - b'0')).copied().unwrap_or_default(),
            _ => Self::Unknown,
        }
    }

    /// The state as the value of a `state` node.
    #[must_use]
    pub const fn value(self) -> &'static str {
        match self {
            Self::Unknown => "0",
            Self::Initialising => "1",
            Self::InitWait => "2",
            Self::Initialised => "3",
            Self::Connected => "4",
            Self::Closing => "5",
            Self::Closed => "6",
            Self::Reconfiguring => "7",
            Self::Reconfigured => "8",
        }
    }

    /// Whether a front end in this state is connected or about to connect.
    #[must_use]
    pub const fn is_up(self) -> bool {
        matches!(self, Self::Initialising | Self::InitWait | Self::Initialised | Self::Connected)
    }

    /// Whether a front end in this state has no device: it has closed the device, or its node is gone.
    #[must_use]
    pub const fn is_over(self) -> bool {
        matches!(self, Self::Unknown | Self::Closed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_written_as_they_are_read() {
        for (number, state) in State::ALL.into_iter().enumerate() {
            assert_eq!(state as usize, number);
            assert_eq!(State::parse(state.value().as_bytes()), state);
        }
    }

    #[test]
    fn what_is_no_state_is_unknown() {
        for value in [&b""[..], b"9", b"44", b" 4", b"4\0", b"four", b"-1", b"\xff"] {
            assert_eq!(State::parse(value), State::Unknown, "{value:?}");
        }
    }
}
