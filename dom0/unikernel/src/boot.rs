//! The start info and the command line, which the domain gets at its start (ABI core 1.4).

use crate::memory;
use hypercall_abi::start_info::{StartInfo, flags};

/// The facts of this boot. Valid for as long as the guest runs.
#[derive(Clone, Copy, Debug)]
pub struct Boot {
    info: &'static StartInfo,
    stack_end: u64,
}

impl Boot {
    /// Wraps the start info. `info` and the stack pointer `stack_end` are those with which the domain was entered.
    ///
    /// # Safety
    /// `info` points to a valid start info that nobody writes from now on.
    pub(crate) unsafe fn new(info: *const StartInfo, stack_end: u64) -> Self {
        // SAFETY: valid and never written again, by this function's contract.
        let info = unsafe { &*info };
        Self { info, stack_end }
    }

    /// The start info as the builder wrote it.
    #[must_use]
    pub fn info(&self) -> &'static StartInfo {
        self.info
    }

    /// First address after the boot stack: where the builder's layout ends and padding begins (ABI core 1.3).
    #[must_use]
    pub fn layout_end(&self) -> u64 {
        self.stack_end
    }

    /// Whether this is the first domain.
    #[must_use]
    pub fn is_first_domain(&self) -> bool {
        self.info.flags & flags::INITDOMAIN != 0
    }

    /// Whether this domain has authority over others.
    #[must_use]
    pub fn is_privileged(&self) -> bool {
        self.info.flags & flags::PRIVILEGED != 0
    }

    /// The ramdisk that the builder loaded; empty if there is none. Its pages are never used for anything else.
    #[must_use]
    pub fn ramdisk(&self) -> &'static [u8] {
        let length = usize::try_from(self.info.mod_len).unwrap_or(0);
        if self.info.mod_start == 0 || length == 0 {
            return &[];
        }
        let start = if self.info.flags & flags::MOD_START_PFN == 0 {
            self.info.mod_start
        } else {
            let pages = self.info.mod_len.div_ceil(memory::PAGE);
            let end = self.info.mod_start.saturating_add(pages);
            if end > self.info.nr_pages.min(memory::LINEAR_PAGES) {
                return &[];
            }
            memory::linear(self.info.mod_start)
        };
        // SAFETY: the builder filled these pages; `memory::init` mapped them and gives them to nobody.
        unsafe { core::slice::from_raw_parts(start as *const u8, length) }
    }

    /// The command line, up to the first byte that is not UTF-8.
    #[must_use]
    pub fn command_line(&self) -> &'static str {
        command_line(self.info)
    }

    /// The value of `key=value` on the command line.
    #[must_use]
    pub fn argument(&self, key: &str) -> Option<&'static str> {
        argument(self.command_line(), key)
    }
}

fn command_line(info: &StartInfo) -> &str {
    let bytes = info.cmd_line.split(|&b| b == 0).next().unwrap_or(&[]);
    match core::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(e) => core::str::from_utf8(&bytes[..e.valid_up_to()]).unwrap_or(""),
    }
}

/// The value of the last `key=value` word of `line`.
#[must_use]
pub fn argument<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    line.split_ascii_whitespace().rev().find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_argument_is_found_by_its_whole_key_and_the_last_one_wins() {
        assert_eq!(argument("test=a how=ud2 test=b", "test"), Some("b"));
        assert_eq!(argument("mytest=a", "test"), None);
        assert_eq!(argument("test", "test"), None);
        assert_eq!(argument("test=", "test"), Some(""));
    }

    #[test]
    fn a_command_line_ends_at_its_zero_or_at_bytes_that_are_no_text() {
        let mut info = StartInfo::default();
        info.cmd_line[..7].copy_from_slice(b"one two");
        assert_eq!(command_line(&info), "one two");
        info.cmd_line[4] = 0xff;
        assert_eq!(command_line(&info), "one ");
        info.cmd_line = [b'x'; 1024];
        assert_eq!(command_line(&info).len(), 1024);
    }
}
