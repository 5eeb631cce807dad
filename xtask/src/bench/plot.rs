//! Plots: groups of bars made of parts, one part for each owner of instructions.

use super::counts::{Counts, OWNERS};
use super::report::short;
use svg::Document;
use svg::node::element::{Rectangle, Text};

/// Bars that are compared with each other; each group has a scale of its own.
pub(super) struct Group {
    pub(super) label: String,
    pub(super) bars: Vec<Bar>,
}

/// One bar.
pub(super) struct Bar {
    pub(super) label: String,
    /// One number for each of [`OWNERS`]; a mark taken elsewhere has but one.
    pub(super) parts: Vec<f64>,
    /// What is said behind the sum; may be empty.
    note: String,
}

impl Bar {
    /// The instructions of an operation, by owner.
    pub(super) fn new(label: impl Into<String>, counts: &Counts, operations: u32) -> Self {
        #[allow(clippy::cast_precision_loss, reason = "a plot has no more than some hundred points")]
        let parts = OWNERS.iter().map(|owner| counts.insns(owner) as f64 / f64::from(operations)).collect();
        Self { label: label.into(), parts, note: String::new() }
    }

    /// The same with something said behind the sum.
    pub(super) fn with_note(self, note: String) -> Self {
        Self { note, ..self }
    }

    /// The same without those of guests.
    pub(super) fn hosts(label: impl Into<String>, counts: &Counts) -> Self {
        let mut bar = Self::new(label, counts, 1);
        for (owner, part) in OWNERS.iter().zip(&mut bar.parts) {
            if !matches!(*owner, "dom0" | "ring0") {
                *part = 0.0;
            }
        }
        bar
    }

    /// A number from a document.
    pub(super) fn mark(label: impl Into<String>, total: f64) -> Self {
        Self { label: label.into(), parts: vec![total], note: String::new() }
    }

    fn total(&self) -> f64 {
        self.parts.iter().sum()
    }

    fn is_mark(&self) -> bool {
        self.parts.len() == 1
    }
}

const COLOURS: [&str; OWNERS.len()] = ["#b0b0b0", "#7fb2d9", "#2f6f9f", "#f0b050", "#c0392b"];
const NAMES: [&str; OWNERS.len()] = ["firmware, unpacking", "programs", "guest kernel", "dom0", "ring 0"];
const MARK: &str = "#dddddd";
const LEFT: f64 = 270.0;
const LENGTH: f64 = 420.0;
const WIDTH: f64 = 830.0;
const LINE: f64 = 18.0;

fn text(x: f64, y: f64, anchor: &str, weight: &str, words: &str) -> Text {
    let text = Text::new(words).set("x", format!("{x:.0}")).set("y", format!("{y:.0}"));
    text.set("text-anchor", anchor).set("font-weight", weight)
}

fn rectangle(x: f64, y: f64, width: f64, height: f64, colour: &str) -> Rectangle {
    let rectangle = Rectangle::new().set("x", format!("{x:.1}")).set("y", format!("{y:.1}")).set("fill", colour);
    rectangle.set("width", format!("{width:.1}")).set("height", format!("{height:.1}"))
}

/// The plot as SVG.
pub(super) fn svg(title: &str, groups: &[Group]) -> String {
    let ground = Rectangle::new().set("width", "100%").set("height", "100%").set("fill", "white");
    let title = format!("{title}: instructions, fewer is better");
    let mut plot = Document::new().add(ground).add(text(10.0, 22.0, "start", "bold", &title));
    for (index, (name, colour)) in NAMES.iter().zip(COLOURS).enumerate() {
        #[allow(clippy::cast_precision_loss, reason = "five")]
        let x = 10.0 + 160.0 * index as f64;
        plot = plot.add(rectangle(x, 34.0, 10.0, 10.0, colour)).add(text(x + 14.0, 43.0, "start", "normal", name));
    }
    let mut y = 66.0;
    for group in groups {
        let most = group.bars.iter().map(Bar::total).fold(f64::MIN_POSITIVE, f64::max);
        plot = plot.add(text(LEFT - 90.0, y + 12.0, "end", "bold", &group.label));
        for bar in &group.bars {
            plot = plot.add(text(LEFT - 6.0, y + 12.0, "end", "normal", &bar.label));
            let mut x = LEFT;
            for (part, colour) in bar.parts.iter().zip(COLOURS) {
                let width = part / most * LENGTH;
                if width > 0.0 {
                    let colour = if bar.is_mark() { MARK } else { colour };
                    plot = plot.add(rectangle(x, y + 1.0, width, LINE - 4.0, colour));
                }
                x += width;
            }
            let sum = short(bar.total());
            let words = if bar.note.is_empty() { sum } else { format!("{sum}, {}", bar.note) };
            plot = plot.add(text(x + 5.0, y + 12.0, "start", "normal", &words));
            y += LINE;
        }
        y += 8.0;
    }
    let height = y + 6.0;
    let plot = plot.set("width", WIDTH).set("height", height).set("viewBox", (0, 0, WIDTH, height));
    format!("{}\n", plot.set("font-family", "sans-serif").set("font-size", 12))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_have_their_lengths_and_words_are_escaped() {
        let parts = vec![0.0, 25.0, 0.0, 0.0, 25.0];
        let bars = vec![Bar::mark("Xen", 100.0), Bar { label: "a<b".into(), parts, note: "2 entries".into() }];
        let plot = svg("title", &[Group { label: "group".into(), bars }]);
        assert!(plot.contains(&format!("width=\"{LENGTH:.1}\"")), "the longest bar fills the width");
        assert_eq!(plot.matches(&format!("width=\"{:.1}\"", LENGTH / 4.0)).count(), 2);
        assert!(plot.contains("a&lt;b") && plot.contains("50, 2 entries"), "{plot}");
    }

    #[test]
    fn the_same_numbers_make_the_same_plot() {
        let plot = |numbers: [f64; 2]| {
            let bars =
                numbers.map(|number| Bar { label: "bar".into(), parts: vec![number, 1.5], note: String::new() }).into();
            svg("title", &[Group { label: "group".into(), bars }])
        };
        assert_eq!(plot([1e6, 3.0]), plot([1e6, 3.0]));
        assert_ne!(plot([1e6, 3.0]), plot([2e6, 3.0]));
        for nothing in [svg("title", &[]), plot([0.0, f64::MIN_POSITIVE])] {
            assert!(nothing.ends_with("</svg>\n") && !nothing.contains("NaN") && !nothing.contains("inf"), "{nothing}");
        }
    }
}
