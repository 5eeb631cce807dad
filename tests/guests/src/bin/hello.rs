//! The smallest guest (core 1): enters, prints, asks who the hypervisor is, powers off. It needs nothing
//! but the builder, `xen_version`, `console_io` and `sched_op`.
#![no_std]
#![no_main]
#![forbid(unsafe_code)]

use unikernel::abi::start_info::MAGIC;
use unikernel::abi::version::feature;
use unikernel::boot::Boot;
use unikernel::{hypercall, println};

unikernel::bare_entry!(main);

fn main(boot: &Boot) {
    let info = boot.info();
    println!("hello from a paravirtual guest");
    println!("{} pages, flags {:#x}, command line \"{}\"", info.nr_pages, info.flags, boot.command_line());
    let version = hypercall::version();
    println!("hypervisor version {}.{}", version >> 16, version & 0xffff);

    // core 1.4: what the builder promises.
    assert!(info.magic.starts_with(MAGIC), "magic {:?}", info.magic);
    assert!(info.nr_pages > 0);
    assert!(info.shared_info.is_multiple_of(4096) && info.shared_info != 0);
    assert!(info.pt_base.is_multiple_of(4096));
    assert!(info.nr_pt_frames >= 4);
    // core 1.3: the boot stack follows the page tables.
    assert_eq!(boot.layout_end(), info.pt_base + (info.nr_pt_frames + 1) * 4096);
    // core 8.1: a major version of at least 3 and no error.
    assert!((3..0x100).contains(&(version >> 16)));
    // core 8.1: without these two Linux panics at boot; auto-translation (2) and supervisor mode (3) must be absent.
    let features = hypercall::features(0).expect("word 0 of the features exists");
    println!("features {features:#x}");
    let needed = feature::MMU_PT_UPDATE_PRESERVE_AD | feature::GNTTAB_MAP_AVAIL_BITS;
    assert_eq!(features & needed, needed);
    assert_eq!(features & 0b1101, 0);
    println!("@@ done: passed");
}
