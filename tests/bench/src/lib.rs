//! What the benchmark program measures, for the program and for those who read its results.
//!
//! `microbench` is the first and only program of a Linux in a benchmark: it has no C library, so its counts are those of
//! the kernel and the same on every machine. Each metric runs in windows ([`marker`]) of a fixed number of
//! operations; nothing is calibrated against a clock.
#![no_std]
#![forbid(unsafe_code)]

use core::ffi::CStr;

/// One thing that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metric {
    /// What it is called.
    pub name: &'static str,
    /// Operations in a window.
    pub operations: u32,
}

const fn metric(name: &'static str, operations: u32) -> Metric {
    Metric { name, operations }
}

/// Every metric, in the order of the numbers of their windows, which begin at [`marker::METRICS`].
pub const METRICS: [Metric; 17] = [
    metric("null_syscall", 2000),
    metric("clock_gettime", 2000),
    metric("open_close", 200),
    metric("page_fault", 1024),
    metric("touch_unmap", 1024),
    metric("mmap_munmap_1M", 100),
    metric("mprotect_1024_pages", 20),
    metric("fork_exit", 20),
    // Each operation writes 8 MiB before it forks.
    metric("fork_dirty_8M", 2),
    metric("fork_exec", 20),
    metric("ctxsw_pipe", 1000),
    metric("signal_self", 200),
    metric("nanosleep", 100),
    // A file in the page cache is mapped, each of its pages read, and unmapped.
    metric("map_file_64_pages", 20),
    // The 8 MiB are written before the window: this is fork and exit alone.
    metric("fork_exit_8M", 1),
    // Each page of a file in the page cache is read the first time after it was mapped. Mapping and unmapping are outside.
    metric("map_file_page", 64),
    // As page_fault, where the program asks for large folios: a fault may map sixteen pages.
    metric("page_fault_folios", 1024),
];

/// What is read from a disk, past the kernel's cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// What it is called.
    pub name: &'static str,
    /// The number of the disk: 0 for xvda.
    pub disk: u32,
    /// Bytes of a read.
    pub bytes: u32,
    /// Whether the places are anywhere on the disk; otherwise one follows the other.
    pub random: bool,
    /// Reads that are under way at a time; 1 or [`DEPTH`].
    pub depth: u32,
    /// Reads in a window.
    pub operations: u32,
}

/// Reads that are under way together where it is more than one.
pub const DEPTH: u32 = 16;
/// Bytes of each disk.
pub const DISK_BYTES: u64 = 16 << 20;
/// Where the driver of disks lies in the initramfs, a module of the kernel's.
pub const DRIVER: &CStr = c"/bench/blkfront.ko";

const fn reading(name: &'static str, disk: u32, bytes: u32, depth: u32, operations: u32) -> Reading {
    Reading { name, disk, bytes, random: bytes == 4096, depth, operations }
}

/// All that is read, in the order of the numbers of the windows, which begin at [`marker::READS`]. Disk 0 is one of the
/// machine, disk 1 is memory.
pub const READS: [Reading; 4] = [
    reading("4 KiB, random, disk of the machine", 0, 4096, 1, 100),
    reading("4 KiB, random, memory", 1, 4096, 1, 100),
    reading("128 KiB in sequence, disk of the machine", 0, 128 << 10, 1, 50),
    reading("128 KiB in sequence, 16 at a time, disk of the machine", 0, 128 << 10, DEPTH, 64),
];

