//! TCP and UDP between two guests: one serves, the other measures. And TCP with the host of the emulated machine, which serves.

use crate::linux::{self, Map};
use crate::window;
use core::net::Ipv4Addr;
use core::str::FromStr;
use microbench::{
    ALONE, BEHIND_GATEWAY, FROM_HOST, HOST, MAX_DRIVERS, MIB, NET_DRIVER, PACKET_BYTES, PACKETS, REPETITIONS, TO_HOST,
    TRIPS, VIRTIO_NET_DRIVERS,
};

/// The addresses of the one that serves and of the one that measures.
const SERVER: [u8; 4] = [10, 0, 9, 1];
const CLIENT: [u8; 4] = [10, 0, 9, 2];
const PORT: u16 = 7;
/// Bytes of a write.
const PIECE: usize = 64 << 10;
/// Bits of the part of an address that names a network.
const PREFIX: u32 = 24;
/// Bytes of the headers of Ethernet, IPv4 and UDP.
const HEADERS: usize = 14 + 20 + 8;
/// Bytes of packets that a receiver keeps until it reads them: those of a window.
const ROOM: u32 = 16 << 20;
/// Seconds without a packet after which the rest of a window is lost.
const PATIENCE: i64 = 2;

/// Serves three connections, one after the other: on the first, whole windows of bytes are answered by a byte; on the second,
/// each byte; on the third, whole windows of packets that arrive beside it.
pub(crate) fn serve() {
    linux::load_module(NET_DRIVER);
    linux::set_address(SERVER);
    let memory = Map::new(PIECE);
    memory.touch();
    let listening = linux::listen(PORT);
    for window in [MIB.operations as usize * (1 << 20), 1] {
        let connection = linux::accept(listening);
        let mut left = window;
        loop {
            let count = linux::receive(connection, &memory, left.min(PIECE));
            if count == 0 {
                break;
            }
            left -= count;
            if left == 0 {
                linux::write_byte(connection, 1);
                left = window;
            }
        }
        linux::close(connection);
    }
    let packets = linux::take_packets(PORT, ROOM, PATIENCE);
    let connection = linux::accept(listening);
    // A byte asks for a window.
    while linux::read_byte(connection).is_some() {
        linux::write_byte(connection, 1);
        let arrived = (0..PACKETS.operations).take_while(|_| linux::take_packet(packets, &memory)).count();
        linux::write_byte(connection, u8::from(arrived == PACKETS.operations as usize));
    }
}

/// Measures everything.
pub(crate) fn run() {
    linux::load_module(NET_DRIVER);
    linux::set_address(CLIENT);
    let memory = Map::new(PIECE);
    memory.touch();
    let connection = linux::connect(SERVER, PORT);
    let mut send = || {
        for _ in 0..MIB.operations as usize * (1 << 20) / PIECE {
            linux::send(connection, &memory, PIECE);
        }
        assert!(linux::read_byte(connection).is_some(), "the other guest hangs up");
    };
    send();
    for _ in 0..REPETITIONS {
        window::window::<{ marker::STREAM }>(&mut send);
    }
    linux::close(connection);
    let connection = linux::connect(SERVER, PORT);
    let mut trips = || {
        for _ in 0..TRIPS.operations {
            linux::write_byte(connection, 1);
            assert!(linux::read_byte(connection).is_some(), "the other guest hangs up");
        }
    };
    trips();
    for _ in 0..REPETITIONS {
        window::window::<{ marker::TRIPS }>(&mut trips);
    }
    linux::close(connection);
    let connection = linux::connect(SERVER, PORT);
    let packets = linux::aim_packets(SERVER, PORT);
    let mut send = || {
        for _ in 0..PACKETS.operations {
            linux::send(packets, &memory, PACKET_BYTES - HEADERS);
        }
        assert_eq!(linux::read_byte(connection), Some(1), "packets are lost");
    };
    let ask = || {
        linux::write_byte(connection, 1);
        assert!(linux::read_byte(connection).is_some(), "the other guest hangs up");
    };
    ask();
    send();
    for _ in 0..REPETITIONS {
        ask();
        window::window::<{ marker::PACKETS }>(&mut send);
    }
    linux::close(connection);
}

/// Measures TCP with the host. On the first connection, the host answers whole windows of bytes by a byte. On the second, the
/// host answers a byte by a window of bytes.
pub(crate) fn with_host(alone: bool, port: &[u8]) {
    let port = parsed(port).expect("the second argument is a port");
    if alone {
        linux::load_modules(VIRTIO_NET_DRIVERS, MAX_DRIVERS);
    } else {
        linux::load_module(NET_DRIVER);
    }
    let [own, gateway] = if alone { ALONE } else { BEHIND_GATEWAY };
    linux::set_address(own);
    linux::set_route(PREFIX, gateway);
    let memory = Map::new(PIECE);
    memory.touch();
    let connection = linux::connect(HOST, port);
    let mut send = || {
        for _ in 0..TO_HOST.operations as usize * (1 << 20) / PIECE {
            linux::send(connection, &memory, PIECE);
        }
        assert!(linux::read_byte(connection).is_some(), "the host hangs up");
    };
    send();
    for _ in 0..REPETITIONS {
        window::window::<{ marker::TO_HOST }>(&mut send);
    }
    linux::close(connection);
    let connection = linux::connect(HOST, port);
    let mut receive = || {
        linux::write_byte(connection, 1);
        let mut left = FROM_HOST.operations as usize * (1 << 20);
        while left > 0 {
            let count = linux::receive(connection, &memory, left.min(PIECE));
            assert!(count > 0, "the host hangs up");
            left -= count;
        }
    };
    receive();
    for _ in 0..REPETITIONS {
        window::window::<{ marker::FROM_HOST }>(&mut receive);
    }
    linux::close(connection);
}

/// Sends packets to an address for ever.
pub(crate) fn flood(address: &[u8]) -> ! {
    let address: Ipv4Addr = parsed(address).expect("the second argument is an address");
    let memory = Map::new(linux::PAGE);
    memory.touch();
    let packets = linux::aim_packets(address.octets(), PORT);
    loop {
        linux::try_send(packets, &memory, PACKET_BYTES - HEADERS);
    }
}

fn parsed<T: FromStr>(word: &[u8]) -> Option<T> {
    core::str::from_utf8(word).ok()?.parse().ok()
}
