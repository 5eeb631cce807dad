//! Event channels, 2-level format (ABI core 5): the shared pending and mask bits, the upcall, and the tasks that wait for
//! ports.
//!
//! The unikernel runs with upcalls masked, and [`crate::tasks`] checks the pending bits before every turn of a task. A handler
//! set with [`on_event`] is called during this check. In test guests that unmask upcalls, the handler is called during the
//! upcall.

use crate::boot::Boot;
use crate::hypercall;
use crate::memory::{PAGE, Window};
use crate::sync::MaskMutex;
use alloc::vec::Vec;
use core::future::Future;
use core::pin::Pin;
use core::sync::atomic::{AtomicPtr, AtomicU8, AtomicU64, Ordering};
use core::task::{Context, Poll, Waker};
use hypercall_abi::shared::{offset, vcpu_info};
use hypercall_abi::{Errno, domid};

/// The mapped shared_info page; null before [`init`].
static SHARED: AtomicPtr<u8> = AtomicPtr::new(core::ptr::null_mut());

/// The state of a port of this domain.
#[derive(Default)]
struct Slot {
    call: Option<fn(u32)>,
    /// Whether an event of the port was seen since the port was opened or the last [`wait`] ended, whichever was later.
    fired: bool,
    /// How many events of the port were seen since the port was opened.
    count: u64,
    waiting: Option<Waker>,
}

static SLOTS: MaskMutex<Vec<Slot>> = MaskMutex::new(Vec::new());

/// Maps the shared_info page.
///
/// # Safety
/// Must be called only once, after the memory of the unikernel is set up.
///
/// # Panics
/// If the hypervisor refuses to show the page.
pub(crate) unsafe fn init(boot: &Boot) {
    let frame = boot.info().shared_info / PAGE;
    let window = Window::map(&[frame], domid::SELF, true);
    let window = window.unwrap_or_else(|e| panic!("shared_info is not mapped: {e:?}"));
    SHARED.store(window.leak(), Ordering::Release);
}

/// The byte at an offset of the shared page; `None` before [`init`].
fn byte(offset: usize) -> Option<&'static AtomicU8> {
    let page = SHARED.load(Ordering::Acquire);
    // SAFETY: once set, the page stays mapped; callers pass offsets below 4096. The hypervisor writes the byte too, hence an
    // atomic.
    (!page.is_null()).then(|| unsafe { AtomicU8::from_ptr(page.add(offset)) })
}

/// The word at an offset of the shared page; `None` before [`init`].
fn word(offset: usize) -> Option<&'static AtomicU64> {
    debug_assert!(offset.is_multiple_of(8));
    let page = SHARED.load(Ordering::Acquire);
    // SAFETY: as in `byte`, and callers pass aligned offsets.
    (!page.is_null()).then(|| unsafe { AtomicU64::from_ptr(page.add(offset).cast()) })
}

/// The word that holds the bit of `port` in the bit array at offset `array`, and a mask with this bit. `None` if there is no
/// such port, or before [`init`].
fn port_bit(array: usize, port: u32) -> Option<(&'static AtomicU64, u64)> {
    let index = usize::try_from(port / 64).ok().filter(|&index| index < 64)?;
    Some((word(array + index * 8)?, 1 << (port % 64)))
}

/// A pointer to vcpu 0's time record (ABI core 6.1); null before [`init`].
pub(crate) fn time_record() -> *const u8 {
    let page = SHARED.load(Ordering::Acquire);
    if page.is_null() { page } else { page.wrapping_add(vcpu_info::TIME) }
}

/// A pointer to the shared_info page; null before [`init`].
#[must_use]
pub fn shared_page() -> *mut u8 {
    SHARED.load(Ordering::Acquire)
}

/// The address of the last page fault, as the hypervisor recorded it; 0 before [`init`].
#[must_use]
pub fn page_fault_address() -> u64 {
    word(vcpu_info::CR2).map_or(0, |word| word.load(Ordering::Relaxed))
}

/// Masks upcalls, and returns the previous mask. Before [`init`], returns 1, because upcalls are masked at first (ABI core
/// 1.3).
pub fn mask_upcalls() -> u8 {
    byte(vcpu_info::UPCALL_MASK).map_or(1, |mask| mask.swap(1, Ordering::AcqRel))
}

/// Restores the mask that [`mask_upcalls`] returned. If this unmasks, pending events are delivered (ABI core 3.8).
pub fn restore_upcalls(mask: u8) {
    if mask == 0 {
        unmask_upcalls();
    }
}

