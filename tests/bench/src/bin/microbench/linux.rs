//! Linux without a C library: the system calls the metrics are made of.

use core::arch::{asm, naked_asm};
use core::ffi::CStr;
use core::fmt::{self, Write};
use core::ops::Range;

/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;
/// Bytes that the pages of a page table have.
pub(crate) const TABLE: usize = 512 * PAGE;

mod number {
    pub(super) const READ: usize = 0;
    pub(super) const WRITE: usize = 1;
    pub(super) const OPEN: usize = 2;
    pub(super) const CLOSE: usize = 3;
    pub(super) const MMAP: usize = 9;
    pub(super) const MPROTECT: usize = 10;
    pub(super) const MUNMAP: usize = 11;
    pub(super) const RT_SIGACTION: usize = 13;
    pub(super) const RT_SIGRETURN: usize = 15;
    pub(super) const IOCTL: usize = 16;
    pub(super) const PREAD: usize = 17;
    pub(super) const PWRITE: usize = 18;
    pub(super) const PIPE: usize = 22;
    pub(super) const MREMAP: usize = 25;
    pub(super) const MADVISE: usize = 28;
    pub(super) const PAUSE: usize = 34;
    pub(super) const NANOSLEEP: usize = 35;
    pub(super) const GETPID: usize = 39;
    pub(super) const SOCKET: usize = 41;
    pub(super) const CONNECT: usize = 42;
    pub(super) const ACCEPT: usize = 43;
    pub(super) const BIND: usize = 49;
    pub(super) const LISTEN: usize = 50;
    pub(super) const SETSOCKOPT: usize = 54;
    pub(super) const FORK: usize = 57;
    pub(super) const EXECVE: usize = 59;
    pub(super) const WAIT4: usize = 61;
    pub(super) const KILL: usize = 62;
    pub(super) const GETPPID: usize = 110;
    pub(super) const MKNOD: usize = 133;
    pub(super) const REBOOT: usize = 169;
    pub(super) const IO_SETUP: usize = 206;
    pub(super) const IO_GETEVENTS: usize = 208;
    pub(super) const IO_SUBMIT: usize = 209;
    pub(super) const CLOCK_GETTIME: usize = 228;
    pub(super) const EXIT_GROUP: usize = 231;
    pub(super) const FINIT_MODULE: usize = 313;
    pub(super) const MEMBARRIER: usize = 324;
}

/// A system call.
///
/// # Safety
/// That of the call: what it does to this process' memory must be sound.
pub(crate) unsafe fn call(number: usize, [a, b, c, d, e]: [usize; 5]) -> isize {
    let result;
    // SAFETY: the kernel's convention; six arguments at most, the last is always 0 here.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") a,
            in("rsi") b,
            in("rdx") c,
            in("r10") d,
            in("r8") e,
            in("r9") 0,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result
}

/// The result of a call that has no reason to fail.
#[track_caller]
pub(crate) fn checked(result: isize) -> usize {
    match usize::try_from(result) {
        Ok(value) => value,
        Err(_) => panic!("errno {}", -result),
    }
}

/// What the kernel gave this process at its start.
pub(crate) struct Process {
    stack: *const usize,
}

impl Process {
    /// # Safety
    /// `stack` is the stack pointer this process was entered with, and nothing has overwritten what it leads to.
    pub(crate) unsafe fn new(stack: *const usize) -> Self {
        Self { stack }
    }

    fn word(&self, index: usize) -> usize {
        // SAFETY: callers stay inside the vectors, by their counts and terminators.
        unsafe { *self.stack.add(index) }
    }

    /// An argument.
    pub(crate) fn argument(&self, index: usize) -> Option<&[u8]> {
        let text = (index < self.word(0)).then(|| self.word(1 + index) as *const core::ffi::c_char)?;
        // SAFETY: an argument is a C string, there for the life of the process.
        Some(unsafe { CStr::from_ptr(text) }.to_bytes())
    }

