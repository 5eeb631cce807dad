//! Edits a line typed on a terminal that neither edits nor echoes.

use alloc::collections::VecDeque;
use alloc::string::String;

/// Most bytes of a line; further keys are ignored.
const LINE_BYTES: usize = 256;
/// Most lines remembered.
const HISTORY: usize = 32;

/// The line being typed, and the lines typed before.
#[derive(Clone, Debug, Default)]
pub struct LineEditor {
    line: String,
    history: VecDeque<String>,
    /// How many lines back in the history the shown line is; 0 for the new line.
    back: usize,
    /// The new line, while a line of the history is shown.
    draft: String,
    escape: Escape,
}

/// The part of an escape sequence that has arrived.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Escape {
    #[default]
    None,
    /// ESC.
    Begun,
    /// ESC and `[` or `O`, and perhaps parameters.
    Inside,
}

/// The result of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Typed {
    /// The line is unfinished; the caller shows this text.
    Echo(&'static str),
    /// The line is unfinished; the caller shows this character.
    Character(char),
    /// The line has changed; the caller draws it again.
    Redraw,
    /// The caller is to complete the line: see [`LineEditor::insert`].
    Complete,
    /// The line is finished.
    Line(String),
    /// The line was discarded.
    Cancelled,
}

impl LineEditor {
    /// What has been typed so far.
    #[must_use]
    pub fn line(&self) -> &str {
        &self.line
    }

    /// Appends text to the line as if it had been typed. The caller then draws the line again.
    pub fn insert(&mut self, text: &str) {
        let room = LINE_BYTES.saturating_sub(self.line.len());
        self.line.extend(text.chars().filter(|c| matches!(c, ' '..='~')).take(room));
    }

    /// Handles a key: printable ASCII, return, backspace or delete, Tab, the arrows up and down (or Ctrl-P and Ctrl-N),
    /// Ctrl-U (empties the line), Ctrl-C (discards it). Other keys are ignored.
    pub fn key(&mut self, key: u8) -> Typed {
        match (self.escape, key) {
            (Escape::Begun, b'[' | b'O') => {
                self.escape = Escape::Inside;
                return Typed::Echo("");
            }
            (Escape::Inside, b'0'..=b'9' | b';') => return Typed::Echo(""),
            (Escape::Inside, b' '..=b'~') => {
                self.escape = Escape::None;
                return match key {
                    b'A' => self.recall(self.back + 1),
                    b'B' => self.recall(self.back.wrapping_sub(1)),
                    _ => Typed::Echo(""),
                };
            }
            _ => self.escape = Escape::None,
        }
        match key {
            0x1b => {
                self.escape = Escape::Begun;
                Typed::Echo("")
            }
            b'\t' => Typed::Complete,
            0x10 => self.recall(self.back + 1),
            0x0e => self.recall(self.back.wrapping_sub(1)),
            b'\r' | b'\n' => {
                let line = self.take();
                if !line.trim().is_empty() && self.history.front() != Some(&line) {
                    self.history.push_front(line.clone());
                    self.history.truncate(HISTORY);
                }
                Typed::Line(line)
            }
            0x08 | 0x7f if self.line.pop().is_some() => Typed::Echo("\x08 \x08"),
            0x15 => {
                self.take();
                Typed::Redraw
            }
            0x03 => {
                self.take();
                Typed::Cancelled
            }
            b' '..=b'~' if self.line.len() < LINE_BYTES => {
                self.line.push(char::from(key));
                Typed::Character(char::from(key))
            }
            _ => Typed::Echo(""),
        }
    }

    /// Takes the line, and begins a new one.
    fn take(&mut self) -> String {
        self.back = 0;
        self.draft.clear();
        core::mem::take(&mut self.line)
    }

