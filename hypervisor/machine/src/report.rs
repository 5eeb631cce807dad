//! What the hypervisor says about itself: log lines, the last words of a panic, and the end of the machine.

use crate::insn::{in8, out8, out32};
use crate::memory::image_data;
use crate::{Hardware, Verdict, serial};
use core::arch::asm;
use core::fmt::{self, Write};
use core::sync::atomic::{AtomicU32, Ordering::Relaxed};
use hv_core::domain::crash::Text;
use hv_core::machine::Registers;
use log::{Level, LevelFilter, Log, Metadata, Record};

/// Errors logged or left out so far.
static BUGS: AtomicU32 = AtomicU32::new(0);
/// So many are logged, and later those that double their number.
const FEW: u32 = 16;

/// Sends log records to the console, each a line that begins with its level.
struct Logger;

impl Log for Logger {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        // Errors are bugs of ours. What can cause one once may do so for ever, and must not fill the log with them.
        let bugs = if record.level() == Level::Error { BUGS.fetch_add(1, Relaxed) } else { 0 };
        if bugs > FEW && !bugs.is_power_of_two() {
            return;
        }
        let level = ["off", "error", "warn", "info", "debug", "trace"].get(record.level() as usize).unwrap_or(&"");
        let mut line = Text::<512>::default();
        let _ = write!(line, "[{level}] {}", record.args());
        if bugs > FEW {
            let _ = write!(line, " ({bugs} errors before, not all of them told)");
        }
        let Text(mut line) = line;
        if line.push('\n').is_err() {
            // Full: the end of the line matters more than its last letter.
            let _ = line.pop();
            let _ = line.push('\n');
        }
        serial::put_line(line.as_bytes());
        serial::keep(line.as_bytes());
    }

    fn flush(&self) {}
}

/// Makes the macros of `log` print on the console, from `level` up. Later calls change the level alone.
pub fn init_logger(level: LevelFilter) {
    let _ = log::set_logger(&Logger);
    log::set_max_level(level);
}

/// The console for last words: takes no lock.
struct LastWords;

impl Write for LastWords {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        serial::put_now(text.as_bytes());
        Ok(())
    }
}

/// Prints the return addresses of the frames from `frame` (a frame pointer) on, as far as they lie in the image's
/// stacks.
fn backtrace(mut frame: u64) {
    let stacks = image_data();
    for _ in 0..32 {
        if !frame.is_multiple_of(8) || !stacks.contains(&frame) || !stacks.contains(&(frame + 15)) {
            return;
        }
        // SAFETY: sixteen aligned bytes inside the image's own data; at worst they are no frame and the numbers
        // are odd.
        let [next, caller] = unsafe { (frame as *const [u64; 2]).read_volatile() };
        let _ = writeln!(LastWords, "  at {caller:#x}");
        // The unmapped guard page lies below the stack, and callers lie above: only upwards.
        if caller == 0 || next <= frame {
            return;
        }
        frame = next;
    }
}

/// Reports an exception that ring 0 caused and nobody expected, and ends the machine.
pub(crate) fn fatal(vector: u64, r: &Registers, address: u64) -> ! {
    let error = r.error & 0xffff_ffff;
    let _ = writeln!(LastWords, "panic: exception {vector} (error {error:#x}) at {:#x}, CR2 {address:#x}", r.rip);
    let _ = writeln!(LastWords, "{r:#x?}");
    backtrace(r.rbp);
    Hardware(()).power_off(Verdict::FAILURE)
}

/// The end of a Rust panic: message, place, callers, exit.
#[cfg(target_os = "none")]
#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    let place = info.location();
    let (file, line) = place.map_or(("?", 0), |place| (place.file(), place.line()));
    let _ = writeln!(LastWords, "panic: {} ({file}:{line})", info.message());
    let frame: u64;
    // SAFETY: copies a register; frame pointers are forced on for this target.
    unsafe { asm!("mov {}, rbp", out(reg) frame, options(nomem, nostack, preserves_flags)) };
    backtrace(frame);
    Hardware(()).power_off(Verdict::FAILURE)
}

impl Hardware {
    /// Ends the machine: the emulator's exit device, else the keyboard controller's reset, else a halt for ever.
    pub fn power_off(&self, verdict: Verdict) -> ! {
        out32(0xf4, verdict.0);
        // The controller takes a command once its input buffer is empty.
        let _ = (0..100_000).any(|_| in8(0x64) & 2 == 0);
        out8(0x64, 0xfe);
        loop {
            // SAFETY: with interrupts off this stops the CPU, which is what we want.
            unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
        }
    }
}