    /// A value of the auxiliary vector.
    pub(crate) fn auxiliary(&self, key: usize) -> Option<usize> {
        // Behind the arguments and a null, the environment and a null.
        let mut at = 1 + self.word(0) + 1;
        while self.word(at) != 0 {
            at += 1;
        }
        at += 1;
        while self.word(at) != 0 {
            if self.word(at) == key {
                return Some(self.word(at + 1));
            }
            at += 2;
        }
        None
    }
}

/// Standard output.
pub(crate) struct Output;

impl Write for Output {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        // SAFETY: the kernel reads the text.
        let written = unsafe { call(number::WRITE, [1, text.as_ptr() as usize, text.len(), 0, 0]) };
        if written < 0 { Err(fmt::Error) } else { Ok(()) }
    }
}

macro_rules! println {
    ($($text:tt)*) => {{
        use core::fmt::Write as _;
        // There is nobody to tell if the console does not take it.
        let _ = writeln!($crate::linux::Output, $($text)*);
    }};
}
pub(crate) use println;

/// Reads one byte.
pub(crate) fn read_byte(file: usize) -> Option<u8> {
    let mut byte = 0_u8;
    // SAFETY: the kernel writes the byte.
    let count = unsafe { call(number::READ, [file, &raw mut byte as usize, 1, 0, 0]) };
    (count == 1).then_some(byte)
}

/// Writes one byte.
#[track_caller]
pub(crate) fn write_byte(file: usize, byte: u8) {
    // SAFETY: the kernel reads the byte.
    checked(unsafe { call(number::WRITE, [file, &raw const byte as usize, 1, 0, 0]) });
}

/// Opens a file for reading.
#[track_caller]
pub(crate) fn open(path: &CStr) -> usize {
    // SAFETY: the kernel reads the path.
    checked(unsafe { call(number::OPEN, [path.as_ptr() as usize, 0, 0, 0, 0]) })
}

/// Makes a file of some pages of zeros, and opens it for reading.
#[track_caller]
pub(crate) fn make_file(path: &CStr, pages: usize) -> usize {
    const WRITE_CREATE: usize = 0o101;
    let page = Map::new(PAGE);
    // SAFETY: the kernel reads the path.
    let file = checked(unsafe { call(number::OPEN, [path.as_ptr() as usize, WRITE_CREATE, 0o600, 0, 0]) });
    for _ in 0..pages {
        // SAFETY: the kernel reads the page.
        let written = checked(unsafe { call(number::WRITE, [file, page.start, PAGE, 0, 0]) });
        assert_eq!(written, PAGE, "{path:?} takes no more");
    }
    close(file);
    open(path)
}

/// Loads a module of the kernel.
#[track_caller]
pub(crate) fn load_module(path: &CStr) {
    let file = open(path);
    // SAFETY: the kernel reads the empty text, and trusts the module as it trusts itself.
    checked(unsafe { call(number::FINIT_MODULE, [file, c"".as_ptr() as usize, 0, 0, 0]) });
    close(file);
}

/// Loads the modules `a.ko`, `b.ko` and so on of a folder, whose path ends with a slash; at most `count` of them.
#[track_caller]
pub(crate) fn load_modules(folder: &CStr, count: u8) {
    for letter in (b'a'..).take(count.into()) {
        let name = [letter, b'.', b'k', b'o'];
        let mut path = [0; 64];
        for (to, from) in path.iter_mut().zip(folder.to_bytes().iter().chain(&name)) {
            *to = *from;
        }
        // SAFETY: the kernel reads the path, which is shorter than its place.
        let file = unsafe { call(number::OPEN, [path.as_ptr() as usize, 0, 0, 0, 0]) };
        let Ok(file) = usize::try_from(file) else {
            assert!(letter > b'a', "no module in {folder:?}");
            return;
        };
        // SAFETY: as in `load_module`.
        checked(unsafe { call(number::FINIT_MODULE, [file, c"".as_ptr() as usize, 0, 0, 0]) });
        close(file);
    }
}

