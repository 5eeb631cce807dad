//! `cargo xtask soak`: the long forms of tests that can be made as long as one likes, with seeds nobody has tried, and a
//! dated record of what they counted.

use crate::test::{self, Suite, Tally};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use xshell::{Shell, cmd};
use xtask::{build, kernels};

/// How long, and which.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// How many times longer than in `cargo xtask test` the random suites are
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(2..=10_000))]
    times: u32,
    /// Where the seeds begin, to repeat a soak [default: by the clock]
    #[arg(long, value_name = "N")]
    seed: Option<u32>,
    /// End the soak, as a failure, after this many minutes
    #[arg(long, value_name = "MINUTES", default_value_t = 180)]
    limit: u64,
    /// Where the record is written [default: soak-DATE.json in Cargo's target folder]
    #[arg(long, value_name = "PATH")]
    record: Option<PathBuf>,
    /// Only suites whose name contains this: sim/random, sim/hostile, store/model, boot/system
    filter: Option<String>,
}

/// A test that can be made longer.
struct Form {
    package: &'static str,
    suite: &'static str,
    /// The one test of the suite; all that a soak has, if there is none.
    test: Option<&'static str>,
    /// The variable that says how long it is, and its value in `cargo xtask test`; `None` for a suite that is not made longer.
    length: Option<(&'static str, u64)>,
    /// The variable with the seed.
    seed: Option<&'static str>,
    /// A variable that makes it another suite than that of `cargo xtask test`, and its value.
    with: Option<(&'static str, &'static str)>,
}

const FORMS: &[Form] = &[
    Form {
        package: "sim",
        suite: "sim/random",
        test: Some("random_guests_never_break_a_promise"),
        length: Some(("SIM_CALLS", 2_000_000)),
        seed: Some("SIM_SEED"),
        with: None,
    },
    Form {
        package: "sim",
        suite: "sim/hostile",
        test: Some("hostile_guests_never_break_a_promise"),
        length: Some(("STEPS", 800_000)),
        seed: Some("SEED"),
        with: None,
    },
    Form {
        package: "store",
        suite: "store/model",
        test: Some("the_store_agrees_with_its_model"),
        length: Some(("STEPS", 60_000)),
        seed: Some("SEED"),
        with: None,
    },
    // Its guests draw their seeds themselves and print them.
    Form { package: "boot", suite: "boot/system", test: None, length: Some(("TENON_SOAK", 1)), seed: None, with: None },
    // Every story and every test guest without the hypervisor's fast paths.
    Form {
        package: "boot",
        suite: "boot/system",
        test: None,
        length: None,
        seed: None,
        with: Some(("TENON_OPTIONS", "lean=off")),
    },
];

/// Runs the long forms, one after another, also after one has failed. The last line has the totals.
pub(crate) fn soak(sh: &Shell, options: &Options) -> Result<ExitCode> {
    let wanted = |form: &&Form| options.filter.as_ref().is_none_or(|filter| form.suite.contains(&**filter));
    let forms: Vec<&Form> = FORMS.iter().filter(wanted).collect();
    ensure!(!forms.is_empty(), "no suite of a soak is called that; there are: {}", names().join(", "));
    let date = cmd!(sh, "date -u +%Y-%m-%dT%H-%M-%SZ").quiet().read()?;
    let record = match &options.record {
        Some(record) => record.clone(),
        None => build::target_dir(sh)?.join(format!("soak-{date}.json")),
    };
    // A record that cannot be written is no reason to find out hours later.
    fs::write(&record, "").with_context(|| format!("cannot write {}", record.display()))?;
    let clock = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_secs());
    let seed = options.seed.map_or_else(clock, u64::from);
    let deadline = Instant::now() + Duration::from_secs(options.limit.saturating_mul(60));
    let (mut total, mut results) = (Tally::default(), Vec::new());
    for form in forms {
        results.push(run(sh, form, options.times, seed, deadline, &mut total));
    }
    let commit = cmd!(sh, "git describe --always --dirty --abbrev=12").quiet().ignore_stderr().read();
    let text = json!({
        "date": date,
        "commit": commit.unwrap_or_else(|_| "unknown".into()),
        "compiler": cmd!(sh, "rustc --version").quiet().read()?,
        "times": options.times,
        "passed": total.passed,
        "failed": total.failed,
        "suites": results,
    });
    fs::write(&record, format!("{text:#}\n")).with_context(|| format!("cannot write {}", record.display()))?;
    eprintln!("recorded in {}", record.display());
    println!("{} passed, {} failed", total.passed, total.failed);
    Ok(if total.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn names() -> Vec<&'static str> {
    FORMS.iter().map(|form| form.suite).collect()
}

/// Runs one of them and gives what is recorded of it. What cannot be started has failed.
fn run(sh: &Shell, form: &Form, times: u32, seed: u64, deadline: Instant, total: &mut Tally) -> Value {
    let (start, mut tally, mut said) = (Instant::now(), Tally::default(), Vec::new());
    let long = form.length.map(|(name, length)| (name, (length * u64::from(times)).to_string()));
    let seed = form.seed.map(|name| (name, seed.to_string()));
    let with = form.with.map(|(name, value)| (name, value.to_owned()));
    let variables: Vec<(&str, String)> = long.into_iter().chain(seed).chain(with).collect();
    let words: Vec<String> = variables.iter().map(|(name, value)| format!("{name}={value}")).collect();
    println!("== {} with {}", form.suite, words.join(" "));
    let mut attempt = || -> Result<()> {
        let suite = find(sh, form)?;
        let mut command = suite.command();
        command.envs(variables.iter().map(|(name, value)| (name, value)));
        match form.test {
            Some(test) => command.args([test, "--exact", "--show-output"]),
            None => &mut command,
        };
        test::run_suite(&suite.name, command, deadline, &mut tally, &mut |line| said.push(line.to_owned()))?;
        ensure!(tally.passed + tally.failed > 0, "the suite {} has no such test", form.suite);
        Ok(())
    };
    if let Err(error) = attempt() {
        eprintln!("error: {error:#}");
        said.push(format!("error: {error:#}"));
        tally.failed += 1;
    }
    *total = Tally { passed: total.passed + tally.passed, failed: total.failed + tally.failed };
    json!({
        "suite": form.suite,
        "with": words,
        "passed": tally.passed,
        "failed": tally.failed,
        "seconds": start.elapsed().as_secs(),
        "said": said,
    })
}

/// Builds the suite, and what it needs.
fn find(sh: &Shell, form: &Form) -> Result<Suite> {
    let suites = test::suites(sh, Some(form.package))?;
    let Some(suite) = suites.into_iter().find(|suite| suite.name == form.suite) else {
        bail!("there is no suite {}", form.suite);
    };
    if form.test.is_none() {
        test::prepare_system_tests(sh)?;
        for name in kernels::all_names() {
            kernels::named(sh, name)?;
        }
    }
    Ok(suite)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tests and variables named here exist under these names.
    #[test]
    fn every_long_form_is_there() {
        for form in FORMS {
            let (package, target) = form.suite.split_once('/').unwrap();
            let folder = if package == "store" { "dom0" } else { "tests" };
            let file = xtask::root().join(folder).join(package).join(format!("tests/{target}.rs"));
            let text = fs::read_to_string(&file).unwrap();
            assert!(form.test.is_none_or(|test| text.contains(&format!("fn {test}()"))), "{}", file.display());
            let length = form.length.is_none_or(|(name, _)| text.contains(&format!("\"{name}\"")));
            assert!(form.test.is_none() || length, "{}", file.display());
        }
    }
}
