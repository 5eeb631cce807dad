//! What a front end publishes in the store (ABI io 3.10): its ring, its port, its protocol.

use core::fmt;

use ring_protocol::block::{BadProtocol, MAX_RING_PAGE_ORDER, RING_PAGES, check_protocol};

/// The keys of a front end that [`Front::parse`] asks for, beside [`MAX_RING_KEYS`]. The caller reads all in one transaction.
pub const KEYS: [&str; 5] = [RING_PAGE_ORDER, RING_REF, EVENT_CHANNEL, PROTOCOL, QUEUES];

/// The keys of the pages of a ring of two or more pages.
pub const MAX_RING_KEYS: [&str; RING_PAGES] = [
    "ring-ref0",
    "ring-ref1",
    "ring-ref2",
    "ring-ref3",
    "ring-ref4",
    "ring-ref5",
    "ring-ref6",
    "ring-ref7",
    "ring-ref8",
    "ring-ref9",
    "ring-ref10",
    "ring-ref11",
    "ring-ref12",
    "ring-ref13",
    "ring-ref14",
    "ring-ref15",
];

const RING_PAGE_ORDER: &str = "ring-page-order";
const RING_REF: &str = "ring-ref";
const EVENT_CHANNEL: &str = "event-channel";
const PROTOCOL: &str = "protocol";
const QUEUES: &str = "multi-queue-num-queues";

/// What a front end has published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Front {
    references: [u32; RING_PAGES],
    pages: usize,
    /// The front end's port, to which dom0 has not yet bound.
    pub port: u32,
}

/// Why a front end is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadFront {
    /// A key is missing.
    Missing(&'static str),
    /// The value of a key is no decimal number of 32 bits.
    Number(&'static str),
    /// The ring, of 2 to the power of this number of pages, has more pages than the back end offers.
    PageOrder(u32),
    /// The front end has this number of queues instead of one.
    Queues(u32),
    /// The front end uses another layout of slots.
    Protocol(BadProtocol),
}

impl fmt::Display for BadFront {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing(key) => write!(f, "its key {key} is missing"),
            Self::Number(key) => write!(f, "the value of its key {key} is no number"),
            Self::PageOrder(order) => write!(f, "its ring-page-order {order} is above {MAX_RING_PAGE_ORDER}"),
            Self::Queues(count) => write!(f, "it has {count} queues, and one was offered"),
            Self::Protocol(error) => error.fmt(f),
        }
    }
}

impl Front {
    /// Parses the keys. `read` returns the value of a key, `None` if the front end has no such key.
    ///
    /// # Errors
    /// The first key that is missing or has an invalid value.
    pub fn parse<'a>(read: impl Fn(&str) -> Option<&'a [u8]>) -> Result<Self, BadFront> {
        check_protocol(read(PROTOCOL)).map_err(BadFront::Protocol)?;
        let optional = |key| read(key).map(|value| number(value).ok_or(BadFront::Number(key))).transpose();
        let needed = |key| optional(key)?.ok_or(BadFront::Missing(key));
        match optional(QUEUES)?.unwrap_or(1) {
            1 => {}
            count => return Err(BadFront::Queues(count)),
        }
        let order = optional(RING_PAGE_ORDER)?.unwrap_or(0);
        if order as usize > MAX_RING_PAGE_ORDER {
            return Err(BadFront::PageOrder(order));
        }
        let (pages, mut references) = (1 << order, [0; RING_PAGES]);
        for (place, key) in references.iter_mut().zip(MAX_RING_KEYS).take(pages) {
            // A ring of one page has a key without a number.
            *place = if pages == 1 { needed(RING_REF)? } else { needed(key)? };
        }
        Ok(Self { references, pages, port: needed(EVENT_CHANNEL)? })
    }

    /// Returns the grant references of the ring's pages, in the order of the pages.
    #[must_use]
    pub fn references(&self) -> &[u32] {
        self.references.get(..self.pages).unwrap_or(&self.references)
    }
}

/// Returns a decimal number of 32 bits. `None` if the value is anything else, such as a number with a sign or spaces.
fn number(value: &[u8]) -> Option<u32> {
    let digits = !value.is_empty() && value.iter().all(u8::is_ascii_digit);
    digits.then(|| core::str::from_utf8(value).ok()?.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(keys: &[(&str, &'static str)]) -> Result<Front, BadFront> {
        Front::parse(|key| keys.iter().find(|(name, _)| *name == key).map(|(_, value)| value.as_bytes()))
    }

    #[test]
    fn a_stock_front_end_has_one_page() {
        let front = parse(&[("ring-ref", "8"), ("event-channel", "15"), ("protocol", "x86_64-abi")]).unwrap();
        assert_eq!((front.references(), front.port), (&[8][..], 15));
    }

    #[test]
    fn a_ring_of_several_pages_has_a_key_for_each() {
        let keys = [("ring-page-order", "1"), ("ring-ref0", "8"), ("ring-ref1", "9"), ("event-channel", "1")];
        assert_eq!(parse(&keys).unwrap().references(), [8, 9]);
        assert_eq!(parse(&keys[..2]), Err(BadFront::Missing("ring-ref1")));
        assert_eq!(parse(&[("ring-page-order", "5")]), Err(BadFront::PageOrder(5)));
    }

    #[test]
    fn anything_may_stand_in_the_keys() {
        assert_eq!(parse(&[]), Err(BadFront::Missing("ring-ref")));
        assert_eq!(parse(&[("ring-ref", "1")]), Err(BadFront::Missing("event-channel")));
        for value in ["", "-1", "+1", " 1", "1 ", "0x1", "4294967296", "99999999999999999999", "\u{663}"] {
            assert_eq!(parse(&[("ring-ref", value), ("event-channel", "1")]), Err(BadFront::Number("ring-ref")));
            assert_eq!(parse(&[("ring-page-order", value)]), Err(BadFront::Number("ring-page-order")));
        }
        assert_eq!(parse(&[("multi-queue-num-queues", "2")]), Err(BadFront::Queues(2)));
        let narrow = BadFront::Protocol(BadProtocol::Narrow);
        assert_eq!(parse(&[("protocol", "x86_32-abi"), ("ring-ref", "1"), ("event-channel", "1")]), Err(narrow));
    }
}
