//! A virtio network device (V 5.1) as a [`network::Uplink`].
//!
//! Queue 0 receives, queue 1 sends; neither the control queue nor further pairs of queues are used. Frames are copied into and
//! out of memory of the driver. The device interrupts for frames that arrive, and only after [`Uplink::rearm`]. Buffers whose
//! frames were taken go back to the device together: when no other frame has arrived, or when the device has less than half of
//! all buffers.
//!
//! ```text
//! New -> reset -> Resetting -> (register reads 0) negotiate, read limits, set the queues -> Running
//!                     | asked too often, or the device is not usable                         | broken, NEEDS_RESET
//!                     v                                                                      v
//!                   Dead                                                                   reset
//! ```
//!
//! A head, a length or a number of buffers that violates the protocol breaks the device: nothing that it writes is looked at
//! until it is reset. A frame that contradicts its header is dropped and counted.

mod config;
mod header;
mod receive;
mod send;

use crate::hardware::{ConfigurationPorts, DmaMemory, Registers};
use crate::virtio::{Broken, Life, MOST, NotTaken, QUEUE_BYTES, Transport, descriptor};
use config::{Limits, feature};
use network::{FrameInfo, Full, MAX_PACKET, Mac, Offloads, Reset, Uplink};
use receive::Receiver;
use send::Sender;

/// Bytes of memory for the receive queue and its buffers.
pub const RECEIVE_BYTES: usize = receive::MEMORY_BYTES;
/// Bytes of memory for the send queue and its buffers.
pub const SEND_BYTES: usize = send::MEMORY_BYTES;

/// The queues.
const RECEIVE: u16 = 0;
const SEND: u16 = 1;

/// Frames that were dropped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dropped {
    /// Frames from the device that contradict their headers, or that are too long or too short.
    pub received: u64,
    /// Frames to be sent that are too short, or that ask for what the device does not do.
    pub sent: u64,
}

/// The driver of one network device.
#[derive(Debug)]
pub struct Net<C, R, M> {
    transport: Transport<C, R>,
    receiver: Receiver<M>,
    sender: Sender<M>,
    life: Life,
    /// Whether the device has violated the protocol. Then nothing that it writes is looked at until it is reset.
    broken: bool,
    limits: Limits,
    /// Whether a frame was found since the queue was last found empty.
    came: bool,
    /// Whether the last search found no frame at all.
    in_vain: bool,
    dropped: Dropped,
}

impl<C: ConfigurationPorts, R: Registers, M: DmaMemory> Net<C, R, M> {
    /// Makes the driver of a network device, which [`Uplink::reset`] then starts. The memory, of at least [`RECEIVE_BYTES`] and
    /// [`SEND_BYTES`], belongs to the device until [`Net::into_memory`].
    ///
    /// # Errors
    /// [`NotTaken::NoRoom`]: the memory is too short, or no memory is left on the heap.
    pub fn new(transport: Transport<C, R>, receive: M, send: M) -> Result<Self, NotTaken> {
        Ok(Self {
            transport,
            receiver: Receiver::new(receive).ok_or(NotTaken::NoRoom)?,
            sender: Sender::new(send).ok_or(NotTaken::NoRoom)?,
            life: Life::New,
            broken: false,
            limits: config::UNKNOWN,
            came: false,
            in_vain: false,
            dropped: Dropped::default(),
        })
    }

    /// Returns how many frames were dropped since the driver was made.
    pub const fn dropped(&self) -> Dropped {
        self.dropped
    }

    /// Masks or unmasks the device's interrupt: for a device that interrupts without reason, and before its port is closed.
    pub fn mask_interrupt(&self, masked: bool) {
        self.transport.mask_interrupt(masked);
    }

    /// Begins or continues to stop the device, in steps like [`Uplink::reset`]. After [`Reset::Done`], the device accesses no
    /// memory and sends no interrupt until [`Uplink::reset`] starts it again.
    pub fn stop(&mut self) -> Reset {
        let stopped = self.life.stop(&self.transport);
        if stopped == Reset::Done {
            self.forget();
        }
        stopped
    }

    /// Returns the memory that [`Net::new`] was given. `None` if the device was started and not stopped; the memory is dropped.
    pub fn into_memory(self) -> Option<[M; 2]> {
        (self.life == Life::New)
            .then(|| [self.receiver.queue, self.sender.queue].map(crate::virtio::Queue::into_memory))
    }

    fn runs(&self) -> bool {
        self.life == Life::Running && !self.broken
    }