/// Makes the node of a disk, and opens the disk past the kernel's cache as soon as there is one.
#[track_caller]
pub(crate) fn make_disk(path: &CStr, major: usize, minor: usize) -> usize {
    const BLOCK: usize = 0o60600;
    const READ_WRITE_DIRECT: usize = 0o40002;
    // SAFETY: the kernel reads the path.
    checked(unsafe { call(number::MKNOD, [path.as_ptr() as usize, BLOCK, major << 8 | minor, 0, 0]) });
    for _ in 0..1000 {
        // SAFETY: as above.
        let file = unsafe { call(number::OPEN, [path.as_ptr() as usize, READ_WRITE_DIRECT, 0, 0, 0]) };
        if let Ok(file) = usize::try_from(file) {
            return file;
        }
        sleep(0, 10_000_000);
    }
    panic!("no disk {path:?}")
}

/// An address and a port, as the kernel wants them (`struct sockaddr_in`).
fn internet(address: [u8; 4], port: u16) -> [u8; 16] {
    let (family, [high, low]) = (2, port.to_be_bytes());
    let [a, b, c, d] = address;
    [family, 0, high, low, a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0]
}

#[track_caller]
fn socket(kind: usize) -> usize {
    const INTERNET: usize = 2;
    // SAFETY: no memory is involved.
    checked(unsafe { call(number::SOCKET, [INTERNET, kind, 0, 0, 0]) })
}

const STREAM: usize = 1;
const DATAGRAM: usize = 2;

/// Gives the network device eth0 an address, and turns it on, as soon as there is one.
#[track_caller]
pub(crate) fn set_address(address: [u8; 4]) {
    const SET_ADDRESS: usize = 0x8916;
    const SET_FLAGS: usize = 0x8914;
    const UP: u8 = 1;
    let socket = socket(DATAGRAM);
    let ask = |request, value: &[u8]| {
        // A name, and what is asked for (`struct ifreq`).
        let mut words = [0_u8; 40];
        words[..4].copy_from_slice(b"eth0");
        words[16..16 + value.len()].copy_from_slice(value);
        // SAFETY: the kernel reads the words.
        unsafe { call(number::IOCTL, [socket, request, words.as_ptr() as usize, 0, 0]) }
    };
    for _ in 0..1000 {
        if ask(SET_ADDRESS, &internet(address, 0)) == 0 {
            checked(ask(SET_FLAGS, &[UP, 0]));
            return close(socket);
        }
        sleep(0, 10_000_000);
    }
    panic!("no network device")
}

/// Makes eth0 lead to a network whose part of an address has `prefix` bits, and by `gateway` to all others.
#[track_caller]
pub(crate) fn set_route(prefix: u32, gateway: [u8; 4]) {
    const SET_MASK: usize = 0x891c;
    const ADD_ROUTE: usize = 0x890b;
    const UP_BY_GATEWAY: u8 = 3;
    let socket = socket(DATAGRAM);
    let mask = u32::MAX.checked_shl(32 - prefix).unwrap_or(0).to_be_bytes();
    // A name, and what is asked for (`struct ifreq`).
    let mut words = [0_u8; 40];
    words[..4].copy_from_slice(b"eth0");
    words[16..32].copy_from_slice(&internet(mask, 0));
    // SAFETY: the kernel reads the words.
    checked(unsafe { call(number::IOCTL, [socket, SET_MASK, words.as_ptr() as usize, 0, 0]) });
    // A word, destination, gateway, mask, flags, and what may be 0 (`struct rtentry`).
    let mut route = [0_u8; 120];
    for (at, address) in [(8, [0; 4]), (24, gateway), (40, [0; 4])] {
        route[at..at + 16].copy_from_slice(&internet(address, 0));
    }
    route[56] = UP_BY_GATEWAY;
    // SAFETY: as above.
    checked(unsafe { call(number::IOCTL, [socket, ADD_ROUTE, route.as_ptr() as usize, 0, 0]) });
    close(socket);
}

