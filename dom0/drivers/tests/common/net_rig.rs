//! A driver with its network device, and frames to send and deliver.

use super::Ram;
use super::bus::{Bus, Space};
use super::nic::{Model, Nic, State};
use super::virtio::{View, command, plug};
use drivers::Net;
use drivers::net::{RECEIVE_BYTES, SEND_BYTES};
use drivers::virtio::Kind;
use network::{Checksum, FrameInfo, Protocol, Reset, Segmentation, Uplink};
use test_random::Random;

pub struct NetRig {
    pub net: Net<Bus, View<State>, Ram>,
    pub nic: Nic,
    bus: Bus,
    pub memory: [Ram; 2],
}

impl NetRig {
    /// A driver that has not been started.
    pub fn new(model: Model, random: &Random) -> Self {
        let memory = [Ram::new(0x1_0000_0000, RECEIVE_BYTES), Ram::new(0x2_0000_0000, SEND_BYTES)];
        let nic = Nic::new(model, memory.to_vec(), random.clone());
        let (bus, transport) = plug(&nic.0, Kind::NET, Space::virtio_net());
        let [receive, send] = memory.clone();
        Self { net: Net::new(transport, receive, send).unwrap(), nic, bus, memory }
    }

    pub fn started(model: Model, random: &Random) -> Self {
        let mut rig = Self::new(model, random);
        assert_eq!(rig.net.reset(), Reset::Done);
        rig
    }

    pub fn command(&self) -> u32 {
        command(&self.bus)
    }
}

/// A frame of this length at most, with what accompanies it and the header that a device has for both.
#[derive(Clone, Debug)]
pub struct Sample {
    pub frame: Vec<u8>,
    pub info: FrameInfo,
    pub header: [u8; 12],
}

impl Sample {
    /// A frame like any other, whose checksum is in it.
    pub fn plain(random: &mut Random, bytes: usize) -> Self {
        let mut frame = vec![0; bytes];
        frame.chunks_mut(8).for_each(|part| part.copy_from_slice(&random.next().to_le_bytes()[..part.len()]));
        frame[12] = 0x99;
        Self { frame, info: FrameInfo::default(), header: [0; 12] }
    }

    /// TCP over IPv4 or IPv6 without a checksum, of `bytes` bytes; segments of `segment` bytes unless 0.
    pub fn tcp(random: &mut Random, bytes: usize, six: bool, segment: u16) -> Self {
        let mut sample = Self::plain(random, bytes);
        let frame = &mut sample.frame;
        let start: u16 = if six { 54 } else { 34 };
        frame[12..14].copy_from_slice(if six { &[0x86, 0xdd] } else { &[0x08, 0x00] });
        frame[14] = if six { 0x60 } else { 0x45 };
        if six {
            frame[18..20].copy_from_slice(&u16::try_from(bytes - 54).unwrap().to_be_bytes());
            frame[20] = 6;
        } else {
            frame[16..18].copy_from_slice(&u16::try_from(bytes - 14).unwrap().to_be_bytes());
            (frame[20], frame[21], frame[23]) = (0x40, 0, 6);
        }
        frame[usize::from(start) + 12] = 0x50;
        let protocol = if six { Protocol::Tcp6 } else { Protocol::Tcp4 };
        let segmentation = (segment > 0).then_some(Segmentation { protocol, bytes: segment });
        sample.info = FrameInfo { checksum: Checksum::Blank, segmentation };
        sample.header[0] = 1;
        if segment > 0 {
            sample.header[1] = if six { 4 } else { 1 };
            sample.header[2..4].copy_from_slice(&(start + 20).to_le_bytes());
            sample.header[4..6].copy_from_slice(&segment.to_le_bytes());
        }
        sample.header[6..8].copy_from_slice(&start.to_le_bytes());
        sample.header[8] = 16;
        sample
    }

    /// Any of these that a device with these limits takes.
    pub fn any(random: &mut Random, most: usize, checksums: bool, segments: bool) -> Self {
        let (six, bytes) = (random.one_in(2), 80 + random.below(most - 79));
        match random.below(3) {
            0 if segments => {
                let bytes = 80 + random.below(65_535 - 79);
                let segment = u16::try_from(48 + random.below(bytes.min(9000) - 47)).unwrap();
                Self::tcp(random, bytes, six, segment)
            }
            1 if checksums => Self::tcp(random, bytes, six, 0),
            _ => {
                let bytes = 14 + random.below(most - 13);
                Self::plain(random, bytes)
            }
        }
    }
}