    /// Shows the line `back` lines back in the history, if it exists; 0 shows the new line.
    fn recall(&mut self, back: usize) -> Typed {
        let wanted = match back.checked_sub(1) {
            None => Some(core::mem::take(&mut self.draft)),
            Some(index) => self.history.get(index).cloned(),
        };
        let Some(wanted) = wanted else { return Typed::Echo("") };
        let before = core::mem::replace(&mut self.line, wanted);
        if self.back == 0 {
            self.draft = before;
        }
        self.back = back;
        Typed::Redraw
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::format;
    use alloc::string::ToString;

    fn type_all(editor: &mut LineEditor, keys: &[u8]) -> Typed {
        let mut last = Typed::Echo("");
        for key in keys {
            last = editor.key(*key);
        }
        last
    }

    #[test]
    fn a_line_is_typed_corrected_and_finished() {
        let mut editor = LineEditor::default();
        assert_eq!(editor.key(b'l'), Typed::Character('l'));
        assert_eq!(type_all(&mut editor, b"ixx\x7f\x08"), Typed::Echo("\x08 \x08"));
        assert_eq!(editor.line(), "li");
        assert_eq!(type_all(&mut editor, b"st\r"), Typed::Line("list".into()));
        assert_eq!(editor.key(0x7f), Typed::Echo(""), "nothing left to take back");
        assert_eq!(type_all(&mut editor, b"abc\x15"), Typed::Redraw);
        assert_eq!(type_all(&mut editor, b"d\n"), Typed::Line("d".into()));
        assert_eq!(type_all(&mut editor, b"abc\x03"), Typed::Cancelled);
        assert_eq!(editor.line(), "");
    }

    #[test]
    fn earlier_lines_come_back() {
        let mut editor = LineEditor::default();
        assert_eq!(type_all(&mut editor, b"\x1b[A"), Typed::Echo(""), "there are none yet");
        assert_eq!(type_all(&mut editor, b"\x1b[B"), Typed::Echo(""));
        type_all(&mut editor, b"list\rlist\r  \rinfo\rdra");
        assert_eq!(type_all(&mut editor, b"\x1b[A"), Typed::Redraw);
        assert_eq!(editor.line(), "info");
        type_all(&mut editor, b"\x1bOA");
        assert_eq!(editor.line(), "list");
        assert_eq!(editor.key(0x10), Typed::Echo(""), "neither doubles nor empty lines are kept");
        type_all(&mut editor, b"\x0e\x1b[B");
        assert_eq!(editor.line(), "dra", "what was begun is still there");
        assert_eq!(type_all(&mut editor, b"\x10\x10 -j\r"), Typed::Line("list -j".into()));
        for line in 0..100 {
            type_all(&mut editor, format!("{line}\r").as_bytes());
        }
        type_all(&mut editor, &[0x10; 1000]);
        assert_eq!(editor.line(), (100 - HISTORY).to_string());
    }

    #[test]
    fn a_line_can_be_completed() {
        let mut editor = LineEditor::default();
        assert_eq!(type_all(&mut editor, b"li\t"), Typed::Complete);
        editor.insert("st \x1b");
        assert_eq!(editor.line(), "list ");
        editor.insert(&"x".repeat(1000));
        assert_eq!(editor.line().len(), LINE_BYTES);
    }

    #[test]
    fn other_keys_and_endless_lines_do_no_harm() {
        let mut editor = LineEditor::default();
        for key in 0..=255 {
            if !matches!(key, b' '..=b'~' | b'\r' | b'\n' | b'\t' | 3 | 0x15) {
                assert_eq!(editor.key(key), Typed::Echo(""), "{key}");
            }
        }
        assert_eq!(type_all(&mut editor, b"\x1b[3;5~\x1b[1"), Typed::Echo(""));
        assert_eq!(type_all(&mut editor, b"\rx\r"), Typed::Line("x".into()));
        type_all(&mut editor, &[b'x'; 10_000]);
        assert_eq!(editor.line().len(), LINE_BYTES);
    }
}
