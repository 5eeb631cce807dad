//! YAML with the line of every value: what the files of a seed are written in.

use saphyr::{MarkedYaml, Scalar, ScalarStyle, YamlData, YamlLoader};
use saphyr_parser::Parser;
use std::fmt;

/// What is wrong with a file, and in which of its lines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wrong {
    /// Counted from 1.
    pub(crate) line: usize,
    pub(crate) why: String,
}

impl Wrong {
    pub(crate) fn new(line: usize, why: impl Into<String>) -> Self {
        Self { line, why: why.into() }
    }
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.line, self.why)
    }
}

/// A value, and the line where it begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) line: usize,
    pub(crate) value: Value,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    /// A text as it is written. `plain` if it stands without quotes, and may mean a number, a truth value or nothing.
    Text {
        text: String,
        plain: bool,
    },
    List(Vec<Node>),
    Map(Vec<Entry>),
}

/// A key of a map, and its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) key: String,
    pub(crate) line: usize,
    pub(crate) node: Node,
}

/// Reads the one document of a text; an empty one is `None`.
///
/// # Errors
/// The text is no YAML, has several documents, or has keys that are no texts.
pub(crate) fn read(text: &str) -> Result<Option<Node>, Wrong> {
    let mut loader = YamlLoader::<MarkedYaml<'_>>::default();
    // Texts are kept as they are written: a mode `0644` is no decimal number.
    loader.early_parse(false);
    let wrong = |why: &saphyr::ScanError| Wrong::new(why.marker().line(), format!("no YAML: {}", why.info()));
    Parser::new_from_str(text).load(&mut loader, true).map_err(|why| wrong(&why))?;
    if let Some(why) = loader.error() {
        return Err(wrong(why));
    }
    let documents = loader.into_documents();
    match documents.as_slice() {
        [] => Ok(None),
        [document] => convert(document).map(|node| Some(node).filter(|node| !node.is_nothing())),
        [_, second, ..] => Err(Wrong::new(second.span.start.line(), "a second document")),
    }
}

fn convert(yaml: &MarkedYaml<'_>) -> Result<Node, Wrong> {
    let line = yaml.span.start.line();
    let value = match &yaml.data {
        YamlData::Representation(text, style, _) => {
            Value::Text { text: text.to_string(), plain: *style == ScalarStyle::Plain }
        }
        YamlData::Value(Scalar::Null) => Value::Text { text: String::new(), plain: true },
        YamlData::Sequence(items) => Value::List(items.iter().map(convert).collect::<Result<_, _>>()?),
        YamlData::Mapping(entries) => Value::Map(
            entries
                .iter()
                .map(|(key, value)| {
                    let line = key.span.start.line();
                    match convert(key)?.value {
                        Value::Text { text, .. } => Ok(Entry { key: text, line, node: convert(value)? }),
                        _ => Err(Wrong::new(line, "a key that is no text")),
                    }
                })
                .collect::<Result<_, _>>()?,
        ),
        YamlData::Tagged(_, inner) => return convert(inner),
        _ => return Err(Wrong::new(line, "a value that cannot be read")),
    };
    Ok(Node { line, value })
}

impl Node {
    /// Whether this is no value: `null`, `~`, or nothing at all.
    pub(crate) fn is_nothing(&self) -> bool {
        matches!(&self.value, Value::Text { text, plain: true } if ["", "~", "null", "Null", "NULL"].contains(&&**text))
    }

    /// The text; `key` is told if it is none.
    pub(crate) fn text(&self, key: &str) -> Result<&str, Wrong> {
        match &self.value {
            Value::Text { text, .. } if text.contains('\0') => {
                Err(Wrong::new(self.line, format!("{key}: a NUL in a text")))
            }
            Value::Text { text, .. } if !self.is_nothing() => Ok(text),
            _ => Err(Wrong::new(self.line, format!("{key}: must be a text"))),
        }
    }

