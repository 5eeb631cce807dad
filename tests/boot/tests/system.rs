//! Whole-machine tests: the tests inside the test guests, and the stories below.

#![forbid(unsafe_code)]

use anyhow::Result;
use boot::{Machine, Setup, guests};
use libtest_mimic::{Arguments, Failed, Trial};
use std::process::ExitCode;
use std::time::Duration;
use xtask::bundle::{Bundle, Guest};
use xtask::{build, kernels};

/// A story, and what it is called.
type Story = (&'static str, fn() -> Result<()>);

/// Every story that starts at dom0.
const STORIES: &[Story] = &[("stock_kernel_has_a_shell_and_powers_off", stock_kernel_has_a_shell_and_powers_off)];

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // Two machines at a time: more are slower on the machines this is developed on, and no surer.
    arguments.test_threads = Some(arguments.test_threads.unwrap_or(2).min(2));
    match trials() {
        Ok(trials) => libtest_mimic::run(&arguments, trials).exit_code(),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn trials() -> Result<Vec<Trial>> {
    let sh = boot::shell()?;
    let images = build::bare_metal_packages(&sh);
    let mut trials = Vec::new();
    if ["hypervisor", "guests"].iter().all(|name| images.contains(name)) {
        for name in build::test_guests(&sh)? {
            let path = build::image(&boot::images()?, &name)?;
            for test in guests::tests(&path)? {
                let path = path.clone();
                let title = test.as_ref().map_or_else(|| name.clone(), |test| format!("{name}::{test}"));
                trials.push(trial(title, move || guests::run(&path, test.as_deref())));
            }
        }
    }
    if ["hypervisor", "dom0"].iter().all(|name| images.contains(name)) {
        trials.extend(STORIES.iter().map(|(name, story)| trial((*name).to_owned(), story)));
    }
    Ok(trials)
}

fn trial(name: String, run: impl FnOnce() -> Result<()> + Send + 'static) -> Trial {
    Trial::test(name, move || run().map_err(|error| Failed::from(format!("{error:#}"))))
}

/// The kernel a distribution ships, unpatched, in a domain that dom0 builds: its shell answers on the console, and its
/// power-off ends the machine.
fn stock_kernel_has_a_shell_and_powers_off() -> Result<()> {
    let sh = boot::shell()?;
    let guest = Guest {
        name: "linux".into(),
        memory: 192,
        vcpus: 1,
        kernel: kernels::stock(&sh, kernels::DEFAULT)?.vmlinux,
        ramdisk: Some(kernels::ramdisk(&sh)?),
        extra: "console=hvc0".into(),
    };
    let dom0 = build::image(&boot::images()?, "dom0")?;
    let mut setup = Setup::new(Bundle::dom0(&dom0, "").guest(&guest));
    setup.memory = 1024;
    setup.limit = Duration::from_secs(240);
    let mut machine = Machine::boot("stock_kernel_has_a_shell_and_powers_off", &setup)?;
    machine.expect("tenon-guest: init reached", Duration::from_secs(180))?;
    machine.expect("tenon-guest# ", Duration::from_secs(30))?;
    // What is typed is echoed, so the answer must differ from the question.
    machine.type_line("echo the answer is $((6 * 7))")?;
    machine.expect("the answer is 42", Duration::from_secs(30))?;
    machine.type_line("poweroff -f")?;
    machine.finish()?.require_success()
}
