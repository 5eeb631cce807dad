//! A result, as table, plot or JSON.

use super::bars::Bar;
use super::counts::{Counts, OWNERS};
use super::plot::{self, Group};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::fmt::Write;
use std::fs;
use std::path::Path;

/// What a bench has found.
pub(super) struct Report {
    /// Name of the bench, and of the files it is kept in.
    pub(super) name: String,
    /// What it measures, in a sentence or two.
    pub(super) about: String,
    pub(super) versions: Vec<(String, String)>,
    pub(super) date: String,
    pub(super) tables: Vec<Table>,
    pub(super) bars: Vec<Bar>,
    pub(super) plot: Vec<Group>,
    /// Every number, by measurement.
    pub(super) numbers: Vec<Value>,
    /// What stands below the table: how good the numbers are.
    pub(super) notes: Vec<String>,
    /// Where instructions went, if that was asked for: a title and lines.
    pub(super) profiles: Vec<(String, Vec<String>)>,
}

/// A table.
pub(super) struct Table {
    /// What stands above it; may be empty.
    pub(super) title: String,
    /// The first has the heads of the columns.
    pub(super) rows: Vec<Vec<String>>,
}

impl From<Vec<Vec<String>>> for Table {
    fn from(rows: Vec<Vec<String>>) -> Self {
        Self { title: String::new(), rows }
    }
}

impl Table {
    fn markdown(&self) -> String {
        let title = if self.title.is_empty() { String::new() } else { format!("## {}\n\n", self.title) };
        title + &aligned(&self.rows)
    }
}

impl Report {
    /// Everything as text.
    pub(super) fn markdown(&self) -> String {
        let option = if self.name.ends_with("-debian") { " --guest " } else { " --kernel " };
        let mut out = format!("# cargo xtask bench {}\n\n{}\n\n", self.name.replacen('-', option, 1), self.about);
        let versions: Vec<_> = self.versions.iter().map(|(name, version)| format!("{name} {version}")).collect();
        // Writing to a string does not fail.
        let _ = writeln!(out, "{}: {}.\n", self.date, versions.join(", "));
        out += &self.tables.iter().map(Table::markdown).collect::<Vec<_>>().join("\n");
        for note in &self.notes {
            let _ = write!(out, "\n{note}\n");
        }
        if !self.bars.is_empty() {
            let head = ["bar", "measured", "at most", ""].map(str::to_owned).to_vec();
            let row = |bar: &Bar| {
                let verdict = if bar.is_met() { "met" } else { "MISSED" };
                vec![bar.what.clone(), short(bar.measured), short(bar.limit), verdict.into()]
            };
            let rows: Vec<_> = std::iter::once(head).chain(self.bars.iter().map(row)).collect();
            out += "\n";
            out += &aligned(&rows);
        }
        for (title, lines) in &self.profiles {
            let _ = write!(out, "\n{title}\n\n```\n{}\n```\n", lines.join("\n"));
        }
        out
    }

    /// Everything for programs.
    pub(super) fn json(&self) -> Value {
        let versions: serde_json::Map<_, _> =
            self.versions.iter().map(|(name, version)| (name.clone(), version.clone().into())).collect();
        json!({
            "bench": self.name, "date": self.date, "versions": versions,
            "numbers": &self.numbers,
            "bars": self.bars.iter().map(Bar::json).collect::<Vec<_>>(),
        })
    }

    /// Writes all forms into a folder; a report without a plot has two.
    pub(super) fn save(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder)?;
        let mut files = vec![("md", self.markdown()), ("json", format!("{:#}\n", self.json()))];
        if !self.plot.is_empty() {
            files[0].1 += &format!("\n![plot]({}.svg)\n", self.name);
            files.push(("svg", plot::svg(&format!("cargo xtask bench {}, {}", self.name, self.date), &self.plot)));
        }
        for (ending, content) in files {
            let file = folder.join(format!("{}.{ending}", self.name));
            fs::write(&file, content).with_context(|| format!("cannot write {}", file.display()))?;
        }
        Ok(())
    }
}

