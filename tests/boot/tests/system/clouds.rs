//! Guests from cloud images: stand-ins with a GPT, an ESP, and an ext4 file system whose `/boot` has a stock kernel.

use crate::media::shell;
use crate::networks::value;
use crate::run::xtask_with;
use crate::stories::{BOOT, SHELL, SOON, dom0};
use anyhow::{Context, Result, ensure};
use boot::{Machine, Setup, gpt};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;
use test_kernels::qcow2;
use xtask::cloud::{self, Wish};
use xtask::disk::Disk;
use xtask::ext4::Tools;
use xtask::kernels;

/// Bytes of the file systems.
const SIZE: usize = 64 << 20;

/// Makes files below a folder, by their paths and what they contain.
fn tree(folder: &Path, files: &[(&str, &[u8])]) -> Result<()> {
    for (name, content) in files {
        let file = folder.join(name);
        fs::create_dir_all(file.parent().context("a file in no folder")?)?;
        fs::write(file, content)?;
    }
    Ok(())
}

/// An ext4 file system of `bytes` bytes with these files.
fn file_system(files: &[(&str, &[u8])], bytes: usize) -> Result<Vec<u8>> {
    let folder = tempfile::tempdir()?;
    let [root, image] = ["root", "image"].map(|name| folder.path().join(name));
    fs::create_dir(&root)?;
    tree(&root, files)?;
    fs::File::create(&image)?.set_len(bytes as u64)?;
    Tools::find(&boot::shell()?)?.fill(&image, &root)?;
    Ok(fs::read(image)?)
}

/// The stock kernel as its package has it, and our ramdisk.
fn stock() -> Result<[Vec<u8>; 2]> {
    let sh = boot::shell()?;
    let kernel = kernels::stock(&sh, kernels::DEFAULT)?.bzimage;
    Ok([fs::read(kernel)?, fs::read(kernels::ramdisk_for(&sh, kernels::DEFAULT, true)?)?])
}

/// What stands in for an EFI system partition: no file system that can be read here.
fn esp() -> Vec<u8> {
    vec![0xeb; 1 << 20]
}

/// Boots the guest of an image, and leaves it at its shell.
fn boot(title: &str, wish: &Wish<'_>) -> Result<Machine> {
    let guest = cloud::guest(wish)?;
    let (mut guests, mut disks) = (vec![guest.described.clone()], Vec::new());
    Disk::add(&mut disks, &mut guests)?;
    let bundle = dom0("")?.described(guests.first().context("a guest")?);
    let arguments = disks.iter().enumerate().flat_map(|(number, disk)| disk.arguments(number)).collect();
    let limit = Duration::from_secs(300);
    let mut machine = Machine::boot(title, &Setup { memory: 1024, limit, arguments, ..Setup::new(bundle) })?;
    machine.expect(SHELL, BOOT)?;
    Ok(machine)
}

fn wish(image: &Path) -> Wish<'_> {
    Wish { image, name: "cloud", memory: 256, vcpus: 1, extra: "quiet=no", overlay: Some(64) }
}

/// The newest kernel of an image is booted, and finds the image's partitions and what it is told to be the root. The image,
/// which is qcow2, stays as it is; another one, raw and with a file system of its own for `/boot`, is written.
pub(crate) fn a_cloud_image_boots() -> Result<()> {
    let [kernel, ramdisk] = stock()?;
    let older: (&str, &[u8]) = ("boot/vmlinuz-6.1.0-9-amd64", b"an older kernel");
    let root = file_system(
        &[
            ("etc/os-release", b"ID=stand-in\n"),
            ("boot/vmlinuz-6.1.0-50-amd64", &kernel),
            ("boot/initrd.img-6.1.0-50-amd64", &ramdisk),
            ("boot/vmlinuz-6.1.0-51-amd64.dpkg-new", b"half a kernel"),
            older,
        ],
        SIZE,
    )?;
    let folder = tempfile::tempdir()?;
    let [one, two] = ["one.qcow2", "two.img"].map(|name| folder.path().join(name));
    let image = qcow2(&gpt::disk(&[esp(), root]).0);
    fs::write(&one, &image)?;
    let mut machine = boot("a_cloud_image_boots", &wish(&one))?;
    // Our ramdisk has mounted the root, and found no system there.
    let words = value(&mut machine, "cat /proc/cmdline", SOON)?;
    ensure!(words == "console=hvc0 root=/dev/xvda2 ro quiet=no", "{words}");
    let found = shell(&mut machine, "mount -o remount,rw /mnt; cat /mnt/etc/os-release; echo x > /mnt/x", SOON)?;
    ensure!(found.contains("ID=stand-in"), "{found}");
    machine.type_line("sync; poweroff -f")?;
    machine.finish()?.require_success()?;
    ensure!(fs::read(&one)? == image, "the guest has written the image");
    // The kernel's file system and the root are two.
    let boot_system =
        file_system(&[("vmlinuz-6.1.0-50-amd64", &kernel), ("initramfs-6.1.0-50-amd64.img", &ramdisk)], SIZE)?;
    let root = file_system(&[("etc/os-release", b"ID=stand-in\n"), older], 16 << 20)?;
    let (image, places) = gpt::disk(&[boot_system, root]);
    fs::write(&two, &image)?;
    let mut machine = boot("a_cloud_image_boots_and_is_written", &Wish { overlay: None, ..wish(&two) })?;
    let words = value(&mut machine, "cat /proc/cmdline", SOON)?;
    ensure!(words.contains("root=/dev/xvda2 "), "{words}");
    shell(&mut machine, "mount -o remount,rw /mnt && echo written-here > /mnt/x && umount /mnt", SOON)?;
    machine.type_line("poweroff -f")?;
    machine.finish()?.require_success()?;
    let (after, word) = (fs::read(&two)?, b"written-here");
    let root = after.get(places[1].clone()).context("the image has shrunk")?;
    ensure!(root.windows(word.len()).any(|bytes| bytes == word), "the image has not been written");
    Ok(())
}

