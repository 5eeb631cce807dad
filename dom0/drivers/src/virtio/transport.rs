//! The common configuration of a device (V 4.1.4.3): status, features, queues, its interrupt.

use super::{Layout, NotTaken, Region, feature};
use crate::hardware::{ConfigurationPorts, Registers};
use crate::pci::{Function, Message, Msix, msix_mask};
use disk::BusAddress;

/// Offsets in the common configuration.
mod at {
    pub(super) const DEVICE_FEATURE_SELECT: usize = 0;
    pub(super) const DEVICE_FEATURE: usize = 4;
    pub(super) const DRIVER_FEATURE_SELECT: usize = 8;
    pub(super) const DRIVER_FEATURE: usize = 12;
    pub(super) const CONFIG_VECTOR: usize = 16;
    pub(super) const STATUS: usize = 20;
    pub(super) const GENERATION: usize = 21;
    pub(super) const QUEUE_SELECT: usize = 22;
    pub(super) const QUEUE_SIZE: usize = 24;
    pub(super) const QUEUE_VECTOR: usize = 26;
    pub(super) const QUEUE_ENABLE: usize = 28;
    pub(super) const QUEUE_NOTIFY: usize = 30;
    pub(super) const QUEUE_PARTS: [usize; 3] = [32, 40, 48];
}

/// Bits of the status (V 2.1).
mod status {
    pub(super) const ACKNOWLEDGE: u8 = 1;
    pub(super) const DRIVER: u8 = 2;
    pub(super) const DRIVER_OK: u8 = 4;
    pub(super) const FEATURES_OK: u8 = 8;
    pub(super) const NEEDS_RESET: u8 = 64;
    pub(super) const FAILED: u8 = 128;
}

/// The entry of the message table for all queues and for changes of the configuration.
const VECTOR: u16 = 0;
/// How often the configuration is read at most, if it changes during each read.
const TRIES: u32 = 16;
/// The maximum number of queues that are used.
const QUEUES: usize = 2;

/// A device's registers, and its place on the bus. The driver uses the first queue, or the first two.
#[derive(Debug)]
pub struct Transport<C, R> {
    function: Function<C>,
    common: R,
    notify: R,
    device: Option<R>,
    table: R,
    msix: Msix,
    message: Message,
    notify_step: u32,
    /// Where each queue is notified.
    doorbells: [usize; QUEUES],
}

impl<C: ConfigurationPorts, R: Registers> Transport<C, R> {
    /// Maps the registers by `map`, and makes the device answer there. `message` becomes the device's interrupt when it is
    /// first started. Until then the device sends no interrupt, and accesses no memory that it was given.
    ///
    /// # Errors
    /// [`NotTaken::NotMapped`]: `map` has no window for some of the registers.
    pub fn open(
        function: Function<C>,
        layout: &Layout,
        message: Message,
        mut map: impl FnMut(Region) -> Option<R>,
    ) -> Result<Self, NotTaken> {
        let mut map = |region: Region| map(region).ok_or(NotTaken::NotMapped);
        let transport = Self {
            common: map(layout.common)?,
            notify: map(layout.notify)?,
            device: layout.device.map(&mut map).transpose()?,
            table: map(layout.table)?,
            msix: layout.msix,
            message,
            notify_step: layout.notify_step,
            doorbells: [0; QUEUES],
            function,
        };
        transport.function.answer();
        Ok(transport)
    }

    /// Returns the registers of the device's own configuration. `None` if the device has no such registers.
    pub(crate) const fn device(&self) -> Option<&R> {
        self.device.as_ref()
    }

    /// Begins a reset.
    pub(crate) fn begin_reset(&self) {
        self.common.write8(at::STATUS, 0);
    }

    /// Returns whether the reset has ended. The read also flushes the bus: after it, no write of the device is on its way.
    pub(crate) fn is_reset(&self) -> bool {
        self.common.read8(at::STATUS) == 0
    }

    /// Returns whether the device reports that it needs a reset (V 2.1.2).
    pub(crate) fn needs_reset(&self) -> bool {
        self.common.read8(at::STATUS) & status::NEEDS_RESET != 0
    }

