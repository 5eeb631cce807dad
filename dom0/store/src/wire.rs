//! Messages: a header of four words and a payload (ABI io 3.2).

use alloc::vec::Vec;

use crate::error::StoreError;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 16;
/// Longest payload in either direction.
pub const PAYLOAD_MAX: usize = 4096;

macro_rules! kinds {
    ($($(#[$meta:meta])* $name:ident = $number:literal,)*) => {
        /// The kind of a message: a request and its reply, or an event.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        pub enum Kind { $($(#[$meta])* $name = $number,)* }

        impl Kind {
            /// The kind with this number.
            #[must_use]
            pub const fn from_number(number: u32) -> Option<Self> {
                match number {
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }
        }
    };
}

kinds! {
    /// Commands to the server itself.
    Control = 0,
    /// Reads the names of children.
    Directory = 1,
    /// Reads a value.
    Read = 2,
    /// Reads a permission list.
    GetPermissions = 3,
    /// Registers a watch.
    Watch = 4,
    /// Removes a watch.
    Unwatch = 5,
    /// Opens a transaction.
    TransactionStart = 6,
    /// Commits or drops a transaction.
    TransactionEnd = 7,
    /// Introduces a domain: its page and port are ready.
    Introduce = 8,
    /// Tells that a domain is gone.
    Release = 9,
    /// Asks for the home of a domain.
    GetDomainPath = 10,
    /// Sets a value.
    Write = 11,
    /// Creates a node.
    MakeDirectory = 12,
    /// Removes a subtree.
    Remove = 13,
    /// Replaces a permission list.
    SetPermissions = 14,
    /// Server to client: a watched path changed.
    WatchEvent = 15,
    /// Server to client: a request was refused.
    Error = 16,
    /// Asks whether a domain is introduced.
    IsDomainIntroduced = 17,
    /// Tells that a domain that shut down runs again.
    Resume = 18,
    /// Gives one domain the rights of another.
    SetTarget = 19,
    /// Drops the caller's watches and transactions.
    ResetWatches = 21,
    /// Reads the names of children from an offset on.
    DirectoryPart = 22,
    /// Asks for the features of the server.
    GetFeature = 23,
}

/// The header of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Number of the kind; an unknown number is kept for the reply.
    pub kind: u32,
    /// Chosen by the client, copied into the reply.
    pub request: u32,
    /// Number of the transaction; 0 means no transaction.
    pub transaction: u32,
    /// Bytes of payload.
    pub length: u32,
}

impl Header {
    /// Reads a header.
    #[must_use]
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Self {
        let word = |at: usize| {
            let mut word = [0; 4];
            for (to, from) in word.iter_mut().zip(bytes.iter().skip(at)) {
                *to = *from;
            }
            u32::from_le_bytes(word)
        };
        Self { kind: word(0), request: word(4), transaction: word(8), length: word(12) }
    }

    /// Writes a header.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let words = [self.kind, self.request, self.transaction, self.length];
        for (to, from) in bytes.chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&from.to_le_bytes());
        }
        bytes
    }
}

/// A whole message as bytes. A payload is cut at [`PAYLOAD_MAX`]; callers check its length before.
#[must_use]
pub fn message(kind: u32, request: u32, transaction: u32, payload: &[u8]) -> Vec<u8> {
    let payload = payload.get(..PAYLOAD_MAX).unwrap_or(payload);
    let length = u32::try_from(payload.len()).unwrap_or(0);
    let header = Header { kind, request, transaction, length };
    let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
    bytes.extend_from_slice(&header.encode());
    bytes.extend_from_slice(payload);
    bytes
}

/// The stream is not a sequence of messages: a payload longer than [`PAYLOAD_MAX`] was announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProtocolError {
    /// The announced length.
    pub length: u32,
}

/// Assembles messages from pieces. Holds at most one message.
#[derive(Clone, Debug, Default)]
pub struct Assembler {
    bytes: Vec<u8>,
}

impl Assembler {
    /// Returns how many bytes are missing until the header (or, once the header is complete, the message) is complete.
    ///
    /// # Errors
    /// The header announces too long a payload.
    pub fn wanted(&self) -> Result<usize, ProtocolError> {
        match self.header() {
            None => Ok(HEADER_BYTES - self.bytes.len()),
            Some(Header { length, .. }) => match usize::try_from(length) {
                Ok(payload) if payload <= PAYLOAD_MAX => Ok((HEADER_BYTES + payload).saturating_sub(self.bytes.len())),
                _ => Err(ProtocolError { length }),
            },
        }
    }