    fn forget(&mut self) {
        self.receiver.forget();
        self.sender.forget();
        (self.broken, self.came, self.in_vain) = (false, false, false);
    }

    /// Starts the device after a reset. Fails with the reason why the device cannot be used.
    fn start(&mut self) -> Result<(), &'static str> {
        let bytes = self.transport.device().map_or(0, Registers::bytes);
        let features = self.transport.negotiate(|offered| config::choose(offered, bytes))?;
        self.limits = Limits::read(&self.transport, features)?;
        self.forget();
        let sizes = [RECEIVE, SEND].map(|queue| {
            let limit = self.transport.queue_limit(queue).min(MOST);
            if limit == 0 { 0 } else { 1 << limit.ilog2() }
        });
        let [received, sent] = sizes;
        self.receiver.begin(received, &self.limits)?;
        self.sender.begin(sent, &self.limits)?;
        let parts = [(received, self.receiver.queue.parts()), (sent, self.sender.queue.parts())];
        self.transport.begin(&parts)?;
        self.restock();
        Ok(())
    }

    /// Shows the device the buffers whose frames were taken.
    fn restock(&mut self) {
        if self.receiver.queue.expose() {
            self.transport.notify(RECEIVE);
        }
    }
}

impl<C: ConfigurationPorts, R: Registers, M: DmaMemory> Uplink for Net<C, R, M> {
    /// Returns the address that the device had at its last start; zeroes before the first one.
    fn mac(&self) -> Mac {
        self.limits.mac
    }

    fn mtu(&self) -> u16 {
        self.limits.mtu
    }

    /// Returns whether the device is running and its link is up. Reads a register.
    fn has_link(&self) -> bool {
        self.runs() && config::link(self.transport.device(), self.limits.features)
    }

    /// Returns the offloads that the device had at its last start.
    fn offloads(&self) -> Offloads {
        let cuts = |feature| self.limits.has(feature) && self.sender.takes_all();
        Offloads {
            checksum: self.limits.has(feature::CSUM),
            tcp4: cuts(feature::HOST_TSO4),
            tcp6: cuts(feature::HOST_TSO6),
        }
    }

    /// As [`Uplink::send`]. A frame that is too short, or that asks for what the device does not do, is dropped and counted
    /// ([`Dropped::sent`]).
    fn send(&mut self, frame: &[u8], info: FrameInfo) -> Result<(), Full> {
        let most = if info.segmentation.is_some() { MAX_PACKET } else { self.limits.frame() };
        if !self.runs() || frame.len() > most {
            return Err(Full);
        }
        let Ok(header) = header::outgoing(frame, info, &self.limits) else {
            self.dropped.sent += 1;
            return Ok(());
        };
        match self.sender.send(header, frame) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Full),
            Err(Broken) => {
                self.broken = true;
                Err(Full)
            }
        }
    }

    fn kick(&mut self) {
        if self.runs() && self.sender.queue.expose() {
            self.transport.notify(SEND);
        }
    }

    fn receive(&mut self, into: &mut [u8]) -> Option<(usize, FrameInfo)> {
        if self.runs() && self.receiver.is_low() {
            self.restock();
        }
        // Ends: the device gets no buffer back before the loop has ended.
        while self.runs() {
            match self.receiver.take(into) {
                Ok(Some((header, bytes))) => {
                    self.came = true;
                    let frame = into.get(..bytes).unwrap_or_default();
                    if let Ok(info) = header::incoming(&header, frame, &self.limits) {
                        return Some((bytes, info));
                    }
                    self.dropped.received += 1;
                }
                Ok(None) => {
                    self.restock();
                    break;
                }
                Err(Broken) => self.broken = true,
            }
        }
        self.in_vain = !core::mem::take(&mut self.came);
        None
    }

    fn rearm(&mut self) -> bool {
        self.runs() && self.receiver.queue.rearm()
    }

    /// Reads the device's status only if [`Uplink::receive`] has just found no frame at all: a device that needs a reset sends
    /// an interrupt without a frame. In a virtual machine, reading a register costs more than the rest of a frame.
    fn needs_reset(&self) -> bool {
        !self.runs() || self.in_vain && self.transport.needs_reset()
    }

    fn reset(&mut self) -> Reset {
        let quiet = self.life.quiesce(&self.transport);
        if quiet != Reset::Done {
            return quiet;
        }
        let started = self.start();
        self.life.begin(&self.transport, started)
    }
}
