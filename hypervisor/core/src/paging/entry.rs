//! The meaning of a page-table entry, and which entries a guest may have.

use super::Refused;
use crate::addr::Frame;

/// Bits of an entry.
pub use hypercall_abi::mmu::pte::{ACCESSED, DIRTY, FRAME, GLOBAL, NX as NO_EXECUTE, PRESENT, USER, WRITE as WRITABLE};
use hypercall_abi::mmu::pte::{AVAILABLE_HIGH, AVAILABLE_LOW, GUEST_KERNEL, PAT_OR_PSE, PCD, PWT};

/// PWT, PCD and, at level 1, PAT.
pub const CACHE: u64 = PWT | PCD | PAT_OR_PSE;
/// Bits 9..=11 and 52..=62, which the guest may use for its own purposes.
const SOFTWARE: u64 = AVAILABLE_LOW | AVAILABLE_HIGH;
/// Bits that a guest may set above level 1, besides the frame's address.
const UPPER: u64 = PRESENT | WRITABLE | USER | ACCESSED | DIRTY | SOFTWARE | NO_EXECUTE;
/// Bits of a present entry whose change changes no count. RW is not among them: in XSA-182, a fast path treated a
/// change of RW as harmless, and so a table was mapped writable.
const HARMLESS: u64 = ACCESSED | DIRTY | SOFTWARE | NO_EXECUTE;

/// What an entry points to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Target {
    /// Nothing: not present.
    Nothing,
    /// A page.
    Leaf {
        /// The frame of the page.
        frame: Frame,
        /// Whether the page may be written.
        writable: bool,
    },
    /// A table of the level below.
    Table(Frame),
}

/// An entry that has been checked and may be stored in a table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// What the entry points to.
    pub target: Target,
    /// The entry, with the bits that the hypervisor forces.
    pub raw: u64,
    /// Whether the entry asks for a cacheability other than write-back.
    pub uncached: bool,
}

/// Checks an entry that a guest wants to store in a table of this level.
///
/// # Errors
/// [`Refused::BadBits`]. Entries that are not present are never refused.
pub fn parse(raw: u64, level: u8) -> Result<Entry, Refused> {
    if raw & PRESENT == 0 {
        return Ok(Entry { target: Target::Nothing, raw, uncached: false });
    }
    let frame = Frame::containing(raw & FRAME).ok_or(Refused::BadBits)?;
    if level == 1 {
        // Guest kernel and user both run in ring 3 (ABI core 4.2), so all leaves get USER; GUEST_KERNEL marks those that the
        // guest meant for its kernel.
        let mark = if raw & USER == 0 { GUEST_KERNEL } else { 0 };
        let target = Target::Leaf { frame, writable: raw & WRITABLE != 0 };
        return Ok(Entry { target, raw: raw & !GLOBAL | USER | mark, uncached: raw & CACHE != 0 });
    }
    ensure!(raw & !(UPPER | FRAME) == 0, Refused::BadBits);
    let accessed = if level == 4 { ACCESSED } else { 0 };
    Ok(Entry { target: Target::Table(frame), raw: raw | USER | accessed, uncached: false })
}

/// Returns the `raw` that [`parse`] returns for an entry of level 1 that is *ordinary*: it is not present, or it asks for no
/// cacheability other than write-back. Returns `None` for all other entries. Does not check whether the frame exists.
#[inline]
#[must_use]
pub fn ordinary_leaf(raw: u64) -> Option<u64> {
    if raw & PRESENT == 0 || raw & (USER | GLOBAL | CACHE) == USER {
        return Some(raw);
    }
    if raw & CACHE == 0 { parse(raw, 1).ok().map(|entry| entry.raw) } else { None }
}

/// What an entry of a live table points to. The entry was checked with [`parse`] when it was stored.
#[must_use]
pub fn target(raw: u64, level: u8) -> Target {
    match Frame::containing(raw & FRAME) {
        Some(frame) if raw & PRESENT != 0 && level == 1 => Target::Leaf { frame, writable: raw & WRITABLE != 0 },
        Some(frame) if raw & PRESENT != 0 => Target::Table(frame),
        _ => Target::Nothing,
    }
}

