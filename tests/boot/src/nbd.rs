//! A disk of the emulated machine that fails as the test says: a server of the network block device protocol, for QEMU alone.
//!
//! What is written is volatile until it is flushed, as in a disk with a cache. At a power cut each sector that was not flushed
//! is what it was before, or one of the contents it was given since, at random.

use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;
use test_random::Random;

/// Bytes that a disk writes as a whole.
pub const SECTOR: usize = 512;
/// Most bytes of a request or an option.
const LARGEST: usize = 32 << 20;

const MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;

/// Fixed newstyle, without the zeros of old servers.
const HANDSHAKE: u16 = 1 | 2;
const OPTION_ABORT: u32 = 2;
const OPTION_INFO: u32 = 6;
const OPTION_GO: u32 = 7;
const ACKNOWLEDGED: u32 = 1;
const INFO: u32 = 3;
const UNSUPPORTED: u32 = 1 << 31 | 1;

/// Flags are there; flush, FUA, trim and write zeroes are.
const FEATURES: u16 = 1 | 4 | 8 | 32 | 64;
const READ_ONLY: u16 = 2;
/// In a request: the answer waits until the data is stable.
const FUA: u16 = 1;
const DISCONNECT: u16 = 2;

const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "names of requests")]
pub enum Command {
    Read,
    Write,
    Flush,
    Trim,
    WriteZeroes,
}

impl Command {
    const fn of(number: u16) -> Option<Self> {
        match number {
            0 => Some(Self::Read),
            1 => Some(Self::Write),
            3 => Some(Self::Flush),
            4 => Some(Self::Trim),
            6 => Some(Self::WriteZeroes),
            _ => None,
        }
    }
}

/// How many requests there were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Reads.
    pub reads: u64,
    /// Writes, of zeroes as well.
    pub writes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Writes that were to be stable at once.
    pub fua: u64,
    /// Bytes that were discarded.
    pub discarded: u64,
    /// Requests that failed by order of the test.
    pub failed: u64,
}

/// The sectors of a disk, and those that a power cut may still take.
struct Sectors {
    stable: Vec<u8>,
    /// What each sector was given since the last flush, oldest first.
    volatile: BTreeMap<usize, Vec<[u8; SECTOR]>>,
}

impl Sectors {
    fn read(&self, at: usize, length: usize) -> Vec<u8> {
        let mut bytes = self.stable.get(at..at + length).unwrap_or_default().to_vec();
        for (sector, contents) in self.volatile.range(at / SECTOR..(at + length) / SECTOR) {
            let place = sector * SECTOR - at;
            if let (Some(target), Some(newest)) = (bytes.get_mut(place..place + SECTOR), contents.last()) {
                target.copy_from_slice(newest);
            }
        }
        bytes
    }

    fn write(&mut self, at: usize, bytes: &[u8], stable: bool) {
        for (index, content) in bytes.as_chunks::<SECTOR>().0.iter().enumerate() {
            let sector = at / SECTOR + index;
            if stable {
                self.volatile.remove(&sector);
                self.settle(sector, content);
            } else {
                self.volatile.entry(sector).or_default().push(*content);
            }
        }
    }

    fn settle(&mut self, sector: usize, content: &[u8; SECTOR]) {
        if let Some(target) = self.stable.get_mut(sector * SECTOR..(sector + 1) * SECTOR) {
            target.copy_from_slice(content);
        }
    }

    fn flush(&mut self) {
        for (sector, contents) in std::mem::take(&mut self.volatile) {
            if let Some(newest) = contents.last() {
                self.settle(sector, newest);
            }
        }
    }

    /// Lets each volatile sector be what it was, or one of what it was to be.
    fn lose(&mut self, seed: u64) {
        let mut random = Random::seeded(seed);
        for (sector, contents) in std::mem::take(&mut self.volatile) {
            let choice = random.below(contents.len() + 1);
            if let Some(content) = contents.get(choice) {
                self.settle(sector, content);
            }
        }
    }
}