/// What was counted in a measurement, for programs.
pub(super) fn number(name: &str, counts: &Counts, operations: u32) -> Value {
    let insns: serde_json::Map<_, _> =
        OWNERS.iter().map(|owner| ((*owner).to_owned(), counts.insns(owner).into())).collect();
    json!({
        "name": name, "operations": operations, "instructions": insns, "total": counts.total(),
        "entries": counts.entries(), "cr3": counts.cr3(),
    })
}

/// A number for people: three digits and a unit, or all digits of a small one.
pub(super) fn short(number: f64) -> String {
    match number {
        n if n >= 1e9 => format!("{:.2} G", n / 1e9),
        n if n >= 1e8 => format!("{:.0} M", n / 1e6),
        n if n >= 1e6 => format!("{:.2} M", n / 1e6),
        n if n >= 1e5 => format!("{:.0} k", n / 1e3),
        n if n >= 100.0 => format!("{n:.0}"),
        n if n == n.trunc() => format!("{n:.0}"),
        n if n < 0.1 => format!("{n:.3}"),
        n => format!("{n:.2}"),
    }
}

/// A Markdown table that is readable as text, too: the first column to the left, numbers to the right.
fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0).max(3);
    let mut out = String::new();
    for (index, row) in rows.iter().enumerate() {
        let cells = row.iter().enumerate().map(|(column, cell)| match column {
            0 => format!("{cell:<width$}", width = width(0)),
            _ => format!("{cell:>width$}", width = width(column)),
        });
        let _ = writeln!(out, "| {} |", cells.collect::<Vec<_>>().join(" | "));
        if index == 0 {
            let rule = (0..columns).map(|column| match column {
                0 => "-".repeat(width(0)),
                _ => format!("{}:", "-".repeat(width(column) - 1)),
            });
            let _ = writeln!(out, "| {} |", rule.collect::<Vec<_>>().join(" | "));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let numbers = [0.0, 0.009, 0.25, 73.0, 784.0, 12345.4, 756_123.0, 8.04e6, 290.2e6, 6.13e9];
        let texts = ["0", "0.009", "0.25", "73", "784", "12345", "756 k", "8.04 M", "290 M", "6.13 G"];
        assert_eq!(numbers.map(short), texts);
    }

    #[test]
    fn tables_are_aligned() {
        let rows = [["what", "n"], ["a", "12345"]].map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(aligned(&rows), "| what |     n |\n| ---- | ----: |\n| a    | 12345 |\n");
    }

    #[test]
    fn a_missed_bar_is_counted_and_told() {
        let report = Report {
            name: "boot".into(),
            about: "About.".into(),
            versions: vec![("QEMU".into(), "10".into())],
            date: "2025-01-01".into(),
            tables: vec![vec![vec!["x".into()]].into(), Table { title: "More".into(), rows: vec![vec!["y".into()]] }],
            bars: vec![Bar::new("good", 1.0, 1.0), Bar::new("bad", 2.0, 1.0)],
            plot: vec![Group { label: String::new(), bars: Vec::new() }],
            numbers: vec![number("bare", &Counts::default(), 1)],
            notes: vec!["Note.".into()],
            profiles: Vec::new(),
        };
        assert_eq!(report.bars.iter().filter(|bar| !bar.is_met()).count(), 1);
        assert!(report.markdown().contains("| --- |\n\n## More\n\n| y   |\n"), "{}", report.markdown());
        assert!(report.markdown().contains("| bad  |        2 |       1 | MISSED |"), "{}", report.markdown());
        assert_eq!(report.json()["bars"][1]["met"], false);
        let folder = tempfile::tempdir().unwrap();
        report.save(folder.path()).unwrap();
        assert!(fs::read_to_string(folder.path().join("boot.svg")).unwrap().starts_with("<svg"));
    }
}