    /// After a reset, tells the device that it has a driver, and negotiates features: of those offered, what `choose` returns,
    /// and those wanted of any device. Returns all features that were taken (V 3.1.1, steps 2 to 6).
    ///
    /// # Errors
    /// Why the device cannot be used.
    pub(crate) fn negotiate(&self, choose: impl FnOnce(u64) -> u64) -> Result<u64, &'static str> {
        self.common.write8(at::STATUS, status::ACKNOWLEDGE);
        self.common.write8(at::STATUS, status::ACKNOWLEDGE | status::DRIVER);
        let offered = self.offered();
        if offered & feature::VERSION_1 == 0 {
            return Err("does not offer version 1 of virtio");
        }
        let taken = offered & (choose(offered) | feature::WANTED);
        for (half, shift) in [(0, 0), (1, 32)] {
            self.common.write32(at::DRIVER_FEATURE_SELECT, half);
            self.common.write32(at::DRIVER_FEATURE, u32::try_from(taken >> shift & 0xffff_ffff).unwrap_or(0));
        }
        let so_far = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        self.common.write8(at::STATUS, so_far);
        if self.common.read8(at::STATUS) != so_far {
            return Err("does not accept the features it offered");
        }
        Ok(taken)
    }

    fn offered(&self) -> u64 {
        let half = |half| {
            self.common.write32(at::DEVICE_FEATURE_SELECT, half);
            u64::from(self.common.read32(at::DEVICE_FEATURE))
        };
        half(0) | half(1) << 32
    }

    /// Returns the maximum number of entries of a queue; 0 if the device has no such queue.
    pub(crate) fn queue_limit(&self, queue: u16) -> u16 {
        self.common.write16(at::QUEUE_SELECT, queue);
        self.common.read16(at::QUEUE_SIZE)
    }

    /// After [`Transport::negotiate`], tells the device the number of entries of each queue and where the queue is
    /// (descriptors, available part, used part), sets the interrupt, and starts the device (V 3.1.1, steps 7 and 8). `queues`
    /// has one or two queues, from number 0 on.
    ///
    /// # Errors
    /// Why the device cannot be used.
    pub(crate) fn begin(&mut self, queues: &[(u16, [BusAddress; 3])]) -> Result<(), &'static str> {
        self.function.enable_msix(&self.msix, &self.table, self.message);
        self.common.write16(at::CONFIG_VECTOR, VECTOR);
        // The register reads as another number if the device has no resources for an interrupt (V 4.1.5.1.2.2).
        if self.common.read16(at::CONFIG_VECTOR) != VECTOR {
            return Err("has no interrupt for changes of its configuration");
        }
        for (number, (entries, parts)) in (0..).zip(queues) {
            let doorbell = self.set_queue(number, *entries, parts)?;
            if let Some(slot) = self.doorbells.get_mut(usize::from(number)) {
                *slot = doorbell;
            }
        }
        self.function.set_bus_master(true);
        let done = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
        self.common.write8(at::STATUS, done);
        // Reading the status back makes sure that the write has arrived.
        if self.common.read8(at::STATUS) & (status::NEEDS_RESET | status::FAILED) != 0 {
            return Err("does not start");
        }
        Ok(())
    }

    /// Sets and enables a queue. Returns where the queue is notified.
    fn set_queue(&self, queue: u16, entries: u16, parts: &[BusAddress; 3]) -> Result<usize, &'static str> {
        let common = &self.common;
        common.write16(at::QUEUE_SELECT, queue);
        common.write16(at::QUEUE_SIZE, entries);
        common.write16(at::QUEUE_VECTOR, VECTOR);
        if common.read16(at::QUEUE_VECTOR) != VECTOR {
            return Err("has no interrupt for its queue");
        }
        if common.read16(at::QUEUE_SIZE) != entries {
            return Err("does not accept the size of its queue");
        }
        for (offset, part) in at::QUEUE_PARTS.into_iter().zip(*parts) {
            common.write64(offset, part.number());
        }
        let number = u64::from(common.read16(at::QUEUE_NOTIFY));
        let doorbell = usize::try_from(number * u64::from(self.notify_step)).unwrap_or(usize::MAX);
        if doorbell > self.notify.bytes().saturating_sub(2) || !doorbell.is_multiple_of(2) {
            return Err("wants to be notified outside its registers");
        }
        common.write16(at::QUEUE_ENABLE, 1);
        Ok(doorbell)
    }

    /// Gives the device up after a reset has ended: it can no longer access memory.
    pub(crate) fn give_up(&self) {
        self.common.write8(at::STATUS, status::FAILED);
        self.function.set_bus_master(false);
    }

    /// Notifies the device that a queue has new heads.
    pub(crate) fn notify(&self, queue: u16) {
        if let Some(doorbell) = self.doorbells.get(usize::from(queue)) {
            self.notify.write16(*doorbell, queue);
        }
    }

    /// Reads the device's own configuration with `read`, again if the configuration changed during the read (V 2.5.1).
    ///
    /// # Errors
    /// The configuration keeps changing.
    pub(crate) fn consistent<T>(&self, mut read: impl FnMut(&Self) -> T) -> Result<T, &'static str> {
        for _ in 0..TRIES {
            let before = self.common.read8(at::GENERATION);
            let value = read(self);
            if self.common.read8(at::GENERATION) == before {
                return Ok(value);
            }
        }
        Err("changes its configuration all the time")
    }

    /// Masks or unmasks the device's interrupt. An interrupt that was due while masked comes when it is unmasked.
    pub fn mask_interrupt(&self, masked: bool) {
        msix_mask(&self.table, usize::from(VECTOR), masked);
    }
}