    /// The text, which must be one line.
    pub(crate) fn line_of_text(&self, key: &str) -> Result<&str, Wrong> {
        let text = self.text(key)?;
        match text.chars().any(char::is_control) {
            true => Err(Wrong::new(self.line, format!("{key}: must be one line"))),
            false => Ok(text),
        }
    }

    /// A truth value, as YAML 1.1 writes it.
    pub(crate) fn flag(&self, key: &str) -> Result<bool, Wrong> {
        let text = match &self.value {
            Value::Text { text, .. } => text.to_ascii_lowercase(),
            _ => String::new(),
        };
        match &*text {
            "true" | "yes" | "on" => Ok(true),
            "false" | "no" | "off" => Ok(false),
            _ => Err(Wrong::new(self.line, format!("{key}: must be true or false"))),
        }
    }

    pub(crate) fn list(&self, key: &str) -> Result<&[Self], Wrong> {
        match &self.value {
            Value::List(items) => Ok(items),
            _ => Err(Wrong::new(self.line, format!("{key}: must be a list"))),
        }
    }

    pub(crate) fn map(&self, key: &str) -> Result<&[Entry], Wrong> {
        match &self.value {
            Value::Map(entries) => Ok(entries),
            _ => Err(Wrong::new(self.line, format!("{key}: must be a map of keys and values"))),
        }
    }

    /// The lines of text of a list.
    pub(crate) fn lines(&self, key: &str) -> Result<Vec<String>, Wrong> {
        self.list(key)?.iter().map(|item| item.line_of_text(key).map(str::to_owned)).collect()
    }

    /// The words of a list, or of one text with commas.
    pub(crate) fn words(&self, key: &str) -> Result<Vec<String>, Wrong> {
        match &self.value {
            Value::List(_) => self.lines(key),
            _ => {
                let words = self.line_of_text(key)?.split(',').map(|word| word.trim().to_owned());
                Ok(words.filter(|word| !word.is_empty()).collect())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_have_their_lines() {
        let node = read("# x\na: 0644\nb:\n  - 'yes'\n  - {c: null}\n").unwrap().unwrap();
        let [a, b] = node.map("").unwrap() else { panic!("{node:?}") };
        assert_eq!((&*a.key, a.line, a.node.text("a").unwrap()), ("a", 2, "0644"));
        let [yes, map] = b.node.list("b").unwrap() else { panic!("{b:?}") };
        assert_eq!((yes.line, yes.flag("b")), (4, Ok(true)));
        let [c] = map.map("b").unwrap() else { panic!("{map:?}") };
        assert!(c.node.is_nothing() && c.line == 5);
        assert_eq!(read(""), Ok(None));
        assert_eq!(read("# nothing\n"), Ok(None));
    }

    #[test]
    fn what_is_no_yaml_is_told_with_its_line() {
        for (text, line, why) in [
            ("a: b\nc: [d\n", 3, "no YAML: "),
            ("a: b\nc:\n\t- d\n", 3, "no YAML: "),
            ("a: b\na: c\n", 2, "no YAML: "),
            ("a: b\n---\nc: d\n", 3, "a second document"),
            ("? [a]\n: b\n", 1, "a key that is no text"),
        ] {
            let wrong = read(text).unwrap_err();
            assert!(wrong.line == line && wrong.why.starts_with(why) && !wrong.why.contains('\n'), "{text}: {wrong}");
        }
    }

    #[test]
    fn aliases_are_values_and_bombs_are_refused() {
        let node = read("a: &x [1]\nb: *x\n").unwrap().unwrap();
        assert_eq!(node.map("").unwrap()[1].node.lines("b").unwrap(), ["1"]);
        let bomb: String = (1..20).fold("a0: &a0 [x]\n".into(), |text, n| {
            let last = n - 1;
            format!(
                "{text}a{n}: &a{n} [*a{last}, *a{last}, *a{last}, *a{last}, *a{last}, *a{last}, *a{last}, *a{last}]\n"
            )
        });
        assert!(read(&bomb).is_err());
    }
}
