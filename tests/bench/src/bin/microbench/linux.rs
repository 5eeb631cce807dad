//! Linux without a C library: the system calls the metrics are made of.

use core::arch::{asm, naked_asm};
use core::ffi::CStr;
use core::fmt::{self, Write};

/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;

mod number {
    pub(super) const READ: usize = 0;
    pub(super) const WRITE: usize = 1;
    pub(super) const OPEN: usize = 2;
    pub(super) const CLOSE: usize = 3;
    pub(super) const MMAP: usize = 9;
    pub(super) const MPROTECT: usize = 10;
    pub(super) const MUNMAP: usize = 11;
    pub(super) const RT_SIGACTION: usize = 13;
    pub(super) const RT_SIGRETURN: usize = 15;
    pub(super) const PIPE: usize = 22;
    pub(super) const MADVISE: usize = 28;
    pub(super) const PAUSE: usize = 34;
    pub(super) const NANOSLEEP: usize = 35;
    pub(super) const GETPID: usize = 39;
    pub(super) const FORK: usize = 57;
    pub(super) const EXECVE: usize = 59;
    pub(super) const WAIT4: usize = 61;
    pub(super) const KILL: usize = 62;
    pub(super) const GETPPID: usize = 110;
    pub(super) const REBOOT: usize = 169;
    pub(super) const CLOCK_GETTIME: usize = 228;
    pub(super) const EXIT_GROUP: usize = 231;
}

/// A system call.
///
/// # Safety
/// That of the call: what it does to this process' memory must be sound.
unsafe fn call(number: usize, [a, b, c, d, e]: [usize; 5]) -> isize {
    let result;
    // SAFETY: the kernel's convention; six arguments at most, the last is always 0 here.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") a,
            in("rsi") b,
            in("rdx") c,
            in("r10") d,
            in("r8") e,
            in("r9") 0,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result
}

/// The result of a call that has no reason to fail.
#[track_caller]
fn checked(result: isize) -> usize {
    match usize::try_from(result) {
        Ok(value) => value,
        Err(_) => panic!("errno {}", -result),
    }
}

/// What the kernel gave this process at its start.
pub(crate) struct Process {
    stack: *const usize,
}

impl Process {
    /// # Safety
    /// `stack` is the stack pointer this process was entered with, and nothing has overwritten what it leads to.
    pub(crate) unsafe fn new(stack: *const usize) -> Self {
        Self { stack }
    }

    fn word(&self, index: usize) -> usize {
        // SAFETY: callers stay inside the vectors, by their counts and terminators.
        unsafe { *self.stack.add(index) }
    }

    /// An argument.
    pub(crate) fn argument(&self, index: usize) -> Option<&[u8]> {
        let text = (index < self.word(0)).then(|| self.word(1 + index) as *const core::ffi::c_char)?;
        // SAFETY: an argument is a C string, there for the life of the process.
        Some(unsafe { CStr::from_ptr(text) }.to_bytes())
    }

    /// A value of the auxiliary vector.
    pub(crate) fn auxiliary(&self, key: usize) -> Option<usize> {
        // Behind the arguments and a null, the environment and a null.
        let mut at = 1 + self.word(0) + 1;
        while self.word(at) != 0 {
            at += 1;
        }
        at += 1;
        while self.word(at) != 0 {
            if self.word(at) == key {
                return Some(self.word(at + 1));
            }
            at += 2;
        }
        None
    }
}

/// Standard output.
pub(crate) struct Output;

impl Write for Output {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        // SAFETY: the kernel reads the text.
        let written = unsafe { call(number::WRITE, [1, text.as_ptr() as usize, text.len(), 0, 0]) };
        if written < 0 { Err(fmt::Error) } else { Ok(()) }
    }
}

macro_rules! println {
    ($($text:tt)*) => {{
        use core::fmt::Write as _;
        // There is nobody to tell if the console does not take it.
        let _ = writeln!($crate::linux::Output, $($text)*);
    }};
}
pub(crate) use println;

/// Reads one byte.
pub(crate) fn read_byte(file: usize) -> Option<u8> {
    let mut byte = 0_u8;
    // SAFETY: the kernel writes the byte.
    let count = unsafe { call(number::READ, [file, &raw mut byte as usize, 1, 0, 0]) };
    (count == 1).then_some(byte)
}

/// Writes one byte.
#[track_caller]
pub(crate) fn write_byte(file: usize, byte: u8) {
    // SAFETY: the kernel reads the byte.
    checked(unsafe { call(number::WRITE, [file, &raw const byte as usize, 1, 0, 0]) });
}

