//! What a domain writes to the log, and what ring 0 logs because of the domain.
//!
//! Touches: bytes of its own, and the logger.
//! Never touches: lines of others. Each domain's lines are in a buffer of its own, in which only its own oldest lines
//! are dropped; ring 0's log contains no byte of a guest.
//! Keeps: a guest's line begins with its mark and has only printable characters, whatever the guest writes.

use crate::prelude::*;
use core::fmt::{self, Write};
use core::ops::Range;
use heapless::{Deque, String};

/// Bytes of a domain's last lines that are kept.
const KEPT: usize = 2048;
/// The longest line; a longer one is continued on the next.
const LINE: usize = 160;
/// The most characters that one byte becomes.
const LONGEST: usize = 4;
/// Lines that ring 0 logs in a burst because of a domain; after that, one each second.
const REMARKS: u64 = 16;
/// Nanoseconds in a second.
const SECOND: u64 = 1_000_000_000;

/// A line with its mark, as readers get it.
pub(crate) type Shown = String<{ LINE + 48 }>;

/// The last lines of a domain. Lines are numbered from 0.
#[derive(Debug)]
pub(crate) struct Journal {
    /// Whole lines, each with its newline.
    text: Deque<u8, KEPT>,
    /// The numbers of the lines in `text`.
    lines: Range<u64>,
    /// The line that is being written.
    line: String<LINE>,
    /// Lines dropped to make room, since the log was last cleared.
    left_out: u64,
    /// The numbers of the lines in the reading that began last.
    reading: Range<u64>,
    /// The lines of the reading before this number have been shown.
    shown: u64,
    /// When ring 0 may log a full burst for the domain again.
    busy_until: u64,
    /// Lines that ring 0 did not log since the last one it did.
    unlogged: u32,
}

impl Journal {
    /// The journal of a domain that has written nothing.
    pub(crate) const fn new() -> Self {
        Self {
            text: Deque::new(),
            lines: 0..0,
            line: String::new(),
            left_out: 0,
            reading: 0..0,
            shown: 0,
            busy_until: 0,
            unlogged: 0,
        }
    }

    /// Adds bytes that a guest has written.
    pub(crate) fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if *byte == b'\n' || self.line.capacity() - self.line.len() < LONGEST {
                self.end_line();
            }
            let _ = write!(self.line, "{}", Character(*byte)); // there is room now
        }
    }

    /// Moves the line being written to the whole lines. An empty line is ignored.
    fn end_line(&mut self) {
        if self.line.is_empty() {
            return;
        }
        while self.text.capacity() - self.text.len() <= self.line.len() {
            self.drop_first();
            self.left_out += 1;
        }
        let bytes = self.line.bytes().chain([b'\n']);
        bytes.for_each(|byte| _ = self.text.push_back(byte)); // there is room now
        self.lines.end += 1;
        self.line.clear();
    }

    fn drop_first(&mut self) {
        while self.text.pop_front().is_some_and(|byte| byte != b'\n') {}
        self.lines.start += 1;
    }

    /// Returns a line with its mark, and the place of the next line. Place 0 begins a reading with the first line kept;
    /// place `n` is the `n`-th line after it. The end of a reading is fixed when it begins, so a guest that keeps
    /// writing cannot prolong it.
    pub(crate) fn show(&mut self, id: DomainId, place: u32) -> Option<(Shown, u32)> {
        if place == 0 {
            self.end_line(); // readers see the unfinished line as a whole one
            self.reading = self.lines.clone();
        }
        let number = self.reading.start.saturating_add(place.into()).max(self.lines.start);
        if number >= self.reading.end {
            return None;
        }
        let mut bytes = self.text.iter().copied();
        (self.lines.start..number).for_each(|_| while bytes.next().is_some_and(|byte| byte != b'\n') {});
        let mut shown = Shown::new();
        let _ = write!(shown, "({id}) ");
        if number == self.lines.start && self.left_out > 0 {
            let _ = write!(shown, "[{} lines left out] ", self.left_out);
        }
        bytes.take_while(|byte| *byte != b'\n').chain([b'\n']).for_each(|byte| _ = shown.push(char::from(byte)));
        self.shown = number + 1;
        Some((shown, low32(self.shown - self.reading.start)))
    }

    /// Drops the lines that have been shown.
    pub(crate) fn forget(&mut self) {
        while self.lines.start < self.shown && !self.lines.is_empty() {
            self.drop_first();
            self.left_out = 0;
        }
    }

    /// Checks whether ring 0 may log one more line because of the domain. If so, returns how many lines were not logged
    /// since the last one.
    fn may_be_logged(&mut self, now: u64) -> Option<u32> {
        let busy_until = self.busy_until.max(now).saturating_add(SECOND);
        if busy_until - now > REMARKS * SECOND {
            self.unlogged = self.unlogged.saturating_add(1);
            return None;
        }
        self.busy_until = busy_until;
        Some(core::mem::take(&mut self.unlogged))
    }
}

