//! Where the registers of a virtio device are (V 4.1.4).

use crate::hardware::ConfigurationPorts;
use crate::pci::{BadBar, Bar, Found, Function, Msix};
use core::fmt;
use core::ops::Range;

/// The vendor ID of all virtio devices.
const VENDOR: u16 = 0x1af4;
/// The ID of vendor-specific capabilities.
const OWN: u8 = 9;
/// The least length in bytes of the common configuration, and the length of a notification.
const COMMON_BYTES: u32 = 56;
const NOTIFY_BYTES: u32 = 2;

/// What a virtio device is (V 5), by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind(pub u16);

impl Kind {
    /// A network card.
    pub const NET: Self = Self(1);
    /// A disk.
    pub const BLOCK: Self = Self(2);
    /// An adapter with disks.
    pub const SCSI: Self = Self(8);

    /// Returns the kind of a virtio device (V 4.1.2). `None` if the function is no virtio device.
    #[must_use]
    pub const fn of(found: &Found) -> Option<Self> {
        if found.vendor != VENDOR {
            return None;
        }
        match found.device {
            0x1000 => Some(Self::NET),
            0x1001 => Some(Self::BLOCK),
            0x1002 => Some(Self(5)),
            0x1003 => Some(Self(3)),
            0x1004 => Some(Self::SCSI),
            0x1005 => Some(Self(4)),
            0x1009 => Some(Self(9)),
            0x1040..=0x107f => Some(Self(found.device - 0x1040)),
            _ => None,
        }
    }
}

/// Why a virtio device is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotTaken {
    /// The device has only the registers from before version 1.
    LegacyOnly,
    /// The device has no message interrupts.
    NoMessages,
    /// A BAR with registers of the device cannot be used.
    Bar(u8, BadBar),
    /// The device does not tell where some of its registers are, or they would lie beyond the end of the BAR.
    Registers(&'static str),
    /// The device's registers cannot be mapped.
    NotMapped,
    /// The hypervisor has no interrupt for the device.
    NoInterrupt,
    /// No memory is left.
    NoRoom,
}

impl fmt::Display for NotTaken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LegacyOnly => f.write_str("has only the legacy interface of virtio, which is not supported"),
            Self::NoMessages => f.write_str("has no MSI-X interrupts"),
            Self::Bar(index, why) => write!(f, "BAR {index} {why}"),
            Self::Registers(which) => write!(f, "its {which} registers are missing or do not fit"),
            Self::NotMapped => f.write_str("its registers cannot be mapped"),
            Self::NoInterrupt => f.write_str("the hypervisor has no interrupt for it"),
            Self::NoRoom => f.write_str("no memory is left for its driver"),
        }
    }
}

/// A part of a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// The machine address of its first byte, which need not begin a page.
    pub address: u64,
    /// The length in bytes.
    pub bytes: u32,
}

/// Where the registers of a device are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// What the device is.
    pub kind: Kind,
    /// The common configuration.
    pub(super) common: Region,
    /// The registers that notify the device of new heads in a queue.
    pub(super) notify: Region,
    /// Bytes from the notification register of one number to that of the next number.
    pub(super) notify_step: u32,
    /// The device's own configuration.
    pub(super) device: Option<Region>,
    pub(super) msix: Msix,
    /// The table of message interrupts.
    pub(super) table: Region,
}

/// A capability that locates registers.
#[derive(Clone, Copy)]
struct Claim {
    at: u8,
    kind: u8,
    bar: u8,
    offset: u32,
    bytes: u32,
}

impl Layout {
    /// Finds the registers of a virtio device of this kind. `ram`: the machine addresses of all RAM.
    ///
    /// # Errors
    /// Why the device is not taken.
    pub fn find<C: ConfigurationPorts>(
        function: &Function<C>,
        kind: Kind,
        ram: &[Range<u64>],
    ) -> Result<Self, NotTaken> {
        let common = claim(function, 1).ok_or(NotTaken::LegacyOnly)?;
        let notify = claim(function, 2).ok_or(NotTaken::Registers("notification"))?;
        let msix = function.msix().ok_or(NotTaken::NoMessages)?;
        let bar = |index| function.bar(index, ram).map_err(|why| NotTaken::Bar(index, why));
        let fit = |claim: Claim, least, which| {
            let region = part_of(bar(claim.bar)?, claim.offset, claim.bytes).filter(|region| region.bytes >= least);
            region.ok_or(NotTaken::Registers(which))
        };
        let (table_bar, offset) = msix.table;
        let table = part_of(bar(table_bar)?, offset, u32::from(msix.entries) * 16);
        Ok(Self {
            kind,
            common: fit(common, COMMON_BYTES, "common")?,
            notify: fit(notify, NOTIFY_BYTES, "notification")?,
            notify_step: notify.at.checked_add(16).map_or(0, |register| function.read(register)),
            device: claim(function, 4).map(|claim| fit(claim, 1, "device's own")).transpose()?,
            msix,
            table: table.ok_or(NotTaken::Registers("interrupt"))?,
        })
    }
}

/// Returns the first capability for registers of a kind. As V 4.1.4 asks, capabilities with an invalid BAR number are ignored.
fn claim<C: ConfigurationPorts>(function: &Function<C>, kind: u8) -> Option<Claim> {
    let own = function.capabilities().filter(|capability| capability.id == OWN && capability.at <= 0xf0);
    let mut claims = own.map(|capability| {
        let at = capability.at;
        let [.., kind] = function.read(at).to_le_bytes();
        let [bar, ..] = function.read(at + 4).to_le_bytes();
        Claim { at, kind, bar, offset: function.read(at + 8), bytes: function.read(at + 12) }
    });
    claims.find(|claim| claim.kind == kind && claim.bar < 6)
}

/// Returns a part of a BAR. `None` if the part reaches beyond the BAR.
fn part_of(bar: Bar, offset: u32, bytes: u32) -> Option<Region> {
    let end = u64::from(offset) + u64::from(bytes);
    (end <= bar.bytes).then_some(Region { address: bar.address + u64::from(offset), bytes })
}
