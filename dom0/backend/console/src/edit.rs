//! A line being typed on a terminal that neither edits nor echoes.

use alloc::string::String;

/// Bytes of a line; more are not taken.
const LINE_BYTES: usize = 256;

/// The line, and what of it is on the screen.
#[derive(Clone, Debug, Default)]
pub struct LineEditor {
    line: String,
}

/// What a key led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Typed {
    /// The line goes on; this is to be shown.
    Echo(&'static str),
    /// The line goes on; this character is to be shown.
    Character(char),
    /// The line begins anew: what is on the screen is to be wiped.
    Redraw,
    /// The line is finished.
    Line(String),
    /// The line was given up.
    Cancelled,
}

impl LineEditor {
    /// What has been typed so far.
    #[must_use]
    pub fn line(&self) -> &str {
        &self.line
    }

    /// Takes a key: printable ASCII, return, backspace or delete, Ctrl-U (empties the line), Ctrl-C (gives it up).
    /// Others are ignored.
    pub fn key(&mut self, key: u8) -> Typed {
        match key {
            b'\r' | b'\n' => Typed::Line(core::mem::take(&mut self.line)),
            0x08 | 0x7f if self.line.pop().is_some() => Typed::Echo("\x08 \x08"),
            0x15 => {
                self.line.clear();
                Typed::Redraw
            }
            0x03 => {
                self.line.clear();
                Typed::Cancelled
            }
            b' '..=b'~' if self.line.len() < LINE_BYTES => {
                self.line.push(char::from(key));
                Typed::Character(char::from(key))
            }
            _ => Typed::Echo(""),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn other_keys_and_endless_lines_do_no_harm() {
        let mut editor = LineEditor::default();
        for key in 0..=255 {
            if !matches!(key, b' '..=b'~' | b'\r' | b'\n' | 3 | 0x15) {
                assert_eq!(editor.key(key), Typed::Echo(""), "{key}");
            }
        }
        type_all(&mut editor, &[b'x'; 10_000]);
        assert_eq!(editor.line().len(), LINE_BYTES);
    }
}