/// What is sent from one guest to another by TCP: MiB.
pub const MIB: Metric = metric("TCP guest to guest, a MiB", 4);
/// What goes there and back: a byte.
pub const TRIPS: Metric = metric("round trip guest to guest", 200);
/// What is sent from one guest to another by UDP: a packet of [`PACKET_BYTES`].
pub const PACKETS: Metric = metric("UDP packet of 64 bytes guest to guest", 2048);
/// Bytes of a packet, the headers of Ethernet, IPv4 and UDP among them.
pub const PACKET_BYTES: usize = 64;
/// What is sent to the host of the emulated machine by TCP: MiB.
pub const TO_HOST: Metric = metric("TCP guest to host, a MiB", 4);
/// What is sent by the host of the emulated machine by TCP: MiB.
pub const FROM_HOST: Metric = metric("TCP host to guest, a MiB", 4);
/// Where the drivers of a virtio network device lie in the initramfs, in the order in which they are loaded.
pub const VIRTIO_NET_DRIVERS: &CStr = c"/bench/virtio-net/";
/// The most drivers that lie there: their names are `a.ko`, `b.ko` and so on.
pub const MAX_DRIVERS: u8 = 26;
/// The address of the host behind QEMU's user network.
pub const HOST: [u8; 4] = [10, 0, 2, 2];
/// The address of a guest behind dom0's gateway, and the gateway's.
pub const BEHIND_GATEWAY: [[u8; 4]; 2] = [[10, 77, 0, 9], [10, 77, 0, 1]];
/// The address of a kernel that is alone on the machine, and its gateway's.
pub const ALONE: [[u8; 4]; 2] = [[10, 0, 2, 15], HOST];
/// Where the driver of network devices lies in the initramfs, a module of the kernel's.
pub const NET_DRIVER: &CStr = c"/bench/netfront.ko";

/// A script for busybox's shell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Script {
    /// What it is called.
    pub name: &'static str,
    /// Where it lies in the initramfs.
    pub path: &'static CStr,
    /// What it says.
    pub text: &'static str,
}

/// What runs before the scripts, outside their windows.
pub const SETUP: Script = Script { name: "setup", path: c"/bench/setup", text: include_str!("../scripts/setup.sh") };

/// The scripts that are measured, in the order of the numbers of their windows, which begin at [`marker::SCRIPTS`].
pub const SCRIPTS: [Script; 2] = [
    Script { name: "pipes", path: c"/bench/pipes", text: include_str!("../scripts/pipes.sh") },
    Script { name: "processes", path: c"/bench/processes", text: include_str!("../scripts/processes.sh") },
];

/// Windows of each metric. The one with the fewest instructions is the result: it has met the fewest timer interrupts.
pub const REPETITIONS: u32 = 5;

/// What the program is told to do by its first argument.
pub mod mode {
    /// Reach the point `INIT` and power off.
    pub const BOOT: &str = "boot";
    /// Run every metric and power off.
    pub const GUEST: &str = "guest";
    /// Read from the disks and power off.
    pub const DISKS: &str = "disks";
    /// Serve the guest that is told [`NETWORK`], and power off.
    pub const SERVE: &str = "serve";
    /// Measure TCP with the guest that is told [`SERVE`], and power off.
    pub const NETWORK: &str = "network";
    /// Measure TCP with the host as a guest, and power off. The next argument is the host's port.
    pub const HOST_GUEST: &str = "host-guest";
    /// Measure TCP with the host as the kernel that is alone on the machine, and power off. The next argument is as above.
    pub const HOST_ALONE: &str = "host-alone";
    /// Send packets of UDP to the address in the next argument, without an end. This is for a program beside others.
    pub const FLOOD: &str = "flood";
    /// Press the kernel's memory from several processes, and check what it holds. This is for a program beside others.
    pub const PRESS: &str = "press";
    /// Interrupt CPUs on which other processes run. This is for a program beside others.
    pub const INTERRUPT: &str = "interrupt";
    /// Run every script and power off.
    pub const SCRIPTS: &str = "scripts";
    /// Reach the point `INIT`, run the operations of `bench wall` by the clock, and power off.
    pub const WALL: &str = "wall";
    /// Reach the point `INIT`, say so, and wait for ever.
    pub const WAIT: &str = "wait";
}

/// What the program prints in the modes `boot`, `wall` and `wait` when it has reached the point.
pub const REACHED: &str = "microbench: init reached";
/// What lines begin with that say the guest's clock in nanoseconds, before and after all that is timed.
pub const CLOCK: [&str; 2] = ["microbench: clock begin ", "microbench: clock end "];
/// What lines begin with that have the name, the number of operations and the nanoseconds of something that was timed.
pub const TIMED: &str = "microbench: timed ";
/// What it prints when all went well.
pub const DONE: &str = "microbench: done";
