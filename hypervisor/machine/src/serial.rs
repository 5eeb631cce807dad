//! COM1: the machine's console. Our own lines wait for the transmitter, those of domains do not; input arrives by interrupt
//! into a small ring.

use crate::Hardware;
use crate::insn::{in8, out8};
use core::ops::Range;
use core::sync::atomic::{AtomicU8, AtomicU32, Ordering::Relaxed};
use hv_core::addr::index;
use hv_core::lock::Leaf;
use hv_core::machine::Console;

/// I/O ports of COM1.
const BASE: u16 = 0x3f8;
/// Line status: data waits to be read.
const DATA_READY: u8 = 1;
/// Line status: the transmitter takes another byte.
const CAN_SEND: u8 = 0x20;

/// What has been typed and not yet taken.
static INPUT: Leaf<heapless::Deque<u8, 512>> = Leaf::new(heapless::Deque::new());
/// What we have logged last, and how many bytes have been in all.
static LOG: [AtomicU8; 1 << 14] = [const { AtomicU8::new(0) }; 1 << 14];
static LOGGED: AtomicU32 = AtomicU32::new(0);
/// Keeps the bytes of one line, or one `put`, together. A line may take long: who waits for it answers flushes, so no rule logs
/// while it holds on to a frame it has found.
static OUTPUT: Leaf<()> = Leaf::new(());
/// How often in a row the line took nothing.
static REFUSED: AtomicU32 = AtomicU32::new(0);
/// So often; then the line is stuck, and must not hang the machine: it took about a second.
const PATIENCE: u32 = 1_000_000;

/// Sets 115200 baud, 8 bits, no parity, queues on, and asks for interrupts on input.
pub(crate) fn init() {
    let setup = [
        (3, 0x80), // divisor latch
        (0, 1),
        (1, 0),
        (3, 3),    // 8n1
        (2, 7),    // queues on and empty
        (4, 0x0b), // DTR, RTS, OUT2: interrupts reach the line
        (1, 1),    // interrupt when data is ready
    ];
    for (register, value) in setup {
        out8(BASE + register, value);
    }
}

/// Whether there is a UART at all: an empty bus reads as ones.
fn present() -> bool {
    in8(BASE + 5) != 0xff
}

fn can_send() -> bool {
    in8(BASE + 5) & CAN_SEND != 0
}

/// Sends bytes without the lock, for reports from places that may have interrupted its holder.
pub(crate) fn put_now(bytes: &[u8]) {
    if !present() {
        return;
    }
    for &byte in bytes {
        if (0..PATIENCE).any(|_| can_send()) {
            out8(BASE, byte);
        }
    }
}

/// Sends a whole line.
pub(crate) fn put_line(bytes: &[u8]) {
    OUTPUT.with(|()| put_now(bytes));
}

/// Remembers bytes of our own log.
pub(crate) fn keep(bytes: &[u8]) {
    for byte in bytes {
        let at = index(LOGGED.fetch_add(1, Relaxed)) % LOG.len();
        LOG.iter().skip(at).take(1).for_each(|slot| slot.store(*byte, Relaxed));
    }
}

/// Empties the UART into the ring, as far as there is room: what stays in its queue holds the sender up.
pub(crate) fn receive() {
    INPUT.with(|input| {
        while present() && !input.is_full() && in8(BASE + 5) & DATA_READY != 0 {
            let byte = in8(BASE);
            let _ = input.push_back(byte);
        }
    });
}

impl Console for Hardware {
    fn put(&self, bytes: &[u8]) -> usize {
        if !present() {
            return bytes.len();
        }
        let mut goes = |_: &&u8| can_send() || REFUSED.fetch_add(1, Relaxed) >= PATIENCE;
        let sent = OUTPUT.with(|()| bytes.iter().take_while(&mut goes).map(|&byte| out8(BASE, byte)).count());
        if sent > 0 {
            REFUSED.store(0, Relaxed);
        }
        sent
    }

    fn take(&self, to: &mut [u8]) -> usize {
        receive();
        INPUT.with(|input| to.iter_mut().map_while(|slot| input.pop_front().map(|byte| *slot = byte)).count())
    }

    fn kept(&self, from: u32, to: &mut [u8]) -> Range<u32> {
        let end = LOGGED.load(Relaxed);
        let from = from.max(end.saturating_sub(1 << 14)).min(end);
        let kept = LOG.iter().cycle().skip(index(from) % LOG.len()).take(index(end - from));
        to.iter_mut().zip(kept).for_each(|(to, byte)| *to = byte.load(Relaxed));
        from..end.min(from.saturating_add(u32::try_from(to.len()).unwrap_or(0)))
    }
}