/// Sets an option of a socket to a value, which is at an address and has so many bytes.
#[track_caller]
fn set_option(socket: usize, option: usize, (value, bytes): (usize, usize)) {
    const SOCKET_LEVEL: usize = 1;
    // SAFETY: the kernel reads the value.
    checked(unsafe { call(number::SETSOCKOPT, [socket, SOCKET_LEVEL, option, value, bytes]) });
}

/// Takes packets at a port, and keeps those of `bytes` bytes until they are read. A reader waits `seconds` for a packet.
#[track_caller]
pub(crate) fn take_packets(port: u16, bytes: u32, seconds: i64) -> usize {
    const RECEIVE_TIMEOUT: usize = 20;
    const FORCE_RECEIVE_BUFFER: usize = 33;
    let (socket, address) = (socket(DATAGRAM), internet([0; 4], port));
    let (time, bytes) = ([seconds, 0], bytes.to_ne_bytes());
    set_option(socket, RECEIVE_TIMEOUT, (time.as_ptr() as usize, size_of_val(&time)));
    set_option(socket, FORCE_RECEIVE_BUFFER, (bytes.as_ptr() as usize, bytes.len()));
    // SAFETY: the kernel reads the address.
    checked(unsafe { call(number::BIND, [socket, address.as_ptr() as usize, address.len(), 0, 0]) });
    socket
}

/// Reads a packet into some memory. Returns false if none came for too long.
pub(crate) fn take_packet(socket: usize, memory: &Map) -> bool {
    // SAFETY: the memory is a map's, which nobody refers to.
    unsafe { call(number::READ, [socket, memory.start, memory.length, 0, 0]) >= 0 }
}

/// Makes a socket whose packets go to an address, which may be a broadcast address.
#[track_caller]
pub(crate) fn aim_packets(address: [u8; 4], port: u16) -> usize {
    const BROADCAST: usize = 6;
    static ON: u32 = 1;
    let (socket, to) = (socket(DATAGRAM), internet(address, port));
    set_option(socket, BROADCAST, (&raw const ON as usize, size_of::<u32>()));
    // SAFETY: the kernel reads the address.
    checked(unsafe { call(number::CONNECT, [socket, to.as_ptr() as usize, to.len(), 0, 0]) });
    socket
}

/// Listens for connections.
#[track_caller]
pub(crate) fn listen(port: u16) -> usize {
    let (socket, address) = (socket(STREAM), internet([0; 4], port));
    // SAFETY: the kernel reads the address.
    checked(unsafe { call(number::BIND, [socket, address.as_ptr() as usize, address.len(), 0, 0]) });
    // SAFETY: no memory is involved.
    checked(unsafe { call(number::LISTEN, [socket, 1, 0, 0, 0]) });
    socket
}

/// Waits for a connection.
#[track_caller]
pub(crate) fn accept(listening: usize) -> usize {
    // SAFETY: the kernel writes no address.
    checked(unsafe { call(number::ACCEPT, [listening, 0, 0, 0, 0]) })
}

/// Connects, as soon as somebody listens.
#[track_caller]
pub(crate) fn connect(address: [u8; 4], port: u16) -> usize {
    let to = internet(address, port);
    for _ in 0..1000 {
        let socket = socket(STREAM);
        // SAFETY: the kernel reads the address.
        if unsafe { call(number::CONNECT, [socket, to.as_ptr() as usize, to.len(), 0, 0]) } == 0 {
            return socket;
        }
        close(socket);
        sleep(0, 10_000_000);
    }
    panic!("nobody listens")
}

/// Sends what some memory holds.
#[track_caller]
pub(crate) fn send(connection: usize, memory: &Map, bytes: usize) {
    assert!(bytes <= memory.length, "the memory is too small");
    // SAFETY: the memory is a map's, which nobody refers to.
    let sent = checked(unsafe { call(number::WRITE, [connection, memory.start, bytes, 0, 0]) });
    assert_eq!(sent, bytes, "not all is sent");
}

