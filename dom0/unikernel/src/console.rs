//! Printing, and the back end of `log`.
//!
//! The first domain and test guests print by `console_io` (ABI core 8.2). A domain that has a console ring prints on the
//! ring (io 2), and waits while the ring is full.

use crate::boot::Boot;
use crate::shared::PeerPages;
use crate::sync::MaskMutex;
use crate::{hypercall, memory};
use core::fmt::{self, Write};
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use hypercall_abi::sched::ShutdownReason;
use hypercall_abi::start_info::{StartInfo, flags};
use ring_protocol::console::FrontEnd;

/// A function that takes printed text. It must not log.
pub type Sink = fn(&str);

static SINK: AtomicUsize = AtomicUsize::new(0);

/// Sends everything printed from now on to `sink`.
pub fn set_sink(sink: Sink) {
    SINK.store(sink as usize, Ordering::Release);
}

/// Prints on the hypervisor's console; text that the hypervisor does not take is lost.
pub fn write_to_hypervisor(text: &str) {
    let _ = hypercall::console_write(text.as_bytes());
}

/// Prints bytes unchanged on the hypervisor's console; bytes that the hypervisor does not take are lost.
pub fn write_bytes(bytes: &[u8]) {
    let _ = hypercall::console_write(bytes);
}

/// Reads what was typed on the machine's console. Returns how many bytes it read, 0 if there are none.
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

/// Collects the pieces of a print, so that one line is one write and other domains' text cannot come between.
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

/// Prints formatted text; used by [`crate::print!`].
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

/// The domain's console ring.
struct Ring {
    page: PeerPages,
    port: u32,
    end: FrontEnd,
}

static RING: MaskMutex<Option<Ring>> = MaskMutex::new(None);

/// Prints all of `text` on the ring. If the other end has damaged the ring, the text is lost.
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

/// Finds the console ring that the builder made.
fn find_ring(info: &StartInfo) -> Option<Ring> {
    if info.flags & flags::INITDOMAIN != 0 || info.console_mfn == 0 {
        return None;
    }
    let table = hypercall::machphys_mapping().ok()?;
    if info.console_mfn > table.max_mfn {
        return None;
    }
    // SAFETY: the table is readable for every frame that it covers, and the frame is ours (ABI core 2.2).
    let page = unsafe { ((table.v_start + info.console_mfn * 8) as *const u64).read_volatile() };
    // SAFETY: the page is below the boot stack, so the builder mapped it there (ABI core 1.3), and only the ring uses it.
    let page = unsafe { PeerPages::new(memory::linear(page) as *mut u8, 4096) };
    let end = FrontEnd::attach(&page).ok()?;
    Some(Ring { page, port: info.console_evtchn, end })
}

/// Chooses where text is printed, and connects `log`.
pub(crate) fn init(boot: &Boot) {
    // The hypervisor only logs what a domain with a ring writes to it, so such a domain prints on its ring.
    *RING.lock() = find_ring(boot.info());
    if RING.lock().is_some() {
        set_sink(write_to_ring);
    }
    if log::set_logger(&Logger).is_ok() {
        log::set_max_level(log::LevelFilter::Info);
    }
}

static PANICKED: AtomicBool = AtomicBool::new(false);

/// Prints where a panic was, and crashes the domain. Used by [`crate::entry!`].
pub fn panicked(info: &PanicInfo<'_>) -> ! {
    if !PANICKED.swap(true, Ordering::Relaxed) {
        println!("\n{info}\n@@ done: failed");
    }
    hypercall::shutdown(ShutdownReason::Crash)
}
