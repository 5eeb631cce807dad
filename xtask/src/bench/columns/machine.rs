//! A machine from its start to its end: what is typed, printed and counted.

use super::Typed;
use crate::bench::counts::Record;
use anyhow::{Context, Result, bail};
use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;
use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::NamedTempFile;
use xtask::machine::End;

/// No run takes longer, whatever the machine it runs on.
const LIMIT: Duration = Duration::from_mins(20);

/// What a machine did.
pub(in crate::bench) struct Run {
    /// What was counted.
    pub(in crate::bench) record: Record,
    pub(in crate::bench) printed: Printed,
}

/// What a machine printed.
#[derive(Clone, Default)]
pub(in crate::bench) struct Printed {
    text: Vec<u8>,
    /// How long the text was at each moment since the start at which some of it came.
    moments: Vec<(usize, Duration)>,
}

impl Printed {
    /// The text.
    pub(in crate::bench) fn text(&self) -> String {
        String::from_utf8_lossy(&self.text).into_owned()
    }

    /// When the end of a piece of text came, the first time; since the start of the machine.
    pub(in crate::bench) fn moment(&self, piece: &str) -> Option<Duration> {
        let end = self.text.windows(piece.len()).position(|part| part == piece.as_bytes())? + piece.len();
        self.moments.iter().find(|(length, _)| *length >= end).map(|(_, moment)| *moment)
    }
}

/// A machine before its start.
pub(super) struct Machine {
    pub(super) command: Command,
    pub(super) counts: NamedTempFile,
    /// The machine is stopped, which is then a good end, when this was printed.
    pub(super) until: Option<String>,
}

impl Machine {
    /// Runs to the end, which the machine must find by itself; `wants` must have been printed.
    pub(super) fn run(mut self, name: &str, wants: &str, typed: &[Typed<'_>], logs: Option<&Path>) -> Result<Run> {
        let start = Instant::now();
        // What QEMU complains about is told only if it fails.
        let complaints = NamedTempFile::new()?;
        self.command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(complaints.reopen()?);
        let mut child = Running(self.command.spawn().context("cannot start QEMU")?);
        let mut input = child.0.stdin.take().context("QEMU has no input")?;
        let output = child.0.stdout.take().context("QEMU has no output")?;
        let console = Arc::new(Mutex::new(Printed::default()));
        let reader = thread::spawn({
            let console = Arc::clone(&console);
            move || collect(output, &console, start)
        });
        let printed = || console.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut typed = typed.iter();
        let mut next = typed.next();
        let mut seen = 0;
        let status = loop {
            if let Some(status) = child.0.try_wait()? {
                break Some(status);
            }
            if start.elapsed() > LIMIT {
                break None;
            }
            if let Some((after, words)) = next {
                let text = printed().text;
                if let Some(at) = text[seen..].windows(after.len()).position(|part| part == after.as_bytes()) {
                    seen += at + after.len();
                    input.write_all(words.as_bytes())?;
                    next = typed.next();
                }
            }
            let stops = |text: &String| printed().text.windows(text.len()).any(|part| part == text.as_bytes());
            if self.until.take_if(|text| stops(text)).is_some() {
                // QEMU ends in good order then, and writes the counts.
                signal::kill(Pid::from_raw(child.0.id().try_into()?), Signal::SIGTERM)?;
            }
            thread::sleep(Duration::from_millis(50));
        };
        drop(child);
        // The reader ends with its pipe.
        let _ = reader.join();
        let printed = printed();
        let console = printed.text();
        let counts = fs::read_to_string(self.counts.path()).context("the plugin wrote nothing")?;
        if let Some(folder) = logs {
            fs::write(folder.join(format!("{name}.console")), &console)?;
            fs::write(folder.join(format!("{name}.counts")), &counts)?;
        }
        let end = status.map(End::of);
        if !matches!(end, Some(End::Success | End::Reset)) || !console.contains(wants) {
            let lines: Vec<&str> = console.lines().collect();
            eprintln!("{}", lines[lines.len().saturating_sub(30)..].join("\n"));
            eprint!("{}", fs::read_to_string(complaints.path()).unwrap_or_default());
            let end = end.map_or_else(|| format!("no end after {} s", LIMIT.as_secs()), End::explanation);
            bail!("{name}: {end}; the console above should have had `{wants}`");
        }
        eprintln!("{name}: {:.0} s", start.elapsed().as_secs_f64());
        Ok(Run { record: Record::parse(&counts).with_context(|| name.to_owned())?, printed })
    }
}

fn collect(mut from: impl Read, to: &Mutex<Printed>, start: Instant) {
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        let mut printed = to.lock().unwrap_or_else(PoisonError::into_inner);
        printed.text.extend_from_slice(&buffer[..count]);
        let length = printed.text.len();
        printed.moments.push((length, start.elapsed()));
    }
}

/// A machine that does not outlive us.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_of_text_has_come_when_its_end_has() {
        let moments = [3, 6, 9].map(|length| (length, Duration::from_secs(length as u64))).into();
        let printed = Printed { text: b"abcdefgab".into(), moments };
        assert_eq!(printed.moment("abc"), Some(Duration::from_secs(3)));
        assert_eq!(printed.moment("cd"), Some(Duration::from_secs(6)));
        assert_eq!(printed.moment("gab"), Some(Duration::from_secs(9)));
        assert_eq!(printed.moment("x"), None);
    }
}