/// Opens a file for reading.
#[track_caller]
pub(crate) fn open(path: &CStr) -> usize {
    // SAFETY: the kernel reads the path.
    checked(unsafe { call(number::OPEN, [path.as_ptr() as usize, 0, 0, 0, 0]) })
}

/// Makes a file of some pages of zeros, and opens it for reading.
#[track_caller]
pub(crate) fn make_file(path: &CStr, pages: usize) -> usize {
    const WRITE_CREATE: usize = 0o101;
    let page = Map::new(PAGE);
    // SAFETY: the kernel reads the path.
    let file = checked(unsafe { call(number::OPEN, [path.as_ptr() as usize, WRITE_CREATE, 0o600, 0, 0]) });
    for _ in 0..pages {
        // SAFETY: the kernel reads the page.
        let written = checked(unsafe { call(number::WRITE, [file, page.start, PAGE, 0, 0]) });
        assert_eq!(written, PAGE, "{path:?} takes no more");
    }
    close(file);
    open(path)
}

/// Closes a file.
#[track_caller]
pub(crate) fn close(file: usize) {
    // SAFETY: no memory is involved.
    checked(unsafe { call(number::CLOSE, [file, 0, 0, 0, 0]) });
}

/// A pipe: the end to read, the end to write.
#[track_caller]
pub(crate) fn pipe() -> (usize, usize) {
    let mut ends = [0_u32; 2];
    // SAFETY: the kernel writes the two numbers.
    checked(unsafe { call(number::PIPE, [ends.as_mut_ptr() as usize, 0, 0, 0, 0]) });
    (ends[0] as usize, ends[1] as usize)
}

/// Memory from the kernel, in pages of 4 KiB, given back when dropped.
pub(crate) struct Map {
    start: usize,
    length: usize,
}

impl Map {
    /// Pages that are not there until they are touched.
    #[track_caller]
    pub(crate) fn new(length: usize) -> Self {
        const READ_WRITE: usize = 3;
        const PRIVATE_ANONYMOUS: usize = 0x22;
        const NO_HUGE_PAGE: usize = 15;
        // SAFETY: new pages where nothing is; no file is behind them, so its number (r8) is -1.
        let start = checked(unsafe { call(number::MMAP, [0, length, READ_WRITE, PRIVATE_ANONYMOUS, usize::MAX]) });
        // SAFETY: the pages are ours and hold nothing. A kernel without huge pages refuses, and needs no advice.
        unsafe { call(number::MADVISE, [start, length, NO_HUGE_PAGE, 0, 0]) };
        Self { start, length }
    }

    /// A file's pages, for reading, in place of some of this map's. They begin where a page table does, and leave a hole.
    #[track_caller]
    pub(crate) fn replace(&self, file: usize, length: usize) -> Self {
        const READ: usize = 1;
        const PRIVATE_FIXED: usize = 0x12;
        let start = self.start.next_multiple_of(512 * PAGE);
        assert!(start + length <= self.start + self.length, "no room in the map");
        // SAFETY: the pages that go are ours, and nobody refers to them.
        checked(unsafe { call(number::MMAP, [start, length, READ, PRIVATE_FIXED, file]) });
        Self { start, length }
    }

    /// Reads from each page.
    pub(crate) fn read(&self) {
        for at in (self.start..self.start + self.length).step_by(PAGE) {
            // SAFETY: the page is ours, and the file behind it is as long as the map.
            unsafe { (at as *const u8).read_volatile() };
        }
    }

    /// Writes to each page.
    pub(crate) fn touch(&self) {
        for at in (self.start..self.start + self.length).step_by(PAGE) {
            // SAFETY: the page is ours and holds nothing but this byte.
            unsafe { (at as *mut u8).write_volatile(1) };
        }
    }

    /// Lets the pages be written, or only read.
    #[track_caller]
    pub(crate) fn protect(&self, writable: bool) {
        let protection = if writable { 3 } else { 1 };
        // SAFETY: nobody writes to the pages while they are only for reading.
        checked(unsafe { call(number::MPROTECT, [self.start, self.length, protection, 0, 0]) });
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the pages are ours, and nobody refers to them any more.
        checked(unsafe { call(number::MUNMAP, [self.start, self.length, 0, 0, 0]) });
    }
}

