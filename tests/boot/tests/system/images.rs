//! Images made by `cargo xtask image`, booted by GRUB under either firmware.

use crate::run::xtask;
use crate::stories::{BOOT, SHELL, SOON, answers, dom0, image};
use anyhow::{Context, Result, ensure};
use boot::Machine;
use boot::answers::{LEAVE, number};
use std::fs;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;
use xtask::bundle::Bundle;
use xtask::grub::{Menu, Tools};
use xtask::machine::Medium;

/// How long firmware and GRUB may take until the hypervisor speaks, while another machine runs.
const FIRMWARE: Duration = Duration::from_secs(60);

/// One image for all stories, as the tool makes it: a stock guest of 192 MiB.
fn iso() -> Result<PathBuf> {
    static MADE: Mutex<Option<PathBuf>> = Mutex::new(None);
    let mut made = MADE.lock().ok().context("the image could not be made for another story")?;
    if let Some(iso) = &*made {
        return Ok(iso.clone());
    }
    let iso = boot::images()?.join("system.iso");
    let output = iso.to_string_lossy();
    let (status, out, err) =
        xtask(&["image", "iso", "--profile", boot::PROFILE, "--memory", "192M", "--output", &output])?;
    ensure!(status == 0 && out.starts_with(&*output), "no image:\n{out}\n{err}");
    Ok(made.insert(iso).clone())
}

/// From power-on to the end of the guest, through its shell and dom0's command line.
fn boots(name: &str, uefi: bool) -> Result<()> {
    let mut machine = Machine::boot_image(name, &iso()?, Medium::Cd, uefi, Duration::from_secs(240))?;
    machine.expect("[info] Tenon", FIRMWARE)?;
    machine.expect("tenon-guest: init reached", BOOT)?;
    machine.expect(SHELL, SOON)?;
    answers(&mut machine)?;
    machine.expect(SHELL, SOON)?;
    // The firmware's memory map has holes; what lies between them is found all the same.
    let total = number(&machine.ask("info")?, "total_mib")?;
    ensure!((960..=1024).contains(&total), "the hypervisor found {total} MiB of 1024");
    machine.type_line("console linux")?;
    machine.expect("[console of linux", SOON)?;
    machine.type_line("poweroff -f")?;
    machine.expect("guest linux (domain 8) powered off", SOON)?;
    machine.finish()?.require_success()
}

/// The oldest way a PC starts.
pub(crate) fn a_cd_boots_with_bios() -> Result<()> {
    boots("a_cd_boots_with_bios", false)
}

/// UEFI hands over another memory map, its own ACPI pointer, and modules wherever it had room.
pub(crate) fn a_cd_boots_with_uefi() -> Result<()> {
    boots("a_cd_boots_with_uefi", true)
}

/// The same file on a disk.
pub(crate) fn a_stick_boots_with_either_firmware() -> Result<()> {
    for uefi in [false, true] {
        let name = "a_stick_boots_with_either_firmware";
        let mut machine = Machine::boot_image(name, &iso()?, Medium::Disk, uefi, Duration::from_secs(120))?;
        machine.expect("Tenon dom0", FIRMWARE)?;
        machine.expect("[console of linux", SOON)?;
        machine.type_keys(LEAVE)?;
        machine.type_line("destroy linux")?;
        machine.expect("all guests have ended", SOON)?;
        machine.finish()?.require_success()?;
    }
    Ok(())
}

/// What cannot become an image is refused in one line, before anything is built, and nothing is written.
pub(crate) fn what_is_no_image_is_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let kernel = image("hello")?;
    let hello = kernel.to_string_lossy();
    fs::write(path("big.toml"), format!("name = 'big'\nkernel = '{hello}'\nmemory = 2000\n"))?;
    fs::write(path("disky.toml"), format!("name = 'd'\nkernel = '{hello}'\nmemory = 16\ndisk = ['x']\n"))?;
    fs::write(path("filed.toml"), format!("name = 'f'\nkernel = '{hello}'\nmemory = 16\ndisk = ['big.img,,xvda']\n"))?;
    fs::write(path("big.img"), [0; 512])?;
    let filed = path("filed.toml");
    let (big, disky, output) = (path("big.toml"), path("disky.toml"), path("out.iso"));
    for (arguments, why) in [
        (&["qcow", "--output", &output][..], "no form \"qcow\" of image; there are: iso, debian"),
        (&["iso", "--output", &output, &big], "big.toml:3: memory: 2000 MiB for big, but only"),
        (&["iso", "--output", &output, &disky], "disky.toml:4: disk: disk 1: `vdev` is missing"),
        (
            &["iso", "--output", &output, &filed],
            "big.img stays on this machine: in an image, a disk is `serial:NUMBER`",
        ),
        (&["iso", "--output", &output, "--kernel", &big], "unusable kernel "),
        (&["iso", "--output", &output, "--ramdisk", "missing.cpio"], "no ramdisk missing.cpio"),
        (&["iso", "--output", &output, "--", "log=debug;reboot"], "GRUB cannot pass on the hypervisor option"),
        (&["iso", "--output", &path("no/out.iso")], "no folder for "),
        (&["iso", "--output", &path("")], "is a folder"),
    ] {
        let (status, out, err) = xtask(&[&["image"], arguments].concat())?;
        ensure!(status != 0 && out.is_empty() && err.contains(why), "not refused with {why:?}:\n{out}\n{err}");
        ensure!(err.lines().filter(|line| line.starts_with("error: ")).count() == 1, "not one line:\n{err}");
    }
    ensure!(fs::read_dir(folder.path())?.count() == 4, "something was left behind");
    Ok(())
}

/// The exit statuses when dom0 fails or the hypervisor panics. No image that the tool makes has such a dom0: one has a
/// word on its command line that there is not, and in place of the other is a kernel that dies of a fault. The hypervisor
/// cannot boot with a command line longer than 4096 bytes.
pub(crate) fn the_exit_status_says_who_failed() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let iso = folder.path().join("fails.iso");
    let fails = |bundle: Bundle, option: &str, wanted: i32, said: &str, why: &str| -> Result<()> {
        let menu = Menu::new(&[option.to_owned()])?;
        let tools = Tools::find(&boot::shell()?)?;
        tools.iso(&image("hypervisor")?, bundle.write()?.path(), &menu, &iso)?;
        let (status, out, err) = xtask(&["run", "--iso", &iso.to_string_lossy(), "--timeout", "100"])?;
        ensure!(status == wanted && out.contains(said), "{status}, not {wanted} with {said:?}\n{out}\n{err}");
        ensure!(err.contains(why), "{err}");
        Ok(())
    };
    let crash = image("crash")?;
    let (first, us) = ("error: the first domain crashed: see the console above", "error: the hypervisor panicked");
    fails(dom0("frobnicate=1")?, "log=info", 20, "error: unknown word on dom0's command line", first)?;
    let dies = Bundle::dom0(&crash, "how=no-handler");
    fails(dies.clone(), "log=info", 20, "d0v0 crashed: no handler for exception 6", first)?;
    let long = format!("log={}", "x".repeat(4096));
    fails(dies, &long, 21, "panic: cannot boot: the command line is longer than 4096 bytes", us)
}
