//! The picture of a terminal on README's first page, made of the transcript there.

use anyhow::{Context, Result};
use std::fs;
use svg::Document;
use svg::node::element::{Circle, Rectangle, Text};
use xtask::root;

/// The transcript is the first block of README that is marked like this.
const BLOCK: &str = "```console\n";
/// The picture, as README names it.
const FILE: &str = "xtask/picture.svg";
/// What stands before words that somebody types.
const PROMPTS: [&str; 3] = ["$ ", "debian login: ", "root@debian:~# "];

const GROUND: &str = "#1e2127";
const FRAME: &str = "#3a3f4b";
const TYPED: &str = "#98c379";
const PRINTED: &str = "#d5d9e0";
const BUTTONS: [&str; 3] = ["#e06c75", "#e5c07b", "#98c379"];

/// Pixels between two lines, of a character's width, above the first line, and beside the lines.
const LINE: usize = 18;
const CHARACTER: usize = 8;
const TOP: usize = 50;
const EDGE: usize = 16;

/// Writes the picture.
pub(crate) fn write() -> Result<()> {
    Ok(fs::write(root().join(FILE), picture(&transcript()?))?)
}

fn transcript() -> Result<String> {
    let readme = fs::read_to_string(root().join("README.md"))?;
    let (_, rest) = readme.split_once(BLOCK).context("README has no transcript")?;
    let (transcript, _) = rest.split_once("```").context("README's transcript does not end")?;
    Ok(transcript.to_owned())
}

/// A terminal with these lines, as SVG.
fn picture(transcript: &str) -> String {
    let longest = transcript.lines().map(|line| line.chars().count()).max().unwrap_or(0);
    let width = 2 * EDGE + longest * CHARACTER;
    let height = TOP + transcript.lines().count() * LINE;
    let frame = |height: usize, colour: &str| {
        Rectangle::new().set("width", width).set("height", height).set("rx", 8).set("fill", colour)
    };
    let mut picture = Document::new().add(frame(height, GROUND)).add(frame(28, FRAME));
    for (index, colour) in BUTTONS.into_iter().enumerate() {
        picture = picture.add(Circle::new().set("cx", EDGE + 20 * index).set("cy", 14).set("r", 6).set("fill", colour));
    }
    for (index, line) in transcript.lines().enumerate() {
        let typed = PROMPTS.iter().find_map(|prompt| line.strip_prefix(prompt)).unwrap_or_default();
        let printed = line.strip_suffix(typed).unwrap_or(line);
        let y = TOP + index * LINE;
        picture = picture.add(words(printed, 0, y, PRINTED));
        if !typed.is_empty() {
            picture = picture.add(words(typed, printed.chars().count(), y, TYPED));
        }
    }
    let picture = picture.set("width", width).set("height", height).set("viewBox", (0, 0, width, height));
    format!("{}\n", picture.set("font-family", "monospace").set("font-size", 13))
}

/// Words behind so many characters of a line. Blanks stay, and each character has the same width, whatever font there is.
fn words(words: &str, behind: usize, y: usize, colour: &str) -> Text {
    let text = Text::new(words.replace(' ', "\u{a0}")).set("x", EDGE + behind * CHARACTER).set("y", y);
    text.set("textLength", words.chars().count() * CHARACTER).set("fill", colour)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_typed_stands_out_and_words_are_escaped() {
        let picture = picture("$ echo a<b\na<b & $ c\n");
        let typed = format!("fill=\"{TYPED}\" textLength=\"64\" x=\"32\" y=\"50\">\necho\u{a0}a&lt;b\n</text>");
        assert!(picture.contains(&typed), "{picture}");
        assert!(picture.contains(">\na&lt;b\u{a0}&amp;\u{a0}$\u{a0}c\n</text>"), "{picture}");
        assert_eq!(picture.matches(TYPED).count(), 2, "a line and a button");
    }

    #[test]
    fn the_picture_is_of_the_transcript() {
        let there = fs::read_to_string(root().join(FILE)).unwrap();
        assert!(
            there == picture(&transcript().unwrap()),
            "{FILE} is not of README's transcript: `cargo xtask picture`"
        );
    }
}
