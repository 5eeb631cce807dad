//! The host's end of TCP with a machine.

use super::columns::Times;
use anyhow::{Context, Result, ensure};
use microbench::{FROM_HOST, REPETITIONS, TO_HOST};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Bytes of a read.
const PIECE: usize = 64 << 10;

/// A server that takes two connections, one after the other. On the first, it answers whole windows of bytes by a byte. On the
/// second, it answers a byte by a window of bytes.
pub(super) struct Server {
    port: u16,
    thread: JoinHandle<Result<Times>>,
}

impl Server {
    /// Starts the server at a free port of this machine.
    pub(super) fn start() -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = listener.local_addr()?.port();
        let windows = [TO_HOST, FROM_HOST].map(|metric| metric.operations as usize * (1 << 20));
        Ok(Self { port, thread: thread::spawn(move || serve(&listener, windows)) })
    }

    pub(super) fn port(&self) -> u16 {
        self.port
    }

    /// Waits until the second client has hung up. Returns how long each window took, without the first one of each client.
    pub(super) fn finish(self) -> Result<Times> {
        let times = self.thread.join().ok().context("the server has panicked")??;
        let wanted = 1 + REPETITIONS as usize;
        for windows in &times {
            ensure!(windows.len() == wanted, "{} windows of TCP with the host, not {wanted}", windows.len());
        }
        Ok(times.map(|windows| windows.into_iter().skip(1).collect()))
    }
}

/// Serves two clients with windows of so many bytes.
fn serve(listener: &TcpListener, [to_host, from_host]: [usize; 2]) -> Result<Times> {
    let mut piece = vec![0; PIECE];
    let (mut stream, _) = listener.accept()?;
    stream.set_nodelay(true)?;
    let (mut taken, mut left, mut begun) = (Vec::new(), to_host, None);
    loop {
        let count = stream.read(&mut piece[..left.min(PIECE)])?;
        if count == 0 {
            break;
        }
        let begun_at = *begun.get_or_insert_with(Instant::now);
        left -= count;
        if left == 0 {
            taken.push(begun_at.elapsed());
            (left, begun) = (to_host, None);
            stream.write_all(&[1])?;
        }
    }
    let (mut stream, _) = listener.accept()?;
    stream.set_nodelay(true)?;
    let (mut given, window) = (Vec::<Duration>::new(), vec![0; from_host]);
    // A window has arrived when the client asks for the next one, or hangs up.
    let mut begun: Option<Instant> = None;
    loop {
        let count = stream.read(&mut piece[..1])?;
        given.extend(begun.map(|begun| begun.elapsed()));
        if count == 0 {
            return Ok([taken, given]);
        }
        begun = Some(Instant::now());
        stream.write_all(&window)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpStream;

    #[test]
    fn windows_are_answered_and_timed() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let server = thread::spawn(move || serve(&listener, [100_000, 70_000]));
        let mut client = TcpStream::connect(address).unwrap();
        for _ in 0..3 {
            client.write_all(&[7; 100_000]).unwrap();
            client.read_exact(&mut [0]).unwrap();
        }
        drop(client);
        let mut client = TcpStream::connect(address).unwrap();
        for _ in 0..2 {
            client.write_all(&[1]).unwrap();
            client.read_exact(&mut [0; 70_000]).unwrap();
        }
        drop(client);
        let times = server.join().unwrap().unwrap();
        assert_eq!(times.map(|windows| windows.len()), [3, 2]);
    }

    #[test]
    fn a_client_that_leaves_early_is_told() {
        let server = Server::start().unwrap();
        for _ in 0..2 {
            drop(TcpStream::connect((Ipv4Addr::LOCALHOST, server.port())).unwrap());
        }
        assert_eq!(server.finish().unwrap_err().to_string(), "0 windows of TCP with the host, not 6");
    }
}
