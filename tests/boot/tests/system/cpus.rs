//! The CPU models of the emulator: what a stock kernel, or a program of ours, does with a CPU depends on the features it
//! is shown, and many of those are switched by combinations that only certain models have.

use crate::stories::kernel_answers;
use anyhow::Result;
use boot::guests::{self, Run};
use libtest_mimic::Trial;
use std::path::PathBuf;
use std::time::Duration;
use xtask::qemu::Qemu;

/// Models from Intel and from AMD, old and new; one of the emulator's own, with few features, and the one with all that it
/// can do as if it were Intel's.
pub(crate) const MODELS: [&str; 13] = [
    "Nehalem",
    "Haswell",
    "Skylake-Client",
    "Skylake-Server",
    "Icelake-Server",
    "SapphireRapids",
    "GraniteRapids",
    "EPYC",
    "EPYC-Rome",
    "EPYC-Milan",
    "EPYC-Genoa",
    "qemu64",
    "max,vendor=GenuineIntel",
];

/// Those of every day, each with the stock kernel that boots on it: Intel's first with FSRM, which the emulator shows from
/// the fourth version of the model on, and one of AMD's.
pub(crate) const DAILY: [(&str, &str); 2] = [("Icelake-Server-v4", "6.1"), ("EPYC-Rome", "6.12")];

/// A stock kernel, on a model of every day.
pub(crate) fn daily(model: &'static str, kernel: &'static str) -> Trial {
    let title = title(model, kernel);
    crate::trial(title.clone(), move || answers_on(&title, model, kernel))
}

/// A stock kernel, on any of the models.
pub(crate) fn soak(model: &'static str, kernel: &'static str) -> Trial {
    let title = title(model, kernel);
    where_known(title.clone(), model, move || answers_on(&title, model, kernel))
}

/// The test guest at `path` that tries an instruction for each feature it is shown.
pub(crate) fn features(model: &'static str, path: PathBuf) -> Trial {
    where_known(format!("features_on_{model}"), model, move || {
        let tests = guests::tests(&path)?;
        tests.iter().try_for_each(|test| {
            let run = Run { test: test.as_deref(), cpu: Some(model), limit: Duration::from_secs(60), ..Run::default() };
            guests::run(&path, &run).map(drop)
        })
    })
}

/// A trial on a model, unless the emulator lacks it: that is printed.
fn where_known(title: String, model: &'static str, run: impl FnOnce() -> Result<()> + Send + 'static) -> Trial {
    crate::trial(title.clone(), move || {
        if is_known(model)? {
            return run();
        }
        println!("{title}: skipped, the emulator has no such model");
        Ok(())
    })
}

fn title(model: &str, kernel: &str) -> String {
    format!("stock_{kernel}_answers_on_{model}")
}

/// The shell of a stock kernel answers. Prints which features of the model were not tried, since the accelerator lacks them.
fn answers_on(title: &str, model: &str, kernel: &str) -> Result<()> {
    let lacking = kernel_answers(title, kernel, true, Some(model))?.lacking_features()?;
    if !lacking.is_empty() {
        println!("{title}: without {}", lacking.join(", "));
    }
    Ok(())
}

/// Whether the emulator has the model: old ones lack the newest.
fn is_known(model: &str) -> Result<bool> {
    let name = model.split(',').next().unwrap_or(model);
    Ok(Qemu::find(&boot::shell()?, None)?.cpu_models()?.iter().any(|known| known == name))
}
