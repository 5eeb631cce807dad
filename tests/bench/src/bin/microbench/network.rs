//! TCP between two guests: one serves, the other measures.

use crate::linux::{self, Map};
use crate::window;
use microbench::{MIB, NET_DRIVER, REPETITIONS, TRIPS};

/// The addresses of the one that serves and of the one that measures.
const SERVER: [u8; 4] = [10, 0, 9, 1];
const CLIENT: [u8; 4] = [10, 0, 9, 2];
const PORT: u16 = 7;
/// Bytes of a write.
const PIECE: usize = 64 << 10;

/// Serves two connections, one after the other: on the first, whole windows of bytes are answered by a byte; on the second, each
/// byte.
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
}
