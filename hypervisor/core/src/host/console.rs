//! The machine's console and the log (ABI core 8).

use crate::domain::{Journal, Powers, Shown};
use crate::prelude::*;
use crate::world::LogMarks;
use hypercall_abi::physdev::ConsoleIo;
use hypercall_abi::sysctl::ReadConsole;

/// Bytes of console output handled at a time.
const CHUNK: usize = 128;
/// Bytes written to the log before the call is interrupted (P8). Printing takes as long as the serial line does, so at
/// most one chunk is printed.
const BATCH: u64 = 2048;
/// Positions in the log from here on stand for lines of guests: [`SLOT`] positions for each slot of domains.
const GUESTS: u32 = 1 << 31;
/// Positions for each slot: more than a domain has lines.
const SLOT: u32 = 4096;
/// Lines of guests copied by one call.
const LINES: u32 = 32;

/// `console_io(command, count, buffer)`. What a domain without `CONSOLE_WRITE` writes only goes to the log.
///
/// # Errors
/// `Perm` for reading without `CONSOLE_READ`, `NoSys` for unknown commands, `Fault` for a bad buffer.
pub fn console_io<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call) -> Answer {
    let (count, buffer) = (u64::from(low32(call.args[1])), call.args[2]);
    let mut chunk = [0u8; CHUNK];
    match ConsoleIo::from_number(call.command()).ok_or(Errno::NoSys)? {
        ConsoleIo::Write => {
            let shown = ctx.domain.may(Powers::CONSOLE_WRITE);
            let batch = count.min(if shown { long(CHUNK) } else { BATCH });
            let mut done = 0;
            for _ in (0..batch).step_by(CHUNK) {
                let now = usize::try_from(batch - done).unwrap_or(CHUNK).min(CHUNK);
                let part = chunk.get_mut(..now).ok_or(Errno::Inval)?;
                ctx.read_bytes(buffer.wrapping_add(done), part)?;
                done += if shown {
                    long(ctx.m.put(part))
                } else {
                    ctx.domain.journal.with(|journal| journal.write(part));
                    long(now)
                };
            }
            (call.args[1], call.args[2]) = (count - done, buffer.wrapping_add(done));
            if done == count { Ok(0) } else { Err(Halt::More) }
        }
        ConsoleIo::Read if ctx.domain.may(Powers::CONSOLE_READ) => {
            let room = usize::try_from(count).unwrap_or(CHUNK).min(CHUNK);
            let part = chunk.get_mut(..room).ok_or(Errno::Inval)?;
            // The buffer is written to once before bytes are taken from the console, so that no byte is lost.
            ctx.write_bytes(buffer, part)?;
            let taken = ctx.m.take(part);
            ctx.write_bytes(buffer, part.get(..taken).unwrap_or_default())?;
            Ok(long(taken))
        }
        _ => Err(Errno::Perm.into()),
    }
}

/// Copies as much of the log as there is room for: first the lines of ring 0, then the lines of guests, domain by
/// domain.
pub(super) fn read_log<M: Machine>(ctx: &Ctx<'_, M>, wanted: &mut ReadConsole) -> Result<(), Errno> {
    let LogMarks { start, read } = &ctx.world.log;
    let mut at = start.load(Relaxed).max(if wanted.incremental == 0 { 0 } else { wanted.index });
    let (mut chunk, mut done) = ([0; CHUNK], 0);
    while at < GUESTS && done < wanted.count {
        let room = index(wanted.count - done);
        let kept = ctx.m.kept(at, chunk.get_mut(..room.min(CHUNK)).unwrap_or_default());
        read.store(kept.end, Relaxed);
        let part = chunk.get(..kept.len()).filter(|part| !part.is_empty());
        at = if part.is_some() { kept.end } else { GUESTS };
        ctx.write_bytes(wanted.buffer.wrapping_add(done.into()), part.unwrap_or_default())?;
        done += low32(long(kept.len()));
    }
    for _ in 0..LINES {
        let room = index(wanted.count - done);
        let Some((line, next)) = guest_line(ctx.world, at).filter(|(line, _)| line.len() <= room || done == 0) else {
            break;
        };
        let part = line.as_bytes().get(..room).unwrap_or(line.as_bytes());
        ctx.write_bytes(wanted.buffer.wrapping_add(done.into()), part)?;
        (done, at) = (done + low32(long(part.len())), next);
    }
    if wanted.clear != 0 && at < GUESTS {
        start.store(at, Relaxed);
    } else if wanted.clear != 0 {
        start.store(read.load(Relaxed), Relaxed);
        ctx.world.domains.iter().for_each(|domain| domain.journal.with(Journal::forget));
    }
    (wanted.index, wanted.count) = (at, done);
    Ok(())
}

/// Returns the line of a guest at a position of the log, and the position of the next line.
fn guest_line(world: &World, at: u32) -> Option<(Shown, u32)> {
    let place = at.checked_sub(GUESTS)?;
    let (first, place) = (place / SLOT, place % SLOT);
    world.domains.iter().zip(0..).skip(index(first)).find_map(|(domain, slot)| {
        let place = if slot == first { place } else { 0 };
        let (line, next) = domain.journal.with(|journal| journal.show(domain.id(), place))?;
        Some((line, GUESTS + slot * SLOT + next))
    })
}
