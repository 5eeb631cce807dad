//! What is read of images, and what is refused.

use super::image::Content;
use super::qcow2::Qcow2;
use super::*;
use crate::ext4::Tools;
use std::io::{Seek, SeekFrom, Write};
use xshell::Shell;

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    file
}

/// Ten clusters of 64 KiB: some of zeroes, some that can be compressed, and one that ends within.
fn content() -> Vec<u8> {
    let mut content = vec![0; 9 * 65536 + 1024];
    for (at, byte) in content.iter_mut().enumerate().filter(|(at, _)| at / 65536 % 3 != 1) {
        *byte = u8::try_from(at / 7 % 251).unwrap();
    }
    content
}

#[test]
fn clusters_are_read_wherever_they_are() {
    let content = content();
    let mut image = Qcow2::open(file(&test_kernels::qcow2(&content))).unwrap();
    assert_eq!(image.bytes(), content.len() as u64);
    for (at, length) in [(0, content.len()), (65530, 12), (2 * 65536 - 1, 65536 + 2), (content.len() - 5, 5), (7, 0)] {
        let mut read = vec![1; length];
        image.read(at as u64, &mut read).unwrap();
        assert!(read == content[at..at + length], "{at} {length}");
    }
}

#[test]
fn bad_headers_and_cut_images_are_refused() {
    let image = test_kernels::qcow2(&content());
    let told = |bytes: &[u8]| Qcow2::open(file(bytes)).map_or_else(|why| format!("{why:#}"), |_| "no error".into());
    for (at, byte, why) in [
        (7, 4, "has version 4 of qcow2"),
        (15, 1, "is the difference to another file, its backing file"),
        (23, 30, "has clusters of 2^30 bytes"),
        (35, 1, "is encrypted"),
        (39, 0, "has a damaged header"),
        (36, 255, "has a damaged header"),
        (31, 1, "has a damaged header"),
        (79, 2, "is marked as damaged"),
        (79, 4, "has its data in another file"),
        (79, 8, "is compressed by zstd"),
        (79, 16, "has features of qcow2 that are not known here: 0x10"),
        // The table of tables, and a table, lie beyond the end.
        (42, 255, "is cut off"),
        (2 * 65536 + 2, 255, "is cut off"),
    ] {
        let mut bad = image.clone();
        bad[at] = byte;
        let told = told(&bad);
        assert!(told.starts_with(why) && told.lines().count() == 1, "{at}: {told}");
    }
    // Old reference counts are no damage.
    let mut dirty = image.clone();
    dirty[79] = 1;
    assert_eq!(told(&dirty), "no error");
    for length in [0, 71, 103, 65536, 2 * 65536 + 8, 4 * 65536 - 1, image.len() - 65536 - 1] {
        assert!(told(&image[..length]).starts_with("is cut off"), "{length}: {}", told(&image[..length]));
    }
}

/// An image without a table: the whole disk is the root, unless the user says otherwise.
#[test]
fn a_file_system_alone_is_an_image() {
    let sh = Shell::new().unwrap();
    // Where the programs would have to be fetched, the system tests do so.
    if !Tools::state().unwrap().0 {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let [root, image] = ["root", "image"].map(|name| folder.path().join(name));
    fs::create_dir_all(root.join("boot")).unwrap();
    fs::write(root.join("boot/vmlinuz-6.9.1"), "older").unwrap();
    fs::write(root.join("boot/vmlinuz-6.10.0"), test_kernels::halting()).unwrap();
    fs::write(root.join("boot/initramfs-6.10.0.img"), "ramdisk").unwrap();
    File::create(&image).unwrap().set_len(8 << 20).unwrap();
    Tools::find(&sh).unwrap().fill(&image, &root).unwrap();
    let wish = Wish { image: &image, name: "web", memory: 64, vcpus: 2, extra: "", overlay: Some(8) };
    let guest = guest(&wish).unwrap();
    let config = &guest.described.config;
    assert_eq!((&*config.extra, &*config.name, config.vcpus), ("console=hvc0 root=/dev/xvda ro", "web", 2));
    assert_eq!(fs::read(&guest.described.kernel).unwrap(), test_kernels::halting());
    assert_eq!(fs::read(guest.described.ramdisk.as_ref().unwrap()).unwrap(), b"ramdisk");
    assert!(!config.disk[0].writes_target());
    let kernel = guest.described.kernel.clone();
    drop(guest);
    assert!(!kernel.exists());
    let written = super::guest(&Wish { overlay: None, extra: "root=LABEL=x rw", ..wish.clone() }).unwrap();
    assert!(written.described.config.disk[0].writes_target());
    assert_eq!(written.described.config.extra, "console=hvc0 root=LABEL=x rw");
    let why = format!("{:#}", super::guest(&Wish { memory: 1, ..wish.clone() }).unwrap_err());
    assert!(why.starts_with(&format!("--cloud: {}: --memory: too little memory", image.display())), "{why}");
}