/// Sends what some memory holds, if it can be sent.
pub(crate) fn try_send(connection: usize, memory: &Map, bytes: usize) {
    assert!(bytes <= memory.length, "the memory is too small");
    // SAFETY: as in `send`.
    unsafe { call(number::WRITE, [connection, memory.start, bytes, 0, 0]) };
}

/// Receives at most so many bytes into some memory. Returns how many; 0 if the other side has hung up.
#[track_caller]
pub(crate) fn receive(connection: usize, memory: &Map, bytes: usize) -> usize {
    assert!(bytes <= memory.length, "the memory is too small");
    // SAFETY: the memory is a map's, which nobody refers to.
    checked(unsafe { call(number::READ, [connection, memory.start, bytes, 0, 0]) })
}

/// A read or a write, as the kernel wants it from those who do not wait for it (`struct iocb`).
#[repr(C)]
pub(crate) struct Transfer {
    data: u64,
    key: u32,
    flags: u32,
    operation: u16,
    priority: i16,
    file: u32,
    memory: u64,
    bytes: u64,
    at: u64,
    reserved: u64,
    more_flags: u32,
    event: u32,
}

impl Transfer {
    fn new(operation: u16, file: usize, memory: &Map, offset: usize, bytes: usize, at: u64) -> Self {
        assert!(offset + bytes <= memory.length, "the memory is too small");
        Self {
            data: 0,
            key: 0,
            flags: 0,
            operation,
            priority: 0,
            file: u32::try_from(file).unwrap_or(u32::MAX),
            memory: (memory.start + offset) as u64,
            bytes: bytes as u64,
            at,
            reserved: 0,
            more_flags: 0,
            event: 0,
        }
    }

    /// Reads from `at` of a file to `offset` of some memory.
    pub(crate) fn read(file: usize, memory: &Map, offset: usize, bytes: usize, at: u64) -> Self {
        Self::new(0, file, memory, offset, bytes, at)
    }

    /// Writes what is at `offset` of some memory to `at` of a file.
    pub(crate) fn write(file: usize, memory: &Map, offset: usize, bytes: usize, at: u64) -> Self {
        Self::new(1, file, memory, offset, bytes, at)
    }
}

/// Does a transfer, and waits for it.
#[track_caller]
pub(crate) fn transfer(transfer: &Transfer) {
    let number = if transfer.operation == 0 { number::PREAD } else { number::PWRITE };
    let words = [u64::from(transfer.file), transfer.memory, transfer.bytes, transfer.at];
    let [file, memory, bytes, at] = words.map(|word| usize::try_from(word).unwrap_or(usize::MAX));
    // SAFETY: the memory is a map's, which nobody refers to.
    let done = checked(unsafe { call(number, [file, memory, bytes, at, 0]) });
    assert_eq!(done, bytes, "a transfer is cut short");
}

/// Transfers that the kernel does together.
pub(crate) struct Asynchronous(usize);

impl Asynchronous {
    /// Room for so many.
    #[track_caller]
    pub(crate) fn new(count: u32) -> Self {
        let mut context = 0_usize;
        // SAFETY: the kernel writes the word.
        checked(unsafe { call(number::IO_SETUP, [count as usize, &raw mut context as usize, 0, 0, 0]) });
        Self(context)
    }

    /// Begins all of these, and waits for all of them.
    #[track_caller]
    pub(crate) fn run<const N: usize>(&self, transfers: &[Transfer; N]) {
        let list = transfers.each_ref().map(core::ptr::from_ref);
        // SAFETY: the kernel reads the list and the transfers, whose memory is a map's that nobody refers to.
        let begun = checked(unsafe { call(number::IO_SUBMIT, [self.0, N, list.as_ptr() as usize, 0, 0]) });
        assert_eq!(begun, N, "not all transfers begin");
        // An event: what the transfer was called, its address, and two results.
        let mut events = [[0_u64; 4]; N];
        // SAFETY: the kernel writes N events.
        let ended = checked(unsafe { call(number::IO_GETEVENTS, [self.0, N, N, events.as_mut_ptr() as usize, 0]) });
        assert!(
            ended == N && events.iter().zip(transfers).all(|(event, one)| event[2] == one.bytes),
            "a transfer fails"
        );
    }
}

