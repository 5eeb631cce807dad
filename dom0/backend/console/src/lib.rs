//! The console back end: takes what a guest prints, and gives the guest what is typed for it (ABI io 2).
//!
//! Touches: one guest's console page, through [`SharedPage`]; a bounded memory of what the guest printed.
//! Never touches: event channels (it returns whether to notify), terminals (it hands out bytes), clocks.
//! Keeps: a guest that prints is never held up by a reader of its output. Output is taken even if
//! nothing can be done with it, since a stock kernel spins with interrupts off while its ring is full.
//! Memory per guest is fixed: the oldest output is dropped, and counted.
//!
//! A terminal attached to one guest gets the bytes unchanged ([`Scrollback::since`]). On a display that
//! several guests share, each guest's output goes through a [`LineWriter`], which escapes all control
//! characters.
#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

extern crate alloc;

mod edit;
mod lines;
mod scrollback;

use alloc::collections::VecDeque;

use ring_protocol::console::{BackEnd, set_connected};
use ring_protocol::{BadIndices, SharedPage};

pub use edit::{LineEditor, Typed};
pub use lines::{LINE_MAX, LineWriter};
pub use scrollback::{Scrollback, Since};

/// Most keystrokes kept for a guest that does not read them.
pub const TYPED_MAX: usize = 4096;
/// A good budget for [`Console::serve`]: as many bytes as a ring holds.
pub const BUDGET: usize = 2048;

/// Bytes of the heap that a console uses for as long as it exists, whatever its guest does: kept output, kept
/// keystrokes, the unfinished line of a [`LineWriter`], and the heap's overhead for each.
#[must_use]
pub const fn console_bytes(scrollback_bytes: usize) -> usize {
    scrollback_bytes + TYPED_MAX + 2 * LINE_MAX + 512
}

/// Bytes that one turn of a console may allocate in addition: a line with every byte escaped, which grows by doubling.
pub const TURN_BYTES: usize = 32 * LINE_MAX;

/// Why a console cannot be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachError {
    /// The indices in the page contradict each other.
    BadIndices(BadIndices),
    /// There is not enough memory for the guest's output.
    NoMemory,
}

/// What the caller of [`Console::serve`] has to do next.
#[must_use = "a guest that is not notified waits for ever"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Served {
    /// Whether to send to the guest's event channel, because an index moved. Never send otherwise: a stock
    /// kernel answers events without cause with delays.
    pub notify: bool,
    /// Whether more output waits. Other guests get their turn first; then serve again without waiting for an event.
    pub again: bool,
    /// Bytes taken from the guest.
    pub taken: usize,
}

/// One guest's console.
#[derive(Clone, Debug)]
pub struct Console {
    ends: BackEnd,
    typed: VecDeque<u8>,
    printed: Scrollback,
    stopped: Option<BadIndices>,
}

impl Console {
    /// Connects to a guest's console page where the last back end stopped, if there was one. The caller serves
    /// at once and notifies the guest once, because output may have been waiting.
    ///
    /// All memory that the console ever uses is allocated here: see [`console_bytes`].
    ///
    /// # Errors
    /// The indices in the page contradict each other, or there is no memory. The page is as it was then.
    pub fn attach<P: SharedPage>(page: &P, scrollback_bytes: usize) -> Result<Self, AttachError> {
        let mut typed = VecDeque::new();
        typed.try_reserve_exact(TYPED_MAX).map_err(|_| AttachError::NoMemory)?;
        let printed = Scrollback::new(scrollback_bytes).map_err(|_| AttachError::NoMemory)?;
        // This marks the page as served, so it comes last: nothing after it can fail.
        let ends = BackEnd::attach(page).map_err(AttachError::BadIndices)?;
        Ok(Self { ends, typed, printed, stopped: None })
    }

    /// Connects to the page of the guest's new domain. Kept output stays; kept keystrokes are dropped.
    ///
    /// # Errors
    /// The indices in the page contradict each other; nothing has changed then.
    pub fn reattach<P: SharedPage>(&mut self, page: &P) -> Result<(), BadIndices> {
        self.ends = BackEnd::attach(page)?;
        self.typed.clear();
        self.stopped = None;
        Ok(())
    }

    /// Takes up to `budget` bytes of output, keeps them and passes each piece to `sink`; gives the guest the keystrokes
    /// that its ring has room for. To be called on the guest's event, after [`type_in`](Self::type_in), and while
    /// `again` is set.
    ///
    /// # Errors
    /// The guest's indices are impossible. Its console is no longer served; every later call returns the same error.
    pub fn serve<P: SharedPage>(
        &mut self,
        page: &P,
        budget: usize,
        sink: impl FnMut(&[u8]),
    ) -> Result<Served, BadIndices> {
        if let Some(why) = self.stopped {
            return Err(why);
        }
        self.exchange(page, budget, sink).inspect_err(|why| {
            self.stopped = Some(*why);
            set_connected(page, false);
        })
    }

    fn exchange<P: SharedPage>(
        &mut self,
        page: &P,
        budget: usize,
        mut sink: impl FnMut(&[u8]),
    ) -> Result<Served, BadIndices> {
        let mut buffer = [0; 512];
        let mut taken = 0;
        while taken < budget {
            let room = buffer.len().min(budget - taken);
            let count = self.ends.output.read(page, buffer.get_mut(..room).unwrap_or_default())?;
            if count == 0 {
                break;
            }
            taken += count;
            let bytes = buffer.get(..count).unwrap_or_default();
            self.printed.push(bytes);
            sink(bytes);
        }
        let given = self.give_typed(page)?;
        let again = self.ends.output.available(page)? > 0;
        Ok(Served { notify: taken > 0 || given > 0, again, taken })
    }

    fn give_typed<P: SharedPage>(&mut self, page: &P) -> Result<usize, BadIndices> {
        let mut given = 0;
        loop {
            let (front, _) = self.typed.as_slices();
            let count = self.ends.input.write(page, front)?;
            if count == 0 {
                return Ok(given);
            }
            self.typed.drain(..count);
            given += count;
        }
    }

    /// Queues keystrokes for the guest; returns how many were taken. There is no room for the rest, because
    /// the guest does not read: the caller drops it, or tries again later.
    pub fn type_in(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(TYPED_MAX.saturating_sub(self.typed.len()));
        self.typed.extend(bytes.iter().take(taken));
        taken
    }

    /// The last output of the guest.
    #[must_use]
    pub const fn scrollback(&self) -> &Scrollback {
        &self.printed
    }

    /// Why this console is no longer served; `None` while it is.
    #[must_use]
    pub const fn stopped(&self) -> Option<BadIndices> {
        self.stopped
    }
}
