//! The console and the log.

use hypercall_abi::Hypercall;
use hypercall_abi::physdev::ConsoleIo;
use hypercall_abi::sysctl::{ReadConsole, Sysctl, SysctlOp};
use sim::world::build::{at, page};
use sim::world::script::{Actor, Stage, tell};
use std::sync::atomic::Ordering::Relaxed;
use zerocopy::{FromBytes, IntoBytes};

/// What a toolstack reads of the log, in pieces.
fn dmesg(stage: &mut Stage, dom0: &Actor, clear: bool) -> String {
    let (buffer, mut text, mut index) = (at(page::MORE_ARGS), Vec::new(), 0);
    loop {
        let wanted = ReadConsole { incremental: 1, index, buffer, count: 300, ..Default::default() };
        let told = read_console(stage, dom0, wanted);
        if told.count == 0 {
            break;
        }
        text.extend((0..u64::from(told.count)).map(|n| stage.get::<u8>(dom0, buffer + n)));
        index = told.index;
    }
    if clear {
        read_console(stage, dom0, ReadConsole { clear: 1, incremental: 1, index, ..Default::default() });
    }
    String::from_utf8(text).expect("it is ASCII")
}

fn read_console(stage: &mut Stage, dom0: &Actor, wanted: ReadConsole) -> ReadConsole {
    let mut arg = Sysctl {
        cmd: SysctlOp::ReadConsole as u32,
        interface_version: hypercall_abi::sysctl::INTERFACE_VERSION,
        payload: [0; 128],
    };
    arg.payload[..24].copy_from_slice(wanted.as_bytes());
    let arg = stage.put(dom0, 0, &arg);
    assert_eq!(stage.call(dom0, Hypercall::Sysctl, &[arg]).result, Ok(0));
    let told: Sysctl = stage.get(dom0, arg);
    ReadConsole::read_from_prefix(&told.payload).expect("it is there").0
}

fn write_log(stage: &mut Stage, guest: &Actor, text: &[u8]) {
    let mut page = [0u8; 2048];
    page[..text.len()].copy_from_slice(text);
    let buffer = stage.put(guest, 0, &page);
    let went = stage.call(guest, Hypercall::ConsoleIo, &[ConsoleIo::Write as u64, text.len() as u64, buffer]);
    assert_eq!(went.result, Ok(0));
}

/// A newline in what a guest wrote began a line of ring 0, or of another guest; and a guest that wrote much drove out what
/// ring 0 and others had said.
#[test]
fn a_guest_writes_lines_of_its_own_alone() {
    tell(300, |stage| {
        let [dom0, quiet, loud] = [stage.enter(true), stage.enter(false), stage.enter(false)];
        let logged = String::from_utf8(stage.m.logged.lock().expect("one thread").clone()).expect("text");
        write_log(stage, &quiet, b"here I am\n");
        let forged = format!("[error] mfn 0x1: bad\n({}) forged\n\x1b[2J no end", quiet.id);
        for _ in 0..1000 {
            write_log(stage, &loud, forged.as_bytes());
        }
        let log = dmesg(stage, &dom0, true);
        let mine = format!("({}) ", loud.id);
        let (first, others) = log.split_at(log.find(&mine).expect("it has written"));
        assert_eq!(first, format!("{logged}({}) here I am\n", quiet.id));
        assert!(others.len() < 4096 && others.lines().all(|line| line.starts_with(&mine)), "{others}");
        assert!(others.is_ascii() && !others.contains('\x1b') && others.contains(" lines left out] "), "{others}");
        assert_eq!(dmesg(stage, &dom0, false), "", "cleared");
        write_log(stage, &quiet, b"still\n");
        assert_eq!(dmesg(stage, &dom0, false), format!("({}) still\n", quiet.id));
    });
}

/// Two thousand bytes were printed in one step, each of which waits for the line: a fifth of a second on a real one (P8).
#[test]
fn printing_does_not_wait_for_the_line() {
    tell(200, |stage| {
        let dom0 = stage.enter(true);
        let text = [*b"abcdefg"; 43];
        let at = stage.put(&dom0, 0, &text);
        stage.m.line.store(10, Relaxed);
        let went = stage.call(&dom0, Hypercall::ConsoleIo, &[ConsoleIo::Write as u64, 301, at]);
        assert_eq!((went.result, went.steps), (Ok(0), 31), "ten bytes a step");
        assert_eq!(*stage.m.printed.lock().expect("one thread"), text.as_flattened());
    });
}
