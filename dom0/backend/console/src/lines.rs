//! Lines of one guest for a display that several guests share.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Write;

/// Bytes after which a line is broken even if the guest does not end it.
pub const LINE_MAX: usize = 256;

/// Cuts a guest's output into lines and escapes everything dangerous: a guest must not move the cursor, forge another
/// guest's lines, or send commands to the operator's terminal.
#[derive(Clone, Debug)]
pub struct LineWriter {
    prefix: String,
    line: Vec<u8>,
}

impl LineWriter {
    /// A writer whose lines start with `prefix`, for instance `(d3) `.
    #[must_use]
    pub const fn new(prefix: String) -> Self {
        Self { prefix, line: Vec::new() }
    }

    /// Takes output; calls `emit` with every finished line, without its line end.
    pub fn push(&mut self, bytes: &[u8], mut emit: impl FnMut(&str)) {
        for byte in bytes {
            if *byte == b'\n' {
                self.finish(&mut emit);
                continue;
            }
            if self.line.len() >= LINE_MAX {
                self.finish(&mut emit);
            }
            self.line.push(*byte);
        }
    }

    /// Calls `emit` with the unfinished line (a prompt, for instance), if there is one.
    pub fn flush(&mut self, mut emit: impl FnMut(&str)) {
        if !self.line.is_empty() {
            self.finish(&mut emit);
        }
    }

    fn finish(&mut self, emit: &mut impl FnMut(&str)) {
        let mut shown = self.prefix.clone();
        let line = self.line.strip_suffix(b"\r").unwrap_or(&self.line);
        for chunk in line.utf8_chunks() {
            for character in chunk.valid().chars() {
                push_visible(&mut shown, character);
            }
            for byte in chunk.invalid() {
                // Writing to a string cannot fail.
                let _ = write!(shown, "\\x{byte:02x}");
            }
        }
        self.line.clear();
        emit(&shown);
    }
}

/// Appends a character: unchanged if it does no more than print itself, else escaped.
fn push_visible(shown: &mut String, character: char) {
    match character {
        ' '..='~' if character != '\\' => shown.push(character),
        '\t' => shown.push(' '),
        '\0'..='\u{7f}' if character != '\\' => {
            let _ = write!(shown, "\\x{:02x}", u32::from(character));
        }
        // Doubles the backslash, escapes characters that do not print (direction marks too), and keeps the rest.
        _ => shown.extend(character.escape_debug()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(pieces: &[&[u8]]) -> Vec<String> {
        let mut writer = LineWriter::new("(d3) ".into());
        let mut seen = Vec::new();
        for piece in pieces {
            writer.push(piece, |line| seen.push(String::from(line)));
        }
        writer.flush(|line| seen.push(String::from(line)));
        seen
    }

    #[test]
    fn lines_are_prefixed_whatever_the_pieces() {
        let expected = ["(d3) one", "(d3) ", "(d3) two", "(d3) login: "];
        assert_eq!(lines(&[b"one\r\n\ntw", b"o\nlogin: "]), expected);
        let bytes: Vec<&[u8]> = b"one\r\n\ntwo\nlogin: ".chunks(1).collect();
        assert_eq!(lines(&bytes), expected);
    }

    #[test]
    fn nothing_but_visible_characters_passes() {
        let all: Vec<u8> = (0..=255).filter(|byte| *byte != b'\n').collect();
        for line in lines(&[&all]) {
            assert!(line.bytes().all(|byte| (b' '..=b'~').contains(&byte)), "{line}");
        }
        assert_eq!(lines(&[b"\x1b[2J\x07a\tb\\n"]), ["(d3) \\x1b[2J\\x07a b\\\\n"]);
        assert_eq!(lines(&["gr\u{fc}n \u{202e}x\u{9b}".as_bytes()]), ["(d3) grün \\u{202e}x\\u{9b}"]);
        assert_eq!(lines(&[b"a\rb"]), ["(d3) a\\x0db"], "a return would overwrite the prefix");
    }

    #[test]
    fn an_endless_line_is_broken() {
        let long = [b'x'; 10 * LINE_MAX];
        let seen = lines(&[&long]);
        assert_eq!(seen.len(), 10);
        assert!(seen.iter().all(|line| line.len() == LINE_MAX + 5));
    }
}