/// Unmasks upcalls. If an upcall is pending, makes a hypercall that has no effect of its own: the hypervisor delivers the
/// upcall before the hypercall returns.
pub fn unmask_upcalls() {
    if let Some(mask) = byte(vcpu_info::UPCALL_MASK) {
        mask.store(0, Ordering::SeqCst);
        if upcall_pending() {
            hypercall::version();
        }
    }
}

/// The current upcall mask; 1 before [`init`].
#[must_use]
pub fn upcall_mask() -> u8 {
    byte(vcpu_info::UPCALL_MASK).map_or(1, |mask| mask.load(Ordering::Acquire))
}

/// Whether the hypervisor has marked an upcall as pending.
#[must_use]
pub fn upcall_pending() -> bool {
    byte(vcpu_info::UPCALL_PENDING).is_some_and(|pending| pending.load(Ordering::SeqCst) != 0)
}

/// Handles the event upcall. Upcalls are masked while this runs (ABI core 3.8); the loop in [`scan`] handles events that arrive
/// meanwhile.
pub(crate) fn upcall() {
    scan();
}

/// As long as an upcall is pending, takes the selector, whose bits name words of 64 ports, and handles each port in these words
/// that is pending and not masked.
pub fn scan() {
    let (Some(pending), Some(selector)) = (byte(vcpu_info::UPCALL_PENDING), word(vcpu_info::PENDING_SEL)) else {
        return;
    };
    while pending.swap(0, Ordering::AcqRel) != 0 {
        let selected = selector.swap(0, Ordering::AcqRel);
        for index in bits(selected) {
            scan_word(index);
        }
    }
}

fn scan_word(index: u32) {
    let at = usize::try_from(index).unwrap_or(0) * 8;
    let (Some(pending), Some(mask)) = (word(offset::EVTCHN_PENDING + at), word(offset::EVTCHN_MASK + at)) else {
        return;
    };
    let ready = pending.load(Ordering::Acquire) & !mask.load(Ordering::Acquire);
    for bit in bits(ready) {
        pending.fetch_and(!(1 << bit), Ordering::AcqRel);
        dispatch(index * 64 + bit);
    }
}

/// The numbers of the set bits, from the lowest on.
fn bits(mut word: u64) -> impl Iterator<Item = u32> {
    core::iter::from_fn(move || {
        let bit = word.trailing_zeros();
        word &= word.wrapping_sub(1);
        (bit < 64).then_some(bit)
    })
}

fn dispatch(port: u32) {
    let Some((call, waiting)) = with_slot(port, |slot| {
        slot.fired = true;
        slot.count += 1;
        (slot.call, slot.waiting.take())
    }) else {
        return;
    };
    if let Some(call) = call {
        call(port);
    }
    if let Some(waker) = waiting {
        waker.wake();
    }
}

/// Calls `f` with the state of a port, and returns what `f` returns; `None` if [`prepare`] has made no room for this port.
fn with_slot<T>(port: u32, f: impl FnOnce(&mut Slot) -> T) -> Option<T> {
    let mut slots = SLOTS.lock();
    slots.get_mut(usize::try_from(port).ok()?).map(f)
}

/// Makes room for the state of a port, and resets the state.
fn prepare(port: u32) {
    let mut slots = SLOTS.lock();
    let index = usize::try_from(port).unwrap_or(0);
    while slots.len() <= index {
        slots.push(Slot::default());
    }
    if let Some(slot) = slots.get_mut(index) {
        *slot = Slot::default();
    }
}

/// Begins to listen to a port that was just bound or allocated. Events that were seen in an earlier use of this port's number
/// are forgotten.
pub fn open(port: u32) {
    prepare(port);
    set_port_mask(port, false);
}

/// Opens a port, and then calls `call(port)` whenever an event of the port is seen. If upcalls are not masked, an event that is
/// seen after the port is open and before `call` is set does not reach `call`.
pub fn on_event(port: u32, call: fn(u32)) {
    open(port);
    with_slot(port, |slot| slot.call = Some(call));
    deliver_missed(port);
}

/// Waits for an event of a port. Ends at once if an event was seen since the port was opened or the last wait ended, whichever
/// was later. Only one task may wait for a port.
pub fn wait(port: u32) -> impl Future<Output = ()> {
    Wait { port }
}

struct Wait {
    port: u32,
}

