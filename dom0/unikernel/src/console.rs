//! Where text goes, and the back end of `log`.
//!
//! `console_io` serves the first domain and test guests (core 8.2). A domain that the hypervisor does not let print there
//! uses its console ring (io 2), and waits while nobody drains it.

use crate::boot::Boot;
use crate::shared::PeerPage;
use crate::sync::MaskMutex;
use crate::{hypercall, memory};
use core::fmt::{self, Write};
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use hypercall_abi::sched::ShutdownReason;
use hypercall_abi::start_info::{StartInfo, flags};
use ring_protocol::console::FrontEnd;

/// Takes text. Must not log.
pub type Sink = fn(&str);

static SINK: AtomicUsize = AtomicUsize::new(0);

/// Sends what is printed to `sink` from now on.
pub fn set_sink(sink: Sink) {
    SINK.store(sink as usize, Ordering::Release);
}

/// Prints on the hypervisor's console, as far as it takes it.
pub fn write_to_hypervisor(text: &str) {
    let _ = hypercall::console_write(text.as_bytes());
}

/// Prints bytes as they are on the hypervisor's console, as far as it takes them.
pub fn write_bytes(bytes: &[u8]) {
    let _ = hypercall::console_write(bytes);
}

/// Reads what was typed on the machine's console; answers how many bytes, 0 when there is nothing more.
///
/// # Errors
/// `Perm` for a domain without authority over the console.
pub fn read(buffer: &mut [u8]) -> Result<usize, hypercall_abi::Errno> {
    hypercall::console_read(buffer)
}

struct Output;

impl Write for Output {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let sink = SINK.load(Ordering::Acquire);
        if sink == 0 {
            write_to_hypervisor(text);
        } else {
            // SAFETY: `set_sink` alone stores here, and it stores a `Sink`.
            let sink = unsafe { core::mem::transmute::<usize, Sink>(sink) };
            sink(text);
        }
        Ok(())
    }
}

/// Collects pieces into lines, so that one line is one write and other domains' text cannot fall into it.
struct LineBuffer {
    bytes: [u8; 256],
    used: usize,
}

impl LineBuffer {
    fn flush(&mut self) {
        let text = self.bytes.get(..self.used).unwrap_or(&[]);
        if let Ok(text) = core::str::from_utf8(text) {
            let _ = Output.write_str(text);
        }
        self.used = 0;
    }
}

impl Write for LineBuffer {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for character in text.chars() {
            if self.used + character.len_utf8() > self.bytes.len() {
                self.flush();
            }
            let room = &mut self.bytes[self.used..];
            self.used += character.encode_utf8(room).len();
        }
        Ok(())
    }
}

/// Prints; used by [`crate::print!`].
pub fn print(arguments: fmt::Arguments<'_>) {
    let mut buffer = LineBuffer { bytes: [0; 256], used: 0 };
    let _ = buffer.write_fmt(arguments);
    buffer.flush();
}

/// Prints to the console.
#[macro_export]
macro_rules! print {
    ($($arg:tt)*) => { $crate::console::print(format_args!($($arg)*)) };
}

/// Prints a line to the console.
#[macro_export]
macro_rules! println {
    () => { $crate::console::print(format_args!("\n")) };
    ($($arg:tt)*) => { $crate::console::print(format_args!("{}\n", format_args!($($arg)*))) };
}

struct Logger;

impl log::Log for Logger {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            let level = match record.level() {
                log::Level::Error => "error: ",
                log::Level::Warn => "warning: ",
                _ => "",
            };
            print(format_args!("{}: {level}{}\n", record.target(), record.args()));
        }
    }

    fn flush(&self) {}
}

/// Our console ring.
struct Ring {
    page: PeerPage,
    port: u32,
    end: FrontEnd,
}

static RING: MaskMutex<Option<Ring>> = MaskMutex::new(None);

/// Prints on the ring, all of it; a ring that its other end has damaged swallows it.
fn write_to_ring(text: &str) {
    let mut guard = RING.lock();
    let Some(ring) = guard.as_mut() else { return };
    let mut rest = text.as_bytes();
    while !rest.is_empty() {
        let Ok(written) = ring.end.output.write(&ring.page, rest) else { return };
        rest = rest.get(written..).unwrap_or_default();
        let _ = hypercall::send(ring.port);
        if written == 0 {
            hypercall::yield_now();
        }
    }
}

/// Finds the console ring the builder made.
fn find_ring(info: &StartInfo) -> Option<Ring> {
    if info.flags & flags::INITDOMAIN != 0 || info.console_mfn == 0 {
        return None;
    }
    let table = hypercall::machphys_mapping().ok()?;
    if info.console_mfn > table.max_mfn {
        return None;
    }
    // SAFETY: the table is readable for every frame it can tell of, and the frame is ours (core 2.2).
    let page = unsafe { ((table.v_start + info.console_mfn * 8) as *const u64).read_volatile() };
    // SAFETY: the page is below the boot stack, so the builder mapped it there (core 1.3), and only the ring uses it.
    let page = unsafe { PeerPage::new(memory::linear(page) as *mut u8) };
    let end = FrontEnd::attach(&page).ok()?;
    Some(Ring { page, port: info.console_evtchn, end })
}

/// Chooses where text goes, and makes `log` print there.
pub(crate) fn init(boot: &Boot) {
    // A domain that has a ring is not shown what it writes to the hypervisor, which only logs it.
    *RING.lock() = find_ring(boot.info());
    if RING.lock().is_some() {
        set_sink(write_to_ring);
    }
    if log::set_logger(&Logger).is_ok() {
        log::set_max_level(log::LevelFilter::Info);
    }
}

static PANICKED: AtomicBool = AtomicBool::new(false);

/// Says where a panic was and crashes the domain. Used by [`crate::entry!`].
pub fn panicked(info: &PanicInfo<'_>) -> ! {
    if !PANICKED.swap(true, Ordering::Relaxed) {
        println!("\n{info}\n@@ done: failed");
    }
    hypercall::shutdown(ShutdownReason::Crash)
}
