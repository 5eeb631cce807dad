//! The configuration of a disk (V 5.2.4), and the limits derived from it.

use crate::hardware::{ConfigurationPorts, Registers};
use crate::virtio::Transport;
use disk::{Discard, SECTOR, Shape};

/// Feature bits of a disk (V 5.2.3).
pub(super) mod feature {
    pub(crate) const SIZE_MAX: u64 = 1 << 1;
    pub(crate) const SEG_MAX: u64 = 1 << 2;
    pub(crate) const RO: u64 = 1 << 5;
    pub(crate) const BLK_SIZE: u64 = 1 << 6;
    pub(crate) const FLUSH: u64 = 1 << 9;
    pub(crate) const TOPOLOGY: u64 = 1 << 10;
    pub(crate) const DISCARD: u64 = 1 << 13;
}

/// The features that the driver knows, each with the least length in bytes of a configuration that has the feature's fields.
const FIELDS: [(u64, usize); 7] = [
    (feature::SIZE_MAX, 12),
    (feature::SEG_MAX, 16),
    (feature::RO, 8),
    (feature::BLK_SIZE, 24),
    (feature::FLUSH, 8),
    (feature::TOPOLOGY, 32),
    (feature::DISCARD, 48),
];

/// Bytes of a sector.
pub(super) const BYTES: u32 = 512;
const _: () = assert!(BYTES as usize == SECTOR);
/// The maximum number of bytes of a block.
const MOST_BLOCK: u32 = 1 << 16;
/// The maximum number of segments of a request: with header and status, a table of half a page.
pub(super) const MOST_SEGMENTS: u16 = 126;

/// The fields of the configuration, as they were read.
#[derive(Clone, Copy, Debug)]
struct Fields {
    capacity: u64,
    size_max: u32,
    seg_max: u32,
    block: u32,
    physical_exponent: u8,
    max_discard: u32,
    discard_alignment: u32,
}

/// What a disk can do, and how large a request may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    pub(super) shape: Shape,
    /// The maximum number of segments of a request, at least 1. The queue may have room for fewer.
    pub(super) segments: u16,
    /// The maximum number of bytes of a segment: whole sectors.
    pub(super) segment_bytes: u32,
    /// The maximum number of sectors of a discard request: whole blocks. 0 without discards.
    pub(super) discard_sectors: u32,
}

/// Returns the features that the driver wants of a disk whose configuration has `bytes` bytes.
pub(super) fn wanted(bytes: usize) -> u64 {
    FIELDS.iter().filter(|(_, end)| *end <= bytes).map(|(feature, _)| feature).sum()
}

