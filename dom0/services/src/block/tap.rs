//! A device that serves guests, with a tap: dom0 reads a few sectors between the guests' requests, for a partition table.
//!
//! The lowest byte of the tap's tickets is one that the back end never uses. Memory that the device may still write is not
//! given back: the tap keeps the memory of a read until the read has ended or the device was reset.

use alloc::boxed::Box;
use alloc::rc::Rc;
use alloc::vec::Vec;
use core::cell::{Cell, RefCell};
use core::fmt;
use core::mem::ManuallyDrop;

use block_backend::LATE_NS;
use disk::{Device, Full, Operation, Outcome, Piece, Reset, SECTOR, Shape, Ticket};

use super::host::BlockHost;
use crate::signal::{Waiters, before};
use disk::OwnMemory;
use ring_protocol::SharedPage;

/// The lowest byte of the tap's tickets. In tickets of the back end, that byte is at most 65.
const LOWEST: u32 = 255;
/// Nanoseconds until the next try of a read for which the device or the tap had no room.
const RETRY_NS: u64 = 1_000_000;

/// A read of the tap.
enum Read<M> {
    Idle,
    /// The device has the read. The memory is given back only after the device has ended the read.
    Begun {
        ticket: Ticket,
        memory: ManuallyDrop<M>,
        awaited: bool,
    },
    /// The read has ended. The memory is there if the read has succeeded.
    Ended(Ticket, Option<M>),
}

struct Tapped<M> {
    device: RefCell<Box<dyn Device>>,
    read: RefCell<Read<M>>,
    number: Cell<u32>,
    ended: Waiters,
}

/// A device with a tap. Clones stand for the same device.
pub(super) struct Tap<M>(Rc<Tapped<M>>);

impl<M> Clone for Tap<M> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

impl<M> fmt::Debug for Tap<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.device.borrow().fmt(f)
    }
}

impl<M: OwnMemory + SharedPage> Tap<M> {
    pub(super) fn new(device: Box<dyn Device>) -> Self {
        let device = RefCell::new(device);
        let (read, ended) = (RefCell::new(Read::Idle), Waiters::default());
        Self(Rc::new(Tapped { device, read, number: Cell::new(0), ended }))
    }

    /// Reads `sectors` sectors from `first` on. Calls `kick` so that the device's queue gets a turn soon.
    ///
    /// # Errors
    /// Why the sectors cannot be read.
    pub(super) async fn read<H>(
        &self,
        host: &H,
        (first, sectors): (u64, u32),
        kick: impl Fn(),
    ) -> Result<Vec<u8>, &'static str>
    where
        H: BlockHost<Memory = M>,
    {
        const NO_MEMORY: &str = "no memory is left to read the partition table";
        let bytes = sectors as usize * SECTOR;
        let mut memory = host.allocate(bytes.div_ceil(4096)).ok_or(NO_MEMORY)?;
        let mut read = Vec::new();
        read.try_reserve_exact(bytes).map_err(|_| NO_MEMORY)?;
        read.resize(bytes, 0);
        let deadline_ns = host.now_ns().saturating_add(LATE_NS);
        let late = "the device does not answer";
        let ticket = loop {
            match self.begin(first, sectors, memory) {
                Ok(ticket) => break ticket,
                Err(_) if host.now_ns() >= deadline_ns => return Err(late),
                Err(back) => memory = back,
            }
            host.sleep_until(host.now_ns().saturating_add(RETRY_NS)).await;
        };
        let _awaited = Awaited { tap: self, ticket };
        kick();
        let ended = self.0.ended.until(|| self.take(ticket));
        let memory = before(host.sleep_until(deadline_ns), ended).await.ok_or(late)?;
        memory.ok_or("the partition table cannot be read")?.read(0, &mut read);
        Ok(read)
    }