/// Whether both entries are present, and one can replace the other without a change of any count.
#[inline]
#[must_use]
pub fn holds_the_same(old: u64, new: u64) -> bool {
    old & new & PRESENT != 0 && (old ^ new) & !HARMLESS == 0
}

/// Whether both entries are present and differ in the right to write, and otherwise only in bits that change no count.
#[inline]
#[must_use]
pub fn changes_right(old: u64, new: u64) -> bool {
    old & new & PRESENT != 0 && (old ^ new) & !HARMLESS == WRITABLE
}

/// Like [`changes_right`], but only true if [`ordinary_leaf`] returns `new` unchanged.
#[inline]
#[must_use]
pub fn changes_right_of_ordinary(old: u64, new: u64) -> bool {
    (old ^ new) & !HARMLESS == WRITABLE && new & (PRESENT | USER | GLOBAL | CACHE) == PRESENT | USER
}

#[cfg(test)]
mod tests {
    use super::*;

    const F: u64 = 0x1234_5000;

    #[test]
    fn every_flag_of_every_level_is_judged() {
        for level in 1..=4 {
            for bit in (0..12).chain(52..64) {
                let raw = F | PRESENT | 1 << bit;
                let allowed = level == 1 || UPPER & 1 << bit != 0;
                let got = parse(raw, level);
                assert_eq!(got.is_ok(), allowed, "level {level} bit {bit}");
                let Ok(entry) = got else { continue };
                assert_eq!(entry.raw & GLOBAL, 0);
                assert_ne!(entry.raw & USER, 0);
                assert_eq!(entry.uncached, CACHE & 1 << bit != 0);
                if level == 1 {
                    assert_eq!(entry.raw & 1 << 52 != 0, bit != 2, "only kernel leaves are marked by us");
                }
            }
            for bit in 44..52 {
                assert_eq!(parse(F | PRESENT | 1 << bit, level), Err(Refused::BadBits));
            }
        }
    }

    #[test]
    fn what_is_ordinary_is_as_parsed() {
        for high in [0, NO_EXECUTE, 1 << 52, 1 << 62] {
            for low in 0..0x1000 {
                let raw = F | high | low;
                let parsed = parse(raw, 1).unwrap();
                assert_eq!(ordinary_leaf(raw), (!parsed.uncached).then_some(parsed.raw), "{raw:#x}");
                let other = parse(raw ^ WRITABLE, 1).unwrap();
                assert_eq!(changes_right(parsed.raw, other.raw), raw & PRESENT != 0);
                for new in [raw, raw ^ WRITABLE] {
                    let ordinary = changes_right(parsed.raw, new) && ordinary_leaf(new) == Some(new);
                    assert_eq!(changes_right_of_ordinary(parsed.raw, new), ordinary, "{raw:#x} {new:#x}");
                }
                assert!(!changes_right(parsed.raw, parsed.raw) && !changes_right(parsed.raw, raw ^ 0x1000 ^ WRITABLE));
            }
        }
    }

    #[test]
    fn absent_entries_may_hold_anything() {
        for level in 1..=4 {
            let raw = !PRESENT;
            assert_eq!(parse(raw, level).unwrap().raw, raw);
            assert_eq!(target(raw, level), Target::Nothing);
        }
    }

    #[test]
    fn only_bits_without_meaning_for_counts_are_harmless() {
        let old = F | PRESENT | USER;
        for bit in 0..64 {
            let harmless = [5, 6, 9, 10, 11, 63].contains(&bit) || (52..=62).contains(&bit);
            assert_eq!(holds_the_same(old, old ^ 1 << bit), harmless, "bit {bit}");
        }
        assert!(!holds_the_same(0, 0));
    }

    #[test]
    fn what_was_parsed_is_what_is_dropped() {
        for level in 1..=4 {
            for low in 0..0x1000 {
                if let Ok(entry) = parse(F | low, level) {
                    assert_eq!(target(entry.raw, level), entry.target);
                    assert_eq!(parse(entry.raw, level).map(|e| e.raw), Ok(entry.raw));
                }
            }
        }
    }
}