/// The smallest system call.
pub(crate) fn getppid() {
    // SAFETY: no memory is involved.
    unsafe { call(number::GETPPID, [0; 5]) };
}

/// The monotonic clock by a system call.
pub(crate) fn clock_by_call(time: &mut [i64; 2]) {
    // SAFETY: the kernel writes the two numbers.
    checked(unsafe { call(number::CLOCK_GETTIME, [1, time.as_mut_ptr() as usize, 0, 0, 0]) });
}

/// Sleeps for so long, in seconds and nanoseconds.
#[track_caller]
pub(crate) fn sleep(seconds: i64, nanoseconds: i64) {
    let time = [seconds, nanoseconds];
    // SAFETY: the kernel reads the two numbers.
    checked(unsafe { call(number::NANOSLEEP, [time.as_ptr() as usize, 0, 0, 0, 0]) });
}

/// Runs `work` in a new process, which then exits with 0.
#[track_caller]
pub(crate) fn fork(work: impl FnOnce()) -> usize {
    // SAFETY: one thread, so the child's copy of our memory is whole.
    let child = checked(unsafe { call(number::FORK, [0; 5]) });
    if child == 0 {
        work();
        exit(0);
    }
    child
}

/// Waits for a child; it must have ended with 0.
#[track_caller]
pub(crate) fn wait(child: usize) {
    let mut status = 0_u32;
    // SAFETY: the kernel writes the status.
    checked(unsafe { call(number::WAIT4, [child, &raw mut status as usize, 0, 0, 0]) });
    assert_eq!(status, 0, "a child failed");
}

/// Becomes another program, with at most three words.
pub(crate) fn execute(path: &CStr, words: &[&CStr]) -> ! {
    let mut arguments = [core::ptr::null(); 4];
    for (argument, word) in arguments[..3].iter_mut().zip(words) {
        *argument = word.as_ptr();
    }
    let environment = [core::ptr::null::<u8>()];
    // SAFETY: the kernel reads the path and the vectors; if it returns, nothing has changed.
    unsafe {
        call(number::EXECVE, [path.as_ptr() as usize, arguments.as_ptr() as usize, environment.as_ptr() as usize, 0, 0])
    };
    exit(127)
}

/// Ends this process.
pub(crate) fn exit(status: usize) -> ! {
    // SAFETY: this process ends.
    unsafe { call(number::EXIT_GROUP, [status, 0, 0, 0, 0]) };
    unreachable!("exit_group returns to nobody")
}

/// The signal that [`signal_self`] sends.
const USR1: usize = 10;

/// Takes the signal and does nothing.
extern "C" fn on_signal(_signal: i32) {}

/// Where a signal handler returns to.
///
/// # Safety
/// For the kernel alone.
#[unsafe(naked)]
unsafe extern "C" fn restore() {
    naked_asm!("mov eax, {}", "syscall", "ud2", const number::RT_SIGRETURN)
}

/// Installs a handler for the signal.
#[track_caller]
pub(crate) fn take_signals() {
    const RESTORER: usize = 0x0400_0000;
    let action = [on_signal as *const () as usize, RESTORER, restore as *const () as usize, 0];
    // SAFETY: the kernel reads the action (handler, flags, restorer, mask of eight bytes); both functions are what it expects.
    checked(unsafe { call(number::RT_SIGACTION, [USR1, action.as_ptr() as usize, 0, 8, 0]) });
}

/// Sends the signal to this process, which takes it before this returns.
pub(crate) fn signal_self(process: usize) {
    // SAFETY: the handler touches nothing.
    unsafe { call(number::KILL, [process, USR1, 0, 0, 0]) };
}

/// The number of this process.
pub(crate) fn getpid() -> usize {
    // SAFETY: no memory is involved.
    checked(unsafe { call(number::GETPID, [0; 5]) })
}

/// Waits for a signal.
pub(crate) fn pause() {
    // SAFETY: no memory is involved.
    unsafe { call(number::PAUSE, [0; 5]) };
}

/// Turns the machine off. (Somebody's own machine, where this is not the first program, is left alone.)
pub(crate) fn power_off() -> ! {
    if getpid() != 1 {
        exit(1);
    }
    const MAGIC: [usize; 2] = [0xfee1_dead, 0x2812_1969];
    const POWER_OFF: usize = 0x4321_fedc;
    loop {
        // SAFETY: no memory is involved.
        unsafe { call(number::REBOOT, [MAGIC[0], MAGIC[1], POWER_OFF, 0, 0]) };
        pause();
    }
}