/// Closes a file.
#[track_caller]
pub(crate) fn close(file: usize) {
    // SAFETY: no memory is involved.
    checked(unsafe { call(number::CLOSE, [file, 0, 0, 0, 0]) });
}

/// A pipe: the end to read, the end to write.
#[track_caller]
pub(crate) fn pipe() -> (usize, usize) {
    let mut ends = [0_u32; 2];
    // SAFETY: the kernel writes the two numbers.
    checked(unsafe { call(number::PIPE, [ends.as_mut_ptr() as usize, 0, 0, 0, 0]) });
    (ends[0] as usize, ends[1] as usize)
}

/// Memory from the kernel, in pages of 4 KiB, given back when dropped.
pub(crate) struct Map {
    start: usize,
    length: usize,
}

impl Map {
    /// Pages that are not there until they are touched.
    #[track_caller]
    pub(crate) fn new(length: usize) -> Self {
        const NO_HUGE_PAGE: usize = 15;
        Self::advised(length, NO_HUGE_PAGE)
    }

    /// As [`Map::new`], with large folios where the kernel has them.
    #[track_caller]
    pub(crate) fn with_folios(length: usize) -> Self {
        const HUGE_PAGE: usize = 14;
        Self::advised(length, HUGE_PAGE)
    }

    #[track_caller]
    fn advised(length: usize, advice: usize) -> Self {
        const READ_WRITE: usize = 3;
        const PRIVATE_ANONYMOUS: usize = 0x22;
        // SAFETY: new pages where nothing is; no file is behind them, so its number (r8) is -1.
        let start = checked(unsafe { call(number::MMAP, [0, length, READ_WRITE, PRIVATE_ANONYMOUS, usize::MAX]) });
        // SAFETY: the pages are ours and hold nothing. A kernel without huge pages refuses, and needs no advice.
        unsafe { call(number::MADVISE, [start, length, advice, 0, 0]) };
        Self { start, length }
    }

    /// A file's pages, for reading, in place of some of this map's. They begin where a page table does, and leave a hole.
    #[track_caller]
    pub(crate) fn replace(&self, file: usize, length: usize) -> Self {
        const READ: usize = 1;
        const PRIVATE_FIXED: usize = 0x12;
        let start = self.start.next_multiple_of(TABLE);
        assert!(start + length <= self.start + self.length, "no room in the map");
        // SAFETY: the pages that go are ours, and nobody refers to them.
        checked(unsafe { call(number::MMAP, [start, length, READ, PRIVATE_FIXED, file]) });
        Self { start, length }
    }

    /// Reads from each page.
    pub(crate) fn read(&self) {
        for at in (self.start..self.start + self.length).step_by(PAGE) {
            // SAFETY: the page is ours, and the file behind it is as long as the map.
            unsafe { (at as *const u8).read_volatile() };
        }
    }

    /// Writes to each page.
    pub(crate) fn touch(&self) {
        for at in (self.start..self.start + self.length).step_by(PAGE) {
            // SAFETY: the page is ours and holds nothing but this byte.
            unsafe { (at as *mut u8).write_volatile(1) };
        }
    }

    /// Writes to each page of `length` bytes that begin where a page table does: their number of tables is always the same. The
    /// map must be longer by [`TABLE`].
    pub(crate) fn touch_whole_tables(&self, length: usize) {
        let start = self.start.next_multiple_of(TABLE);
        assert!(start + length <= self.start + self.length, "no room in the map");
        for at in (start..start + length).step_by(PAGE) {
            // SAFETY: as in `touch`.
            unsafe { (at as *mut u8).write_volatile(1) };
        }
    }

