//! Stories of guests' disks: file systems on them, and what becomes of both when a disk fails.

use crate::stories::{BOOT, SHELL, SOON, dom0, nonce};
use anyhow::{Context, Result, ensure};
use boot::gpt;
use boot::nbd::{Command, Server};
use boot::{Machine, Setup, answers::LEAVE};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};
use xtask::ext4::Tools;
use xtask::guest_file::{self, Described};

/// How long a guest may take for some megabytes while another guest does the same.
const WORK: Duration = Duration::from_secs(60);
/// Bytes of a file system.
const SIZE: usize = 24 << 20;

/// A stock guest with our initramfs and these disks.
pub(crate) fn with_disks(folder: &Path, name: &str, kernel: &str, disks: &[&str]) -> Result<Described> {
    let file = folder.join(format!("{name}.toml"));
    let text =
        format!("name = '{name}'\nkernel = '{kernel}'\nextra = 'console=hvc0'\nmemory = 192\ndisk = {disks:?}\n");
    fs::write(&file, text)?;
    guest_file::read(&boot::shell()?, &[file])?.pop().context("a file is a guest")
}

/// Boots a machine of a GiB with these disks, known by their serial numbers.
pub(crate) fn start(title: &str, guests: &[&Described], disks: &[(&str, &Server)]) -> Result<Machine> {
    let bundle = guests.iter().try_fold(dom0("")?, |bundle, guest| Ok::<_, anyhow::Error>(bundle.described(guest)))?;
    let mut setup = Setup::new(bundle);
    setup.memory = 1024;
    setup.limit = Duration::from_secs(300);
    setup.arguments = disks.iter().flat_map(|(serial, server)| server.arguments(serial)).collect();
    Machine::boot(title, &setup)
}

/// Types commands at the shell of a guest, and returns what they print. All must succeed.
///
/// What is typed is echoed, so the words that tell success from failure are put together by the guest.
pub(crate) fn shell(machine: &mut Machine, commands: &str, within: Duration) -> Result<String> {
    machine.type_line(&format!("( {commands} ) && echo all\"f\"ine || echo not\"f\"ine"))?;
    let output = machine.expect("fine\r\n", within).with_context(|| format!("no end of {commands:?}"))?;
    ensure!(output.ends_with("allfine\r\n"), "{commands:?} failed:\n{output}");
    machine.expect(SHELL, SOON)?;
    Ok(output)
}

/// An empty ext4 file system.
fn file_system(tools: &Tools, folder: &Path) -> Result<Vec<u8>> {
    let image = folder.join("empty.img");
    fs::write(&image, vec![0; SIZE])?;
    tools.make(&image)?;
    Ok(fs::read(image)?)
}

/// An error unless these bytes are a sound file system that knows the word.
fn require_sound(tools: &Tools, folder: &Path, bytes: &[u8], word: &str) -> Result<()> {
    let image = folder.join("used.img");
    fs::write(&image, bytes)?;
    tools.check(&image)?;
    ensure!(bytes.windows(word.len()).any(|window| window == word.as_bytes()), "no {word} on the disk");
    Ok(())
}

/// Leads to the shell of a guest.
fn console(machine: &mut Machine, name: &str) -> Result<()> {
    machine.type_keys(LEAVE)?;
    machine.expect("dom0> ", SOON)?;
    machine.type_line(&format!("console {name}"))?;
    machine.expect(&format!("[console of {name}"), SOON)?;
    machine.type_line("")?;
    machine.expect(SHELL, BOOT)?;
    Ok(())
}

/// Two stock kernels mount a partition each: one finds it on the disk, the other has it alone. Both write a tree, read the
/// tree back, discard what they removed, and leave file systems that outlive a power cut. A disk that is only read stays as
/// it is.
pub(crate) fn stock_kernels_keep_file_systems() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let tools = Tools::find(&boot::shell()?)?;
    let empty = file_system(&tools, folder.path())?;
    let (whole, places) = gpt::disk(std::slice::from_ref(&empty));
    let (shared, parts) = gpt::disk(&[vec![0; 1 << 20], empty]);
    let (alpha, beta, fixed) = (Server::new(whole)?, Server::new(shared)?, Server::read_only(vec![0x5a; 1 << 20])?);
    let guests = [
        with_disks(folder.path(), "alpha", "6.1", &["serial:alpha,,xvda,w", "serial:fixed,,xvdb,r"])?,
        with_disks(folder.path(), "beta", "6.12", &["serial:beta,,xvda,w,part=2"])?,
    ];
    let disks = [("alpha", &alpha), ("beta", &beta), ("fixed", &fixed)];
    let mut machine = start("stock_kernels_keep_file_systems", &[&guests[0], &guests[1]], &disks)?;
    machine.expect(SHELL, BOOT)?;
    let mut words = Vec::new();
    for (name, device) in [("alpha", "xvda1"), ("beta", "xvda")] {
        console(&mut machine, name)?;
        let word = nonce()?;
        shell(&mut machine, &format!("mkdir /mnt && mount -t ext4 /dev/{device} /mnt && cp -a /lib /mnt/tree"), WORK)?;
        shell(
            &mut machine,
            &format!("echo {word} > /mnt/word && cp -a /mnt/tree /mnt/other && rm -r /mnt/other"),
            WORK,
        )?;
        shell(&mut machine, "sync && echo 3 > /proc/sys/vm/drop_caches", WORK)?;
        shell(&mut machine, "cd /lib && find . -type f | while read f; do cmp $f /mnt/tree/$f || exit 1; done", WORK)?;
        shell(&mut machine, "fstrim /mnt && umount /mnt", WORK)?;
        words.push(word);
    }
    console(&mut machine, "alpha")?;
    shell(&mut machine, "dd if=/dev/xvdb bs=64k | tr -d Z | wc -c | grep -x 0", WORK)?;
    shell(&mut machine, "! dd if=/dev/zero of=/dev/xvdb bs=4096 count=1 conv=fsync", WORK)?;
    for name in ["alpha", "beta"] {
        machine.type_keys(LEAVE)?;
        machine.expect("dom0> ", SOON)?;
        machine.type_line(&format!("shutdown -w {name}"))?;
        machine.expect(&format!("guest {name} "), SOON)?;
    }
    machine.finish()?.require_success()?;
    ensure!(fixed.counts().writes == 0 && fixed.content().iter().all(|byte| *byte == 0x5a), "{fixed:?}");
    for (server, place, word) in [(alpha, &places[0], &words[0]), (beta, &parts[1], &words[1])] {
        let counts = server.counts();
        ensure!(counts.discarded > 1 << 20 && counts.flushes > 0, "{counts:?}");
        let disk = server.power_cut(1);
        require_sound(&tools, folder.path(), &disk[place.clone()], word)?;
    }
    Ok(())
}