/// Images and seeds that are bad are refused in one line before anything starts, and nothing is left behind.
pub(crate) fn bad_images_and_seeds_are_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name);
    let [kernel, _] = stock()?;
    let with = |files: &[(&str, &[u8])]| file_system(files, 32 << 20);
    let good = with(&[("etc/os-release", b""), ("boot/vmlinuz-6.1.0-50-amd64", &kernel)])?;
    let disk = gpt::disk(&[esp(), good.clone()]).0;
    let packed = qcow2(&disk);
    let mut backed = packed.clone();
    backed[8..16].copy_from_slice(&512_u64.to_be_bytes());
    let alone = with(&[("vmlinuz-6.1.0-50-amd64", &kernel)])?;
    let files: &[(&str, &[u8], &str)] = &[
        (
            "cut.img",
            &disk[..disk.len() - (8 << 20)],
            "both copies of the partition table are damaged: is the file complete?",
        ),
        ("cut-system.img", &good[..good.len() - (8 << 20)], "and its file system 33554432: it is cut off"),
        ("odd.img", &disk[..disk.len() - 100], "bytes; a raw disk is whole sectors"),
        ("cut.qcow2", &packed[..packed.len() / 2], "is cut off"),
        ("short.qcow2", &packed[..40], "cut off"),
        ("backed.qcow2", &backed, "is the difference to another file, its backing file"),
        ("empty.img", &[0; 1 << 20], "the disk has no partition table, and is no ext4 file system"),
        ("esp.img", &gpt::disk(&[esp()]).0, "has no ext4 file system"),
        ("none.img", &gpt::disk(&[with(&[("etc/os-release", b"")])?]).0, "has no kernel /boot/vmlinuz-VERSION"),
        ("bad.img", &with(&[("boot/vmlinuz-9", b"no kernel")])?, "the kernel vmlinuz-9: "),
        ("alone.img", &gpt::disk(&[alone]).0, "the root is on no ext4 file system: say which with --extra root="),
    ];
    for (name, content, _) in files {
        fs::write(path(name), content)?;
    }
    let key: PathBuf = path("key");
    for (name, text) in [
        ("key", "-----BEGIN OPENSSH PRIVATE KEY-----\nb3Bl\n"),
        ("script", "#!/bin/sh\n"),
        ("broken.yaml", "#cloud-config\nusers: [\n"),
        ("wrong.yaml", "#cloud-config\nusers: 3\n"),
    ] {
        fs::write(path(name), text)?;
    }
    let before = entries(folder.path())?;
    let temporary = tempfile::tempdir()?;
    let refused = |arguments: &[&str], why: &str, status: i32| -> Result<()> {
        let (ended, out, err) = xtask_with(arguments, &[("TMPDIR", temporary.path())])?;
        ensure!(
            ended == status && out.is_empty() && err.contains(why),
            "not refused with {why:?}: {ended}\n{out}\n{err}"
        );
        ensure!(err.lines().filter(|line| line.starts_with("error: ")).count() == 1, "not one line:\n{err}");
        Ok(())
    };
    let cloud = |image: &Path, more: &[&str], why: &str, status: i32| {
        refused(&[&["run", "--cloud", &image.to_string_lossy()], more].concat(), why, status)
    };
    for (name, _, why) in files {
        cloud(&path(name), &[], why, 1)?;
    }
    cloud(&path("missing"), &[], "missing: no such file", 1)?;
    let debian = |option: &str, file: &str, why: &str, status: i32| {
        let file = if option == "--hostname" { file.to_owned() } else { path(file).to_string_lossy().into_owned() };
        refused(&["run", "--guest", "debian", option, &file], why, status)
    };
    debian("--ssh-key", "key", "key: is a private key, which must not leave this machine", 1)?;
    debian("--ssh-key", "missing", "missing: no such file", 1)?;
    debian("--user-data", "script", "script:1: the first line must be #cloud-config", 1)?;
    debian("--user-data", "broken.yaml", "broken.yaml:3: no YAML: ", 1)?;
    debian("--user-data", "wrong.yaml", "wrong.yaml:2: users: must be a list", 1)?;
    debian("--hostname", "a_b", "is no name of a host", 2)?;
    ensure!(key.is_file() && entries(folder.path())? == before, "something was left behind beside the images");
    ensure!(entries(temporary.path())?.is_empty(), "something was left behind: {:?}", entries(temporary.path())?);
    Ok(())
}

/// The names of what is in a folder, and the sizes.
fn entries(folder: &Path) -> Result<Vec<(PathBuf, u64)>> {
    let entry = |entry: std::io::Result<fs::DirEntry>| -> Result<_> {
        let entry = entry?;
        Ok((entry.path(), entry.metadata()?.len()))
    };
    let mut entries = fs::read_dir(folder)?.map(entry).collect::<Result<Vec<_>>>()?;
    entries.sort();
    Ok(entries)
}
