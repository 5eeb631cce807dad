//! The clock as programs read it: by the function the kernel maps into every process, without a system call if it can.

use crate::linux::{self, Process};

/// Key of the address of the kernel's mapped object in the auxiliary vector.
const SYSINFO_EHDR: usize = 33;
const NAME: &[u8] = b"__vdso_clock_gettime\0";
/// `SHT_DYNSYM`
const DYNAMIC_SYMBOLS: u32 = 11;

type Function = extern "C" fn(i32, *mut [i64; 2]) -> i32;

/// The monotonic clock.
pub(crate) struct Clock(Option<Function>);

impl Clock {
    /// Finds the function.
    pub(crate) fn new(process: &Process) -> Self {
        // SAFETY: the kernel's word for where it mapped its object, an ELF file that is sound.
        Self(process.auxiliary(SYSINFO_EHDR).and_then(|base| unsafe { find(base) }))
    }

    /// Whether the kernel offers the function.
    pub(crate) fn is_mapped(&self) -> bool {
        self.0.is_some()
    }

    /// Reads the clock.
    pub(crate) fn read(&self, time: &mut [i64; 2]) {
        match self.0 {
            Some(function) => {
                function(1, time);
            }
            None => linux::clock_by_call(time),
        }
    }
}

/// # Safety
/// A sound ELF64 file with section headers, linked at address 0, is mapped at `base` for good.
unsafe fn find(base: usize) -> Option<Function> {
    // SAFETY: the caller's word; every offset below is one of the file's own.
    let read = |at: usize, size: usize| unsafe {
        match size {
            2 => usize::from((at as *const u16).read_unaligned()),
            4 => (at as *const u32).read_unaligned() as usize,
            _ => (at as *const usize).read_unaligned(),
        }
    };
    let (sections, size, count) = (base + read(base + 0x28, 8), read(base + 0x3a, 2), read(base + 0x3c, 2));
    let header = |index: usize| sections + index * size;
    let symbols = (0..count).map(header).find(|header| read(header + 4, 4) == DYNAMIC_SYMBOLS as usize)?;
    let strings = base + read(header(read(symbols + 0x28, 4)) + 0x18, 8);
    let (start, length) = (base + read(symbols + 0x18, 8), read(symbols + 0x20, 8));
    let named = |symbol: &usize| {
        let name = strings + read(*symbol, 4);
        // SAFETY: names end with a NUL, and the comparison stops at the first difference.
        NAME.iter().enumerate().all(|(index, byte)| unsafe { *((name + index) as *const u8) } == *byte)
    };
    let symbol = (start..start + length).step_by(24).find(named)?;
    let address = base + read(symbol + 8, 8);
    // SAFETY: the symbol of this name is that function.
    Some(unsafe { core::mem::transmute::<usize, Function>(address) })
}