impl Limits {
    /// Reads and checks the configuration of a disk with these features.
    ///
    /// # Errors
    /// Why the disk cannot be used.
    pub(super) fn read<C: ConfigurationPorts, R: Registers>(
        transport: &Transport<C, R>,
        features: u64,
    ) -> Result<Self, &'static str> {
        let device = transport.device().filter(|device| device.bytes() >= 8).ok_or("does not say how large it is")?;
        let number = |offset| device.read32(offset);
        let fields = transport.consistent(|_| Fields {
            capacity: u64::from(number(0)) | u64::from(number(4)) << 32,
            size_max: number(8),
            seg_max: number(12),
            block: number(20),
            physical_exponent: device.read8(24),
            max_discard: number(36),
            discard_alignment: number(44),
        })?;
        Self::judge(&fields, features)
    }

    fn judge(fields: &Fields, features: u64) -> Result<Self, &'static str> {
        let has = |feature| features & feature != 0;
        let block = if has(feature::BLK_SIZE) { fields.block } else { BYTES };
        if !block.is_power_of_two() || !(BYTES..=MOST_BLOCK).contains(&block) {
            return Err("has blocks of a size that is none");
        }
        let unit = block / BYTES;
        // An incomplete block at the end cannot be reached. The bytes of a disk must be countable in 64 bits.
        let sectors = fields.capacity / u64::from(unit) * u64::from(unit);
        if sectors > u64::MAX / u64::from(BYTES) {
            return Err("says that it has more bytes than can be counted");
        }
        let exponent = u32::from(if has(feature::TOPOLOGY) { fields.physical_exponent } else { 0 });
        let physical =
            block.checked_shl(exponent).filter(|physical| *physical >= block && *physical <= MOST_BLOCK * 16);
        let segment_bytes = if has(feature::SIZE_MAX) { fields.size_max } else { u32::MAX } / BYTES * BYTES;
        if segment_bytes == 0 {
            return Err("moves less than a sector at once");
        }
        let segments = if has(feature::SEG_MAX) { fields.seg_max.max(1) } else { 1 };
        let discard_sectors = if has(feature::DISCARD) { fields.max_discard / unit * unit } else { 0 };
        let granularity = fields.discard_alignment.saturating_mul(BYTES).max(block);
        let discard = (discard_sectors > 0).then_some(Discard { granularity, alignment: 0 });
        let shape = Shape {
            sectors,
            block_bytes: block,
            physical_bytes: physical.unwrap_or(block),
            read_only: has(feature::RO),
            volatile: has(feature::FLUSH),
            discard: discard.filter(|_| !has(feature::RO)),
        };
        let segments = u16::try_from(segments).unwrap_or(u16::MAX).min(MOST_SEGMENTS);
        Ok(Self { shape, segments, segment_bytes, discard_sectors })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Fields = Fields {
        capacity: 1001,
        size_max: 5000,
        seg_max: 254,
        block: 4096,
        physical_exponent: 2,
        max_discard: 1021,
        discard_alignment: 1,
    };
    const ALL: u64 = feature::SIZE_MAX
        | feature::SEG_MAX
        | feature::RO
        | feature::BLK_SIZE
        | feature::FLUSH
        | feature::TOPOLOGY
        | feature::DISCARD;

    #[test]
    fn a_field_counts_only_with_its_feature() {
        let limits = Limits::judge(&PLAIN, 0).unwrap();
        assert_eq!((limits.shape.sectors, limits.shape.block_bytes, limits.segments), (1001, 512, 1));
        assert_eq!((limits.shape.read_only, limits.shape.volatile, limits.shape.discard), (false, false, None));
        let limits = Limits::judge(&PLAIN, ALL & !feature::RO).unwrap();
        let shape = limits.shape;
        assert_eq!((shape.sectors, shape.block_bytes, shape.physical_bytes), (1000, 4096, 16384));
        assert_eq!(shape.discard, Some(Discard { granularity: 4096, alignment: 0 }));
        assert_eq!((limits.segments, limits.segment_bytes, limits.discard_sectors), (126, 4608, 1016));
        assert_eq!(Limits::judge(&PLAIN, ALL).unwrap().shape.discard, None);
    }

    #[test]
    fn nonsense_is_refused() {
        for block in [0, 256, 513, 1 << 17, u32::MAX] {
            assert!(Limits::judge(&Fields { block, ..PLAIN }, ALL).is_err());
        }
        assert!(Limits::judge(&Fields { capacity: u64::MAX, ..PLAIN }, ALL).is_err());
        assert!(Limits::judge(&Fields { size_max: 511, ..PLAIN }, ALL).is_err());
        let odd = Fields { physical_exponent: 200, seg_max: 0, discard_alignment: u32::MAX, ..PLAIN };
        let limits = Limits::judge(&odd, ALL & !feature::RO).unwrap();
        assert_eq!((limits.shape.physical_bytes, limits.segments), (4096, 1));
    }

    #[test]
    fn a_short_configuration_has_fewer_features() {
        assert_eq!(wanted(8), feature::RO | feature::FLUSH);
        assert_eq!(wanted(60), ALL);
        assert_eq!(wanted(7), 0);
    }
}
