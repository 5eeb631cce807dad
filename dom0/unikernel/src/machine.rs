//! The machine's disks and network devices, with drivers on real registers. The functions here are safe, because the drivers
//! fulfil the contracts of [`Ports::open`] and [`RegisterWindow::map`].
//!
//! Deliberately absent: access to configuration space or registers for anything but a driver.

use crate::devices::{Ports, RegisterWindow, message_interrupt};
use crate::dma::Dma;
use crate::events::Channel;
use alloc::vec::Vec;
use drivers::blk::MEMORY_BYTES;
use drivers::net::{RECEIVE_BYTES, SEND_BYTES};
use drivers::pci::{Found, Function, Scan};
use drivers::virtio::{Kind, Layout, NotTaken, Transport};
use drivers::{Blk, Net};
use hypercall_abi::Errno;

/// A virtio disk.
pub type Disk = Blk<Ports, RegisterWindow, Dma>;
/// A virtio network device.
pub type Network = Net<Ports, RegisterWindow, Dma>;

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

/// Opens the registers of a virtio device of a kind, for its driver. The device raises the channel.
fn open(found: &Found, kind: Kind) -> Result<(Transport<Ports, RegisterWindow>, Channel), NotTaken> {
    // SAFETY: only the driver uses these ports. It lets the device master the bus after a reset that was read back, and tells
    // the device of no memory but the driver's own, which is a `Dma`, and what the driver is given as a `BusAddress`.
    let ports = unsafe { Ports::open() }.map_err(|_| NotTaken::NotMapped)?;
    let function = Function::new(ports, found.address);
    // dom0 does not know where RAM is, so it names none. The hypervisor knows, and maps no RAM as registers.
    let layout = Layout::find(&function, kind, &[])?;
    let (channel, message) = message_interrupt().map_err(|_| NotTaken::NoInterrupt)?;
    // SAFETY: according to the layout these are registers of the device, and only the driver has the window.
    let map = |region: drivers::virtio::Region| unsafe { RegisterWindow::map(region.address, region.bytes) }.ok();
    Ok((Transport::open(function, &layout, message, map)?, channel))
}

fn memory(bytes: usize) -> Result<Dma, NotTaken> {
    Dma::allocate(bytes.div_ceil(4096)).map_err(|_| NotTaken::NoRoom)
}

/// Makes a driver for a virtio disk. [`disk::Device::reset`] then starts the disk. The disk raises the channel when requests
/// have ended.
///
/// # Errors
/// Why the disk is not taken.
pub fn open_disk(found: &Found) -> Result<(Disk, Channel), NotTaken> {
    let (transport, channel) = open(found, Kind::BLOCK)?;
    Ok((Blk::new(transport, memory(MEMORY_BYTES)?)?, channel))
}

/// Makes a driver for a virtio network device. [`network::Uplink::reset`] then starts the device. The device raises the channel
/// when frames have arrived.
///
/// # Errors
/// Why the device is not taken.
pub fn open_network(found: &Found) -> Result<(Network, Channel), NotTaken> {
    let (transport, channel) = open(found, Kind::NET)?;
    let receive = memory(RECEIVE_BYTES)?;
    let send = match memory(SEND_BYTES) {
        Ok(send) => send,
        Err(why) => {
            // SAFETY: no device was told of the memory.
            unsafe { receive.give_back() };
            return Err(why);
        }
    };
    Ok((Net::new(transport, receive, send)?, channel))
}

/// Gives up a disk that did not start. If the disk does not stop immediately, its memory is never freed.
pub fn give_up_disk(mut disk: Disk, channel: Channel) {
    disk.mask_interrupt(true);
    if disk.stop() == disk::Reset::Done
        && let Some(memory) = disk.into_memory()
    {
        // SAFETY: `stop` has returned `Done`: the disk was reset, and the reset was read back.
        unsafe { memory.give_back() };
    }
    drop(channel);
}

/// Gives up a network device that did not start. If the device does not stop immediately, its memory is never freed.
pub fn give_up_network(mut network: Network, channel: Channel) {
    network.mask_interrupt(true);
    if network.stop() == network::Reset::Done
        && let Some(memories) = network.into_memory()
    {
        for memory in memories {
            // SAFETY: as in `give_up_disk`.
            unsafe { memory.give_back() };
        }
    }
    drop(channel);
}
