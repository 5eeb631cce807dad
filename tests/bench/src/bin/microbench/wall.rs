//! Operations by the clock. Their names and numbers are told with the results.

use crate::clock::Clock;
use crate::linux::{self, Map, Process, println};
use crate::metrics::{self, times};
use microbench::{CLOCK, TIMED};

/// Pages that are touched before their map is given back.
const PAGES: u32 = 1024;

/// Times everything.
pub(crate) fn run(process: &Process) {
    let clock = Clock::new(process);
    let [begin, end] = CLOCK;
    linux::sleep(1, 0);
    println!("{begin}{}", now(&clock));
    // The console is another program's work on Tenon: it has time to show the line when it was printed.
    pause();
    timed(&clock, "null_syscall", 40_000, |n| times(n, linux::getppid));
    timed(&clock, "fork_exec", 200, |n| {
        times(n, || linux::wait(linux::fork(|| linux::execute(c"/bin/tiny", &[c"tiny"]))));
    });
    timed(&clock, "page_fault", 16 * PAGES, |n| times(n / PAGES, || Map::new(PAGES as usize * linux::PAGE).touch()));
    metrics::with_partner(|give, take| timed(&clock, "ctxsw_pipe", 10_000, |n| metrics::switch(n, give, take)));
    println!("{end}{}", now(&clock));
    pause();
}

/// Does a tenth of the operations, which warms up what can be, then all of them by the clock.
fn timed(clock: &Clock, name: &str, operations: u32, mut work: impl FnMut(u32)) {
    work(operations.div_ceil(10));
    let begun = now(clock);
    work(operations);
    let ended = now(clock);
    println!("{TIMED}{name} {operations} {}", ended - begun);
    pause();
}

fn now(clock: &Clock) -> i64 {
    let mut time = [0; 2];
    clock.read(&mut time);
    time[0] * 1_000_000_000 + time[1]
}

fn pause() {
    linux::sleep(0, 100_000_000);
}
