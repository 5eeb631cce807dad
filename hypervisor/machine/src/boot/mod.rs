//! From the loader to `main`, read from the top.

mod loader;

use crate::acpi::{self, Topology};
use crate::memory::{self, boot_bytes};
use crate::{HARDWARE, Hardware, Ranges, apic, cpu, insn, ioapic, serial, smp, timer};
use core::ops::Range;
use core::sync::atomic::AtomicU64;
use heapless::String;
use loader::Loaded;

#[cfg(target_os = "none")]
core::arch::global_asm!(include_str!("boot.s"), start = sym start);

/// What the machine is when `main` gets it.
pub struct BootInfo {
    /// The command line, without the image's own name.
    pub cmdline: String<4096>,
    /// The first module's bytes (the boot bundle); empty if the loader brought none.
    pub module: &'static [u8],
    /// The frames the module lies in, and nothing else: free once it has been unpacked, as far as they are RAM.
    pub module_frames: Range<u64>,
    /// All RAM, in frames.
    pub ram: Ranges,
    /// Frames that may be registers of devices: what the firmware's memory map leaves open, but for the interrupt controllers.
    pub devices: Ranges,
    /// The RAM nobody uses: without the first MiB, the image, the module, and the tables built at boot.
    pub free: Ranges,
    /// Four zeroed words for each frame below [`hv_core::machine::Frames::frame_limit`].
    pub frame_words: &'static [AtomicU64],
    /// The machine.
    pub hardware: &'static Hardware,
}

unsafe extern "Rust" {
    /// Defined by [`crate::entry!`].
    #[cfg(target_os = "none")]
    fn hypervisor_main(boot: BootInfo) -> !;
}

/// The first Rust code: 64-bit mode, the boot tables, the boot stack.
extern "C" fn start(magic: u32, information: u32) -> ! {
    serial::init();
    let boot = match prepare(magic, information.into()) {
        Ok(boot) => boot,
        Err(reason) => panic!("cannot boot: {reason}"),
    };
    // SAFETY: `entry!` defines it with this signature; without that the image does not link.
    #[cfg(target_os = "none")]
    unsafe {
        hypervisor_main(boot)
    }
    #[cfg(not(target_os = "none"))]
    panic!("no image to start with {} frames", boot.free.frames())
}

/// Takes over from the loader: our own page tables, this CPU, the interrupt controllers, time.
///
/// # Errors
/// What is wrong with what the loader left, or what the machine lacks.
fn prepare(magic: u32, information: u64) -> Result<BootInfo, &'static str> {
    let loaded = loader::read(magic, information)?;
    let mut free = loaded.ram.clone();
    free.remove(0..256);
    free.remove(memory::image_frames());
    free.remove(loaded.module_frames());
    let topology = topology(&loaded);
    let controllers = || core::iter::once(apic::address()).chain(topology.ioapics.iter().map(|ioapic| ioapic.address));
    let mut devices = loaded.unmapped.clone();
    // The whole MiB of the LAPIC is where messages of devices go.
    controllers().for_each(|address| devices.remove(address / 4096..(address | 0xf_ffff) / 4096 + 1));
    let address_bits = insn::cpuid(0x8000_0008, 0)[0] & 0xff;
    devices.remove(1u64.checked_shl(address_bits.saturating_sub(12)).unwrap_or(u64::MAX)..1 << 32);
    let frame_words = memory::build(&loaded.ram, &loaded.module_frames(), &mut free, controllers())?;
    cpu::init(smp::prepare(&topology));
    apic::init();
    ioapic::init(&topology);
    timer::init()?;
    Ok(BootInfo {
        module: loaded.module,
        module_frames: loaded.module_frames(),
        cmdline: loaded.cmdline,
        ram: loaded.ram,
        devices,
        free,
        frame_words,
        hardware: &HARDWARE,
    })
}

/// The interrupt controllers by ACPI, or where they usually are.
fn topology(loaded: &Loaded) -> Topology {
    let handed = loaded.rsdp.as_deref().map(|bytes| acpi::read(bytes, &boot_bytes));
    let searched = || acpi::read(boot_bytes(acpi::search(&boot_bytes)?, 36)?, &boot_bytes);
    handed.flatten().or_else(searched).unwrap_or_else(Topology::usual)
}
