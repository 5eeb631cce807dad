//! The metrics, in the order of [`METRICS`].

use crate::clock::Clock;
use crate::linux::{self, Map, Process, println};
use crate::window;
use microbench::{METRICS, REPETITIONS};

const MIB: usize = 1 << 20;
/// Memory that is written before or in the metrics of large forks.
const DIRTY: usize = 8 * MIB;
/// Pages of the file in `map_file_64_pages` and `map_file_page`.
const FILE_PAGES: usize = 64;

/// The number of a metric's window; a metric that does not exist stops the build.
const fn number(name: &str) -> u16 {
    let mut number = 0;
    while (number as usize) < METRICS.len() {
        if same(METRICS[number as usize].name.as_bytes(), name.as_bytes()) {
            return marker::METRICS + number;
        }
        number += 1;
    }
    panic!("no metric of this name")
}

/// The operations in a window of this number.
const fn operations(number: u16) -> u32 {
    METRICS[(number - marker::METRICS) as usize].operations
}

/// Runs `work` inside a window of a metric, with the number of its operations.
#[inline(always)]
fn window<const NUMBER: u16>(work: impl FnOnce(u32)) {
    window::window::<NUMBER>(|| work(const { operations(NUMBER) }));
}

const fn same(a: &[u8], b: &[u8]) -> bool {
    let mut index = 0;
    while index < a.len() && index < b.len() {
        if a[index] != b[index] {
            return false;
        }
        index += 1;
    }
    a.len() == b.len()
}

/// One run of `work` outside of all windows, then those inside.
fn measure<const NUMBER: u16>(mut work: impl FnMut(u32)) {
    work(const { operations(NUMBER) });
    for _ in 0..REPETITIONS {
        window::<NUMBER>(&mut work);
    }
}

/// Does something so many times.
pub(crate) fn times(count: u32, mut work: impl FnMut()) {
    for _ in 0..count {
        work();
    }
}

/// Measures everything.
pub(crate) fn run(process: &Process) {
    // What the kernel still does after its start should be over. (The emulated clock skips idle time.)
    linux::sleep(2, 0);
    measure::<{ number("null_syscall") }>(|n| times(n, linux::getppid));
    let clock = Clock::new(process);
    println!("clock_gettime is mapped: {}", clock.is_mapped());
    measure::<{ number("clock_gettime") }>(|n| times(n, || clock.read(&mut [0; 2])));
    measure::<{ number("open_close") }>(|n| times(n, || linux::close(linux::open(c"/init"))));
    memory();
    processes();
    switches();
    linux::take_signals();
    let this = linux::getpid();
    measure::<{ number("signal_self") }>(|n| times(n, || linux::signal_self(this)));
    // A whole operation: the program sleeps, the CPU idles, the timer wakes both.
    measure::<{ number("nanosleep") }>(|n| times(n, || linux::sleep(0, 1_000_000)));
    // Behind the older metrics, so that the memory they find has not changed.
    let file = linux::make_file(c"/tmp/file", FILE_PAGES);
    // Where the neighbours' page table is: else chance would decide how many tables each operation makes.
    let around = Map::new(4 * MIB);
    around.touch();
    measure::<{ number("map_file_64_pages") }>(|n| {
        times(n, || around.replace(file, FILE_PAGES * linux::PAGE).read());
    });
    drop(around);
    let area = Map::new(DIRTY);
    for _ in 0..REPETITIONS {
        area.touch();
        window::<{ number("fork_exit_8M") }>(|n| times(n, || linux::wait(linux::fork(|| ()))));
    }
    drop(area);
    let around = Map::new(4 * MIB);
    around.touch();
    for _ in 0..REPETITIONS {
        let map = around.replace(file, FILE_PAGES * linux::PAGE);
        window::<{ number("map_file_page") }>(|_| map.read());
    }
    drop(around);
    linux::close(file);
    for _ in 0..REPETITIONS {
        let bytes = const { operations(number("page_fault_folios")) } as usize * linux::PAGE;
        let area = Map::with_folios(bytes + linux::TABLE);
        window::<{ number("page_fault_folios") }>(|_| area.touch_whole_tables(bytes));
    }
}

fn memory() {
    for _ in 0..REPETITIONS {
        let bytes = const { operations(number("page_fault")) } as usize * linux::PAGE;
        let area = Map::new(bytes + linux::TABLE);
        window::<{ number("page_fault") }>(|_| area.touch_whole_tables(bytes));
    }
    measure::<{ number("touch_unmap") }>(|n| {
        let bytes = n as usize * linux::PAGE;
        Map::new(bytes + linux::TABLE).touch_whole_tables(bytes);
    });
    measure::<{ number("mmap_munmap_1M") }>(|n| times(n, || drop(Map::new(MIB))));
    let area = Map::new(1024 * linux::PAGE);
    area.touch();
    measure::<{ number("mprotect_1024_pages") }>(|n| {
        for turn in 0..n {
            area.protect(turn % 2 == 1);
        }
    });
}

fn processes() {
    measure::<{ number("fork_exit") }>(|n| times(n, || linux::wait(linux::fork(|| ()))));
    let area = Map::new(DIRTY);
    for _ in 0..REPETITIONS {
        // Freshly written pages, as a shell's or a daemon's would be: fork must write-protect each.
        window::<{ number("fork_dirty_8M") }>(|n| {
            times(n, || {
                area.touch();
                linux::wait(linux::fork(|| ()));
            });
        });
    }
    drop(area);
    measure::<{ number("fork_exec") }>(|n| {
        times(n, || linux::wait(linux::fork(|| linux::execute(c"/bin/tiny", &[c"/bin/tiny"]))))
    });
}

/// Two processes that wake each other in turn; an operation is one switch.
fn switches() {
    with_partner(|give, take| measure::<{ number("ctxsw_pipe") }>(|n| switch(n, give, take)));
}

/// Switches so many times to the partner and back.
pub(crate) fn switch(count: u32, give: usize, take: usize) {
    times(count / 2, || {
        linux::write_byte(give, 1);
        linux::read_byte(take);
    });
}

/// Runs `work` with the ends of two pipes: another process answers each byte given with one to take.
pub(crate) fn with_partner(work: impl FnOnce(usize, usize)) {
    let ((take, give), (take_back, give_back)) = (linux::pipe(), linux::pipe());
    let child = linux::fork(|| {
        linux::close(give);
        while let Some(byte) = linux::read_byte(take) {
            linux::write_byte(give_back, byte);
        }
    });
    linux::close(take);
    work(give, take_back);
    linux::close(give);
    linux::wait(child);
}
