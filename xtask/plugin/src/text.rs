//! A text that the machine prints.

/// A text that is waited for.
pub(crate) struct Text {
    wanted: Vec<u8>,
    /// The last bytes that were printed, at most as many as are wanted.
    seen: Vec<u8>,
}

impl Text {
    pub(crate) fn new(wanted: &str) -> Self {
        Self { wanted: wanted.into(), seen: Vec::new() }
    }

    /// Takes a byte that was printed. Returns whether it is the last one of the text.
    pub(crate) fn takes(&mut self, byte: u8) -> bool {
        if self.seen.len() == self.wanted.len() {
            self.seen.remove(0);
        }
        self.seen.push(byte);
        self.seen == self.wanted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_found_where_it_ends() {
        let ends = |text: &str| {
            let mut wanted = Text::new("lolly:");
            text.bytes().enumerate().filter(|(_, byte)| wanted.takes(*byte)).map(|(at, _)| at).collect::<Vec<_>>()
        };
        assert_eq!(ends("lolly: lololly:lolly"), [5, 14]);
        assert_eq!(ends("lolly"), []);
    }
}
