//! Runs from the builder's entry point to the image's `main`.
//!
//! The stubs are assembly. What they push has one form for every vector and callback, which [`crate::traps`] receives.

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

/// The addresses of the stubs. They do not exist on the build machine, where the library is only checked and
/// unit-tested.
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

/// Sets everything up, runs `main`, and ends the domain when `main` returns. Called by [`crate::entry!`] only.
///
/// # Safety
/// Called once, before anything else, with what the builder put in RSI and RSP.
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

/// Sets up the console only, runs `main`, and ends the domain when `main` returns. Called by [`crate::bare_entry!`]
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

/// Makes a `fn(&Boot)` the image's main program. Traps, memory, events and time are set up before it runs.
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

/// Like [`entry!`], but only the console is set up: no trap table, no heap, no events.
#[macro_export]
macro_rules! bare_entry {
    ($main:path) => {
        $crate::entry!(@image bare $main);
    };
}
