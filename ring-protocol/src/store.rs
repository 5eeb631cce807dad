//! The store page of a domain (ABI io 3.1): 1024 bytes of requests, 1024 bytes of responses.
//!
//! A message (16 bytes of header, up to 4096 of payload) usually exceeds the ring: both sides move
//! parts of messages. The indices must never be reset behind a running guest's back.

use crate::bytes::{BadIndices, ByteRing, Reader, Writer};
use crate::page::SharedPage;

/// Guest to server.
pub const REQUESTS: ByteRing = ByteRing::new(0, 1024, 2048, 2052);
/// Server to guest.
pub const RESPONSES: ByteRing = ByteRing::new(1024, 1024, 2056, 2060);
/// Offset of the feature word, written by the server.
pub const SERVER_FEATURES: usize = 2064;
/// Offset of the connection word: the guest writes 1 to ask for a new start, the server 0.
pub const CONNECTION: usize = 2068;
/// Offset of the error word, written by the server.
pub const ERROR: usize = 2072;
/// Offset of the event channel's number, for domains built without a start-info.
pub const EVENT_CHANNEL: usize = 2076;

/// The server honours a 1 in the connection word.
pub const FEATURE_RECONNECTION: u32 = 1;
/// The server fills the error word.
pub const FEATURE_ERROR: u32 = 2;
/// The server knows watches with a depth.
pub const FEATURE_WATCH_DEPTH: u32 = 4;

/// Why a server stopped serving this page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum LinkError {
    /// No complaint.
    None = 0,
    /// The event channel could not be used.
    EventChannel = 1,
    /// The indices of a ring contradict each other.
    BadIndices = 2,
    /// The stream is no sequence of messages (a payload longer than 4096 bytes).
    Protocol = 3,
}

/// The server's view of a store page.
#[derive(Clone, Debug)]
pub struct Server {
    /// What the guest asks.
    pub requests: Reader,
    /// What we answer.
    pub responses: Writer,
}

impl Server {
    /// Starts to serve a new domain: indices at zero, features announced, no error.
    ///
    /// # Errors
    /// The peer wrote the indices at this very moment.
    pub fn introduce<P: SharedPage>(page: &P, features: u32) -> Result<Self, BadIndices> {
        REQUESTS.reset(page);
        RESPONSES.reset(page);
        page.store_u32(SERVER_FEATURES, features);
        page.store_u32(ERROR, LinkError::None as u32);
        page.store_u32(CONNECTION, 0);
        page.fence();
        Self::attach(page)
    }

    /// Continues to serve a domain after a restart of the server; nothing is reset.
    ///
    /// # Errors
    /// The indices of one direction contradict each other.
    pub fn attach<P: SharedPage>(page: &P) -> Result<Self, BadIndices> {
        let requests = Reader::attach(REQUESTS, page)?;
        let responses = Writer::attach(RESPONSES, page)?;
        Ok(Self { requests, responses })
    }

    /// Whether the guest asks for a new start. The answer is a new [`introduce`](Self::introduce).
    pub fn reconnect_requested<P: SharedPage>(&self, page: &P) -> bool {
        page.load_u32(CONNECTION) == 1
    }

    /// Tells the guest why we stop.
    pub fn report<P: SharedPage>(&self, page: &P, error: LinkError) {
        page.store_u32(ERROR, error as u32);
    }
}

/// The guest's view of a store page.
#[derive(Clone, Debug)]
pub struct Client {
    /// What we ask.
    pub requests: Writer,
    /// What the server answers.
    pub responses: Reader,
}

impl Client {
    /// Connects where the last client stopped.
    ///
    /// # Errors
    /// The indices of one direction contradict each other.
    pub fn attach<P: SharedPage>(page: &P) -> Result<Self, BadIndices> {
        let requests = Writer::attach(REQUESTS, page)?;
        let responses = Reader::attach(RESPONSES, page)?;
        Ok(Self { requests, responses })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::WordPage;

    #[test]
    fn introduction_starts_at_zero_and_attachment_continues() {
        let page: WordPage = WordPage::new();
        for offset in [2048, 2052, 2056, 2060] {
            page.store_u32(offset, 77);
        }
        page.store_u32(CONNECTION, 1);
        page.store_u32(ERROR, 2);
        let features = FEATURE_ERROR | FEATURE_WATCH_DEPTH;
        let mut server = Server::introduce(&page, features).unwrap();
        let words = [2048, 2052, 2056, 2060, 2064, 2068, 2072].map(|offset| page.load_u32(offset));
        assert_eq!(words, [0, 0, 0, 0, 6, 0, 0]);

        let mut client = Client::attach(&page).unwrap();
        client.requests.write(&page, b"request").unwrap();
        server.responses.write(&page, b"answer").unwrap();
        let mut bytes = [0; 3];
        server.requests.read(&page, &mut bytes).unwrap();
        let mut second = Server::attach(&page).unwrap();
        let mut rest = [0; 9];
        assert_eq!(second.requests.read(&page, &mut rest), Ok(4));
        assert_eq!(&rest[..4], b"uest");
        let indices = [2048, 2052, 2056, 2060].map(|offset| page.load_u32(offset));
        assert_eq!(indices, [7, 7, 0, 6]);
        page.read(1024, &mut rest);
        assert_eq!(&rest[..6], b"answer");
    }

    #[test]
    fn an_error_is_shown_and_a_request_to_reconnect_seen() {
        let page: WordPage = WordPage::new();
        let server = Server::introduce(&page, FEATURE_RECONNECTION).unwrap();
        assert!(!server.reconnect_requested(&page));
        page.store_u32(CONNECTION, 1);
        assert!(server.reconnect_requested(&page));
        server.report(&page, LinkError::Protocol);
        assert_eq!(page.load_u32(2072), 3);
    }
}
