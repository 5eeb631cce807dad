//! From the builder's first instruction to the image's `main`.
//!
//! The stubs are assembly: [`crate::traps`] receives what they push, in one form for every vector and callback.

use crate::boot::Boot;
use crate::{console, events, memory, time, traps};
use hypercall_abi::sched::ShutdownReason;
use hypercall_abi::start_info::StartInfo;

#[cfg(target_os = "none")]
core::arch::global_asm!(include_str!("entry.s"));

#[cfg(target_os = "none")]
unsafe extern "C" {
    static trap_stubs: u8;
    static event_stub: u8;
    static syscall_stub: u8;
    static failsafe_stub: u8;
}

/// Where the stubs are. On the build machine there are none: the library is only type-checked and unit-tested there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stubs {
    /// 256 stubs of [`Stubs::SIZE`] bytes, one per vector.
    pub(crate) traps: u64,
    pub(crate) event: u64,
    pub(crate) syscall: u64,
    pub(crate) failsafe: u64,
}

impl Stubs {
    pub(crate) const SIZE: u64 = 32;

    #[cfg(target_os = "none")]
    pub(crate) fn get() -> Self {
        Self {
            traps: (&raw const trap_stubs).addr() as u64,
            event: (&raw const event_stub).addr() as u64,
            syscall: (&raw const syscall_stub).addr() as u64,
            failsafe: (&raw const failsafe_stub).addr() as u64,
        }
    }

    #[cfg(not(target_os = "none"))]
    pub(crate) fn get() -> Self {
        unreachable!("no stubs on the build machine")
    }
}

/// Runs `main` with everything set up; ends the domain when it returns. Called by [`crate::entry!`] only.
///
/// # Safety
/// Called once, first, with what the builder put in RSI and RSP.
pub unsafe fn full(info: *const StartInfo, stack_end: u64, main: fn(&Boot)) -> ! {
    // SAFETY: the builder's start info is valid, and nobody writes it after this.
    let boot = unsafe { Boot::new(info, stack_end) };
    traps::init();
    console::init(&boot);
    // SAFETY: called once, before anything else uses memory of this domain.
    unsafe { memory::init(&boot) };
    // SAFETY: called once, after memory.
    unsafe { events::init(&boot) };
    time::init();
    main(&boot);
    crate::hypercall::shutdown(ShutdownReason::Poweroff)
}

/// Runs `main` with nothing but the console set up; ends the domain when it returns. Called by [`crate::bare_entry!`]
/// only.
///
/// # Safety
/// As [`full`].
pub unsafe fn bare(info: *const StartInfo, stack_end: u64, main: fn(&Boot)) -> ! {
    // SAFETY: the builder's start info is valid, and nobody writes it after this.
    let boot = unsafe { Boot::new(info, stack_end) };
    console::init(&boot);
    main(&boot);
    crate::hypercall::shutdown(ShutdownReason::Poweroff)
}

/// Makes a function `fn(&Boot)` the image's main program, with traps, memory, events and time set up before it.
#[macro_export]
macro_rules! entry {
    ($main:path) => {
        $crate::entry!(@image full $main);
    };
    (@image $level:ident $main:path) => {
        #[unsafe(no_mangle)]
        extern "C" fn image_main(
            info: *const $crate::abi::start_info::StartInfo,
            stack_end: u64,
        ) -> ! {
            // SAFETY: the entry stub calls this once, first, with the registers the builder set.
            unsafe { $crate::entry::$level(info, stack_end, $main) }
        }

        #[panic_handler]
        fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
            $crate::console::panicked(info)
        }
    };
}

/// As [`entry!`], with nothing set up but the console: no trap table, no heap, no events.
#[macro_export]
macro_rules! bare_entry {
    ($main:path) => {
        $crate::entry!(@image bare $main);
    };
}
