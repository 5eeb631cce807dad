//! `cargo xtask test`: every suite of the project, with its time, and one line of totals at the end.

use crate::bench;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};
use xshell::{Shell, cmd};
use xtask::debian::{self, Recipe, User};
use xtask::{apt, build, ext4, firmware, grub, kernels, qemu, sysroot, xen};

/// The whole run should take no longer on two cores that have nothing else to do. One that does says so, and has not
/// failed: the machine may be busy.
const BUDGET: Duration = Duration::from_mins(25);
/// A suite that takes longer does not come to its end.
const LIMIT: Duration = Duration::from_hours(1);
/// The package with the system tests; its suites run last, on images of this profile.
const SYSTEM: &str = "boot";
const SYSTEM_PROFILE: &str = "checked";

/// Which suites to run.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Only suites of this package
    #[arg(short, long)]
    package: Option<String>,
    /// Only tests whose name contains this
    filter: Option<String>,
}

/// One test program.
pub(crate) struct Suite {
    /// What it is called: its package, or package and target.
    pub(crate) name: String,
    package: String,
    program: PathBuf,
    /// The folder of its package, where Cargo would start it.
    folder: PathBuf,
}

impl Suite {
    /// A command that runs it.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.current_dir(&self.folder).env("CARGO_MANIFEST_DIR", &self.folder);
        command
    }
}

/// Passed and failed tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
}

