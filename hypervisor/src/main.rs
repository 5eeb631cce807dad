//! The hypervisor's image: in which order things happen.
//!
//! Touches: what it boots with, once; then it only passes on: from [`hv_machine`] to [`hv_core`] and back.
//! Never touches: a rule, or a register.
#![cfg_attr(target_os = "none", no_std, no_main)]
#![forbid(unsafe_code)]

#[cfg(target_os = "none")]
mod boot;
#[cfg(target_os = "none")]
mod options;
#[cfg(target_os = "none")]
mod run;

#[cfg(target_os = "none")]
hv_machine::entry!(main);

/// All state of ring 0.
#[cfg(target_os = "none")]
static WORLD: hv_core::world::World = hv_core::world::World::new();

#[cfg(target_os = "none")]
fn main(boot: hv_machine::BootInfo) -> ! {
    use hv_core::addr::Frame;
    let hw = boot.hardware;
    hv_machine::init_logger(log::LevelFilter::Info);
    let fail = |why: &dyn core::fmt::Display| -> ! {
        log::error!("{why}");
        hw.power_off(hv_machine::Verdict::FAILURE)
    };
    let options = options::Options::parse(&boot.cmdline).unwrap_or_else(|why| fail(&why));
    log::set_max_level(options.log);
    log::info!("Tenon {}", env!("CARGO_PKG_VERSION"));
    WORLD.frames.init(boot.frame_words);
    WORLD.frames.set_fast_paths(options.lean);
    let ranges = |ranges: &hv_machine::Ranges, with: &dyn Fn(Frame, u32)| {
        for range in ranges.iter() {
            if let (Some(first), Ok(count)) = (Frame::new(range.start), u32::try_from(range.end - range.start)) {
                with(first, count);
            }
        }
    };
    ranges(&boot.free, &|first, count| WORLD.frames.add(first, count));
    ranges(&boot.ram, &|first, count| WORLD.frames.reserve(first, count));
    let mut held = hv_core::lock::Held::entering_ring_0();
    let mut cpu_ctx = hv_core::world::CpuCtx { m: hw, world: &WORLD, held: &mut held };
    if let Err(why) = boot::first_domain(&mut cpu_ctx, boot.module, &boot.devices, &options) {
        fail(&why)
    }
    // The bundle has been copied: its frames are as good as any.
    let module = boot.module_frames.clone().filter(|frame| boot.ram.has(*frame));
    module.filter_map(Frame::new).for_each(|frame| WORLD.frames.retire(frame));
    run::run(&mut cpu_ctx)
}

#[cfg(not(target_os = "none"))]
fn main() {
    println!("This is the image of a hypervisor: build it for x86_64-unknown-none, or run `cargo xtask run`.");
}
