//! What is too long for every day: `cargo xtask soak`.

use crate::stories::{BOOT, SHELL, SOON, dom0, linux, md5, nonce};
use crate::verbs;
use anyhow::{Context, Result};
use boot::{Machine, Setup, guests};
use libtest_mimic::Trial;
use std::time::Duration;
use xtask::bundle::Guest;
use xtask::{build, kernels};

/// Rounds of the hostile guest in the usual suite, and about the seconds they take on a busy machine.
const ROUNDS: u32 = 20_000;
const SECONDS: u32 = 30;

/// The long forms: the hostile guest, each of its tests so many times longer; fifty kernels unpacked for guests that
/// come and go; and every stock kernel.
pub(crate) fn trials(times: u32) -> Result<Vec<Trial>> {
    let path = build::image(&boot::images()?, "fuzz")?;
    let mut trials = Vec::new();
    for test in guests::tests(&path)? {
        let name = test.clone().context("the hostile guest has tests with names")?;
        let path = path.clone();
        let (rounds, limit) = (ROUNDS.saturating_mul(times), SECONDS.saturating_mul(times));
        trials.push(crate::trial(format!("fuzz::{name}"), move || {
            let limit = Duration::from_secs(limit.into());
            guests::run_with(&path, test.as_deref(), &format!("rounds={rounds}"), limit)
        }));
    }
    let title = "hypervisor_and_dom0_are_small_after_fifty_rounds";
    trials.push(crate::trial(title.to_owned(), || verbs::small_after(50)));
    for name in kernels::names() {
        for form in ["ELF", "bzImage"] {
            let title = format!("stock_{name}_answers_from_its_shell_as_{form}");
            trials.push(crate::trial(title.clone(), move || kernel_answers(&title, name, form == "ELF")));
        }
    }
    Ok(trials)
}

/// A stock kernel, in either of its forms, has a shell that answers.
fn kernel_answers(title: &str, name: &str, elf: bool) -> Result<()> {
    let stock = kernels::stock(&boot::shell()?, name)?;
    let kernel = if elf { stock.vmlinux } else { stock.bzimage };
    let mut setup = Setup::new(dom0("")?.guest(&Guest { kernel, ..linux("linux", 256)? }));
    setup.memory = 1024;
    setup.limit = Duration::from_secs(300);
    let mut machine = Machine::boot(title, &setup)?;
    machine.expect("tenon-guest: init reached", BOOT)?;
    machine.expect(SHELL, SOON)?;
    let word = nonce()?;
    machine.type_line(&format!("echo {word} | md5sum"))?;
    machine.expect(&md5(&word)?, SOON)?;
    machine.expect(SHELL, SOON)?;
    machine.type_line("poweroff -f")?;
    machine.expect("guest linux (domain 1) powered off", SOON)?;
    machine.finish()?.require_success()
}