    /// Begins a read and returns its ticket. Fails with the memory if the device has no room or another read is under way.
    fn begin(&self, first: u64, sectors: u32, memory: M) -> Result<Ticket, M> {
        let mut read = self.0.read.borrow_mut();
        if !matches!(*read, Read::Idle) {
            return Err(memory);
        }
        let number = self.0.number.get();
        let ticket = Ticket(number << 8 | LOWEST);
        let pieces = [Piece { address: memory.address(), bytes: sectors * 512 }];
        let mut device = self.0.device.borrow_mut();
        if device.submit(ticket, Operation::Read { sector: first, pieces: &pieces }).is_err() {
            return Err(memory);
        }
        device.kick();
        self.0.number.set(number.wrapping_add(1));
        *read = Read::Begun { ticket, memory: ManuallyDrop::new(memory), awaited: true };
        Ok(ticket)
    }

    /// Takes the result of a read that has ended: its memory, or an inner `None` if the read has failed. `None` before that.
    fn take(&self, ticket: Ticket) -> Option<Option<M>> {
        let mut read = self.0.read.borrow_mut();
        match core::mem::replace(&mut *read, Read::Idle) {
            Read::Ended(ended, memory) if ended == ticket => Some(memory),
            other => {
                *read = other;
                None
            }
        }
    }

    /// Ends the read with this ticket, if there is one.
    fn end(&self, ended: Ticket, outcome: Outcome) {
        let mut read = self.0.read.borrow_mut();
        match core::mem::replace(&mut *read, Read::Idle) {
            Read::Begun { ticket, memory, awaited } if ticket == ended => {
                let memory = Some(ManuallyDrop::into_inner(memory)).filter(|_| outcome == Outcome::Good);
                if awaited {
                    *read = Read::Ended(ticket, memory);
                }
            }
            other => *read = other,
        }
        drop(read);
        self.0.ended.wake();
    }

    /// Ends the read that the device has, because the device was reset. If `dead`, the device may still write into the memory,
    /// which is kept for ever.
    fn lose(&self, dead: bool) {
        let begun = match &*self.0.read.borrow() {
            Read::Begun { ticket, awaited, .. } => Some((*ticket, *awaited)),
            _ => None,
        };
        let Some((ticket, awaited)) = begun else { return };
        if dead {
            self.0.read.replace(if awaited { Read::Ended(ticket, None) } else { Read::Idle });
            self.0.ended.wake();
        } else {
            self.end(ticket, Outcome::Failed);
        }
    }
}

/// A read that somebody waits for, until this value is dropped.
struct Awaited<'a, M> {
    tap: &'a Tap<M>,
    ticket: Ticket,
}

impl<M> Drop for Awaited<'_, M> {
    fn drop(&mut self) {
        let mut read = self.tap.0.read.borrow_mut();
        match &mut *read {
            Read::Begun { ticket, awaited, .. } if *ticket == self.ticket => *awaited = false,
            Read::Ended(ticket, _) if *ticket == self.ticket => *read = Read::Idle,
            _ => {}
        }
    }
}

impl<M: OwnMemory + SharedPage> Device for Tap<M> {
    fn shape(&self) -> Shape {
        self.0.device.borrow().shape()
    }

    fn submit(&mut self, ticket: Ticket, operation: Operation<'_>) -> Result<(), Full> {
        self.0.device.borrow_mut().submit(ticket, operation)
    }

    fn kick(&mut self) {
        self.0.device.borrow_mut().kick();
    }

    fn completed(&mut self) -> Option<(Ticket, Outcome)> {
        loop {
            let (ticket, outcome) = self.0.device.borrow_mut().completed()?;
            if ticket.0 & 0xff != LOWEST {
                return Some((ticket, outcome));
            }
            self.end(ticket, outcome);
        }
    }

    fn rearm(&mut self) -> bool {
        self.0.device.borrow_mut().rearm()
    }

    fn needs_reset(&self) -> bool {
        self.0.device.borrow().needs_reset()
    }

    fn reset(&mut self) -> Reset {
        let reset = self.0.device.borrow_mut().reset();
        match reset {
            Reset::Pending => {}
            Reset::Done => self.lose(false),
            Reset::Dead(_) => self.lose(true),
        }
        reset
    }
}
