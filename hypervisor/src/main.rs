//! The hypervisor's image: in which order things happen.
#![cfg_attr(target_os = "none", no_std, no_main)]
#![forbid(unsafe_code)]

#[cfg(target_os = "none")]
hv_machine::entry!(main);

#[cfg(target_os = "none")]
fn main(boot: hv_machine::BootInfo) -> ! {
    hv_machine::init_logger(log::LevelFilter::Info);
    log::info!("Tenon {}", env!("CARGO_PKG_VERSION"));
    log::info!("command line: {:?}", boot.cmdline);
    for range in boot.ram.iter() {
        log::info!("RAM {:#x}..{:#x}", range.start << 12, range.end << 12);
    }
    let free = boot.free.frames() / 256;
    log::info!("{free} MiB free, module of {} bytes", boot.module.len());
    boot.hardware.power_off(hv_machine::Verdict::Success)
}

#[cfg(not(target_os = "none"))]
fn main() {
    println!("This is the image of a hypervisor: build it for x86_64-unknown-none, or run `cargo xtask run`.");
}
