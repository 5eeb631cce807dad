//! What ramdisks take of a guest's memory, and when that is warned of.
#![forbid(unsafe_code)]

#[allow(dead_code, reason = "shared by several tests")]
mod packed;

use packed::{gzip, xz};
use test_kernels::halting;
use toolstack::ramdisk::{Contents, contents, warning};

const MIB: usize = 1 << 20;

/// An archive in the form `newc`, of files of so many bytes.
fn archive(files: &[usize]) -> Vec<u8> {
    let mut out = Vec::new();
    let names = (0..).map(|n| format!("file{n}"));
    for (name, length) in names.zip(files.iter().copied()).chain([("TRAILER!!!".to_owned(), 0)]) {
        let mut numbers = [0; 13];
        (numbers[6], numbers[11]) = (length, name.len() + 1);
        out.extend_from_slice(b"070701");
        numbers.iter().for_each(|number| out.extend_from_slice(format!("{number:08x}").as_bytes()));
        out.extend_from_slice(name.as_bytes());
        out.push(0);
        out.resize(out.len().next_multiple_of(4), 0);
        out.resize((out.len() + length).next_multiple_of(4), b'x');
    }
    out
}

fn exactly(bytes: usize) -> Option<Contents> {
    Some(Contents { bytes: bytes as u64, estimated: false })
}

fn about(bytes: usize) -> Option<Contents> {
    Some(Contents { bytes: bytes as u64, estimated: true })
}

/// What the packers of kernels append is not there in a ramdisk.
fn without_size(mut packed: Vec<u8>) -> Vec<u8> {
    packed.truncate(packed.len() - 4);
    packed
}

#[test]
fn what_a_ramdisk_unpacks_to_is_known_or_estimated() {
    let files = archive(&[5000, 0, 3 * MIB]);
    assert_eq!(contents(&files), exactly(2 * 4096 + 3 * MIB));
    assert_eq!(contents(&gzip(&files, 0, b"")), exactly(files.len()));
    assert_eq!(contents(&without_size(xz(&files))), exactly(files.len()));
    // Microcode first, padded, and then the files: as Debian's.
    let early = [&archive(&[100])[..], &[0; 300], &gzip(&files, 0, b"")].concat();
    assert_eq!(contents(&early), exactly(4096 + files.len()));
    assert_eq!(contents(&[archive(&[1]), archive(&[1])].concat()), exactly(2 * 4096));
    // A header of zstd with and without the size of its content.
    assert_eq!(contents(&[0x28, 0xb5, 0x2f, 0xfd, 0x80, 0x50, 0, 0, 0x10, 0, 1, 0, 0]), exactly(MIB));
    let unsized_frame = [0x28, 0xb5, 0x2f, 0xfd, 0, 0x50, 1, 0, 0];
    assert_eq!(contents(&unsized_frame), about(3 * unsized_frame.len()));
    assert_eq!(contents(b"BZh9 and more"), about(3 * 13));
    // Padding behind it hides what gzip says.
    let padded = [&gzip(&files, 0, b"")[..], &[0; 64]].concat();
    assert_eq!(contents(&padded), about(3 * padded.len()));
}

#[test]
fn what_is_not_unpacked_is_not_estimated() {
    for other in [&b""[..], b"a module of another kernel", &[0; 5000], b"\x7fELF"] {
        assert_eq!(contents(other), None);
    }
    // A cut archive is what it is.
    let cut = &archive(&[5000])[..3000];
    assert_eq!(contents(cut), about(3000));
}

#[test]
fn a_ramdisk_that_cannot_fit_beside_its_contents_is_warned_of() {
    let ramdisk = archive(&[20 * MIB]);
    assert_eq!(
        warning(40, &halting(), &ramdisk).unwrap(),
        "40 MiB of memory cannot hold the ramdisk (21 MiB) beside what it unpacks to (20 MiB) and the kernel (1 MiB): it \
         takes 41 MiB and more"
    );
    assert_eq!(warning(42, &halting(), &ramdisk), None);
    let packed = [&b"BZh9"[..], &vec![1; 4 * MIB]].concat();
    let told = warning(10, &halting(), &packed).unwrap();
    assert!(told.contains("the ramdisk (5 MiB) beside what it unpacks to (about 13 MiB)"), "{told}");
    assert_eq!(warning(1, &halting(), b"a module of another kernel"), None);
    assert_eq!(warning(1, &halting(), b""), None);
}