#[cfg(feature = "planted-fault")]
impl crate::audit::Spoil for Journal {
    fn spoil(&mut self) {
        self.write(b"what nobody else may read\n");
        (self.busy_until, self.unlogged) = (1, 1);
    }
}

/// A byte of a guest as harmless characters.
struct Character(u8);

impl fmt::Display for Character {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            b'\n' | b'\r' => Ok(()), // a return inside a line would hide the text before it
            b'\t' => f.write_char(' '),
            byte @ b' '..=b'~' => f.write_char(char::from(byte)),
            byte => write!(f, "\\x{byte:02x}"),
        }
    }
}

impl Domain {
    /// Logs a line that the domain has caused, unless it has caused too many. The number of lines not logged is logged
    /// later.
    pub(crate) fn log<M: Machine>(&self, m: &M, level: log::Level, what: fmt::Arguments<'_>) {
        if !log::log_enabled!(level) {
            return;
        }
        let Some(unlogged) = self.journal.with(|journal| journal.may_be_logged(m.now())) else { return };
        self.tell_unlogged(unlogged);
        log::log!(level, "{what}");
    }

    /// Logs how many lines were not logged, because the domain ends.
    pub(crate) fn end_log(&self) {
        self.tell_unlogged(self.journal.with(|journal| core::mem::take(&mut journal.unlogged)));
    }

    fn tell_unlogged(&self, lines: u32) {
        if lines > 0 {
            log::warn!("{}: {lines} lines left out", self.id());
        }
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::format;
    use std::vec::Vec;

    const ID: DomainId = DomainId(7);

    fn all(journal: &mut Journal) -> Vec<Shown> {
        let mut next = 0;
        let line = || {
            let (line, after) = journal.show(ID, next)?;
            next = after;
            Some(line)
        };
        std::iter::from_fn(line).collect()
    }

    #[test]
    fn every_line_has_its_mark_and_no_control_character() {
        let mut journal = Journal::new();
        journal.write(b"quiet\r\n[error] mfn 0x1: bad\n\n(d8) I am ");
        journal.write(b"d8\x1b[2J\xff\tend");
        let lines = ["(d7) quiet\n", "(d7) [error] mfn 0x1: bad\n", "(d7) (d8) I am d8\\x1b[2J\\xff end\n"];
        assert_eq!(all(&mut journal), lines);
        journal.write(b"next");
        assert_eq!(all(&mut journal).last().map(Shown::as_str), Some("(d7) next\n"), "what was shown is a line");
    }

    #[test]
    fn old_lines_give_way_and_are_counted() {
        let mut journal = Journal::new();
        (0..1000).for_each(|n| journal.write(format!("line {n}\n").as_bytes()));
        let lines = all(&mut journal);
        let left_out = 1000 - lines.len();
        assert_eq!(lines[0], format!("(d7) [{left_out} lines left out] line {left_out}\n").as_str());
        assert_eq!(lines.last().map(Shown::as_str), Some("(d7) line 999\n"));
        assert!((KEPT - LINE..=KEPT + 64).contains(&lines.iter().map(|line| line.len() - 5).sum::<usize>()));
        journal.forget();
        assert_eq!(all(&mut journal), [""; 0]);
        journal.write(&[b'x'; 3 * LINE - 12]);
        assert_eq!(all(&mut journal).len(), 3, "a line without an end is cut");
    }

    #[test]
    fn a_reading_ends_though_the_guest_goes_on() {
        let mut journal = Journal::new();
        journal.write(b"one\ntwo\n");
        let (one, next) = journal.show(ID, 0).unwrap();
        (0..1000).for_each(|n| journal.write(format!("line {n}\n").as_bytes()));
        assert_eq!((one.as_str(), journal.show(ID, next)), ("(d7) one\n", None));
    }

    #[test]
    fn ring_0_stops_logging_because_of_a_domain() {
        let mut journal = Journal::new();
        let logged = (0..100).filter(|_| journal.may_be_logged(5).is_some()).count();
        assert_eq!(logged as u64, REMARKS);
        assert_eq!(journal.may_be_logged(5 + SECOND), Some(100 - low32(REMARKS)));
        assert_eq!(journal.may_be_logged(5 + SECOND), None);
        assert_eq!(journal.may_be_logged(5 + 100 * SECOND), Some(1));
    }
}
