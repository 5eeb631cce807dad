//! Just enough ACPI to find the interrupt controllers: RSDP, root table, MADT.
//!
//! Everything is read through a function from addresses to bytes, so that broken tables are a matter of `None`.

use heapless::Vec;
use hv_core::addr::long;
use zerocopy::FromBytes;

/// Bytes at a machine address.
pub(crate) type Bytes<'a> = &'a dyn Fn(u64, u64) -> Option<&'static [u8]>;

/// What the machine has for interrupts.
#[derive(Default, Debug, PartialEq, Eq)]
pub(crate) struct Topology {
    /// APIC numbers of the CPUs that may be used, in the firmware's order.
    pub(crate) cpus: Vec<u32, 64>,
    /// Register pages and first interrupt of the I/O APICs.
    pub(crate) ioapics: Vec<IoApic, 8>,
    /// Where the ISA interrupts that are not wired straight arrive.
    pub(crate) overrides: Vec<Override, 16>,
}

/// An I/O APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct IoApic {
    /// Machine address of its registers.
    pub(crate) address: u64,
    /// The global number of its first input.
    pub(crate) first: u32,
}

/// An ISA interrupt that arrives elsewhere, or with other signals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Override {
    /// ISA number.
    pub(crate) irq: u8,
    /// Global number.
    pub(crate) global: u32,
    /// Active when low.
    pub(crate) low: bool,
    /// Level-triggered.
    pub(crate) level: bool,
}

impl Topology {
    /// What every PC has had since there are I/O APICs.
    pub(crate) fn usual() -> Self {
        Self { ioapics: Vec::from_array([IoApic { address: 0xfec0_0000, first: 0 }]), ..Self::default() }
    }

    /// How an ISA interrupt arrives.
    pub(crate) fn isa(&self, irq: u8) -> Override {
        let usual = Override { irq, global: irq.into(), low: false, level: false };
        self.overrides.iter().copied().find(|o| o.irq == irq).unwrap_or(usual)
    }
}

/// The value at an offset of a table.
fn at<T: FromBytes>(bytes: &[u8], offset: usize) -> Option<T> {
    T::read_from_prefix(bytes.get(offset..)?).ok().map(|(value, _)| value)
}

/// Whether the bytes add up to zero, as those of every table do.
fn sound(bytes: &[u8]) -> bool {
    bytes.iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte)) == 0
}

/// Searches the firmware's memory for the root pointer, for loaders that do not hand it over.
pub(crate) fn search(bytes: Bytes<'_>) -> Option<u64> {
    let (start, end) = (0xe_0000, 0x10_0000);
    let area = bytes(start, end - start)?;
    let found = area.chunks_exact(16).position(|line| line.starts_with(b"RSD PTR "))?;
    Some(start + 16 * long(found))
}

/// Reads the topology from the root pointer's bytes (20 of version 0, or 36).
pub(crate) fn read(pointer: &[u8], bytes: Bytes<'_>) -> Option<Topology> {
    if !pointer.starts_with(b"RSD PTR ") || !sound(pointer.get(..20)?) {
        return None;
    }
    let wide = at::<u8>(pointer, 15)? >= 2 && at::<u64>(pointer, 24).is_some_and(|address| address != 0);
    let address = |bytes, offset| if wide { at(bytes, offset) } else { at::<u32>(bytes, offset).map(u64::from) };
    let (root, size) = if wide { (24, 8) } else { (16, 4) };
    let root = table(address(pointer, root)?, bytes)?;
    let madt = root
        .get(36..)?
        .chunks_exact(size)
        .find_map(|entry| table(address(entry, 0)?, bytes).filter(|table| table.starts_with(b"APIC")))?;
    Some(madt_entries(madt))
}

