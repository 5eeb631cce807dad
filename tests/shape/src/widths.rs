//! Comments fit the width that the house has for them. rustfmt leaves comments as they are.

use crate::source::Crate;
use std::path::Path;

/// The maximum number of columns of a line that is a comment.
const COLUMNS: usize = 128;

/// What is wider.
pub(crate) fn check(crates: &[Crate]) -> Vec<String> {
    crates.iter().flat_map(|member| &member.files).flat_map(|(path, text)| wide(path, text)).collect()
}

fn wide(path: &Path, text: &str) -> Vec<String> {
    let comment = |line: &str| line.trim_start().starts_with("//");
    let lines = text.lines().enumerate().map(|(index, line)| (index + 1, line, line.chars().count()));
    lines
        .filter(|(_, line, columns)| comment(line) && *columns > COLUMNS)
        .map(|(number, _, columns)| {
            format!("{}:{number}: a comment of {columns} columns; there are {COLUMNS}", path.display())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wide_comments_are_found_and_wide_code_is_not() {
        let fits = format!("    //! {}", "ä".repeat(COLUMNS - 8));
        let text = format!("{fits}\n{fits}x\nlet x = \"{}\"; // short\n", "y".repeat(COLUMNS));
        assert_eq!(wide(Path::new("a.rs"), &text), ["a.rs:2: a comment of 129 columns; there are 128"]);
    }
}