/// What the test has ordered, and what came of it.
struct State {
    sectors: Sectors,
    read_only: bool,
    counts: Counts,
    /// The next so many requests of a kind fail.
    failing: Vec<(Command, u64)>,
    /// Each answer waits for so long.
    delay: Duration,
    /// Answers wait until this is over.
    withheld: bool,
    /// Requests that wait for it.
    waiting: u64,
    /// Flushes are answered, and nothing is made stable. No good disk does that.
    ignores_flushes: bool,
    /// Nothing is answered any more.
    dead: bool,
    connections: Vec<UnixStream>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    /// A panic of another thread leaves the state as good as it was.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A disk, and the server that QEMU connects to. Ends when it is dropped, with all that is withheld.
pub struct Server {
    shared: Arc<Shared>,
    folder: tempfile::TempDir,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NBD server at {} with {:?}", self.socket().display(), self.counts())
    }
}

impl Server {
    /// A disk with this content.
    ///
    /// # Errors
    /// The content is not whole sectors; or there is no room for a socket.
    pub fn new(content: Vec<u8>) -> Result<Self> {
        Self::start(content, false)
    }

    /// A disk with this content that refuses to be written.
    ///
    /// # Errors
    /// As [`Server::new`].
    pub fn read_only(content: Vec<u8>) -> Result<Self> {
        Self::start(content, true)
    }

    fn start(content: Vec<u8>, read_only: bool) -> Result<Self> {
        ensure!(content.len().is_multiple_of(SECTOR), "a disk of {} bytes, which are no whole sectors", content.len());
        let folder = tempfile::Builder::new().prefix("tenon-nbd-").tempdir()?;
        let state = State {
            sectors: Sectors { stable: content, volatile: BTreeMap::new() },
            read_only,
            counts: Counts::default(),
            failing: Vec::new(),
            delay: Duration::ZERO,
            withheld: false,
            waiting: 0,
            ignores_flushes: false,
            dead: false,
            connections: Vec::new(),
        };
        let server = Self { shared: Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() }), folder };
        let listener = UnixListener::bind(server.socket()).context("cannot make a socket")?;
        let shared = Arc::clone(&server.shared);
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let Ok(copy) = stream.try_clone() else { break };
                let mut state = shared.lock();
                if state.dead {
                    break;
                }
                state.connections.push(copy);
                drop(state);
                let shared = Arc::clone(&shared);
                // Whatever goes wrong ends the connection, and QEMU reports it to the guest.
                thread::spawn(move || serve(stream, &shared));
            }
        });
        Ok(server)
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    /// The arguments for QEMU that make this a disk with the given serial number.
    #[must_use]
    pub fn arguments(&self, serial: &str) -> [String; 4] {
        let read_only = if self.shared.lock().read_only { "on" } else { "off" };
        let socket = self.socket().display().to_string();
        [
            "-blockdev".into(),
            format!(
                "driver=nbd,node-name={serial},read-only={read_only},discard=unmap,server.type=unix,server.path={socket}"
            ),
            "-device".into(),
            format!("virtio-blk-pci,drive={serial},serial={serial},werror=report,rerror=report"),
        ]
    }

    /// What has been asked for so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.shared.lock().counts
    }

    /// What a reader would find.
    #[must_use]
    pub fn content(&self) -> Vec<u8> {
        let state = self.shared.lock();
        state.sectors.read(0, state.sectors.stable.len())
    }

    /// Lets the next so many requests of this kind fail, as a bad medium does. They change nothing.
    pub fn fail(&self, command: Command, times: u64) {
        self.shared.lock().failing.push((command, times));
    }

    /// Lets each answer wait for so long.
    pub fn delay(&self, by: Duration) {
        self.shared.lock().delay = by;
    }

    /// Withholds all answers until [`Server::release`]. QEMU cannot reset its disk, nor end in good order, meanwhile.
    pub fn withhold(&self) {
        self.shared.lock().withheld = true;
    }

    /// The requests whose answers are withheld.
    #[must_use]
    pub fn waiting(&self) -> u64 {
        self.shared.lock().waiting
    }

    /// Gives the answers that were withheld.
    pub fn release(&self) {
        self.shared.lock().withheld = false;
        self.shared.changed.notify_all();
    }

    /// Answers flushes from here on without making anything stable: a fault that a test of durability must find.
    pub fn ignore_flushes(&self) {
        self.shared.lock().ignores_flushes = true;
    }

    /// Closes all connections, as if the cable were pulled. QEMU does not come back.
    pub fn cut(&self) {
        let mut state = self.shared.lock();
        state.dead = true;
        for connection in state.connections.drain(..) {
            // The other end may be gone already.
            let _ = connection.shutdown(Shutdown::Both);
        }
        drop(state);
        self.shared.changed.notify_all();
        // The thread that waits for connections learns of it by one.
        let _ = UnixStream::connect(self.socket());
    }

    /// Cuts the power: nothing is answered from here on, and a part of what was not flushed is lost, as the seed decides.
    /// Returns what is left on the disk.
    #[must_use]
    pub fn power_cut(self, seed: u64) -> Vec<u8> {
        self.cut();
        let mut state = self.shared.lock();
        state.sectors.lose(seed);
        std::mem::take(&mut state.sectors.stable)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.cut();
    }
}

