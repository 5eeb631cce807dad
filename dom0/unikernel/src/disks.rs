//! The machine's disks, with drivers on real registers. The functions here are safe, because the drivers fulfil the contracts
//! of [`Ports::open`] and [`RegisterWindow::map`].
//!
//! Deliberately absent: access to configuration space or registers for anything but a driver.

use crate::devices::{Ports, RegisterWindow, message_interrupt};
use crate::dma::Dma;
use crate::events::Channel;
use alloc::vec::Vec;
use disk::Reset;
use drivers::Blk;
use drivers::blk::MEMORY_BYTES;
use drivers::pci::{Found, Function, Scan};
use drivers::virtio::{Kind, Layout, NotTaken, Transport};
use hypercall_abi::Errno;

/// A virtio disk.
pub type Disk = Blk<Ports, RegisterWindow, Dma>;

/// The memory of a disk's driver, in pages.
const PAGES: usize = MEMORY_BYTES.div_ceil(4096);
/// The maximum number of functions that are looked at: as many as eight full buses have.
const MOST: usize = 2048;

/// Returns the functions of the machine's PCI buses, at most 2,048.
///
/// # Errors
/// Why the hypervisor refused.
pub fn functions() -> Result<Vec<Found>, Errno> {
    // SAFETY: a scan only reads.
    let ports = unsafe { Ports::open() }?;
    Ok(Scan::new(&ports).take(MOST).collect())
}

/// Makes a driver for a virtio disk. [`disk::Device::reset`] then starts the disk. The disk raises the channel when requests
/// have ended.
///
/// # Errors
/// Why the disk is not taken.
pub fn open(found: &Found) -> Result<(Disk, Channel), NotTaken> {
    // SAFETY: only the driver uses these ports. It lets the disk master the bus after a reset that was read back, and tells it
    // of no memory but its own, which is a `Dma`, and what it is given as a `BusAddress`.
    let ports = unsafe { Ports::open() }.map_err(|_| NotTaken::NotMapped)?;
    let function = Function::new(ports, found.address);
    // dom0 does not know where RAM is, so it names none. The hypervisor knows, and maps no RAM as registers.
    let layout = Layout::find(&function, Kind::BLOCK, &[])?;
    let (channel, message) = message_interrupt().map_err(|_| NotTaken::NoInterrupt)?;
    // SAFETY: according to the layout these are registers of the disk, and only the driver has the window.
    let map = |region: drivers::virtio::Region| unsafe { RegisterWindow::map(region.address, region.bytes) }.ok();
    let transport = Transport::open(function, &layout, message, map)?;
    let memory = Dma::allocate(PAGES).map_err(|_| NotTaken::NoRoom)?;
    Ok((Blk::new(transport, memory)?, channel))
}

/// Gives up a disk that did not start. If the disk does not stop immediately, its memory is never freed.
pub fn give_up(mut disk: Disk, channel: Channel) {
    disk.mask_interrupt(true);
    if disk.stop() == Reset::Done
        && let Some(memory) = disk.into_memory()
    {
        // SAFETY: `stop` has returned `Done`: the disk was reset, and the reset was read back.
        unsafe { memory.give_back() };
    }
    drop(channel);
}