    /// The address of a page, by its number in the map.
    fn page(&self, page: usize) -> *mut u64 {
        assert!(page < self.length / PAGE, "no page {page}");
        (self.start + page * PAGE) as *mut u64
    }

    /// Writes the first word of a page.
    pub(crate) fn set(&self, page: usize, word: u64) {
        // SAFETY: the page is ours and holds nothing but words.
        unsafe { self.page(page).write_volatile(word) };
    }

    /// The first word of a page.
    pub(crate) fn get(&self, page: usize) -> u64 {
        // SAFETY: the page is ours.
        unsafe { self.page(page).read_volatile() }
    }

    /// Gives the kernel advice about some pages: `MADV_DONTNEED` (4), `MADV_FREE` (8) or `MADV_COLD` (20).
    #[track_caller]
    pub(crate) fn advise(&self, pages: Range<usize>, advice: usize) {
        let start = self.page(pages.start) as usize;
        // SAFETY: the pages are ours, and hold nothing but words.
        checked(unsafe { call(number::MADVISE, [start, pages.len() * PAGE, advice, 0, 0]) });
    }

    /// Gives some pages back, of which nobody may ask again.
    #[track_caller]
    pub(crate) fn unmap(&self, pages: Range<usize>) {
        let start = self.page(pages.start) as usize;
        // SAFETY: the pages are ours, and nobody refers to them.
        checked(unsafe { call(number::MUNMAP, [start, pages.len() * PAGE, 0, 0, 0]) });
    }

    /// Moves all pages to another place.
    #[track_caller]
    pub(crate) fn moved(self) -> Self {
        const MOVE_TO_FIXED: usize = 3;
        let to = Self::new(self.length);
        // SAFETY: the pages there are ours and hold nothing.
        checked(unsafe { call(number::MREMAP, [self.start, self.length, self.length, MOVE_TO_FIXED, to.start]) });
        to
    }

    /// Lets the pages be written, or only read.
    #[track_caller]
    pub(crate) fn protect(&self, writable: bool) {
        let protection = if writable { 3 } else { 1 };
        // SAFETY: nobody writes to the pages while they are only for reading.
        checked(unsafe { call(number::MPROTECT, [self.start, self.length, protection, 0, 0]) });
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the pages are ours, and nobody refers to them any more.
        checked(unsafe { call(number::MUNMAP, [self.start, self.length, 0, 0, 0]) });
    }
}

/// The smallest system call.
pub(crate) fn getppid() {
    parent();
}

/// The number of this process' parent.
#[inline(always)]
pub(crate) fn parent() -> usize {
    // SAFETY: no memory is involved.
    unsafe { call(number::GETPPID, [0; 5]) }.cast_unsigned()
}

/// Wants to be interrupted by the [`barrier`]s of other processes.
#[track_caller]
pub(crate) fn take_barriers() {
    const REGISTER_GLOBAL_EXPEDITED: usize = 4;
    // SAFETY: no memory is involved.
    checked(unsafe { call(number::MEMBARRIER, [REGISTER_GLOBAL_EXPEDITED, 0, 0, 0, 0]) });
}

/// Interrupts the CPUs that run processes which [`take_barriers`], and waits until all were.
#[track_caller]
pub(crate) fn barrier() {
    const GLOBAL_EXPEDITED: usize = 2;
    // SAFETY: no memory is involved.
    checked(unsafe { call(number::MEMBARRIER, [GLOBAL_EXPEDITED, 0, 0, 0, 0]) });
}

/// The monotonic clock by a system call.
pub(crate) fn clock_by_call(time: &mut [i64; 2]) {
    // SAFETY: the kernel writes the two numbers.
    checked(unsafe { call(number::CLOCK_GETTIME, [1, time.as_mut_ptr() as usize, 0, 0, 0]) });
}