/// A whole table, if its length and sum are right.
fn table(address: u64, bytes: Bytes<'_>) -> Option<&'static [u8]> {
    let length: u32 = at(bytes(address, 36)?, 4)?;
    bytes(address, length.max(36).into()).filter(|table| sound(table))
}

/// Goes through the entries of the MADT; what makes no sense is left out.
fn madt_entries(madt: &[u8]) -> Topology {
    let mut found = Topology::default();
    let mut rest = madt.get(44..).unwrap_or(&[]);
    while let [kind, length, ..] = *rest {
        let Some((entry, after)) = rest.split_at_checked(usize::from(length.max(2))) else { break };
        rest = after;
        // An entry that is too short, or one too many, is skipped.
        let _ = madt_entry(kind, entry, &mut found);
    }
    found
}

fn madt_entry(kind: u8, entry: &[u8], found: &mut Topology) -> Option<()> {
    match kind {
        // A CPU: enabled.
        0 if at::<u32>(entry, 4)? & 1 != 0 => found.cpus.push(at::<u8>(entry, 3)?.into()).ok(),
        9 if at::<u32>(entry, 8)? & 1 != 0 => found.cpus.push(at(entry, 4)?).ok(),
        1 => {
            let address = at::<u32>(entry, 4)?.into();
            found.ioapics.push(IoApic { address, first: at(entry, 8)? }).ok()
        }
        2 => {
            let (irq, global, flags): (u8, u32, u16) = (at(entry, 3)?, at(entry, 4)?, at(entry, 8)?);
            let (low, level) = (flags & 3 == 3, flags >> 2 & 3 == 3);
            found.overrides.push(Override { irq, global, low, level }).ok()
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec as List;

    /// A table with header, right length and sum.
    fn sealed(signature: &[u8; 4], body: &[u8]) -> List<u8> {
        let mut table = List::from(signature.as_slice());
        table.extend(u32::try_from(36 + body.len()).unwrap().to_le_bytes());
        table.resize(36, 0);
        table.extend(body);
        let sum = table.iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte));
        table[9] = 0u8.wrapping_sub(sum);
        table
    }

    /// Lays tables out at 0x1000, 0x2000, ... and reads.
    fn read_tables(pointer: &[u8], tables: List<List<u8>>) -> Option<Topology> {
        let tables: &'static [List<u8>] = tables.leak();
        let bytes = move |address: u64, length: u64| {
            let number = |value: u64| usize::try_from(value).ok();
            let table = tables.get(number(address / 0x1000)?.checked_sub(1)?)?;
            let start = number(address % 0x1000)?;
            table.get(start..start + number(length)?)
        };
        read(pointer, &bytes)
    }

    fn pointer(version: u8, rsdt: u32, xsdt: u64) -> List<u8> {
        let mut bytes = List::from(*b"RSD PTR ");
        bytes.extend([0; 7]);
        bytes.push(version);
        bytes.extend(rsdt.to_le_bytes());
        let sum = bytes.iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte));
        bytes[8] = 0u8.wrapping_sub(sum);
        bytes.extend(36u32.to_le_bytes());
        bytes.extend(xsdt.to_le_bytes());
        bytes.extend([0; 4]);
        bytes
    }

    fn madt() -> List<u8> {
        let mut body = List::from([0, 0, 0xe0, 0xfe, 1, 0, 0, 0]);
        body.extend([0, 8, 0, 0, 1, 0, 0, 0]); // CPU 0
        body.extend([0, 8, 1, 1, 0, 0, 0, 0]); // CPU 1, disabled
        body.extend([0, 8, 2, 7, 1, 0, 0, 0]); // CPU 7
        body.extend([1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
        body.extend([2, 10, 0, 0, 2, 0, 0, 0, 0, 0]);
        body.extend([2, 10, 0, 4, 20, 0, 0, 0, 0xf, 0]);
        sealed(b"APIC", &body)
    }

    #[test]
    fn both_root_tables_lead_to_the_controllers() {
        for wide in [false, true] {
            let entry = if wide { List::from(0x2000u64.to_le_bytes()) } else { List::from(0x2000u32.to_le_bytes()) };
            let root = sealed(if wide { b"XSDT" } else { b"RSDT" }, &entry);
            let pointer = if wide { pointer(2, 0, 0x1000) } else { pointer(0, 0x1000, 0) };
            let found = read_tables(&pointer, vec![root, madt()]).unwrap();
            assert_eq!(found.cpus, [0, 7]);
            assert_eq!(found.ioapics[0], IoApic { address: 0xfec0_0000, first: 0 });
            assert_eq!(found.isa(4), Override { irq: 4, global: 20, low: true, level: true });
            assert_eq!(found.isa(0).global, 2);
            assert_eq!(found.isa(1), Override { irq: 1, global: 1, low: false, level: false });
        }
    }

    #[test]
    fn broken_tables_are_no_tables() {
        let root = sealed(b"RSDT", &0x2000u32.to_le_bytes());
        let good = pointer(0, 0x1000, 0);
        let mut bad_sum = madt();
        bad_sum[40] ^= 1;
        assert_eq!(read_tables(&good, vec![root.clone(), bad_sum]), None);
        assert_eq!(read_tables(&good, vec![root.clone()]), None);
        assert_eq!(read_tables(&good[..19], vec![root, madt()]), None);
        assert_eq!(read_tables(b"", vec![]), None);
    }

    #[test]
    fn cut_entries_end_the_list() {
        let mut body = List::from([0; 8]);
        body.extend([0, 8, 0, 3, 1, 0, 0, 0]);
        body.extend([1, 12, 0]);
        let found = madt_entries(&sealed(b"APIC", &body));
        assert_eq!(found.cpus, [3]);
        assert!(found.ioapics.is_empty());
        // A length of zero must not stop the walk from ending.
        let zero = madt_entries(&sealed(b"APIC", &[0; 64]));
        assert!(zero.cpus.is_empty());
    }
}