/// Runs the suites and prints the totals; they are the last line, whatever happens.
pub(crate) fn test(sh: &Shell, options: &Options) -> Result<ExitCode> {
    let start = Instant::now();
    let mut total = Tally::default();
    let mut outcome = run_all(sh, options, &mut total);
    if outcome.is_ok() && total.passed + total.failed == 0 {
        outcome = Err(anyhow::anyhow!("no test was selected"));
    }
    if let Err(error) = &outcome {
        eprintln!("error: {error:#}");
        // What could not be built or started is a failure too.
        total.failed += 1;
    }
    println!("{}", spent(start.elapsed()));
    println!("{} passed, {} failed", total.passed, total.failed);
    Ok(if total.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// How long a run took, of how much it should.
fn spent(time: Duration) -> String {
    let [minutes, budget] = [time, BUDGET].map(|time| time.as_secs_f64() / 60.0);
    let over = if time > BUDGET { ": too long, unless the machine is busy" } else { "" };
    format!("== {minutes:.1} minutes of {budget:.0}{over}")
}

fn run_all(sh: &Shell, options: &Options, total: &mut Tally) -> Result<()> {
    let mut suites = suites(sh, options.package.as_deref())?;
    suites.sort_by_key(|suite| suite.package == SYSTEM);
    let mut prepared = false;
    for suite in &suites {
        if suite.package == SYSTEM && !prepared {
            prepare_system_tests(sh)?;
            prepared = true;
        }
        let mut command = suite.command();
        command.args(&options.filter);
        run_suite(&suite.name, command, Instant::now() + LIMIT, total, &mut |_| {})?;
    }
    if options.package.is_none() && options.filter.is_none() {
        let mut command = Command::new("cargo");
        command.current_dir(sh.current_dir()).args(["test", "--quiet", "--doc", "--workspace"]);
        command.args(build::IMAGES.into_iter().flat_map(|name| ["--exclude", name]));
        run_suite("examples in the documentation", command, Instant::now() + LIMIT, total, &mut |_| {})?;
        measured(sh, total)?;
    }
    Ok(())
}

/// The bars of the quick benches: a test each.
fn measured(sh: &Shell, total: &mut Tally) -> Result<()> {
    let start = Instant::now();
    let mut tally = Tally::default();
    for (bar, met) in bench::bars(sh)? {
        println!("{bar}: {}", if met { "met" } else { "MISSED" });
        tally.passed += u64::from(met);
        tally.failed += u64::from(!met);
    }
    let seconds = start.elapsed().as_secs_f64();
    println!("bench: {} passed, {} failed in {seconds:.1} s", tally.passed, tally.failed);
    *total = Tally { passed: total.passed + tally.passed, failed: total.failed + tally.failed };
    Ok(())
}

/// Images, emulator, kernel, initramfs, ssh, GRUB, firmware and Debian: nothing that a system test needs is built or fetched
/// while it runs.
pub(crate) fn prepare_system_tests(sh: &Shell) -> Result<()> {
    let start = Instant::now();
    sysroot::ensure_target(sh)?;
    build::images(sh, SYSTEM_PROFILE)?;
    qemu::Qemu::find(sh, None)?;
    for name in kernels::DAILY {
        kernels::ramdisk_for_devices(sh, name)?;
        kernels::ramdisk_with_ssh(sh, name)?;
    }
    kernels::ramdisk(sh)?;
    xen::hypervisor(sh)?;
    grub::Tools::find(sh)?;
    firmware::uefi(sh)?;
    ext4::Tools::find(sh)?;
    match User::find() {
        Ok(_) => {
            debian::cached(sh, &Recipe::default())?;
            apt::mirror(sh, debian::Suite::Bookworm.name(), &[apt::TEST_PACKAGE])?;
        }
        Err(why) => println!("== left out: the test with Debian: {why:#}"),
    }
    println!("== images, emulator and kernels ready in {:.1} s", start.elapsed().as_secs_f64());
    Ok(())
}

/// Builds every test program of the host and lists them.
pub(crate) fn suites(sh: &Shell, only: Option<&str>) -> Result<Vec<Suite>> {
    let start = Instant::now();
    let mut which = vec!["--workspace"];
    which.extend(build::IMAGES.into_iter().flat_map(|name| ["--exclude", name]));
    let which = only.map_or(which, |package| vec!["--package", package]);
    let messages = cmd!(sh, "cargo test --quiet --no-run {which...} --message-format json-render-diagnostics");
    let messages = messages.quiet().read().context("the tests do not build")?;
    println!("== tests built in {:.1} s", start.elapsed().as_secs_f64());
    messages.lines().filter_map(suite).collect()
}

/// The test program that one of Cargo's messages tells of, if it does.
fn suite(message: &str) -> Option<Result<Suite>> {
    let message: Value = match serde_json::from_str(message) {
        Ok(message) => message,
        Err(error) => return Some(Err(error).with_context(|| format!("cargo says `{message}`"))),
    };
    let text = |path| message.pointer(path).and_then(Value::as_str);
    if text("/reason")? != "compiler-artifact" || !message.pointer("/profile/test")?.as_bool()? {
        return None;
    }
    let program = text("/executable")?;
    let describe = || {
        let folder = Path::new(text("/manifest_path")?).parent()?.to_owned();
        // The identity ends in `path/to/folder#version` or `path/to/folder#name@version`.
        let (path, tail) = text("/package_id")?.rsplit_once('#')?;
        let package = tail.split_once('@').map_or_else(|| path.rsplit('/').next(), |(name, _)| Some(name))?;
        let target = text("/target/name")?;
        let name = if target.replace('_', "-") == package { package.to_owned() } else { format!("{package}/{target}") };
        Some(Suite { name, package: package.to_owned(), program: program.into(), folder })
    };
    Some(describe().with_context(|| format!("cargo's message about {program} is not understood")))
}

/// A suite that does not outlive us.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs one suite, shows what it prints and tells `hear`, and adds its tests to `total`.
pub(crate) fn run_suite(
    name: &str,
    mut command: Command,
    deadline: Instant,
    total: &mut Tally,
    hear: &mut dyn FnMut(&str),
) -> Result<()> {
    let start = Instant::now();
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
    let mut suite = Running(child.with_context(|| format!("the suite {name} does not start"))?);
    let output = BufReader::new(suite.0.stdout.take().context("a suite without output")?);
    let (send, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in output.split(b'\n').map_while(Result::ok) {
            if send.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                break;
            }
        }
    });
    let (mut tally, mut complete) = (Tally::default(), false);
    loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                if let Some(result) = result_line(&line) {
                    tally.passed += result.passed;
                    tally.failed += result.failed;
                    complete = true;
                }
                if !is_noise(&line) {
                    println!("{line}");
                    hear(&line);
                }
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                *total = Tally { passed: total.passed + tally.passed, failed: total.failed + tally.failed };
                bail!("the time was up during the suite {name}, after {} s of it", start.elapsed().as_secs());
            }
        }
    }
    let status = suite.0.wait()?;
    // A suite that panics, aborts or says nothing at its end has failed, whatever it counted before.
    if (!status.success() && tally.failed == 0) || !complete {
        println!("the suite {name} ended without a result ({status})");
        tally.failed += 1;
    }
    // A package without tests of its own has an empty suite.
    if tally != Tally::default() {
        let seconds = start.elapsed().as_secs_f64();
        println!("{name}: {} passed, {} failed in {seconds:.1} s", tally.passed, tally.failed);
    }
    *total = Tally { passed: total.passed + tally.passed, failed: total.failed + tally.failed };
    Ok(())
}

