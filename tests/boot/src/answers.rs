//! What dom0 answers in JSON: to commands typed at its prompt, and to those it was booted with.

use crate::{Machine, Outcome};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::thread;
use std::time::{Duration, Instant};
use xtask::machine::ANSWER;

/// How long an answer may take while other machines run.
const ANSWERED: Duration = Duration::from_secs(30);
/// Ctrl-]: from a guest's console to dom0.
pub const LEAVE: &[u8] = b"\x1d";

impl Machine {
    /// Types a command at dom0's prompt, and returns its answer. A guest's console is left for it.
    ///
    /// # Errors
    /// No answer within half a minute.
    pub fn ask(&mut self, command: &str) -> Result<Value> {
        self.type_keys(LEAVE)?;
        self.type_line(&format!("{command} -j"))?;
        let until = Instant::now() + ANSWERED;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let line = self.expect("\n", left).with_context(|| format!("no answer to `{command}`"))?;
            if let Some(answer) = parse(&line) {
                return Ok(answer);
            }
        }
    }

    /// An error unless dom0 gives exactly this answer to a command.
    ///
    /// # Errors
    /// Says what it answers instead.
    pub fn require_answer(&mut self, command: &str, wanted: &Value) -> Result<()> {
        let answer = self.ask(command)?;
        if answer != *wanted {
            bail!("`{command}` answers {answer}, not {wanted}");
        }
        Ok(())
    }

    /// Repeats a command until its answer is as wanted, and returns that answer.
    ///
    /// # Errors
    /// There is none within half a minute; the last answer is told.
    pub fn ask_until(&mut self, command: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let until = Instant::now() + ANSWERED;
        loop {
            let answer = self.ask(command)?;
            if wanted(&answer) {
                return Ok(answer);
            }
            if Instant::now() >= until {
                bail!("`{command}` still answers {answer}");
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Outcome {
    /// The answers to the commands that dom0 was booted with.
    ///
    /// # Errors
    /// One of them is not JSON.
    pub fn answers(&self) -> Result<Vec<Value>> {
        let lines = self.console.lines().filter_map(|line| line.strip_prefix(ANSWER));
        lines.map(|line| parse(line).with_context(|| format!("no JSON: {line}"))).collect()
    }
}

/// The answer to a command that was carried out and has nothing to tell.
#[must_use]
pub fn done(verb: &str, name: &str) -> Value {
    json!({ "done": verb, "name": name })
}

/// The answer to a command that was refused.
#[must_use]
pub fn refused(why: &str) -> Value {
    json!({ "error": why })
}

/// All answers among the lines of a text.
#[must_use]
pub fn among(text: &str) -> Vec<Value> {
    text.lines().filter_map(parse).collect()
}

/// The domain of this name in an answer to `list`.
///
/// # Errors
/// It is not in the list.
pub fn named<'a>(list: &'a Value, name: &str) -> Result<&'a Value> {
    let found = list.as_array().into_iter().flatten().find(|domain| domain["name"] == name);
    found.with_context(|| format!("no {name} in {list}"))
}

/// The names of the domains in an answer to `list`.
#[must_use]
pub fn names(list: &Value) -> Vec<&str> {
    list.as_array().into_iter().flatten().map(|domain| domain["name"].as_str().unwrap_or("?")).collect()
}

/// A number of an answer.
///
/// # Errors
/// There is no such field, or it is not a number.
pub fn number(answer: &Value, field: &str) -> Result<u64> {
    answer[field].as_u64().with_context(|| format!("no {field} in {answer}"))
}

/// The answer that a line is: an object or an array.
fn parse(line: &str) -> Option<Value> {
    let value: Value = serde_json::from_str(line.trim_end()).ok()?;
    (value.is_object() || value.is_array()).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_whole_lines_of_json() {
        let text = "dom0> domid web -j\r\n{\"name\":\"web\",\"domid\":3}\r\n3\n[console of web]\nweb| {}\n[]\r\n";
        assert_eq!(among(text), [json!({"name": "web", "domid": 3}), json!([])]);
    }

    #[test]
    fn only_marked_lines_answer_the_commands_of_a_bundle() {
        let outcome = |console: &str| Outcome { end: None, console: console.into(), log: "console.log".into() };
        let good = outcome("\u{1e}{\"done\":\"rename\"}\r\n{\"done\":\"pause\"}\n\u{1e}[]\r\n");
        assert_eq!(good.answers().unwrap(), [json!({"done": "rename"}), json!([])]);
        assert!(outcome("\u{1e}3\r\n").answers().is_err());
    }

    #[test]
    fn domains_are_found_by_name() {
        let list = json!([{"name": "dom0", "domid": 0}, {"name": "web", "domid": 3}]);
        assert_eq!(names(&list), ["dom0", "web"]);
        assert_eq!(number(named(&list, "web").unwrap(), "domid").unwrap(), 3);
        assert!(named(&list, "db").is_err() && number(&list[1], "name").is_err());
    }
}