/// Sleeps for so long, in seconds and nanoseconds.
#[track_caller]
pub(crate) fn sleep(seconds: i64, nanoseconds: i64) {
    let time = [seconds, nanoseconds];
    // SAFETY: the kernel reads the two numbers.
    checked(unsafe { call(number::NANOSLEEP, [time.as_ptr() as usize, 0, 0, 0, 0]) });
}

/// Runs `work` in a new process, which then exits with 0.
#[track_caller]
pub(crate) fn fork(work: impl FnOnce()) -> usize {
    // SAFETY: one thread, so the child's copy of our memory is whole.
    let child = checked(unsafe { call(number::FORK, [0; 5]) });
    if child == 0 {
        work();
        exit(0);
    }
    child
}

/// Waits for a child; it must have ended with 0.
#[track_caller]
pub(crate) fn wait(child: usize) {
    let mut status = 0_u32;
    // SAFETY: the kernel writes the status.
    checked(unsafe { call(number::WAIT4, [child, &raw mut status as usize, 0, 0, 0]) });
    assert_eq!(status, 0, "a child failed");
}

/// Becomes another program, with at most three words.
pub(crate) fn execute(path: &CStr, words: &[&CStr]) -> ! {
    let mut arguments = [core::ptr::null(); 4];
    for (argument, word) in arguments[..3].iter_mut().zip(words) {
        *argument = word.as_ptr();
    }
    let environment = [core::ptr::null::<u8>()];
    // SAFETY: the kernel reads the path and the vectors; if it returns, nothing has changed.
    unsafe {
        call(number::EXECVE, [path.as_ptr() as usize, arguments.as_ptr() as usize, environment.as_ptr() as usize, 0, 0])
    };
    exit(127)
}

/// Ends this process.
pub(crate) fn exit(status: usize) -> ! {
    // SAFETY: this process ends.
    unsafe { call(number::EXIT_GROUP, [status, 0, 0, 0, 0]) };
    unreachable!("exit_group returns to nobody")
}

/// The signal that [`signal_self`] sends.
const USR1: usize = 10;

/// Takes the signal and does nothing.
extern "C" fn on_signal(_signal: i32) {}

/// Where a signal handler returns to.
///
/// # Safety
/// For the kernel alone.
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn restore() {
    naked_asm!("mov eax, {}", "syscall", "ud2", const number::RT_SIGRETURN)
}

/// Installs a handler for the signal.
#[track_caller]
pub(crate) fn take_signals() {
    const RESTORER: usize = 0x0400_0000;
    let action = [on_signal as *const () as usize, RESTORER, restore as *const () as usize, 0];
    // SAFETY: the kernel reads the action (handler, flags, restorer, mask of eight bytes); both functions are what it expects.
    checked(unsafe { call(number::RT_SIGACTION, [USR1, action.as_ptr() as usize, 0, 8, 0]) });
}

/// Sends the signal to this process, which takes it before this returns.
pub(crate) fn signal_self(process: usize) {
    // SAFETY: the handler touches nothing.
    unsafe { call(number::KILL, [process, USR1, 0, 0, 0]) };
}

/// The number of this process.
pub(crate) fn getpid() -> usize {
    // SAFETY: no memory is involved.
    checked(unsafe { call(number::GETPID, [0; 5]) })
}

/// Waits for a signal.
pub(crate) fn pause() {
    // SAFETY: no memory is involved.
    unsafe { call(number::PAUSE, [0; 5]) };
}

/// Turns the machine off. (Somebody's own machine, where this is not the first program, is left alone.)
pub(crate) fn power_off() -> ! {
    if getpid() != 1 {
        exit(1);
    }
    const MAGIC: [usize; 2] = [0xfee1_dead, 0x2812_1969];
    const POWER_OFF: usize = 0x4321_fedc;
    loop {
        // SAFETY: no memory is involved.
        unsafe { call(number::REBOOT, [MAGIC[0], MAGIC[1], POWER_OFF, 0, 0]) };
        pause();
    }
}