/// A request of QEMU's.
struct Request {
    flags: u16,
    kind: u16,
    cookie: u64,
    at: u64,
    length: u32,
    data: Vec<u8>,
}

/// Serves one connection to its end.
fn serve(mut stream: UnixStream, shared: &Shared) -> Result<()> {
    if !handshake(&mut stream, shared)? {
        return Ok(());
    }
    while let Some(request) = receive(&mut stream)? {
        let mut state = shared.lock();
        if state.dead {
            return Ok(());
        }
        let answer = state.carry_out(&request);
        let delay = state.delay;
        if !delay.is_zero() {
            drop(state);
            thread::sleep(delay);
            state = shared.lock();
        }
        state.waiting += 1;
        while state.withheld && !state.dead {
            state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.waiting -= 1;
        if state.dead {
            return Ok(());
        }
        let (error, data) = answer.map_or_else(|error| (error, Vec::new()), |data| (0, data));
        let mut reply = Vec::with_capacity(16 + data.len());
        reply.extend(REPLY_MAGIC.to_be_bytes());
        reply.extend(error.to_be_bytes());
        reply.extend(request.cookie.to_be_bytes());
        reply.extend(data);
        // Still locked: no answer leaves after a power cut.
        stream.write_all(&reply)?;
    }
    Ok(())
}

impl State {
    /// Does what a request asks for. Returns what was read, or an error number.
    fn carry_out(&mut self, request: &Request) -> Result<Vec<u8>, u32> {
        let command = Command::of(request.kind).ok_or(EINVAL)?;
        if let Some((_, times)) = self.failing.iter_mut().find(|(which, times)| *which == command && *times > 0) {
            *times -= 1;
            self.counts.failed += 1;
            return Err(EIO);
        }
        let sectors = &mut self.sectors;
        if command == Command::Flush {
            self.counts.flushes += 1;
            if !self.ignores_flushes {
                sectors.flush();
            }
            return Ok(Vec::new());
        }
        let (at, length) = (usize::try_from(request.at).unwrap_or(usize::MAX), request.length as usize);
        let inside = at.checked_add(length).is_some_and(|end| end <= sectors.stable.len());
        if !inside || !at.is_multiple_of(SECTOR) || !length.is_multiple_of(SECTOR) || length > LARGEST {
            return Err(EINVAL);
        }
        if command == Command::Read {
            self.counts.reads += 1;
            return Ok(sectors.read(at, length));
        }
        if self.read_only {
            return Err(EPERM);
        }
        let fua = request.flags & FUA != 0;
        self.counts.fua += u64::from(fua);
        let stable = fua && !self.ignores_flushes;
        match command {
            Command::Write => sectors.write(at, &request.data, stable),
            _ => sectors.write(at, &vec![0; length], stable),
        }
        match command {
            Command::Trim => self.counts.discarded += u64::from(request.length),
            _ => self.counts.writes += 1,
        }
        Ok(Vec::new())
    }
}

/// Agrees with the client on the one disk there is. Returns `false` if the client leaves.
fn handshake(stream: &mut UnixStream, shared: &Shared) -> Result<bool> {
    let mut hello = MAGIC.to_be_bytes().to_vec();
    hello.extend(OPTION_MAGIC.to_be_bytes());
    hello.extend(HANDSHAKE.to_be_bytes());
    stream.write_all(&hello)?;
    let _client_flags = u32::from_be_bytes(take(stream)?);
    loop {
        ensure!(u64::from_be_bytes(take(stream)?) == OPTION_MAGIC, "no option");
        let option = u32::from_be_bytes(take(stream)?);
        let length = u32::from_be_bytes(take(stream)?) as usize;
        ensure!(length <= LARGEST, "an option of {length} bytes");
        let mut data = vec![0; length];
        stream.read_exact(&mut data)?;
        let mut reply = |kind: u32, data: &[u8]| -> Result<()> {
            let mut bytes = OPTION_REPLY.to_be_bytes().to_vec();
            bytes.extend(option.to_be_bytes());
            bytes.extend(kind.to_be_bytes());
            bytes.extend(u32::try_from(data.len())?.to_be_bytes());
            bytes.extend(data);
            Ok(stream.write_all(&bytes)?)
        };
        match option {
            // The name of the export does not matter: there is one.
            OPTION_INFO | OPTION_GO => {
                let state = shared.lock();
                let features = if state.read_only { FEATURES | READ_ONLY } else { FEATURES };
                let mut info = 0u16.to_be_bytes().to_vec();
                info.extend((state.sectors.stable.len() as u64).to_be_bytes());
                info.extend(features.to_be_bytes());
                drop(state);
                reply(INFO, &info)?;
                reply(ACKNOWLEDGED, &[])?;
                if option == OPTION_GO {
                    return Ok(true);
                }
            }
            OPTION_ABORT => {
                reply(ACKNOWLEDGED, &[])?;
                return Ok(false);
            }
            _ => reply(UNSUPPORTED, &[])?,
        }
    }
}

/// The next request. `None` if the client has gone.
fn receive(stream: &mut UnixStream) -> Result<Option<Request>> {
    let magic = match take(stream) {
        Ok(magic) => u32::from_be_bytes(magic),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    ensure!(magic == REQUEST_MAGIC, "no request");
    let flags = u16::from_be_bytes(take(stream)?);
    let kind = u16::from_be_bytes(take(stream)?);
    let cookie = u64::from_be_bytes(take(stream)?);
    let at = u64::from_be_bytes(take(stream)?);
    let length = u32::from_be_bytes(take(stream)?);
    let carries = if Command::of(kind) == Some(Command::Write) { length as usize } else { 0 };
    ensure!(carries <= LARGEST, "a write of {carries} bytes");
    let mut data = vec![0; carries];
    stream.read_exact(&mut data)?;
    Ok((kind != DISCONNECT).then_some(Request { flags, kind, cookie, at, length, data }))
}

fn take<const N: usize>(stream: &mut UnixStream) -> std::io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: usize = 4096;

    /// The other end, as QEMU speaks.
    struct Client(UnixStream);

    impl Client {
        fn connect(server: &Server, size: usize) -> Self {
            let mut stream = UnixStream::connect(server.socket()).unwrap();
            assert_eq!(u64::from_be_bytes(take(&mut stream).unwrap()), MAGIC);
            assert_eq!(u64::from_be_bytes(take(&mut stream).unwrap()), OPTION_MAGIC);
            assert_eq!(u16::from_be_bytes(take(&mut stream).unwrap()), HANDSHAKE);
            stream.write_all(&3u32.to_be_bytes()).unwrap();
            let mut client = Self(stream);
            // Structured replies are refused, which QEMU takes.
            assert_eq!(client.option(8, &[]), (UNSUPPORTED, vec![]));
            let (kind, info) = client.option(OPTION_GO, &[0, 0, 0, 0, 0, 0]);
            assert_eq!((kind, info.len()), (INFO, 12));
            assert_eq!(u64::from_be_bytes(info[2..10].try_into().unwrap()), size as u64);
            assert_eq!(client.reply(), (ACKNOWLEDGED, vec![]));
            client
        }

        fn option(&mut self, option: u32, data: &[u8]) -> (u32, Vec<u8>) {
            let length = u32::try_from(data.len()).unwrap();
            let words = [&OPTION_MAGIC.to_be_bytes()[..], &option.to_be_bytes(), &length.to_be_bytes(), data];
            self.0.write_all(&words.concat()).unwrap();
            self.reply()
        }

        fn reply(&mut self) -> (u32, Vec<u8>) {
            assert_eq!(u64::from_be_bytes(take(&mut self.0).unwrap()), OPTION_REPLY);
            let _option: [u8; 4] = take(&mut self.0).unwrap();
            let kind = u32::from_be_bytes(take(&mut self.0).unwrap());
            let mut data = vec![0; u32::from_be_bytes(take(&mut self.0).unwrap()) as usize];
            self.0.read_exact(&mut data).unwrap();
            (kind, data)
        }

        fn ask(&mut self, kind: u16, flags: u16, at: u64, length: usize, data: &[u8]) {
            let mut request = REQUEST_MAGIC.to_be_bytes().to_vec();
            request.extend(flags.to_be_bytes());
            request.extend(kind.to_be_bytes());
            request.extend((at ^ 0x55).to_be_bytes());
            request.extend(at.to_be_bytes());
            request.extend(u32::try_from(length).unwrap().to_be_bytes());
            request.extend(data);
            self.0.write_all(&request).unwrap();
        }

        /// The answer to a request at `at`: an error, and `length` bytes if it is a good read. `None`: the server has gone.
        fn answer(&mut self, at: u64, length: usize) -> Option<(u32, Vec<u8>)> {
            let magic = take(&mut self.0).ok()?;
            assert_eq!(u32::from_be_bytes(magic), REPLY_MAGIC);
            let error = u32::from_be_bytes(take(&mut self.0).unwrap());
            assert_eq!(u64::from_be_bytes(take(&mut self.0).unwrap()), at ^ 0x55);
            let mut data = vec![0; if error == 0 { length } else { 0 }];
            self.0.read_exact(&mut data).unwrap();
            Some((error, data))
        }

        fn write(&mut self, at: u64, byte: u8, flags: u16) -> u32 {
            self.ask(1, flags, at, BLOCK, &[byte; BLOCK]);
            self.answer(at, 0).unwrap().0
        }

        fn read(&mut self, at: u64) -> Result<u8, u32> {
            self.ask(0, 0, at, BLOCK, &[]);
            let (error, data) = self.answer(at, BLOCK).unwrap();
            if error != 0 {
                return Err(error);
            }
            assert!(data.iter().all(|byte| *byte == data[0]));
            Ok(data[0])
        }

        fn flush(&mut self) -> u32 {
            self.ask(3, 0, 0, 0, &[]);
            self.answer(0, 0).unwrap().0
        }
    }

    fn served() -> (Server, Client) {
        let server = Server::new(vec![9; 64 * BLOCK]).unwrap();
        let client = Client::connect(&server, 64 * BLOCK);
        (server, client)
    }

    #[test]
    fn what_was_flushed_outlives_a_power_cut() {
        let (server, mut client) = served();
        for block in 0..32 {
            assert_eq!(client.write(block * BLOCK as u64, 1, 0), 0);
        }
        assert_eq!(client.flush(), 0);
        for block in 16..48 {
            assert_eq!(client.write(block * BLOCK as u64, 2, 0), 0);
        }
        // Stable at once, though an older content is volatile.
        assert_eq!(client.write(40 * BLOCK as u64, 3, FUA), 0);
        assert_eq!(
            (client.read(0), client.read(17 * BLOCK as u64), client.read(40 * BLOCK as u64)),
            (Ok(1), Ok(2), Ok(3))
        );
        let counts = server.counts();
        assert_eq!((counts.writes, counts.flushes, counts.fua, counts.reads), (65, 1, 1, 3));
        let left = server.power_cut(1);
        assert!(client.0.read(&mut [0]).is_ok_and(|count| count == 0), "the connection is closed");
        let block = |number: usize| &left[number * BLOCK..][..BLOCK];
        assert!((0..16).all(|number| block(number) == [1; BLOCK]) && block(40) == [3; BLOCK]);
        let (mut old, mut new) = (0, 0);
        for sector in left[16 * BLOCK..40 * BLOCK].chunks(SECTOR) {
            assert!(sector.iter().all(|byte| *byte == sector[0]), "a sector is torn");
            old += usize::from(sector[0] != 2);
            new += usize::from(sector[0] == 2);
        }
        assert!(old > 40 && new > 40, "{old} lost, {new} kept");
        assert!(left[48 * BLOCK..].iter().all(|byte| *byte == 9));
    }

    #[test]
    fn a_seed_decides_what_is_lost() {
        let lost = |seed| {
            let (server, mut client) = served();
            assert_eq!(client.write(0, 1, 0), 0);
            assert_eq!(client.write(0, 2, 0), 0);
            server.power_cut(seed)
        };
        assert_eq!(lost(7), lost(7));
        assert_ne!(lost(7), lost(8));
        // What it was at first, and each content it was given, may be what stays.
        let left: Vec<u8> = (0..8).flat_map(|seed| lost(seed)[..BLOCK].to_vec()).collect();
        assert!([9, 1, 2].iter().all(|byte| left.contains(byte)));
    }

    #[test]
    fn an_ignored_flush_loses_what_it_should_keep() {
        let (server, mut client) = served();
        server.ignore_flushes();
        for block in 0..8 {
            assert_eq!(client.write(block * BLOCK as u64, 1, FUA), 0);
        }
        assert_eq!(client.flush(), 0);
        assert!(server.power_cut(3)[..8 * BLOCK].contains(&9));
    }

    #[test]
    fn requests_fail_by_order() {
        let (server, mut client) = served();
        server.fail(Command::Write, 2);
        server.fail(Command::Flush, 1);
        assert_eq!([client.write(0, 1, 0), client.write(0, 2, 0), client.write(0, 3, 0)], [EIO, EIO, 0]);
        assert_eq!((client.flush(), client.flush(), client.read(0)), (EIO, 0, Ok(3)));
        assert_eq!(server.counts().failed, 3);
        // Beyond the end, between sectors, and nothing that is known.
        assert_eq!(client.read(64 * BLOCK as u64), Err(EINVAL));
        assert_eq!(client.read(1), Err(EINVAL));
        client.ask(9, 0, 0, 0, &[]);
        assert_eq!(client.answer(0, 0).unwrap().0, EINVAL);
    }

    #[test]
    fn discarded_and_zeroed_sectors_are_counted_and_zero() {
        let (server, mut client) = served();
        for (kind, at) in [(4, 0), (6, BLOCK as u64)] {
            client.ask(kind, 0, at, BLOCK, &[]);
            assert_eq!(client.answer(at, 0).unwrap().0, 0);
            assert_eq!(client.read(at), Ok(0));
        }
        let counts = server.counts();
        assert_eq!((counts.discarded, counts.writes), (BLOCK as u64, 1));
        assert_eq!(server.content()[..2 * BLOCK], [0; 2 * BLOCK]);
    }

    #[test]
    fn answers_are_withheld_until_they_are_released() {
        let (server, mut client) = served();
        server.withhold();
        client.ask(0, 0, 0, BLOCK, &[]);
        while server.waiting() == 0 {
            thread::yield_now();
        }
        client.0.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        assert!(client.0.read(&mut [0]).is_err(), "an answer that was withheld");
        client.0.set_read_timeout(None).unwrap();
        server.release();
        assert_eq!(client.answer(0, BLOCK).unwrap(), (0, vec![9; BLOCK]));
        // A cut connection ends what is withheld.
        server.withhold();
        client.ask(0, 0, 0, BLOCK, &[]);
        server.cut();
        assert_eq!(client.answer(0, BLOCK), None);
        // Nobody is served after it.
        let new = UnixStream::connect(server.socket());
        assert!(new.and_then(|mut stream| stream.read(&mut [0])).map_or(true, |count| count == 0));
    }

    #[test]
    fn a_read_only_disk_says_so() {
        let server = Server::read_only(vec![9; BLOCK]).unwrap();
        let mut client = Client::connect(&server, BLOCK);
        assert_eq!((client.write(0, 1, 0), client.read(0)), (EPERM, Ok(9)));
        assert!(server.arguments("disk")[1].contains("read-only=on"));
        assert!(Server::new(vec![0; 100]).is_err());
    }

    #[test]
    fn answers_can_be_slow() {
        let (server, mut client) = served();
        server.delay(Duration::from_millis(30));
        let start = std::time::Instant::now();
        assert_eq!(client.read(0), Ok(9));
        assert!(start.elapsed() >= Duration::from_millis(30));
    }
}