/// What a suite says at its end: `test result: ok. 3 passed; 1 failed; ...`.
fn result_line(line: &str) -> Option<Tally> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let count = |what: &str| {
        let part = counts.split("; ").find_map(|part| part.strip_suffix(what))?;
        part.trim().parse().ok()
    };
    Some(Tally { passed: count(" passed")?, failed: count(" failed")? })
}

/// Lines that say nothing when all is well.
fn is_noise(line: &str) -> bool {
    line.is_empty()
        || (line.starts_with("test ") && (line.ends_with(" ... ok") || line.starts_with("test result: ok")))
        || (line.starts_with("running ") && (line.ends_with(" tests") || line.ends_with(" test")))
        || line.starts_with("all doctests ran in ")
        || line.bytes().all(|byte| byte == b'.')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(script: &str) -> Tally {
        let mut total = Tally::default();
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        run_suite("script", command, Instant::now() + Duration::from_secs(60), &mut total, &mut |_| {}).unwrap();
        total
    }

    #[test]
    fn results_of_a_suite_are_summed() {
        let good = "echo 'test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0s'";
        assert_eq!(tally(&format!("{good}; {good}")), Tally { passed: 6, failed: 0 });
        let bad = "echo 'test result: FAILED. 3 passed; 2 failed; 0 ignored'; exit 101";
        assert_eq!(tally(bad), Tally { passed: 3, failed: 2 });
    }

    #[test]
    fn a_suite_that_dies_or_says_nothing_has_failed() {
        assert_eq!(tally("kill -9 $$"), Tally { passed: 0, failed: 1 });
        assert_eq!(tally("exit 0"), Tally { passed: 0, failed: 1 });
        assert_eq!(tally("echo 'test result: ok. 3 passed; 0 failed'; exit 1"), Tally { passed: 3, failed: 1 });
    }

    #[test]
    fn a_run_that_is_late_is_told_and_has_not_failed() {
        assert_eq!(spent(Duration::from_secs(24 * 60 + 30)), "== 24.5 minutes of 25");
        assert_eq!(spent(Duration::from_mins(27)), "== 27.0 minutes of 25: too long, unless the machine is busy");
        // All of a run's time may be one suite's, on a machine that is half as fast.
        assert!(LIMIT >= 2 * BUDGET);
    }

    #[test]
    fn a_suite_without_an_end_is_a_failure() {
        let mut command = Command::new("sleep");
        command.arg("60");
        let start = Instant::now();
        let deadline = start + Duration::from_millis(50);
        assert!(run_suite("sleeper", command, deadline, &mut Tally::default(), &mut |_| {}).is_err());
        assert!(start.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn cargo_tells_of_test_programs() {
        let message = r#"{"reason":"compiler-artifact","package_id":"path+file:///x/hypervisor/core#hv-core@0.1.0","manifest_path":"/x/hypervisor/core/Cargo.toml","target":{"kind":["lib"],"crate_types":["lib"],"name":"hv_core","src_path":"/x/lib.rs"},"profile":{"opt_level":"1","test":true},"features":[],"filenames":[],"executable":"/t/hv_core-1","fresh":true}"#;
        let found = suite(message).unwrap().unwrap();
        assert_eq!((found.name.as_str(), found.package.as_str()), ("hv-core", "hv-core"));
        assert_eq!(found.folder, PathBuf::from("/x/hypervisor/core"));
        assert_eq!(found.program, PathBuf::from("/t/hv_core-1"));
        assert!(suite(&message.replace("\"test\":true", "\"test\":false")).is_none());
        assert!(suite(&message.replace("\"/t/hv_core-1\"", "null")).is_none());
        assert!(suite(&message.replace("manifest_path", "path")).unwrap().is_err());
        assert!(suite("{").unwrap().is_err());
    }
}
