//! A domain's memory as it is given: in runs of frames while the machine has such, and page by page otherwise.

use guest_image::{MachineFrame, Pfn};
use hypercall_abi::Errno;

/// Pages of a run, given by one call, as a power of two.
pub const RUN_ORDER: u32 = 9;
const RUN: usize = 1 << RUN_ORDER;

/// Gives a domain the pages from `first` on, and writes their frames into `frames`. Returns how many pages were given: fewer
/// than there are frames if the machine has no more memory.
///
/// `run` gives a run of pages from a page on, and returns its first frame; `None` if the machine has no such run. `pages` gives
/// as many pages as the slice has places, from a page on, and returns how many it gave.
///
/// # Errors
/// The error of `run` or `pages`.
pub fn populate(
    first: Pfn,
    frames: &mut [MachineFrame],
    run: impl Fn(u64) -> Result<Option<u64>, Errno>,
    pages: impl Fn(u64, &mut [u64]) -> Result<usize, Errno>,
) -> Result<usize, Errno> {
    let mut done = 0;
    for part in frames.chunks_mut(RUN) {
        let page = first.0 + done as u64;
        if part.len() == RUN
            && let Some(start) = run(page)?
        {
            (start..).zip(part).for_each(|(number, frame)| *frame = MachineFrame(number));
            done += RUN;
            continue;
        }
        let mut numbers = [0; RUN];
        let numbers = numbers.get_mut(..part.len()).unwrap_or_default();
        let given = pages(page, numbers)?;
        part.iter_mut().zip(&*numbers).for_each(|(frame, number)| *frame = MachineFrame(*number));
        done += given;
        if given < part.len() {
            break;
        }
    }
    Ok(done)
}
