//! What a back end has published and connected, as plain data that can outlive the back end. The keys in the store are written
//! from this record; a later back end uses the record, and does not ask the disk again.

use disk::Shape;
use ring_protocol::block::{INDIRECT_SEGMENTS, MAX_RING_PAGE_ORDER, RING_PAGES};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::front::Front;

/// If the power fails, writes may be lost that are not flushed.
const VOLATILE: u32 = 1;
/// The disk is read-only.
const READ_ONLY: u32 = 2;
/// The disk supports discards.
const DISCARD: u32 = 4;
/// The bit of the key `info` that marks a read-only disk. Bit 1 would mark a CD, bit 2 a removable medium.
const INFO_READ_ONLY: u64 = 4;

/// What a back end publishes about a disk (ABI io 5.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Features {
    sectors: u64,
    sector_bytes: u32,
    physical_bytes: u32,
    flags: u32,
    discard_granularity: u32,
    discard_alignment: u32,
    padding: u32,
}

/// A key of a back end, and its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// The name of the node.
    pub name: &'static str,
    /// The value of the node, written in decimal.
    pub value: u64,
}

const fn key(name: &'static str, value: u64) -> Key {
    Key { name, value }
}

impl Features {
    /// Returns what is published about a disk of this shape.
    #[must_use]
    pub fn of(shape: &Shape) -> Self {
        let discard = shape.discard.filter(|_| !shape.read_only);
        let flag = |is: bool, flag| if is { flag } else { 0 };
        Self {
            sectors: shape.sectors,
            sector_bytes: shape.block_bytes,
            physical_bytes: shape.physical_bytes.max(shape.block_bytes),
            flags: flag(shape.volatile, VOLATILE) | flag(shape.read_only, READ_ONLY) | flag(discard.is_some(), DISCARD),
            discard_granularity: discard.map_or(0, |discard| discard.granularity),
            discard_alignment: discard.map_or(0, |discard| discard.alignment),
            padding: 0,
        }
    }

    /// Returns the keys that the front end reads before it makes its ring. They are written together with the state `InitWait`.
    pub fn offered(&self) -> impl Iterator<Item = Key> + use<> {
        [
            key("feature-max-indirect-segments", INDIRECT_SEGMENTS as u64),
            key("max-ring-page-order", MAX_RING_PAGE_ORDER as u64),
            key("multi-queue-max-queues", 1),
        ]
        .into_iter()
    }

    /// Returns the keys that the front end reads when it is connected. They are written together with the state `Connected`.
    pub fn connected(&self) -> impl Iterator<Item = Key> + use<> {
        let flags = self.flags;
        let has = move |flag| flags & flag != 0;
        let always = [
            key("feature-flush-cache", has(VOLATILE).into()),
            key("feature-barrier", 0),
            key("feature-persistent", 0),
            key("feature-discard", has(DISCARD).into()),
            key("sectors", self.sectors),
            key("info", if has(READ_ONLY) { INFO_READ_ONLY } else { 0 }),
            key("sector-size", self.sector_bytes.into()),
            key("physical-sector-size", self.physical_bytes.into()),
        ];
        let discard = [
            key("discard-granularity", self.discard_granularity.into()),
            key("discard-alignment", self.discard_alignment.into()),
            key("discard-secure", 0),
        ];
        always.into_iter().chain(discard.into_iter().filter(move |_| has(DISCARD)))
    }

    /// Returns the value of the key `mode`, which tools read.
    #[must_use]
    pub const fn mode(&self) -> &'static str {
        if self.flags & READ_ONLY != 0 { "r" } else { "w" }
    }
}

/// A vbd as it was published and connected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Record {
    /// What was published about the disk.
    pub features: Features,
    /// The guest.
    pub domain: u32,
    /// The number of the device among the guest's: 51712 for xvda.
    pub device: u32,
    /// The front end's port.
    pub front_port: u32,
    /// Our end of that channel.
    pub port: u32,
    /// How many pages the ring has. 0 if the vbd is not connected.
    pub pages: u32,
    /// Zero.
    pub padding: u32,
    /// The grant references of the ring's pages. Those after the first `pages` are 0.
    pub references: [u32; RING_PAGES],
}

const _: () = assert!(size_of::<Features>() == 32 && size_of::<Record>() == 120);

impl Record {
    /// Makes the record of a vbd whose features are published, and which is not connected.
    #[must_use]
    pub fn published(domain: u16, device: u32, features: Features) -> Self {
        Self { features, domain: domain.into(), device, ..Self::default() }
    }

    /// Returns this record with the ring and the port that the front end has published, and with `port` as our end.
    #[must_use]
    pub fn connected(mut self, front: &Front, port: u32) -> Self {
        (self.front_port, self.port) = (front.port, port);
        self.pages = 0;
        for (place, reference) in self.references.iter_mut().zip(front.references()) {
            *place = *reference;
            self.pages += 1;
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    use disk::Discard;

    const SHAPE: Shape = Shape {
        sectors: 2048,
        block_bytes: 512,
        physical_bytes: 4096,
        read_only: false,
        volatile: true,
        discard: None,
    };

    fn value(features: Features, name: &str) -> Option<u64> {
        features.offered().chain(features.connected()).find(|key| key.name == name).map(|key| key.value)
    }

    #[test]
    fn a_disk_says_what_it_is() {
        let features = Features::of(&SHAPE);
        let expected = [
            ("feature-max-indirect-segments", 256),
            ("max-ring-page-order", 4),
            ("feature-flush-cache", 1),
            ("feature-barrier", 0),
            ("feature-persistent", 0),
            ("feature-discard", 0),
            ("sectors", 2048),
            ("info", 0),
            ("sector-size", 512),
            ("physical-sector-size", 4096),
        ];
        for (name, expected) in expected {
            assert_eq!(value(features, name), Some(expected), "{name}");
        }
        assert_eq!(value(features, "discard-granularity"), None);
        assert_eq!(features.mode(), "w");
    }

    #[test]
    fn write_through_read_only_and_discard_are_said() {
        let discard = Some(Discard { granularity: 65536, alignment: 512 });
        let features = Features::of(&Shape { volatile: false, discard, ..SHAPE });
        let values =
            ["feature-flush-cache", "feature-discard", "discard-granularity", "discard-alignment", "discard-secure"];
        let found: Vec<_> = values.iter().map(|name| value(features, name)).collect();
        assert_eq!(found, [Some(0), Some(1), Some(65536), Some(512), Some(0)]);
        let features = Features::of(&Shape { read_only: true, discard, ..SHAPE });
        assert_eq!((value(features, "info"), value(features, "feature-discard")), (Some(4), Some(0)));
        assert_eq!(features.mode(), "r");
    }

    #[test]
    fn a_record_is_plain_data() {
        let keys = [("ring-page-order", "1"), ("ring-ref0", "8"), ("ring-ref1", "9"), ("event-channel", "3")];
        let front = Front::parse(|key| keys.iter().find(|(name, _)| *name == key).map(|(_, value)| value.as_bytes()));
        let record = Record::published(5, 51712, Features::of(&SHAPE)).connected(&front.unwrap(), 44);
        assert_eq!((record.pages, record.references[..3].to_vec(), record.front_port), (2, [8, 9, 0].to_vec(), 3));
        assert_eq!(Record::read_from_bytes(record.as_bytes()).unwrap(), record);
    }
}
