//! The scripts, in the order of [`SCRIPTS`].

use crate::linux;
use crate::window::window;
use microbench::{SCRIPTS, SETUP, Script};

/// Runs every script, once: they are so long that further runs differ by less than a hundredth.
pub(crate) fn run() {
    // As before the metrics.
    linux::sleep(2, 0);
    shell(SETUP);
    let [pipes, processes] = SCRIPTS;
    window::<{ marker::SCRIPTS }>(|| shell(pipes));
    window::<{ marker::SCRIPTS + 1 }>(|| shell(processes));
}

/// Runs a script to its end.
fn shell(script: Script) {
    linux::wait(linux::fork(|| linux::execute(c"/bin/busybox", &[c"sh", script.path])));
}