    /// Takes bytes up to the end of one message. Returns how many it took, and the message if it is complete.
    ///
    /// # Errors
    /// As [`wanted`](Self::wanted).
    pub fn push(&mut self, bytes: &[u8]) -> Result<(usize, Option<Message>), ProtocolError> {
        let mut taken = 0;
        loop {
            let wanted = self.wanted()?;
            if wanted == 0 {
                return Ok((taken, self.finish()));
            }
            let rest = bytes.get(taken..).unwrap_or_default();
            if rest.is_empty() {
                return Ok((taken, None));
            }
            let piece = rest.get(..wanted).unwrap_or(rest);
            // Room for what is announced, not a byte more.
            self.bytes.reserve_exact(wanted);
            self.bytes.extend_from_slice(piece);
            taken += piece.len();
        }
    }

    /// The bytes of the next message that have arrived so far.
    #[must_use]
    pub fn partial(&self) -> &[u8] {
        &self.bytes
    }

    /// Drops a half-read message.
    pub fn clear(&mut self) {
        self.bytes = Vec::new();
    }

    fn header(&self) -> Option<Header> {
        self.bytes.first_chunk().map(Header::decode)
    }

    fn finish(&mut self) -> Option<Message> {
        let header = self.header()?;
        let payload = core::mem::take(&mut self.bytes).split_off(HEADER_BYTES);
        Some(Message { header, payload })
    }
}

/// One whole message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Its header; `length` equals the payload's.
    pub header: Header,
    /// Its payload.
    pub payload: Vec<u8>,
}

/// Splits a payload into exactly `COUNT` strings, each of which ends with a zero byte.
///
/// # Errors
/// Another number of strings, or an unterminated one.
pub(crate) fn strings<const COUNT: usize>(payload: &[u8]) -> Result<[&[u8]; COUNT], StoreError> {
    let body = payload.strip_suffix(b"\0").ok_or(StoreError::Invalid)?;
    let mut parts = body.split(|byte| *byte == 0);
    let mut found = [&b""[..]; COUNT];
    for slot in &mut found {
        *slot = parts.next().ok_or(StoreError::Invalid)?;
    }
    if parts.next().is_some() { Err(StoreError::Invalid) } else { Ok(found) }
}

/// Splits a payload at its first zero byte: a string, and opaque bytes.
pub(crate) fn string_and_rest(payload: &[u8]) -> Result<(&[u8], &[u8]), StoreError> {
    let end = payload.iter().position(|byte| *byte == 0).ok_or(StoreError::Invalid)?;
    let (string, rest) = payload.split_at_checked(end).ok_or(StoreError::Invalid)?;
    Ok((string, rest.get(1..).unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_survive_the_wire() {
        let header = Header { kind: 2, request: 0x0102_0304, transaction: 7, length: 9 };
        let bytes = header.encode();
        assert_eq!(bytes, [2, 0, 0, 0, 4, 3, 2, 1, 7, 0, 0, 0, 9, 0, 0, 0]);
        assert_eq!(Header::decode(&bytes), header);
    }

    #[test]
    fn a_message_may_arrive_in_any_pieces() {
        let two = [message(2, 1, 0, b"/a\0"), message(11, 2, 0, b"")].concat();
        for piece in 1..two.len() {
            let mut assembler = Assembler::default();
            let mut seen = Vec::new();
            for mut chunk in two.chunks(piece) {
                while !chunk.is_empty() {
                    let (taken, message) = assembler.push(chunk).unwrap();
                    seen.extend(message);
                    chunk = &chunk[taken..];
                }
            }
            let found: Vec<_> = seen.iter().map(|m| (m.header.kind, &m.payload[..])).collect();
            assert_eq!(found, [(2, &b"/a\0"[..]), (11, b"")], "pieces of {piece}");
        }
    }

    #[test]
    fn every_announced_length_is_taken_or_refused() {
        for length in [0, 1, 4095, 4096, 4097, 0x7fff_ffff, 0x8000_0000, u32::MAX] {
            let header = Header { kind: 2, request: 0, transaction: 0, length };
            let mut assembler = Assembler::default();
            let pushed = assembler.push(&header.encode());
            assert_eq!(pushed.is_ok(), length <= 4096, "{length}");
        }
    }

    #[test]
    fn payloads_split_into_exactly_the_strings_asked_for() {
        assert_eq!(strings::<1>(b"a\0"), Ok([&b"a"[..]]));
        assert_eq!(strings::<2>(b"a\0\0"), Ok([&b"a"[..], b""]));
        assert_eq!(strings::<1>(b"\0"), Ok([&b""[..]]));
        for bad in [&b""[..], b"a", b"a\0b", b"a\0b\0c\0"] {
            assert_eq!(strings::<2>(bad), Err(StoreError::Invalid), "{bad:?}");
        }
        assert_eq!(string_and_rest(b"a\0b\0c"), Ok((&b"a"[..], &b"b\0c"[..])));
        assert_eq!(string_and_rest(b"a"), Err(StoreError::Invalid));
    }
}