impl Future for Wait {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        with_slot(self.port, |slot| {
            if core::mem::take(&mut slot.fired) {
                Poll::Ready(())
            } else {
                let waker = context.waker();
                if !slot.waiting.as_ref().is_some_and(|waiting| waiting.will_wake(waker)) {
                    slot.waiting = Some(waker.clone());
                }
                Poll::Pending
            }
        })
        .unwrap_or(Poll::Pending)
    }
}

/// How many events of a port were seen since the port was opened.
#[must_use]
pub fn count(port: u32) -> u64 {
    with_slot(port, |slot| slot.count).unwrap_or(0)
}

/// Masks or unmasks a port by its bit in the shared_info page, not by a hypercall. An event that came while the port was masked
/// is delivered when the port is unmasked.
pub fn set_port_mask(port: u32, masked: bool) {
    if let Some((word, bit)) = port_bit(offset::EVTCHN_MASK, port) {
        if masked {
            word.fetch_or(bit, Ordering::AcqRel);
        } else {
            word.fetch_and(!bit, Ordering::AcqRel);
            deliver_missed(port);
        }
    }
}

/// If a port is pending, sets the port's selector bit and marks an upcall as pending: the hypervisor did neither if the port
/// was masked when the event came (ABI core 5.1). If upcalls are not masked, makes a hypercall as [`unmask_upcalls`] does.
fn deliver_missed(port: u32) {
    if !is_pending(port) {
        return;
    }
    if let (Some(selector), Some(pending)) = (word(vcpu_info::PENDING_SEL), byte(vcpu_info::UPCALL_PENDING)) {
        selector.fetch_or(1 << (port / 64), Ordering::AcqRel);
        pending.store(1, Ordering::SeqCst);
        if upcall_mask() == 0 {
            hypercall::version();
        }
    }
}

/// Whether a port is masked.
#[must_use]
pub fn is_masked(port: u32) -> bool {
    port_bit(offset::EVTCHN_MASK, port).is_some_and(|(word, bit)| word.load(Ordering::Acquire) & bit != 0)
}

/// Whether a port is pending.
#[must_use]
pub fn is_pending(port: u32) -> bool {
    port_bit(offset::EVTCHN_PENDING, port).is_some_and(|(word, bit)| word.load(Ordering::Acquire) & bit != 0)
}

/// Clears the pending bit of a port; returns whether it was set.
pub fn clear_pending(port: u32) -> bool {
    port_bit(offset::EVTCHN_PENDING, port).is_some_and(|(word, bit)| word.fetch_and(!bit, Ordering::AcqRel) & bit != 0)
}

/// An open port. Dropping this value closes the port.
#[derive(Debug)]
pub struct Channel {
    port: u32,
}

impl Channel {
    /// Binds a new port to an unbound port of another domain.
    ///
    /// # Errors
    /// As [`hypercall::bind_interdomain`].
    pub fn connect(remote: u16, remote_port: u32) -> Result<Self, Errno> {
        hypercall::bind_interdomain(remote, remote_port).map(Self::adopt)
    }

    /// Allocates a port that `remote` may bind.
    ///
    /// # Errors
    /// As [`hypercall::allocate_unbound`].
    pub fn offer(remote: u16) -> Result<Self, Errno> {
        hypercall::allocate_unbound(domid::SELF, remote).map(Self::adopt)
    }

    /// Opens a port that this domain has, bound or unbound (see [`open`]), and returns the port as a channel.
    #[must_use]
    pub fn adopt(port: u32) -> Self {
        open(port);
        Self { port }
    }

    /// The number of the local port.
    #[must_use]
    pub fn port(&self) -> u32 {
        self.port
    }

    /// Sends an event to the other end. Does nothing if the other end is gone.
    pub fn notify(&self) {
        let _ = hypercall::send(self.port);
    }

    /// Waits for an event from the other end, as [`wait`] does.
    pub async fn wait(&self) {
        wait(self.port).await;
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        let _ = hypercall::close(self.port);
        prepare(self.port);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_listed_from_the_lowest() {
        assert!(bits(0).next().is_none());
        assert_eq!(bits(1 | 1 << 5 | 1 << 63).collect::<Vec<_>>(), [0, 5, 63]);
        assert_eq!(bits(u64::MAX).count(), 64);
    }

    #[test]
    fn before_the_shared_page_is_mapped_nothing_is_touched() {
        assert_eq!(mask_upcalls(), 1);
        unmask_upcalls();
        assert!(!is_pending(5));
        assert_eq!(page_fault_address(), 0);
        scan();
    }

    #[test]
    fn a_port_out_of_range_has_no_bits() {
        assert!(port_bit(offset::EVTCHN_MASK, 4096).is_none());
    }
}