/// A disk that does not answer for 40 seconds does not fail; a request that fails once fails once; a flush that fails is told
/// to all that have written; a disk that is gone takes nothing along.
pub(crate) fn disks_that_fail_are_borne() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let tools = Tools::find(&boot::shell()?)?;
    let late = Server::new(file_system(&tools, folder.path())?)?;
    let (halves, _) = gpt::disk(&[vec![0; 1 << 20], vec![0; 1 << 20]]);
    let (bad, gone) = (Server::new(halves)?, Server::new(vec![0; 1 << 20])?);
    let wanted =
        ["serial:late,,xvda,w", "serial:bad,,xvdb,w,part=1", "serial:bad,,xvdc,w,part=2", "serial:gone,,xvdd,w"];
    let guest = with_disks(folder.path(), "linux", "6.1", &wanted)?;
    let disks = [("late", &late), ("bad", &bad), ("gone", &gone)];
    let mut machine = start("disks_that_fail_are_borne", &[&guest], &disks)?;
    machine.expect(SHELL, BOOT)?;
    let word = nonce()?;
    shell(&mut machine, "mkdir /mnt && mount -t ext4 /dev/xvda /mnt", SOON)?;
    late.withhold();
    let begun = Instant::now();
    machine.type_line(&format!("(echo {word} > /mnt/word; sync && echo late\"\"good > late) &"))?;
    machine.expect(SHELL, SOON)?;

    shell(&mut machine, "dd if=/dev/xvdb of=/dev/null bs=4096 count=1 iflag=direct", SOON)?;
    bad.fail(Command::Read, 1);
    shell(&mut machine, "! dd if=/dev/xvdb of=/dev/null bs=4096 count=1 iflag=direct", SOON)?;
    shell(&mut machine, "dd if=/dev/xvdb of=/dev/null bs=4096 count=1 iflag=direct", SOON)?;

    let write = |device: &str| format!("dd if=/init of=/dev/{device} bs=512 count=1");
    shell(&mut machine, &format!("{} oflag=direct && {} oflag=direct", write("xvdb"), write("xvdc")), SOON)?;
    bad.fail(Command::Flush, 1);
    for device in ["xvdb", "xvdc"] {
        shell(&mut machine, &format!("! {} conv=fsync", write(device)), SOON)?;
    }
    // The kernel flushes no more after that, so each write must be flushed for it.
    for device in ["xvdb", "xvdc"] {
        let before = bad.counts().flushes;
        shell(&mut machine, &format!("{} oflag=direct", write(device)), SOON)?;
        ensure!(bad.counts().flushes > before, "{device} wrote, and nothing was flushed: {bad:?}");
    }
    ensure!(bad.counts().failed == 2, "{bad:?}");

    gone.cut();
    shell(&mut machine, "! dd if=/dev/xvdd of=/dev/null bs=4096 count=1 iflag=direct", SOON)?;
    shell(&mut machine, "! dd if=/init of=/dev/xvdd bs=512 count=1 conv=fsync", SOON)?;

    std::thread::sleep(Duration::from_secs(40).saturating_sub(begun.elapsed()));
    ensure!(late.waiting() > 0, "nothing waited: {late:?}");
    shell(&mut machine, "! cat late", SOON)?;
    late.release();
    shell(&mut machine, "while [ ! -f late ]; do usleep 100000; done; grep lategood late", SOON)?;
    shell(&mut machine, "dmesg | grep 'error, dev xvdd'", SOON)?;
    shell(&mut machine, "! dmesg | grep -E 'error, dev xvda|EXT4-fs.* error' && umount /mnt", SOON)?;
    machine.type_line("poweroff -f")?;
    let outcome = machine.finish()?;
    outcome.require_success()?;
    outcome.require_line("the disk late has not answered for 30 s")?;
    outcome.require_line("the disk late answers again")?;
    require_sound(&tools, folder.path(), &late.power_cut(1), &word)
}
